"""The host's side of CUDA graphs, with the CPU in the GPU's place: captures, counts, streams, and what goes wrong."""

from __future__ import annotations

import gc
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_runners import Net
from torch import Tensor, nn

import cet
from benchmarks import rehearsal
from benchmarks.rehearsal import cpu_as_gpu
from cet.ops.definitions import SCORE_NAMES
from cet.ops.exit_gate import triton
from cet.runtime import RunnerName, cuda_graphs
from cet.runtime.cuda_graphs import CudaGraphs
from cet.runtime.graph_backend import CaptureError
from oracle import answer_each_row_alone, assert_same_answers, policy_between_scores

CPU = torch.device("cpu")


class WithSwitch:
    has_switch = True
    runtime_version = 13000
    SwitchGraph = rehearsal.SwitchGraph

    def driver_version(self) -> int:
        return 13000


@pytest.fixture
def on_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda_graphs, "_streams", {})
    monkeypatch.setattr(cuda_graphs, "cuda_extension", WithSwitch)
    monkeypatch.setattr("cet.runtime.graphs.why_no_switch", lambda: None)
    monkeypatch.setattr("cet.model.early_exit.runner_for", lambda device, wanted: wanted)
    monkeypatch.setattr("cet.runtime.check_runner", lambda wanted: None)
    monkeypatch.setattr("cet.model.early_exit.check_runner", lambda wanted: None)
    with cpu_as_gpu():
        yield


def model_run_by(runner: RunnerName, backbone: nn.Module | None = None) -> cet.EarlyExit:
    model = cet.EarlyExit(backbone or Net(), ["stem", "block"], (torch.randn(2, 3, 16),)).eval()
    model.policy = policy_between_scores(model, {"x": torch.randn(8, 3, 16)}, "entropy", [0.5, 0.5])
    model.runner = runner
    return model


@pytest.mark.usefixtures("on_fake_gpu")
@pytest.mark.parametrize("runner", ["graphs", "device"])
@pytest.mark.parametrize("score", SCORE_NAMES)
def test_every_padded_program_is_captured_without_a_wait(runner: RunnerName, score: Any) -> None:
    """On the definitions, which the graphs hold where no kernel runs: each segment for each score, none eager."""
    model = model_run_by(runner)
    for rows in (8, 5, 1):
        x = {"x": torch.randn(rows, 3, 16)}
        model.policy = policy_between_scores(model, x, score, [0.4, 0.4], temperatures=(0.5, 1.0, 3.0))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = model.predict(**x)
        assert_same_answers(got, answer_each_row_alone(model, x, model.policy))
        assert (model.captures[0].runner, model.captures[0].eager) == (runner, ())


def noting(calls: list[str], function: Any) -> Any:
    def noted(*args: Any) -> Any:
        calls.append(function.__name__)
        return function(*args)

    return noted


