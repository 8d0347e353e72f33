"""The whole exit step, fused or not, against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cet import ops
from cet.ops.definitions import Layout, Pool
from thinned import kept

FORMS: dict[str, tuple[Layout, Pool, tuple[int, ...]]] = {
    "series": ("channels_first", "mean", (160, 192)),
    "long series": ("channels_first", "mean", (16, 3001)),
    "short series": ("channels_first", "mean", (100, 7)),
    "images": ("channels_first", "mean", (24, 9, 11)),
    "tokens": ("channels_last", "mean", (97, 96)),
    "many tokens": ("channels_last", "mean", (700, 33)),
    "class token": ("channels_last", "first", (97, 96)),
    "vectors": ("channels_first", "mean", (300,)),
}


def assert_step_right(
    features: Tensor, head: tuple[Tensor, Tensor], others: list[Tensor], dims: list[int], at: int, **options: Any
) -> None:
    """With ``features`` at position ``at`` among the tensors, and half of the rows leaving."""
    with ops.use_backend("reference"):
        logits, scores, _ = ops.exit_gate(features, *head, threshold=0.0, **options)
    tensors, dims = [*others[:at], features, *others[at:]], [*dims[:at], 0, *dims[at:]]
    before = [tensor.clone() for tensor in tensors]
    ordered = scores.sort().values
    # Between two scores, where rounding decides nothing.
    gap = int(ordered.diff().argmax()) if len(ordered) > 1 else 0
    threshold = float(ordered[gap : gap + 2].mean()) if len(ordered) > 1 else float(ordered.sum()) + 1.0
    for limit in (threshold, float("inf"), -1.0):
        got_logits, got_scores, (kept, exited, moved) = ops.exit_step(
            features, *head, tensors, dims, threshold=limit, **options
        )
        tolerance = 1e-4 if features.dtype is torch.float32 else 3e-2
        torch.testing.assert_close(got_logits, logits, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got_scores, scores, rtol=10 * tolerance, atol=10 * tolerance)
        assert kept.tolist() == [row for row, score in enumerate(got_scores.tolist()) if not score <= limit]
        assert exited.tolist() == [row for row, score in enumerate(got_scores.tolist()) if score <= limit]
        for tensor, original, result, dim in zip(tensors, before, moved, dims, strict=True):
            assert torch.equal(tensor, original)
            assert torch.equal(result, original.index_select(dim, kept))


def head_for(features: Tensor, layout: Layout, classes: int = 5) -> tuple[Tensor, Tensor]:
    channels = features.shape[-1 if layout == "channels_last" else 1]
    weight, bias = torch.randn(classes, channels), torch.randn(classes)
    return weight.to(features.dtype), bias.to(features.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 24])
@pytest.mark.parametrize("form", kept(FORMS, "series", "short series", "images", "tokens", "class token"))
def test_rows_that_stay_are_whole_and_in_order(backend: str, form: str, rows: int, dtype: torch.dtype) -> None:
    layout, pool, shape = FORMS[form]
    features = torch.randn(rows, *shape).to(dtype)
    if len(shape) == 3 and rows > 2:
        features = features.contiguous(memory_format=torch.channels_last)
    others = [torch.randn(rows, 3), torch.randn(4, rows)]
    assert_step_right(features, head_for(features, layout), others, [0, 1], at=1, layout=layout, pool=pool)


def test_more_memory_than_is_kept(backend: str) -> None:
    """Features above the sizes from which rows move another way."""
    for megabytes in (40, 80):
        features = torch.randn(30, 64, megabytes * 2**20 // 4 // 64 // 30)
        assert_step_right(features, head_for(features, "channels_first"), [], [], at=0)


def test_large_heads_go_through_the_matrix_product(backend: str) -> None:
    features = torch.randn(20, 300, 4).bfloat16()
    assert_step_right(features, head_for(features, "channels_first", classes=500), [], [], at=0)
    features = torch.randn(20, 1100, 2)
    assert_step_right(features, head_for(features, "channels_first", classes=4000), [], [], at=0)


@given(data=st.data())
def test_any_step(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    rows = data.draw(st.integers(1, 40), label="rows")
    layout: Layout = data.draw(st.sampled_from(["channels_first", "channels_last"]), label="layout")
    shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3), label="shape")
    tokens = layout == "channels_last" and len(shape) == 2
    pool: Pool = data.draw(st.sampled_from(["mean", "first"] if tokens else ["mean"]), label="pool")
    shape.insert(0, rows)
    order = data.draw(st.permutations(range(len(shape))), label="memory order")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="dtype")
    features = torch.randn([shape[d] for d in order]).to(dtype).permute([order.index(d) for d in range(len(shape))])
    classes = data.draw(st.integers(2, 30), label="classes")
    head = head_for(features, layout, classes)
    others = [torch.randn(rows, 5)][: data.draw(st.integers(0, 1), label="others")]
    at = data.draw(st.integers(0, len(others)), label="at")
    assert_step_right(features, head, others, [0] * len(others), at, layout=layout, pool=pool)


def test_few_survivors_hold_no_memory_of_many(backend: str) -> None:
    features = torch.randn(400, 30, 20)
    head = head_for(features, "channels_first")
    scores = ops.exit_gate(features, *head, threshold=0.0)[1].sort().values
    for num_kept in (0, 1, 50, 300):
        threshold = float(scores[-1 - num_kept : len(scores) + 1 - num_kept].mean()) if num_kept else 9.0
        moved = ops.exit_step(features, *head, [features], threshold=threshold)[2].tensors[0]
        assert moved.untyped_storage().nbytes() <= max(8 * moved.nbytes, 64)
