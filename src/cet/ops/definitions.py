"""What the operations share: where features hold their channels, how positions are pooled, and the scores.

A score stands in three places: here by its definition, for the CPU in ``csrc/softmax_stats.h``, for Triton in
``kernels/scores.py``; a test compares their names, since the kernels know a score by its position alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cet.ops.backend import no_tensor

Layout = Literal["channels_first", "channels_last"]
Pool = Literal["mean", "first"]
ScoreName = Literal["entropy", "confidence", "margin"]

MAX_ROWS = 2**30
"""Twice as many, a place in an order of rows, is still an int32."""

SCORE_NAMES: tuple[ScoreName, ...] = get_args(ScoreName)


class Score(NamedTuple):
    """A score.

    Attributes:
        definition: log-probabilities ``(B, K)`` to scores ``(B,)``, differentiable.
        is_low_when_sure: whether a sample leaves at or below the threshold; else at or above it.
    """

    definition: Callable[[Tensor], Tensor]
    is_low_when_sure: bool


def _entropy(log_p: Tensor) -> Tensor:
    # A class ruled out by a logit of -Inf adds nothing, to the gradient neither.
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(dim=1)


def _confidence(log_p: Tensor) -> Tensor:
    return log_p.exp().amax(dim=1)


def _margin(log_p: Tensor) -> Tensor:
    top = log_p.exp().topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


SCORES: dict[ScoreName, Score] = {
    "entropy": Score(_entropy, is_low_when_sure=True),
    "confidence": Score(_confidence, is_low_when_sure=False),
    "margin": Score(_margin, is_low_when_sure=False),
}


def pool_features(feature: Tensor, layout: Layout, pool: Pool, mask: Tensor | None = None) -> Tensor:
    """Pool features to one vector per row.

    Args:
        feature: ``(B, C, ...)`` or ``(B, ..., C)``; those of shape ``(B, C)`` are returned as they are.
        layout: which of the two.
        pool: ``"mean"`` over all positions, or ``"first"``, the first position of features ``(B, T, C)``.
        mask: ``(B, ...)``, one bool or weight >= 0 for each position, for the mean alone. Positions that are false or 0
            add nothing, whatever they hold, NaN and Inf too. A row in which all are so is pooled to zeros.

    Returns:
        ``(B, C)`` in the dtype of the features; a weighted sum is taken in float32 or wider.
    """
    if feature.ndim == 2:
        return feature
    if pool == "first":
        return feature[:, 0]
    if mask is not None:
        return _weighted_mean(feature, layout, mask)
    if layout == "channels_first":
        return feature.mean(2) if feature.ndim == 3 else feature.flatten(2).mean(2)
    return feature.mean(1) if feature.ndim == 3 else feature.flatten(1, -2).mean(1)


def _weighted_mean(feature: Tensor, layout: Layout, mask: Tensor) -> Tensor:
    feature = feature.flatten(2) if layout == "channels_first" else feature.flatten(1, -2)
    positions, channels = (2, 1) if layout == "channels_first" else (1, 2)
    weights = mask.flatten(1).to(torch.promote_types(feature.dtype, torch.float32)).unsqueeze(channels)
    total = weights.sum(positions)
    sums = (feature.masked_fill(weights == 0, 0.0) * weights).sum(positions)
    return (sums / total.masked_fill(total == 0, 1.0)).to(feature.dtype)


def check_mask(op: str, feature: Tensor, layout: Layout, pool: Pool, mask: Tensor) -> None:
    """Refuse a mask that does not fit the features."""
    if not isinstance(mask, Tensor):
        raise no_tensor(op, "mask", mask)
    if pool != "mean" or feature.ndim == 2:
        what = f"pool {pool!r}" if pool != "mean" else f"features of shape {tuple(feature.shape)}"
        raise ValueError(f"{op}: a mask has no meaning for {what}; leave it out, or pool positions with pool='mean'")
    shape = feature.shape[:1] + (feature.shape[2:] if layout == "channels_first" else feature.shape[1:-1])
    if mask.shape != shape:
        raise ValueError(
            f"{op}: mask has shape {tuple(mask.shape)} for features {tuple(feature.shape)} in layout {layout}; "
            f"give {tuple(shape)}"
        )
    if mask.is_complex():
        raise TypeError(f"{op}: mask is {mask.dtype}; give bool, or weights of a real dtype")
    if mask.device != feature.device:
        raise ValueError(f"{op}: mask is on {mask.device} but features on {feature.device}; move one")
