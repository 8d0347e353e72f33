"""What the benchmarks share, and `end_to_end` on the smallest net."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch import nn

import cet
from benchmarks import harness
from benchmarks.end_to_end import SCENARIOS, Measure, Point, Reference, choose_policy, main, set_up
from benchmarks.harness import Case, Row, Spread, Timings, WrongResultError, check_close, measure
from benchmarks.models import Net

ROOT = Path(harness.__file__).parents[1]
DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


def case_of(**providers: Callable[[], Any]) -> Case:
    return Case((), providers, check=lambda results: None)


def test_a_red_check_prevents_timing() -> None:
    timed = []

    def timer(call: Callable[[], Any], repeats: int) -> float:
        timed.append(call())
        return 1.0

    def check(results: Any) -> None:
        for name, result in results.items():
            check_close(name, torch.tensor([float(result == "right")]), torch.ones(1))

    case = Case((), {"right": lambda: "right", "wrong": lambda: "wrong"}, check)
    with pytest.raises(WrongResultError, match="wrong differs"):
        measure(case, timer, seconds=1e-6)
    assert timed == []
    measure(case.without(["wrong"]), timer, seconds=1e-6)
    assert set(timed) == {"right"}


@pytest.mark.parametrize("wrong", [[1.0, 2.001], [1.0, float("nan")], [1.0, float("inf")], [1.0]])
def test_wrong_results_are_refused(wrong: list[float]) -> None:
    want = torch.tensor([1.0, 2.0])
    check_close("p", want + 1e-4, want)
    with pytest.raises(WrongResultError, match="p "):
        check_close("p", torch.tensor(wrong), want)


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    rows = [({"net": "n"}, Row.of("predict", "s", Spread(0.123456789, 0.1, 0.2), 7)), ({"net": "n"}, Row("x", "s"))]
    origin = harness.provenance(torch.device("cpu"), "speed")
    harness.write_results(tmp_path, "speed", rows, origin, Figure())
    first, missing = csv.DictReader((tmp_path / "speed.csv").read_text().splitlines())
    assert (first["median"], first["rounds"], first["torch"]) == ("0.12346", "7", torch.__version__)
    assert (missing["median"], missing["note"]) == ("", "")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        harness.write_results(tmp_path, "speed", rows[:1], {**origin, "bad": object()}, Figure())
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    rows=st.integers(1, 70),
    fractions=st.lists(st.sampled_from([None, 0.0, 0.3, 0.5, 1.0]), min_size=1, max_size=4).map(tuple),
    seed=st.integers(0, 2**31),
)
def test_thresholds_make_just_these_fractions_leave(rows: int, fractions: tuple[float | None, ...], seed: int) -> None:
    scores = torch.rand(len(fractions) + 1, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    policy, exit_index = choose_policy(scores, fractions)
    left = rows
    for k, (fraction, threshold) in enumerate(zip(fractions, policy.thresholds, strict=True)):
        leaving = int((fraction or 0.0) * left)
        here = exit_index >= k
        passes = scores[k] <= (-torch.inf if threshold is None else threshold)
        assert int((passes & here).sum()) == int((exit_index == k).sum()) == leaving
        left -= leaving
    assert int((exit_index == len(fractions)).sum()) == left


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.d = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.d(self.c(self.b(self.a(x)).relu()).relu())


@pytest.mark.parametrize("scenario", SCENARIOS)
@torch.no_grad()
def test_the_check_of_end_to_end_finds_wrong_answers(scenario: str) -> None:
    net = TinyNet().eval()
    stages = (net.a, net.b, lambda h: net.c(h.relu()), lambda h: net.d(h.relu()))
    tiny = Net(net, dict.fromkeys("abc"), (4,), stages)
    x = torch.randn(16, 4)
    model = cet.EarlyExit(net, tiny.exits, (x,)).eval()
    case, exit_index = set_up(tiny, model, x, Reference.of(model, x), SCENARIOS[scenario], net)
    results = {name: provider(x) for name, provider in case.providers.items()}
    case.check(results)
    logits, taken, score = (getattr(results["predict"], name).clone() for name in ("logits", "exit_index", "score"))
    logits[3, 1] += 0.1
    with pytest.raises(WrongResultError, match="predict differs"):
        case.check({**results, "predict": cet.ExitOutput(logits, exit_index, score)})
    taken[2] += 1
    with pytest.raises(WrongResultError, match="predict sends 1 of 16 rows"):
        case.check({**results, "predict": cet.ExitOutput(results["predict"].logits, taken, score)})
    for name in ("forward", "backbone", "compiled"):
        with pytest.raises(WrongResultError, match=f"{name} differs"):
            case.check({**results, name: results[name] + 0.1})
    with pytest.raises(WrongResultError, match="boolean_mask differs"):
        case.check({**results, "boolean_mask": (logits, exit_index)})


def test_measures_are_judged_by_their_worst_point() -> None:
    def point(batch: int, ratio: float, scenario: str = "closed") -> Point:
        seconds = {"predict": np.full(3, ratio), "backbone": np.ones(3)}
        return Point("net", batch, scenario, timings=Timings(seconds))

    measure_ = Measure("backbone", 1.05, ("net",), ("closed",), (1, 2, 4))
    points = [point(1, 1.04), point(2, 1.01), point(8, 2.0), point(1, 2.0, "all_at_first"), Point("net", 4, "closed")]
    verdict = measure_.judge(points)
    assert (verdict["met"], verdict["worst_at"], verdict["batches"]) == (True, ("net", 1, "closed"), [1, 2])
    assert verdict["worst"] == pytest.approx(1.04)
    assert measure_.judge([*points, point(4, 1.06)])["met"] is False
    assert measure_.judge([])["met"] is None


def test_quick_run(tmp_path: Path) -> None:
    """The script as users run it; the last batch is too large for the time it is given."""
    options = "--quick --models sensor_cnn --batches 1,4,65536 --longest-call 0.2 --threads 1"
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.end_to_end", *options.split(), "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "predict/ideal" in run.stdout
    rows = list(csv.DictReader((tmp_path / "end_to_end.csv").read_text().splitlines()))
    times = {(r["batch"], r["scenario"], r["quantity"]): r for r in rows}
    for batch in ("1", "4"):
        for scenario in SCENARIOS:
            for provider in ("predict", "forward", "backbone", "ideal", "boolean_mask"):
                row = times[batch, scenario, provider]
                assert 0 < float(row["p20"]) <= float(row["median"]) <= float(row["p80"])
            assert sum(map(int, times[batch, scenario, "predict"]["leaving"].split("+"))) == int(batch)
            assert float(times[batch, scenario, "predict/ideal"]["median"]) > 0
    assert times["4", "half_at_each", "predict"]["leaving"] == "2+1+0+1"
    assert times["1", "closed", "compiled"]["note"] == "not asked for; give --compile"
    left_out = times["65536", "all", "predict"]
    assert left_out["median"] == ""
    assert left_out["note"].startswith("not run: one pass of the backbone would take")
    description = json.loads((tmp_path / "end_to_end.json").read_text())
    assert description["threads"] == 1
    assert description["command"] == f"python -m benchmarks.end_to_end {options}"
    assert [verdict["met"] is None for verdict in description["measures"]] == [True, True, False]
    assert (tmp_path / "end_to_end.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--models", "sensor_cnn,bert"], "'bert' is not one of"),
        (["--batches", "1,0"], "0 is not in the range x>=1"),
        (["--batches", "1,x"], "'x' is not a valid integer"),
        (["--seconds", "0"], "0.0 is not in the range x>0"),
        (["--output", "/dev/null/results"], "cannot be written"),
    ],
)
def test_bad_options_are_refused_before_anything_runs(options: list[str], message: str) -> None:
    result = CliRunner().invoke(main, options)
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("output", [["--output", "some/folder"], ["--output=some/folder"], []])
def test_results_tell_the_command_but_not_where_it_wrote(output: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["compact.py", *output, "--threads", "2"])
    described = harness.provenance(torch.device("cpu"), "compact")
    assert described["command"] == "python -m benchmarks.compact --threads 2"