@pytest.mark.usefixtures("triton_backend", "on_fake_gpu")  # which records what the other runs
@pytest.mark.parametrize("runner", ["graphs", "device"])
def test_graphs_hold_the_kernels_of_triton(runner: RunnerName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cet.ops.backend.why_no_triton", lambda device: None)
    ways: list[str] = []
    monkeypatch.setattr(triton, "padded_exit_step", noting(ways, triton.padded_exit_step))
    with cet.ops.use_backend(None):
        model = model_run_by(runner)
        for rows in (8, 3):
            x = {"x": torch.randn(rows, 3, 16)}
            assert_same_answers(model.predict(**x), answer_each_row_alone(model, x, model.policy))
    assert len(ways) == 2 * 4 * 2  # exits, buckets, the first run and the capture
    assert model.captures[0].runner == runner


class WithWave(Net):
    """Of what goes on past its exits a part is conjugated lazily: its memory holds other numbers than it."""

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.rfft(x.mean(1)).conj()
        return self.classifier(self.block(self.stem(x)).mean(2)) + z.imag[:, :4]


@pytest.mark.usefixtures("triton_backend", "on_fake_gpu")
@pytest.mark.parametrize("runner", ["graphs", "device"])
def test_what_is_conjugated_lazily_goes_on_as_what_it_is(runner: RunnerName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cet.ops.backend.why_no_triton", lambda device: None)
    ways: list[str] = []
    monkeypatch.setattr(triton, "padded_exit_step", noting(ways, triton.padded_exit_step))
    with cet.ops.use_backend(None):
        model = model_run_by(runner, WithWave())
        x = {"x": torch.randn(8, 3, 16)}
        assert_same_answers(model.predict(**x), answer_each_row_alone(model, x, model.policy))
    assert ways


@pytest.mark.usefixtures("on_fake_gpu")
def test_work_of_a_first_run_that_fails_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, waits = CudaGraphs(CPU, 1), list[object]()
    stream = graphs._streams.captures
    monkeypatch.setattr(type(stream), "synchronize", lambda self: waits.append(self))

    def fails() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        graphs.capture(fails)
    assert stream in waits


class CompilationError(Exception):
    __module__ = "triton.compiler.errors"


def fails(*_: Any) -> None:
    raise CompilationError("at 1:1\nno dtype")


@pytest.mark.usefixtures("triton_backend", "on_fake_gpu")
def test_what_triton_cannot_compile_is_told_and_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cet.ops.backend.why_no_triton", lambda device: None)
    monkeypatch.setattr(triton, "padded_exit_step", fails)
    model, x = model_run_by("graphs"), {"x": torch.randn(8, 3, 16)}
    with cet.ops.use_backend("triton"), pytest.raises(CompilationError):
        model.predict(**x)  # asked for by name
    with cet.ops.use_backend(None):
        with pytest.warns(UserWarning, match="Triton has no kernel for this model .*, so graphs hold PyTorch's"):
            got = model.predict(**x)
        assert_same_answers(got, answer_each_row_alone(model, x, model.policy))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.predict(**x)
    assert model.captures[0].runner == "graphs"


@pytest.mark.usefixtures("on_fake_gpu")
@pytest.mark.parametrize(
    "wait", [lambda x: x * float(x.max()), lambda x: x + torch.tensor(1.0), lambda x: x[x > 0].sum() + x]
)
def test_a_wait_would_be_found(wait: Any) -> None:
    x = torch.randn(4, 3)
    with pytest.raises(CaptureError, match="operation not permitted when stream is capturing"):
        CudaGraphs(CPU, 1).capture(lambda: wait(x))


@pytest.mark.usefixtures("on_fake_gpu")
def test_a_head_with_a_mask_and_one_of_ones_own_are_captured() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.amax(2)).tanh()

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            h = self.block(self.stem(x).relu())
            return self.out((h * attention_mask[:, :, None]).sum(1) / attention_mask.sum(1, keepdim=True))

    x, mask = torch.randn(6, 9, 3), (torch.arange(9) < torch.tensor([3, 9, 5, 1, 7, 2])[:, None]).float()
    example = {"x": x[:2], "attention_mask": mask[:2]}
    masked = cet.EarlyExit(Masked(), {"stem": cet.HeadSpec(layout="channels_last")}, example).eval()
    own = cet.EarlyExit(Net(), {"stem": Own()}, (torch.randn(2, 3, 16),)).eval()
    for model, inputs in ((masked, {"x": x, "attention_mask": mask}), (own, {"x": torch.randn(6, 3, 16)})):
        model.policy = policy_between_scores(model, inputs, "margin", [0.5])
        model.runner = "graphs"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = model.predict(**inputs)
        assert_same_answers(got, answer_each_row_alone(model, inputs, model.policy))
        assert model.captures[0].eager == ()


def sent_count(backend: CudaGraphs, source: Tensor) -> Any:
    def body() -> None:
        with backend.sending(0, source):
            pass

    graph = backend.capture(body)
    graph.instantiate()
    return graph


@pytest.mark.usefixtures("on_fake_gpu")
@pytest.mark.parametrize("is_broken", [False, True])
def test_a_count_of_an_earlier_replay_is_never_read(is_broken: bool) -> None:
    """Even if the event, on which the host waits, were still the one of the replay before, and the graph came late."""
    rehearsal.Stream.late = True
    backend, source = CudaGraphs(CPU, 1), torch.zeros((), dtype=torch.int32)
    graph = sent_count(backend, source)
    rehearsal.Event.broken = is_broken
    for count in (5, 5, 3, 0):
        source.fill_(count)
        with backend.in_order():
            graph.replay()
            assert backend.receive_count(0) == count


@pytest.mark.usefixtures("on_fake_gpu")
def test_a_count_that_never_comes_is_an_error() -> None:
    backend = CudaGraphs(CPU, 1)
    with pytest.raises(RuntimeError, match="the number of kept rows did not arrive"), backend.in_order():
        backend.receive_count(0)


@pytest.mark.usefixtures("on_fake_gpu")
def test_what_follows_an_error_waits_for_what_was_under_way() -> None:
    rehearsal.Stream.late = True
    backend, done = CudaGraphs(CPU, 1), []

    def fails() -> None:
        with backend.in_order():
            torch.cuda.current_stream().launch(lambda: done.append(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert done == [1]


@pytest.mark.usefixtures("on_fake_gpu")
def test_work_that_draws_is_not_frozen_into_one_graph() -> None:
    """PyTorch tells a graph that it replays where the generator is; one that is linked would draw the same again."""
    backend, x = CudaGraphs(CPU, 1), torch.ones(3)
    plain, draws = backend.capture(lambda: x.add_(1)), backend.capture(rehearsal.draw)
    counts = torch.ones(3, dtype=torch.int32)
    backend.link([[plain], [plain]], [(1,), (1,)], counts).replay()
    with pytest.raises(CaptureError, match="a stage draws random numbers, which would be the same ones in each call"):
        backend.link([[plain], [draws]], [(1,), (1,)], counts)


@pytest.mark.usefixtures("on_fake_gpu")
def test_streams_are_made_once_for_each_device() -> None:
    backends = [CudaGraphs(CPU, 2) for _ in range(3)]
    assert len({id(backend._streams.captures) for backend in backends}) == 1
    assert len({id(backend._streams.beside) for backend in backends}) == 1


@pytest.mark.usefixtures("on_fake_gpu")
def test_caches_of_others_are_emptied_once_and_nothing_is_collected_within(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied, enabled = [], []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    backend = CudaGraphs(CPU, 1)
    for _ in range(3):
        backend.capture(lambda: enabled.append(gc.isenabled()))
    assert len(emptied) == 1
    assert enabled == [True, False] * 3
    assert gc.isenabled()


@pytest.mark.usefixtures("on_fake_gpu")
def test_a_model_that_is_dropped_waits_for_its_graphs() -> None:
    model = model_run_by("graphs")
    model.predict(torch.randn(4, 3, 16))
    gc.collect()  # of what other tests left
    closed: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rehearsal.Event, "synchronize", lambda self: closed.append(1))
        del model
        gc.collect()
    assert closed == [1]


@pytest.mark.usefixtures("on_fake_gpu")
def test_an_error_without_a_message_is_told_by_its_name() -> None:
    calls: list[int] = []

    def body() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError

    with pytest.raises(CaptureError, match="raise RuntimeError: RuntimeError"):
        CudaGraphs(CPU, 1).capture(body)


@pytest.mark.usefixtures("on_fake_gpu")
def test_graphs_of_two_models_are_not_launched_side_by_side() -> None:
    """They share the workspace that products were captured with."""
    entered = threading.Event()

    def launch_another() -> None:
        with CudaGraphs(CPU, 1).in_order():
            entered.set()

    other = threading.Thread(target=launch_another)
    with CudaGraphs(CPU, 1).in_order():
        other.start()
        assert not entered.wait(0.2)
    other.join(20)
    assert entered.is_set()


@pytest.mark.usefixtures("on_fake_gpu")
def test_a_count_on_its_way_is_waited_for_also_where_the_work_beside_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[Any] = []
    backend = CudaGraphs(CPU, 1)
    monkeypatch.setattr(rehearsal.Stream, "wait_stream", lambda stream, other: waits.append(other))
    with pytest.raises(ZeroDivisionError), backend.sending(0, torch.zeros((), dtype=torch.int32)):
        raise ZeroDivisionError
    assert len(waits) == 2
    assert waits[1] is backend._streams.beside


@pytest.mark.usefixtures("on_fake_gpu")
def test_another_backend_or_constant_is_another_kind_of_call() -> None:
    model, x = model_run_by("graphs"), torch.randn(4, 3, 16)
    model.predict(x)
    with cet.ops.use_backend("reference"):
        model.predict(x)
    assert len(model.captures) == 2


class Deep(Net):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.block = nn.Sequential(*(nn.Conv1d(8, 8, 1) for _ in range(depth)))


def calls_per_predict(depth: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of Python and by it; without those of the graphs, which the device runs."""
    model, x, calls = model_run_by("device", Deep(depth)), torch.randn(8, 3, 16), 0
    model.predict(x)
    assert model.captures[0].runner == "device"

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    with monkeypatch.context() as patch:
        patch.setattr(rehearsal.Stream, "launch", lambda stream, work: None)
        model.predict(x)
        sys.setprofile(count)
        try:
            model.predict(x)
        finally:
            sys.setprofile(None)
    return calls


@pytest.mark.usefixtures("on_fake_gpu")
def test_what_a_call_costs_the_host_does_not_grow_with_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a look at the address of each."""
    few = calls_per_predict(2, monkeypatch)
    assert few == calls_per_predict(40, monkeypatch) <= 250
