"""The exit contract and the re-capture of the graph runners: on fake graphs anywhere, on CUDA graphs where a GPU is."""

from __future__ import annotations

import copy
import math
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune

import cet
from cet.ops.definitions import SCORE_NAMES
from cet.runtime import RunnerName, cuda_graphs, runner_for
from cet.runtime.buckets import choose_buckets
from cet.runtime.graphs import MAX_BUCKETS, MAX_CAPTURES
from conftest import Built, build_family
from families import FAMILIES, Inputs
from graph_backends import Fakes, run_by
from oracle import (
    CONTRACT,
    all_leave,
    answer_each_row_alone,
    assert_same_answers,
    poisoned_row,
    policy_between_scores,
)
from thinned import kept, slow

GRAPH_RUNNERS: list[RunnerName] = ["graphs", "device"]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NAN = math.nan


def on(device: str, inputs: Inputs) -> Inputs:
    return {name: value.to(device) for name, value in inputs.items()}


@pytest.fixture(params=GRAPH_RUNNERS)
def runner(request: pytest.FixtureRequest) -> RunnerName:
    name: RunnerName = request.param
    return name


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module", params=kept(FAMILIES, "skip", "conv-lstm", "late-fusion"))
def built(request: pytest.FixtureRequest) -> Built:
    return build_family(request.param)


@pytest.fixture
def running(
    built: Built, runner: RunnerName, device: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[[int], Inputs], cet.EarlyExit]:
    """Inputs with so many rows, and the model: on fake graphs on the CPU, on real ones on a GPU."""
    family, model = built
    model = copy.deepcopy(model).to(device)
    if device == "cpu":
        run_by(model, runner, monkeypatch)
    else:
        model.runner = runner
    return lambda rows: on(device, family.inputs(rows)), model


@given(data=st.data())
@settings(CONTRACT, max_examples=6)
def test_every_row_gets_the_answer_that_it_gets_alone(running: Any, data: st.DataObject) -> None:
    inputs_of, model = running
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    early = model.num_exits - 1
    quantile = st.none() | st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0])
    score = data.draw(st.sampled_from(SCORE_NAMES), label="score")
    temperature = st.none() | st.tuples(*[st.sampled_from([0.5, 1.0, 3.0])] * model.num_exits)
    for rows in data.draw(st.lists(st.sampled_from([1, 2, 3, 7, 16]), min_size=1, max_size=3), label="batches"):
        inputs = inputs_of(rows)
        quantiles = data.draw(st.lists(quantile, min_size=early, max_size=early), label="quantiles")
        temperatures = data.draw(temperature, label="temperatures")
        model.policy = policy_between_scores(model, inputs, score, quantiles, temperatures)
        before = {name: value.clone() for name, value in inputs.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "more than . kinds of calls")
            got = model.predict(**inputs)
            with torch.no_grad():
                assert torch.equal(model(**inputs), got.logits)
        assert_same_answers(got, answer_each_row_alone(model, inputs, model.policy))
        assert all(torch.equal(inputs[name], value) for name, value in before.items())


def test_closed_exits_give_the_backbones_output(running: Any) -> None:
    inputs_of, model = running
    model.policy = cet.ExitPolicy.closed(model.num_exits)
    for rows in (9, 2, 1):
        inputs = inputs_of(rows)
        with torch.no_grad():
            output = model.backbone(**inputs)
            expected = output if isinstance(output, Tensor) else output.logits
            torch.testing.assert_close(model(**inputs), expected, rtol=1e-5, atol=1e-5)
        assert model.predict(**inputs).exit_index.tolist() == [model.num_exits - 1] * rows
    assert [len(capture.buckets) for capture in model.captures] == [1]


@pytest.mark.parametrize("poison", [NAN, slow(math.inf), slow(-math.inf)])
def test_a_poisoned_row_stays_and_touches_no_other_nor_a_later_batch(running: Any, poison: float) -> None:
    inputs_of, model = running
    inputs = inputs_of(7)
    model.policy = all_leave(model)
    clean = model.predict(**inputs)
    with poisoned_row(model, inputs, 3, poison) as poisoned:
        got = model.predict(**poisoned)
    others = [0, 1, 2, 4, 5, 6]
    assert got.exit_index[3] == model.num_exits - 1
    assert torch.equal(got.exit_index[others], clean.exit_index[others])
    assert torch.equal(got.logits[others], clean.logits[others])
    again = model.predict(**{name: value[:2] for name, value in inputs.items()})
    torch.testing.assert_close(again.logits, clean.logits[:2])


