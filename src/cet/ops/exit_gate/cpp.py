"""The gate on the compiled kernels: allocates the outputs and launches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cet.ops import backend
from cet.ops.definitions import SCORE_NAMES, Layout, Pool, ScoreName
from cet.ops.exit_gate.definition import DTYPES

_SCORES = {name: number for number, name in enumerate(SCORE_NAMES)}


def gate(logits: Tensor, score: ScoreName, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    """See :func:`cet.ops.gate`."""
    scores = logits.new_empty(logits.shape[0], dtype=torch.float32)
    exit_mask = logits.new_empty(logits.shape[0], dtype=torch.bool)
    backend.kernels().gate(  # type: ignore[union-attr] # dispatch has seen them
        logits.data_ptr(),
        DTYPES[logits.dtype],
        logits.shape,
        logits.stride(),
        _SCORES[score],
        threshold,
        temperature,
        scores.data_ptr(),
        exit_mask.data_ptr(),
        torch.get_num_threads(),
    )
    return scores, exit_mask


def exit_gate(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    threshold: float,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`cet.ops.exit_gate`."""
    rows = features.shape[0]
    if not prefers_gemm(rows, weight):
        exit_mask = features.new_empty(rows, dtype=torch.bool)
        logits, scores, _ = fused(
            features, weight, bias, layout, pool, score, threshold, temperature, exit_mask=exit_mask
        )
        return logits, scores, exit_mask
    pooled = features
    if features.ndim > 2:
        pooled = features.new_empty((rows, weight.shape[1]))
        backend.kernels().pool(  # type: ignore[union-attr]
            features.data_ptr(),
            DTYPES[features.dtype],
            features.shape,
            features.stride(),
            layout == "channels_last",
            pool == "mean",
            pooled.data_ptr(),
            torch.get_num_threads(),
        )
    logits = F.linear(pooled, weight, bias)
    return logits, *gate(logits, score, threshold, temperature)


def prefers_gemm(rows: int, weight: Tensor) -> bool:
    """Whether torch's matrix product, which blocks for the caches, beats dot products on the way (measured).

    In bfloat16 torch multiplies by instructions of their own, four times as fast as in float32.
    """
    return rows >= 16 and weight.numel() >= (1 << 17 if weight.dtype is torch.bfloat16 else 1 << 22)


def fused(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    threshold: float,
    temperature: float,
    *,
    exit_mask: Tensor | None = None,
    order: Tensor | None = None,
    kept_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Logits and scores in one pass over the features, and the decision in one of two forms, or both.

    The exit mask is written to ``exit_mask``, ``(B,)`` bool. The positions of the kept rows, then those of the others,
    are written to ``order``, ``(B,)`` int64, and the last result is the number kept. With ``kept_rows`` too, in rows of
    the same layout, the kept rows are moved there while they are in cache, unless it has room for fewer.
    """
    rows, classes = features.shape[0], weight.shape[0]
    weight = weight.contiguous()
    bias = bias if bias is None else bias.contiguous()
    logits = features.new_empty(rows, classes)  # sizes as numbers: a tuple takes longer to parse
    scores = features.new_empty(rows, dtype=torch.float32)
    num_kept = backend.kernels().exit_gate(  # type: ignore[union-attr]
        features.data_ptr(),
        DTYPES[features.dtype],
        features.shape,
        features.stride(),
        layout == "channels_last",
        pool == "mean",
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        classes,
        logits.data_ptr(),
        _SCORES[score],
        threshold,
        temperature,
        scores.data_ptr(),
        0 if exit_mask is None else exit_mask.data_ptr(),
        0 if order is None else order.data_ptr(),
        0 if kept_rows is None else kept_rows.data_ptr(),
        0 if kept_rows is None else kept_rows.shape[0],
        torch.get_num_threads(),
    )
    return logits, scores, num_kept
