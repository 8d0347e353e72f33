"""The gate and the fused exit head on Triton: the tests of every backend, and each of the ways through the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import test_exit_gate
import torch
from test_exit_gate import (  # noqa: F401
    DTYPES,
    LAYOUTS,
    assert_exit_gate_right,
    test_a_poisoned_row_stays_and_touches_no_other,
    test_a_score_equal_to_the_threshold_leaves,
    test_classes_masked_by_a_large_number_count_nothing,
    test_compiled_calls_give_the_same,
    test_exit_gate_on_any_shape,
    test_gradients_flow_through_the_logits_alone,
    test_many_classes_and_rows_go_through_the_matrix_product,
    test_no_rows,
    test_scores_of_known_logits,
    test_the_custom_operators_keep_their_promises,
)
from torch import Tensor

from cet import ops
from cet.kernels import compact, launch
from cet.kernels import exit_gate as kernels
from cet.kernels.placing import state_size
from cet.ops.exit_step import exit_step
from cet.ops.padded import Answers, PaddedExit, padded_exit_step, padded_gate
from conftest import triton_backend as backend  # noqa: F401
from thinned import kept, sampled, slow


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that are launched, in order."""
    launched: list[str] = []
    original = launch.launch

    def noting(kernel: Any, *args: Any, **options: Any) -> None:
        launched.append(kernel.__name__)
        original(kernel, *args, **options)

    for module in (launch, compact):
        monkeypatch.setattr(module, "launch", noting)
    return launched


FUSED, MULTIPLIED = "exit_gate_kernel", "gate_kernel"