def test_a_segment_without_rows_leaves_later_ones_alone(running: Any) -> None:
    inputs_of, model = running
    inputs = inputs_of(6)
    nobody = cet.ExitPolicy("confidence", (math.inf,) * (model.num_exits - 1))
    for policy, exit_index in ((nobody, model.num_exits - 1), (all_leave(model), 0), (nobody, model.num_exits - 1)):
        model.policy = policy
        got = model.predict(**inputs)
        assert got.exit_index.tolist() == [exit_index] * 6
        with torch.no_grad():
            torch.testing.assert_close(got.logits, model.exit_logits(**inputs)[exit_index], rtol=1e-4, atol=1e-5)
    assert len(model.captures) == 1


def test_empty_batches_need_no_graph(running: Any) -> None:
    inputs_of, model = running
    assert model.predict(**inputs_of(0)).logits.shape == (0, model.num_classes)
    assert model.captures == ()


class Awkward(nn.Module):
    """Behind its exit go: time-first features, a mask that is expanded over rows, one that is expanded within them,
    a table that all rows share, and the number of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.table = nn.Parameter(torch.randn(5, 8))
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for_all = torch.linspace(0, 1, x.shape[1], device=x.device, dtype=x.dtype).expand(x.shape[0], x.shape[1])
        within = x[:, :1, :1].expand(x.shape[0], x.shape[1], 8)
        shared = self.table.softmax(1)
        h = torch.relu(h).transpose(0, 1)
        h = (h.transpose(0, 1) * for_all[:, :, None] + within).transpose(0, 1).contiguous()
        h = h.view(-1, h.shape[1], 8).sum(0) + shared.sum(0)
        return self.classifier(h)


def test_values_of_any_layout_cross(runner: RunnerName, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cet.EarlyExit(Awkward(), {"embed": cet.HeadSpec(layout="channels_last")}, (torch.randn(2, 6, 3),))
    model = model.eval().to(device)
    if device == "cpu":
        run_by(model, runner, monkeypatch)
    for rows in (12, 5, 1):
        inputs = {"x": torch.randn(rows, 6, 3, device=device)}
        model.policy = policy_between_scores(model, inputs, "entropy", [0.4])
        assert_same_answers(model.predict(**inputs), answer_each_row_alone(model, inputs, model.policy))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8))
        self.classifier = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.block(self.stem(x)).mean(2))


def small_model() -> cet.EarlyExit:
    model = cet.EarlyExit(Net(), ["stem", "block"], (torch.randn(2, 3, 16),)).eval()
    model.policy = policy_between_scores(model, {"x": torch.randn(8, 3, 16)}, "entropy", [0.5, 0.5])
    return model


@pytest.fixture
def faked(runner: RunnerName, monkeypatch: pytest.MonkeyPatch) -> tuple[cet.EarlyExit, Fakes]:
    model = small_model()
    return model, run_by(model, runner, monkeypatch)


def agrees(model: cet.EarlyExit, rows: int = 8, **options: Any) -> cet.ExitOutput:
    """Predict; the answers must be those of each row alone."""
    inputs = {"x": torch.randn(rows, 3, 16, **options)}
    got = model.predict(**inputs)
    assert_same_answers(got, answer_each_row_alone(model, inputs, model.policy))
    return got


def captured(fakes: Fakes) -> int:
    return sum(fake.captured for fake in fakes.made)


def test_one_graph_per_segment_and_bucket(faked: tuple[cet.EarlyExit, Fakes], runner: RunnerName) -> None:
    model, fakes = faked
    for rows in (8, 8, 5, 1):
        agrees(model, rows)
    assert len(fakes.made) == 1
    assert captured(fakes) == 3 * 4
    (capture,) = model.captures
    assert capture.runner == runner
    assert capture.exits == ("stem", "block", "final")
    assert capture.buckets == ((1, 2, 4, 8),) * 3
    assert capture.eager == ()
    # x and h go into segments 1 and 2, and the answers: logits, score and exit; all for 8 rows
    assert capture.buffer_bytes == 8 * (4 * (3 * 16 + 8 * 14 + 8 * 12) + 4 * 4 + 4 + 8)
    assert capture.graph_bytes == 12
    assert fakes.made[0].linked == (runner == "device")


def test_larger_batches_are_captured_anew(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, fakes = faked
    for rows, captures in ((4, 1), (3, 1), (9, 2), (4, 2)):
        agrees(model, rows)
        assert len(fakes.made) == captures
    assert len(model.captures) == 1
    assert fakes.made[0].closed == 1


def test_calibrated_survivors_choose_the_buckets(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, _ = faked
    first = model.policy
    model.policy = cet.ExitPolicy(first.score, first.thresholds, survival=(0.5, 0.25))
    agrees(model, 64)
    (capture,) = model.captures
    assert all(len(buckets) <= MAX_BUCKETS and buckets[-1] == 64 for buckets in capture.buckets)
    assert list(capture.buckets) == choose_buckets(64, [0, 1], (0.5, 0.25), MAX_BUCKETS)
    assert len(set(capture.buckets)) == 3


def test_thresholds_change_without_capture_and_the_shape_of_the_policy_with(
    faked: tuple[cet.EarlyExit, Fakes],
) -> None:
    model, fakes = faked
    x = {"x": torch.randn(16, 3, 16)}
    for quantiles, captures in (([0.2, 0.2], 1), ([0.8, 0.5], 1), ([None, 0.5], 2), ([0.5, None], 3), ([0.1, 0.1], 3)):
        model.policy = policy_between_scores(model, x, "entropy", quantiles)
        assert_same_answers(model.predict(**x), answer_each_row_alone(model, x, model.policy))
        assert len(fakes.made) == captures
    model.policy = policy_between_scores(model, x, "margin", [0.1, 0.1])
    assert_same_answers(model.predict(**x), answer_each_row_alone(model, x, model.policy))
    assert len(fakes.made) == 4


def replaced_weight(model: cet.EarlyExit) -> None:
    model.backbone.classifier.weight.data = torch.randn_like(model.backbone.classifier.weight)


def assigned_state(model: cet.EarlyExit) -> None:
    state = {name: torch.rand_like(value.float()).to(value.dtype) for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def other_head(model: cet.EarlyExit) -> None:
    model.heads[1] = cet.ExitHead(8, 4)


def other_submodule(model: cet.EarlyExit) -> None:
    model.backbone.block[0] = nn.Conv1d(8, 8, 3)


def renamed_weight(model: cet.EarlyExit) -> None:
    prune.random_unstructured(model.backbone.classifier, "weight", 0.5)


@pytest.mark.parametrize("change", [replaced_weight, assigned_state, other_head, other_submodule, renamed_weight])
def test_moved_weights_are_captured_anew(
    faked: tuple[cet.EarlyExit, Fakes], change: Callable[[cet.EarlyExit], None]
) -> None:
    model, fakes = faked
    agrees(model)
    change(model)
    with torch.no_grad():
        agrees(model)
        agrees(model)
    assert len(fakes.made) == 2


def test_weights_changed_in_place_need_no_capture(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, fakes = faked
    agrees(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    agrees(model)
    model.load_state_dict(small_model().state_dict())
    agrees(model)
    assert len(fakes.made) == 1


def test_a_cast_frees_the_graphs(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, fakes = faked
    agrees(model)
    model.double()
    assert model.captures == ()
    assert fakes.made[0].closed == 1
    agrees(model, dtype=torch.float64)
    assert len(fakes.made) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbones_have_float32_scores(faked: tuple[cet.EarlyExit, Fakes], dtype: torch.dtype) -> None:
    model, _ = faked
    model.to(dtype)
    x = torch.randn(6, 3, 16).to(dtype)
    got = model.predict(x)
    assert (got.logits.dtype, got.score.dtype) == (dtype, torch.float32)
    by_exit = torch.stack([cet.ops.exit_score(logits) for logits in model.exit_logits(x)])
    torch.testing.assert_close(got.score, by_exit.gather(0, got.exit_index[None])[0], rtol=2e-2, atol=2e-2)


def test_autocast_is_captured_apart(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, fakes = faked
    x = torch.randn(6, 3, 16)
    plain = model.predict(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = model.predict(x)
    assert got.logits.dtype is torch.bfloat16
    torch.testing.assert_close(got.logits.float(), plain.logits, rtol=5e-2, atol=5e-2)
    assert torch.equal(model.predict(x).logits, plain.logits)
    assert len(fakes.made) == 2


def test_inference_mode_and_no_grad_share_graphs(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, fakes = faked
    x = torch.randn(6, 3, 16)
    with torch.inference_mode():
        first = model.predict(x)
        alone = model.predict(torch.randn(6, 3, 16))
    assert alone.logits.is_inference()
    assert torch.equal(model.predict(x).logits, first.logits)
    with torch.no_grad():
        assert torch.equal(model(x), first.logits)
    assert len(fakes.made) == 1


def test_calls_with_gradients_run_eagerly_and_say_so(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, fakes = faked
    with pytest.warns(UserWarning, match=r"graphs hold no gradients, so this call runs eagerly; use torch.no_grad"):
        model(torch.randn(6, 3, 16)).sum().backward()
    assert model.backbone.stem[0].weight.grad is not None
    assert fakes.made == []


def test_answers_outlive_the_next_call(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, _ = faked
    first = agrees(model)
    kept = first.logits.clone(), first.exit_index.clone(), first.score.clone()
    agrees(model)
    assert all(torch.equal(a, b) for a, b in zip(kept, (first.logits, first.exit_index, first.score), strict=True))


def test_inputs_that_are_expanded_once_need_not_be_later(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, _ = faked
    for x in (torch.randn(1, 3, 1).expand(8, 3, 16), torch.randn(8, 3, 16), torch.randn(8, 16, 3).transpose(1, 2)):
        assert_same_answers(model.predict(x=x), answer_each_row_alone(model, {"x": x}, model.policy))


def test_a_copy_and_a_pickle_make_their_own_graphs(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, fakes = faked
    agrees(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.backbone.classifier.weight.zero_()
    assert other.captures == ()
    agrees(other)
    assert len(fakes.made) == 1  # the copied factory makes the copy's backends
    assert len(model.captures) == len(other.captures) == 1
    assert pickle.loads(pickle.dumps(small_model())).captures == ()


def test_kept_captures_are_few(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, fakes = faked
    for length in range(16, 16 + MAX_CAPTURES):
        model.predict(torch.randn(3, 3, length))
    x = {"x": torch.randn(3, 3, 30)}
    with pytest.warns(UserWarning, match=f"more than {MAX_CAPTURES} kinds of calls were seen"):
        got = model.predict(**x)
    assert_same_answers(got, answer_each_row_alone(model, x, model.policy))
    assert len(model.captures) == MAX_CAPTURES
    assert [fake.closed for fake in fakes.made] == [1, *[0] * MAX_CAPTURES]


def test_too_little_memory_means_fewer_buckets(runner: RunnerName, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    fakes = run_by(model, runner, monkeypatch, room=9)
    with pytest.warns(UserWarning, match=r"graphs for batches of 64 do not fit .*; trying 4 for each exit") as caught:
        agrees(model, 64)
    assert len(caught) == 2
    assert model.captures[0].buckets == ((1, 64),) * 3
    agrees(model, 7)
    assert len(fakes.made) == 3


def test_no_memory_means_no_graphs(runner: RunnerName, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    fakes = run_by(model, runner, monkeypatch, room=2)
    with pytest.warns(UserWarning, match="such calls run eagerly"):
        agrees(model, 64)
    tried = len(fakes.made)
    agrees(model, 64)
    agrees(model, 5)
    assert len(fakes.made) == tried
    assert model.captures == ()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 3)
        self.classifier = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.stem(x.add_(1)))


@pytest.mark.parametrize("room", [0, 100])
def test_inputs_that_the_backbone_changes_are_copied(
    runner: RunnerName, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    model = cet.EarlyExit(InPlace(), ["stem"], (torch.randn(2, 3),)).eval()
    run_by(model, runner, monkeypatch, room=room)
    x = torch.randn(6, 3)
    before = x.clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "graphs for batches of 6 do not fit")
        first = model.predict(x)
    assert torch.equal(x, before)
    assert torch.equal(model.predict(x).logits, first.logits)
    assert len(model.captures) == (room > 0)


def test_a_segment_that_cannot_be_captured_is_named(runner: RunnerName, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    run_by(model, runner, monkeypatch, refuses=lambda body: body.args[0] == 1)
    with pytest.warns(UserWarning, match=r"before exit 'block' cannot be captured \(x = NONZERO_1\(h\): operation not"):
        agrees(model)
    for rows in (8, 5, 1):
        agrees(model, rows)
    (capture,) = model.captures
    assert (capture.runner, capture.eager) == ("graphs", ("block",))


def test_linking_that_fails_leaves_the_launches_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    run_by(model, "device", monkeypatch, links=False)
    with pytest.warns(UserWarning, match="so runner 'device' runs as 'graphs'"):
        agrees(model)
    assert model.captures[0].runner == "graphs"
    assert model.captures[0].reason == "operation not supported in a conditional node"


def test_graphs_are_captured_ahead_of_time(faked: tuple[cet.EarlyExit, Fakes], runner: RunnerName) -> None:
    model, fakes = faked
    (capture,) = model.capture(8)
    assert capture.runner == runner
    assert capture.buckets == ((1, 2, 4, 8),) * 3
    for rows in (8, 3):
        agrees(model, rows)
    assert len(fakes.made) == 1
    with pytest.raises(ValueError, match="batch_size is 0; give at least 1"):
        model.capture(0)
    with pytest.raises(RuntimeError, match=r"call model.eval\(\) before capture"):
        model.train().capture(2)


def test_threads_take_turns(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, _ = faked
    batches = [torch.randn(rows, 3, 16) for rows in (8, 3, 5, 1)] * 3
    expected = [answer_each_row_alone(model, {"x": x}, model.policy) for x in batches]
    model.predict(batches[0])
    got: list[cet.ExitOutput | None] = [None] * len(batches)

    def predict(start: int) -> None:
        for index in range(start, len(batches), 3):
            got[index] = model.predict(batches[index])

    threads = [threading.Thread(target=predict, args=(start,)) for start in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output, answers in zip(got, expected, strict=True):
        assert output is not None
        assert_same_answers(output, answers)


def test_compiled_models_hold_no_graphs(faked: tuple[cet.EarlyExit, Fakes]) -> None:
    model, fakes = faked
    x = torch.randn(4, 3, 16)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(x), model(x))
    assert len(fakes.made) == 1


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 3)
        self.classifier = nn.Linear(3, 3)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.classifier(self.stem(x) + context)


def test_inputs_on_two_devices_are_refused(faked: tuple[cet.EarlyExit, Fakes], monkeypatch: pytest.MonkeyPatch) -> None:
    model = cet.EarlyExit(TwoInputs(), ["stem"], (torch.randn(2, 3), torch.randn(2, 3))).eval()
    fakes = run_by(model, "graphs", monkeypatch)
    with pytest.raises(ValueError, match="context is on meta but x on cpu; move one"):
        model.predict(torch.randn(4, 3), torch.randn(4, 3, device="meta"))
    assert fakes.made == []


def test_graphs_on_the_cpu_are_refused_by_name() -> None:
    model = cet.EarlyExit(Net(), ["stem"], (torch.randn(2, 3, 16),), runner="graphs").eval()
    with pytest.raises(ValueError, match="runner 'graphs' needs a CUDA device, but the inputs are on cpu"):
        model.predict(torch.randn(2, 3, 16))
    model.runner = "eager"
    assert len(model.predict(torch.randn(2, 3, 16)).labels) == 2


def test_unknown_runners_are_refused() -> None:
    with pytest.raises(
        ValueError, match="runner 'fast' is unknown; choose one of eager, graphs, device, auto, or None"
    ):
        cet.EarlyExit(Net(), ["stem"], (torch.randn(2, 3, 16),), runner="fast")  # type: ignore[arg-type]


class Extension:
    runtime_version = 13000
    has_switch = True

    def __init__(self, driver: int) -> None:
        self.driver = driver

    def driver_version(self) -> int:
        return self.driver


class OldExtension(Extension):
    has_switch = False


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        (None, "cet was installed without its CUDA extension; install it where nvcc is, with CET_BUILD_CUDA=1"),
        (OldExtension(13000), "built with CUDA older than 12.8; build it again with a newer nvcc"),
        (
            Extension(12060),
            "the driver supports CUDA 12.6, and an extension built with CUDA 13.0 needs 13.0",
        ),
        (Extension(0), "there is no NVIDIA driver; install it on a machine with a GPU"),
        (Extension(13010), None),
        (Extension(13000), None),
    ],
)
def test_where_graphs_cannot_be_linked_the_device_runner_is_refused(
    extension: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "cuda_extension", lambda: extension)
    cuda_graphs.why_no_switch.cache_clear()
    try:
        cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
        assert runner_for(cpu, None) == "eager"
        assert runner_for(cuda, None) == "eager"
        assert runner_for(cuda, "eager") == "eager"
        assert runner_for(cpu, "auto") == "eager"
        assert runner_for(cuda, "auto") == ("device" if reason is None else "graphs")
        model = small_model()
        if reason is None:
            model.runner = "device"
            assert runner_for(cuda, model.runner) == "device"
        else:
            with pytest.raises(RuntimeError, match=f"runner 'device' cannot run: .*{reason}"):
                model.runner = "device"
    finally:
        cuda_graphs.why_no_switch.cache_clear()
