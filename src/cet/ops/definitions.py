"""Words that the operations share: where features hold their channels, how positions are pooled, what is scored."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Layout = Literal["channels_first", "channels_last"]
Pool = Literal["mean", "first"]
ScoreName = Literal["entropy", "confidence", "margin"]

SCORE_NAMES: tuple[ScoreName, ...] = get_args(ScoreName)


def pool_features(feature: Tensor, layout: Layout, pool: Pool) -> Tensor:
    """Features ``(B, C, ...)`` or ``(B, ..., C)`` to ``(B, C)``; those of shape ``(B, C)`` are returned as they are."""
    if feature.ndim == 2:
        return feature
    if pool == "first":
        return feature[:, 0]
    if layout == "channels_first":
        return feature.mean(2) if feature.ndim == 3 else feature.flatten(2).mean(2)
    return feature.mean(1) if feature.ndim == 3 else feature.flatten(1, -2).mean(1)