@pytest.fixture(autouse=True)
def _rows_share_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a small GPU: a large one has a program for each row of so few."""
    monkeypatch.setattr("cet.kernels.launch.num_processors", lambda _: 1)


WAYS: dict[str, tuple[tuple[int, ...], str, str, int, str]] = {
    "small rows": ((5, 20, 11), "channels_first", "mean", 5, FUSED),
    "rows that share programs": ((36, 3, 2), "channels_first", "mean", 3, FUSED),
    "rows that programs share": ((3, 130, 450), "channels_first", "mean", 5, FUSED),
    "rows that programs share, channels last": ((2, 320, 200), "channels_last", "mean", 5, FUSED),
    "more classes than positions": ((5, 20, 11), "channels_first", "mean", 40, MULTIPLIED),
    "many classes": ((5, 20, 300), "channels_first", "mean", 150, MULTIPLIED),
    "nothing to pool": ((40, 70), "channels_first", "mean", 128, MULTIPLIED),
    "classes shared by programs": ((5, 9), "channels_last", "mean", 12000, MULTIPLIED),
    "first position": ((9, 4, 20), "channels_last", "first", 5, MULTIPLIED),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", kept(DTYPES, torch.bfloat16))
def test_every_way_through(backend: str, launches: list[str], way: str, dtype: torch.dtype) -> None:  # noqa: F811
    shape, layout, pool, classes, expected = WAYS[way]
    assert_exit_gate_right(torch.randn(shape).to(dtype), classes, layout, pool, bias=True)
    assert launches == [expected]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", kept([2, 7, 33, 1000, 4097], 7, 1000))
def test_gate_is_as_exact_as_the_reference(backend: str, dtype: torch.dtype, classes: int) -> None:  # noqa: F811
    test_exit_gate.test_gate_is_as_exact_as_the_reference(backend, dtype, classes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(backend: str, name: str, dtype: torch.dtype) -> None:  # noqa: F811
    for rows, channels, positions, classes in [(1, 5, (7,), 2), (3, 33, (4, 9), 7)]:
        features, layout = LAYOUTS[name](rows, channels, positions)
        if 0 not in features.stride():
            features = torch.empty_strided(features.shape, features.stride(), dtype=dtype).copy_(features)
        assert_exit_gate_right(features.to(dtype), classes, layout, "mean", bias=True)


@pytest.mark.parametrize("way", sampled(WAYS, 4))
def test_rows_are_ordered_in_the_same_launch(backend: str, launches: list[str], way: str) -> None:  # noqa: F811
    shape, layout, pool, classes, expected = WAYS[way]
    features = torch.randn(shape)
    weight = torch.randn(classes, shape[-1 if layout == "channels_last" else 1])
    scores = ops.exit_gate(features, weight, layout=layout, pool=pool, threshold=0.0)[1]
    for threshold in (-1.0, float(scores.median())):
        logits, scores, exit_mask = ops.exit_gate(features, weight, layout=layout, pool=pool, threshold=threshold)
        launches.clear()
        got = exit_step(features, weight, None, [features], layout=layout, pool=pool, threshold=threshold)
        assert launches == [expected, *(["gather_and_scatter_rows_kernel"] if expected == MULTIPLIED else [])]
        assert torch.equal(got[0], logits)
        assert torch.equal(got[1], scores)
        assert torch.equal(got[2].kept_indices, (~exit_mask).nonzero()[:, 0])
        assert torch.equal(got[2].exited_indices, exit_mask.nonzero()[:, 0])
        assert torch.equal(got[2].tensors[0], features[~exit_mask])


@pytest.mark.parametrize("shape", [(1500, 4), slow((600, 4, 2))])
def test_more_programs_than_are_looked_back_at_together(backend: str, shape: tuple[int, ...]) -> None:  # noqa: F811
    features, weight = torch.randn(shape), torch.randn(3, 4)
    exit_mask = ops.exit_gate(features, weight, threshold=0.5)[2]
    kept, exited, (moved,) = exit_step(features, weight, None, [features], threshold=0.5)[2]
    assert 0 < len(kept) < len(features)
    assert torch.equal(torch.cat([kept, exited]), exit_mask.long().argsort(stable=True))
    assert torch.equal(moved, features[~exit_mask])


def test_positions_that_are_three_dimensions_in_memory(backend: str) -> None:  # noqa: F811
    assert_exit_gate_right(torch.randn(3, 4, 6, 6, 6)[..., ::2, ::2, ::2], 5, "channels_first", "mean", bias=False)


@pytest.mark.parametrize("classes", [7, 2000, 12000])
def test_a_launch_leaves_its_state_clear_for_the_next(backend: str, classes: int) -> None:  # noqa: F811
    rows = 70 if classes < 100 else 6
    state, num_kept = torch.zeros(state_size(rows), dtype=torch.int64), torch.tensor(-1).int()
    decision, count = torch.tensor([0.6, 1.0]), torch.tensor(rows - 2).int()
    for _ in range(2):
        logits = 3 * torch.randn(rows, classes)
        _, order = padded_gate(logits, decision, count, num_kept, score="confidence", state=state)
        exit_mask = ops.gate(logits, score="confidence", threshold=0.6)[1]
        assert real_order(order, num_kept, rows - 2) == true_order(exit_mask, rows - 2)
        assert not state.any()


def true_order(exit_mask: Tensor, count: int) -> tuple[list[int], list[int]]:
    flags = exit_mask[:count].tolist()
    return [i for i in range(count) if not flags[i]], [i for i in range(count) if flags[i]]


def real_order(order: Tensor, num_kept: Tensor, count: int) -> tuple[list[int], list[int]]:
    """The rows that are kept, and those that leave."""
    assert order.dtype is torch.int32
    kept = int(num_kept)
    return order[0, :kept].tolist(), order[1, : count - kept].tolist()


@pytest.mark.parametrize("count", [0, pytest.param(3, marks=pytest.mark.slow), 36])
@pytest.mark.parametrize("way", sampled(WAYS, 4))
def test_padding_is_not_decided(backend: str, launches: list[str], way: str, count: int) -> None:  # noqa: F811
    shape, layout, pool, classes, expected = WAYS[way]
    rows, count = shape[0], min(count, shape[0])
    features = torch.randn(shape)
    weight = torch.randn(classes, shape[-1 if layout == "channels_last" else 1])
    options: dict[str, Any] = {"layout": layout, "pool": pool, "score": "margin"}
    logits, scores, exit_mask = ops.exit_gate(features, weight, threshold=0.4, temperature=2.0, **options)
    kept, exited = true_order(exit_mask, count)
    launches.clear()

    decision, real, num_kept = torch.tensor([0.4, 2.0]), torch.tensor(count).int(), torch.tensor(-1).int()
    positions = torch.randperm(2 * rows)[:rows].int()
    state = torch.zeros(state_size(rows), dtype=torch.int64)
    at = PaddedExit(decision, torch.tensor(3), real, num_kept, positions, state)
    sources = [features, positions, *(torch.randn(rows, 1 + i) for i in range(7))]
    targets = [torch.full((2 * rows, *source.shape[1:]), -7, dtype=source.dtype) for source in sources]
    answers = Answers(torch.full((2 * rows, classes), -7.0), torch.full((2 * rows,), -7.0), torch.full((2 * rows,), -7))
    padded_exit_step(features, weight, None, at, list(zip(sources, targets, strict=True)), answers, **options)

    assert launches[0] == expected
    assert int(num_kept) == len(kept)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(target[: len(kept)], source[kept])
        assert (target[len(kept) :] == -7).all()
    wanted = Answers(*(torch.full_like(each, -7) for each in answers))
    home = positions[exited].long()
    wanted.logits[home], wanted.scores[home], wanted.exits[home] = logits[exited], scores[exited], 3
    assert torch.equal(answers.logits, wanted.logits)
    torch.testing.assert_close(answers.scores, wanted.scores, rtol=1e-6, atol=1e-6)
    assert torch.equal(answers.exits, wanted.exits)
    assert not state.any()

    got, order = padded_gate(logits, decision, real, num_kept, score="margin")
    # Another kernel may add up in another order.
    torch.testing.assert_close(got[:count], scores[:count], rtol=1e-6, atol=1e-6)
    assert real_order(order, num_kept, count) == (kept, exited)


@pytest.mark.parametrize("shape", [(9, 130, 450), (40, 130, 5)])
def test_the_same_row_has_the_same_answer_in_any_batch(backend: str, shape: tuple[int, ...]) -> None:  # noqa: F811
    """To the bit: what is shared among programs, and so rounding, depends on the row alone."""
    features, weight = torch.randn(shape), torch.randn(5, 130)
    logits, scores, _ = ops.exit_gate(features, weight, threshold=0.5)
    for rows in (slice(0, 1), slice(3, 8)):
        alone = ops.exit_gate(features[rows], weight, threshold=0.5)
        assert torch.equal(alone[0], logits[rows])
        assert torch.equal(alone[1], scores[rows])


def test_another_number_of_rows_is_parted_as_the_first(backend: str) -> None:  # noqa: F811
    """Without a thought: that is most of what a launch would cost the host."""
    kernels._plan.cache_clear()
    compact._extents.cache_clear()
    for rows in (5, 1, 9):
        features = torch.randn(rows, 8, 40)
        exit_step(features, torch.randn(5, 8), None, [features], threshold=0.5)
    assert kernels._plan.cache_info().misses == compact._extents.cache_info().misses == 1


def test_more_programs_than_a_launch_has_are_refused() -> None:
    with pytest.raises(ValueError, match="a launch of 2147483648 programs is more than a GPU takes"):
        launch.launch(kernels.gate_kernel, 1 << 31)


def test_a_poisoned_row_in_a_shared_launch_is_kept(backend: str) -> None:  # noqa: F811
    features, weight = torch.randn(40, 8, 40), torch.randn(5, 8)
    features[7, 3, 0], features[11] = float("nan"), float("inf")
    kept, exited, (moved,) = exit_step(features, weight, None, [features], threshold=9.0)[2]
    assert kept.tolist() == [7, 11]
    assert len(exited) == 38
    assert torch.equal(moved[0].isnan(), features[7].isnan())


def test_a_chosen_backend_that_cannot_run_raises(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    with pytest.raises(ValueError, match=r"^gate: backend 'triton' cannot take a torch\.float64 Tensor on"):
        ops.gate(torch.zeros(2, 2, dtype=torch.float64), threshold=0.0)
    monkeypatch.setattr("cet.kernels.launch.is_interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"^gate: backend 'triton' cannot take a torch\.float64 Tensor on"):
        ops.gate(torch.zeros(2, 2, dtype=torch.float64), threshold=0.0)
    monkeypatch.setattr("cet.kernels.launch.is_interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"^exit_gate: backend 'triton' cannot take a torch\.float32 Tensor on cpu"):
        ops.exit_gate(torch.zeros(2, 3, device="cpu"), torch.zeros(2, 3, device="cpu"), threshold=0.0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: there is no CUDA device; to interpret"):
        ops.use_backend("triton")
    monkeypatch.setattr("cet.ops.backend.has_triton", lambda: False)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: the package triton is not installed"):
        ops.use_backend("triton")


def test_cpu_tensors_are_left_to_the_cpu_unless_triton_is_chosen(launches: list[str]) -> None:
    logits = torch.randn(4, 3, device="cpu")
    with ops.use_backend(None):
        ops.gate(logits, threshold=0.5)
    assert launches == []
