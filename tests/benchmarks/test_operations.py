"""The loop over the points of an operation: what fails is told, and takes nothing else with it."""

from __future__ import annotations

import csv
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

import cet
from benchmarks import compact, consistent_exit_loss, end_to_end, exit_gate, gpu
from benchmarks.harness import Case, WrongResultError
from benchmarks.operations import Benchmark, Measured, Point


def benchmark(set_up: Callable[[Point], Case]) -> Benchmark:
    def verdicts(measured: Measured) -> dict[str, Any]:
        return {"points": len(measured)}

    return Benchmark("some", [{"n": n} for n in range(3)], set_up, [("slow", "cet")], verdicts)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "some.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_point_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    def set_up(point: Point) -> Case:
        def check(results: Any) -> None:
            if point["n"] == 0:
                raise WrongResultError("cet gives 1")
            if point["n"] == 1:
                raise RuntimeError("ptxas failed\nwith code 255")

        return Case((), {"cet": lambda: None, "slow": lambda: None}, check)

    run = CliRunner().invoke(benchmark(set_up).command(), ["--quick", "--output", str(tmp_path)])
    assert run.exit_code == 1
    assert "some points failed and were not timed" in run.output
    first, second, *measured = rows_of(tmp_path)
    assert first["note"] == "not timed: cet gives 1"
    assert second["note"] == "not timed: RuntimeError: ptxas failed with code 255"
    assert [(row["n"], row["quantity"]) for row in measured] == [("2", "cet"), ("2", "slow"), ("2", "slow/cet")]
    assert json.loads((tmp_path / "some.json").read_text())["measures"] == {"points": 1}


def test_a_run_that_is_killed_keeps_what_it_measured(tmp_path: Path) -> None:
    def set_up(point: Point) -> Case:
        if point["n"] == 2:
            raise KeyboardInterrupt
        return Case((), {"cet": lambda: None, "slow": lambda: None}, lambda results: None)

    run = CliRunner().invoke(benchmark(set_up).command(), ["--quick", "--output", str(tmp_path)])
    assert run.exit_code != 0
    assert [row["n"] for row in rows_of(tmp_path)] == ["0"] * 3 + ["1"] * 3
    assert json.loads((tmp_path / "some.json").read_text())["measures"] == {"points": 2}
    assert not (tmp_path / "some.png").exists()


def test_where_every_point_fails_there_are_results_all_the_same(tmp_path: Path) -> None:
    def set_up(point: Point) -> Case:
        raise RuntimeError("no")

    run = CliRunner().invoke(benchmark(set_up).command(), ["--quick", "--output", str(tmp_path)])
    assert run.exit_code == 1
    assert {row["note"] for row in rows_of(tmp_path)} == {"not timed: RuntimeError: no"}


@pytest.mark.parametrize("module", [compact, consistent_exit_loss, exit_gate])
def test_nothing_measured_has_no_verdict(module: Any) -> None:
    assert not any(module.verdicts([]).values())


def test_a_batch_that_fails_is_noted_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = end_to_end.Reference.of

    def of(model: cet.EarlyExit, x: torch.Tensor) -> end_to_end.Reference:
        if len(x) == 1:
            raise torch.OutOfMemoryError("tried to allocate")
        return real(model, x)

    monkeypatch.setattr(end_to_end.Reference, "of", of)
    run = CliRunner().invoke(end_to_end.main, ["--quick", "--models", "sensor_cnn", "--output", str(tmp_path)])
    assert run.exit_code == 1
    rows = list(csv.DictReader((tmp_path / "end_to_end.csv").open(newline="")))
    assert [row["note"] for row in rows if row["batch"] == "1"] == ["not timed: OutOfMemoryError: tried to allocate"]
    assert {row["scenario"] for row in rows if row["batch"] == "4" and row["median"]} == {*end_to_end.SCENARIOS}


def test_the_check_of_the_exit_gate_leaves_the_weights_where_graphs_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = []

    class Noted(cet.ExitHead):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            heads.append(self)

    monkeypatch.setattr(cet, "ExitHead", Noted)
    with torch.inference_mode():
        case = exit_gate.set_up({**exit_gate.POINTS[0], "rows": 8})
        parameters = [*heads[0].parameters()]
        before = [(parameter.data_ptr(), parameter.dtype, parameter.clone()) for parameter in parameters]
        results = {name: case.providers[name](*case.inputs) for name in ("cet", "eager", "copy")}
        case.check(results)
        for parameter, (address, dtype, value) in zip(heads[0].parameters(), before, strict=True):
            assert (parameter.data_ptr(), parameter.dtype) == (address, dtype)
            assert torch.equal(parameter, value)
        with pytest.raises(WrongResultError, match="eager differs"):
            case.check({"eager": (results["eager"][0] + 1, *results["eager"][1:])})


class Noting(TorchDispatchMode):
    """Notes the operations that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """CUDA graphs that only note their replays."""
    replays: list[str] = []

    class Graph:
        def replay(self) -> None:
            replays.append("replay")

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    @contextmanager
    def entered(_: Any) -> Iterator[None]:
        yield

    fakes = {"CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream, "stream": entered, "graph": entered}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return replays


def test_a_graphed_call_is_timed_without_a_copy_of_its_inputs(graph: list[str]) -> None:
    x = torch.ones(3)
    seen = []

    def call(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.data_ptr())
        return x + 1

    replay = gpu.graphed(call, x)
    assert seen == [x.data_ptr()] * 2  # warmed up and captured on the very input
    with Noting() as noted:
        result = replay(x)
    assert graph == ["replay"]
    assert noted.names == []
    assert torch.equal(result, torch.full((3,), 2.0))


def test_what_a_graph_reads_is_not_freed_before_it(graph: list[str]) -> None:
    """Neither its inputs nor what the call holds: a graph knows addresses alone."""
    x, weight = torch.ones(3), torch.ones(3)
    held = [weakref.ref(x), weakref.ref(weight)]
    replay = gpu.graphed(partial(torch.add, weight), x)
    del x, weight
    gc.collect()
    replay()
    assert all(each() is not None for each in held)


def test_a_graph_for_new_inputs_copies_them(graph: list[str]) -> None:
    x = torch.ones(3)
    captured = []
    replay = gpu.graphed_with_copy(lambda x: captured.append(x) or x, x)
    with Noting() as noted:
        result = replay(torch.full((3,), 5.0))
    assert graph == ["replay"]
    assert [name for name in noted.names if "copy" in name] == ["aten.copy_.default"]
    assert torch.equal(result, torch.full((3,), 5.0))
    assert torch.equal(x, torch.ones(3))
    with pytest.raises(ValueError, match="argument"):
        replay()
