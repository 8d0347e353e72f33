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
from cet.kernels import exit_gate as kernels
from cet.ops.exit_step import exit_step
from cet.ops.padded import padded_exit_gate, padded_gate
from conftest import triton_backend as backend  # noqa: F401


class Recorded:
    """A kernel that notes its launches."""

    def __init__(self, name: str, launches: list[str]) -> None:
        self._name, self._launches, self._kernel = name, launches, getattr(kernels, name)

    def __getitem__(self, grid: Any) -> Any:
        self._launches.append(self._name)
        return self._kernel[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    launched: list[str] = []
    for name in ("exit_gate_kernel", "pool_kernel", "head_kernel", "gate_kernel"):
        monkeypatch.setattr(kernels, name, Recorded(name, launched))
    return launched


WAYS: dict[str, tuple[tuple[int, ...], str, str, int, list[str]]] = {
    "small rows": ((5, 20, 11), "channels_first", "mean", 5, ["exit_gate_kernel"]),
    "more classes than positions": ((5, 20, 11), "channels_first", "mean", 40, ["pool_kernel", "head_kernel"]),
    "few large rows": ((3, 40, 450), "channels_first", "mean", 5, ["pool_kernel", "head_kernel"]),
    "few large rows, channels last": ((2, 90, 200), "channels_last", "mean", 5, ["pool_kernel", "head_kernel"]),
    "many classes": ((5, 20, 300), "channels_first", "mean", 150, ["pool_kernel", "head_kernel", "gate_kernel"]),
    "nothing to pool": ((40, 70), "channels_first", "mean", 128, ["head_kernel"]),
    "nothing to pool, many classes": ((40, 70), "channels_last", "mean", 129, ["head_kernel", "gate_kernel"]),
    "first position": ((9, 4, 20), "channels_last", "first", 5, ["head_kernel"]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_way_through(backend: str, launches: list[str], way: str, dtype: torch.dtype) -> None:  # noqa: F811
    shape, layout, pool, classes, expected = WAYS[way]
    assert_exit_gate_right(torch.randn(shape).to(dtype), classes, layout, pool, bias=True)
    assert launches == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 7, 33, 1000, 4096, 4097, 12000])
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


def test_rows_that_fill_the_device_are_read_once() -> None:
    large = kernels._Shape(channels=512, outer=1, inner=196, s_row=512 * 196, s_channel=196, s_outer=0, s_inner=1)
    assert [kernels._is_row_resident(rows, large, classes=100) for rows in (1, 255, 256)] == [False, False, True]
    assert not kernels._is_row_resident(256, large, classes=1000)


@pytest.mark.parametrize("way", WAYS)
def test_rows_are_ordered_in_the_same_launch(backend: str, launches: list[str], way: str) -> None:  # noqa: F811
    shape, layout, pool, classes, expected = WAYS[way]
    features = torch.randn(shape)
    weight = torch.randn(classes, shape[-1 if layout == "channels_last" else 1])
    scores = ops.exit_gate(features, weight, layout=layout, pool=pool, threshold=0.0)[1]
    for threshold in (-1.0, float(scores.median()), 9.0):
        logits, scores, exit_mask = ops.exit_gate(features, weight, layout=layout, pool=pool, threshold=threshold)
        launches.clear()
        got = exit_step(features, weight, None, [features], layout=layout, pool=pool, threshold=threshold)
        assert launches == expected
        assert torch.equal(got[0], logits)
        assert torch.equal(got[1], scores)
        assert torch.equal(got[2].kept_indices, (~exit_mask).nonzero()[:, 0])
        assert torch.equal(got[2].exited_indices, exit_mask.nonzero()[:, 0])
        assert torch.equal(got[2].tensors[0], features[~exit_mask])


def test_more_rows_than_a_block_of_the_scan(backend: str) -> None:  # noqa: F811
    features, weight = torch.randn(1500, 4), torch.randn(3, 4)
    exit_mask = ops.exit_gate(features, weight, threshold=0.5)[2]
    kept, exited, (moved,) = exit_step(features, weight, None, [features], threshold=0.5)[2]
    assert 0 < len(kept) < 1500
    assert torch.equal(torch.cat([kept, exited]), exit_mask.long().argsort(stable=True))
    assert torch.equal(moved, features[~exit_mask])


def test_positions_that_are_three_dimensions_in_memory(backend: str) -> None:  # noqa: F811
    assert_exit_gate_right(torch.randn(3, 4, 6, 6, 6)[..., ::2, ::2, ::2], 5, "channels_first", "mean", bias=False)


def test_a_launch_leaves_its_ticket_for_the_next(backend: str) -> None:  # noqa: F811
    order, counts = torch.empty(70, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    decision = kernels._new_decision(order, threshold=0.6)
    decision = decision._replace(order_ptr=order, num_kept_ptr=counts[0], ticket_ptr=counts[1])
    for _ in range(3):
        logits = 3 * torch.randn(70, 2000)
        kernels.gate_into(logits, "confidence", decision)
        exit_mask = ops.gate(logits, score="confidence", threshold=0.6)[1]
        assert torch.equal(order, exit_mask.long().argsort(stable=True))
        assert counts.tolist() == [int((~exit_mask).sum()), 0]


def true_order(exit_mask: Tensor, count: int) -> list[int]:
    flags = exit_mask[:count].tolist()
    rows = range(count)
    return [*(i for i in rows if not flags[i]), *(i for i in rows if flags[i]), *range(count, len(exit_mask))]


@pytest.mark.parametrize("count", [0, 3, 40])
@pytest.mark.parametrize("way", WAYS)
def test_padding_is_not_decided(backend: str, way: str, count: int) -> None:  # noqa: F811
    shape, layout, pool, classes, _ = WAYS[way]
    count = min(count, shape[0])
    features = torch.randn(shape)
    weight = torch.randn(classes, shape[-1 if layout == "channels_last" else 1])
    options: dict[str, Any] = {"layout": layout, "pool": pool, "score": "margin"}
    logits, scores, exit_mask = ops.exit_gate(features, weight, threshold=0.4, temperature=2.0, **options)
    rule, real, num_kept = torch.tensor([0.4, 2.0]), torch.tensor(count).int(), torch.tensor(-1).int()
    got_logits, got_scores, order = padded_exit_gate(features, weight, None, rule, real, num_kept, **options)
    assert torch.equal(got_logits[:count], logits[:count])
    for got, got_order in [(got_scores, order), padded_gate(logits, rule, real, num_kept, score="margin")]:
        assert torch.equal(got[:count], scores[:count])
        assert got_order.dtype is torch.int32
        assert got_order.tolist() == true_order(exit_mask, count)
        assert num_kept.item() == int((~exit_mask[:count]).sum())


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
