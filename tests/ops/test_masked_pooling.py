"""Pooling with a mask, against sums over the positions in double precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cet import ops
from cet.ops.definitions import Layout, pool_features

LAYOUTS: list[Layout] = ["channels_first", "channels_last"]


def true_mean(feature: Tensor, layout: Layout, mask: Tensor) -> Tensor:
    """Position by position; a row without weight is zero."""
    rows = feature.double().movedim(1, -1) if layout == "channels_first" else feature.double()
    means = torch.zeros(len(rows), rows.shape[-1], dtype=torch.float64)
    for row, (vectors, weights) in enumerate(zip(rows.flatten(1, -2), mask.double().flatten(1), strict=True)):
        counted = [(w, v) for w, v in zip(weights.tolist(), vectors, strict=True) if w != 0]
        if counted:
            means[row] = sum(w * v for w, v in counted) / sum(w for w, _ in counted)
    return means


@given(data=st.data())
def test_any_mask(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    layout = data.draw(st.sampled_from(LAYOUTS), label="layout")
    positions = data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=2), label="positions")
    rows, channels = data.draw(st.integers(0, 6), label="rows"), data.draw(st.integers(1, 9), label="channels")
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]), label="dtype")
    feature = torch.randn(rows, *positions, channels).to(dtype)
    mask = torch.rand(rows, *positions) < data.draw(st.sampled_from([0.0, 0.3, 1.0]), label="kept")
    feature[~mask] = data.draw(st.sampled_from([0.0, float("nan"), float("inf")]), label="padding")
    kinds = {"bool": mask, "int64": mask.long(), "weights": mask * torch.rand(mask.shape)}
    mask = kinds[data.draw(st.sampled_from(list(kinds)), label="mask")]
    if layout == "channels_first":
        feature = feature.movedim(-1, 1)
    got = pool_features(feature, layout, "mean", mask)
    assert got.dtype is dtype
    tolerance = 1e-12 if dtype is torch.float64 and mask.dtype is not torch.float32 else 1e-5
    tolerance = max(tolerance, torch.finfo(dtype).eps)
    torch.testing.assert_close(got.double(), true_mean(feature, layout, mask), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_true_is_the_plain_mean(layout: Layout) -> None:
    feature = torch.randn(5, 4, 7, dtype=torch.float64)
    mask = torch.ones(5, 7 if layout == "channels_first" else 4)
    torch.testing.assert_close(pool_features(feature, layout, "mean", mask), pool_features(feature, layout, "mean"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_exit_gate_and_step_pool_where_the_mask_is_true(backend: str, layout: Layout) -> None:
    x = torch.randn(12, 9, 6)
    mask = torch.rand(12, 9) < 0.6
    mask[3] = False
    x[~mask] = float("nan")
    weight, bias = torch.randn(4, 6), torch.randn(4)
    features = x.movedim(-1, 1) if layout == "channels_first" else x
    pooled = true_mean(features, layout, mask).float()
    expected = ops.exit_gate(pooled, weight, bias, threshold=1.0)
    got = ops.exit_gate(features, weight, bias, layout=layout, threshold=1.0, mask=mask)
    torch.testing.assert_close(got, expected)
    logits, scores, compaction = ops.exit_step(
        features, weight, bias, [features, mask], layout=layout, threshold=1.0, mask=mask
    )
    assert torch.equal(logits, got[0])
    assert torch.equal(scores, got[1])
    for moved, tensor in zip(compaction.tensors, (features, mask), strict=True):
        torch.testing.assert_close(moved, tensor[~got[2]], equal_nan=True, rtol=0, atol=0)


def test_gradients_are_finite_and_right() -> None:
    feature = torch.randn(4, 5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 5, dtype=torch.float64).index_fill_(0, torch.tensor([2]), 0.0)
    assert torch.autograd.gradcheck(lambda x: pool_features(x, "channels_last", "mean", weights), (feature,))
    pool_features(feature, "channels_last", "mean", weights > 0).sum().backward()
    assert feature.grad is not None
    assert feature.grad[2].count_nonzero() == 0


X = torch.zeros(3, 4, 5)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mask": torch.ones(3, 4)}, ValueError, r"mask has shape \(3, 4\) for features .* give \(3, 5\)"),
    ({"mask": torch.ones(3, 5), "layout": "channels_last"}, ValueError, r"in layout channels_last; give \(3, 4\)"),
    ({"mask": [True]}, TypeError, "mask is a list; give a tensor"),
    ({"mask": torch.ones(3, 5, dtype=torch.complex64)}, TypeError, "mask is torch.complex64; give bool, or weights"),
    ({"mask": torch.ones(3, 5, device="meta")}, ValueError, "mask is on meta but features on cpu"),
    (
        {"mask": torch.ones(3, 4), "layout": "channels_last", "pool": "first"},
        ValueError,
        "a mask has no meaning for pool 'first'; leave it out",
    ),
    ({"features": X[..., 0], "mask": torch.ones(3)}, ValueError, r"no meaning for features of shape \(3, 4\)"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_a_mask_that_does_not_fit_is_refused(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    weight = torch.zeros(2, 5 if wrong.get("layout") == "channels_last" else 4)
    arguments: dict[str, Any] = {"features": X, "weight": weight, "threshold": 0.0, **wrong}
    with pytest.raises(error, match=f"^exit_gate: .*{message}"):
        ops.exit_gate(**arguments)
    with pytest.raises(error, match=f"^exit_step: .*{message}"):
        ops.exit_step(**{**arguments, "bias": None, "tensors": []})
