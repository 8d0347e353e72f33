"""The whole exit step: gate and compaction, reading the features once where they are what is compacted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cet.ops.backend import chosen_backend, is_tracing, kernels_for, needs_grad, runs_on_triton, triton_kernels
from cet.ops.compact import KEPT_MEMORY, Compaction, check_rows, compact, move, split
from cet.ops.definitions import Layout, Pool, ScoreName, check_mask, pool_features
from cet.ops.exit_gate import DTYPES, check_decision, check_head, exit_gate, fused_cpp, prefers_gemm

_MUCH_ROOM = 8


def exit_step(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tensors: Sequence[Tensor],
    dims: Sequence[int] | None = None,
    *,
    layout: Layout = "channels_first",
    pool: Pool = "mean",
    score: ScoreName = "entropy",
    threshold: float,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Compaction]:
    """:func:`cet.ops.exit_gate`, then :func:`cet.ops.compact` of ``tensors`` by its flags.

    Where the features themselves are one of ``tensors``, each row is moved right after its gate, while it is in cache;
    their new tensor may then be a part of one with room for up to eight times as many rows. Masked features are not
    moved on the way.

    Returns:
        Logits ``(B, K)``, scores ``(B,)`` float32, and what :func:`cet.ops.compact` returns.

    Raises:
        ValueError, TypeError: as these two do.
    """
    check_head(features, weight, bias, layout, pool)
    check_decision("exit_step", score, threshold, temperature)
    if mask is not None:
        check_mask("exit_step", features, layout, pool, mask)
        features = pool_features(features, layout, pool, mask)
    if dims is None:
        dims = (0,) * len(tensors)
    rows = features.shape[0]
    check_rows("exit_step", rows, features.device, tensors, dims)
    head = (weight,) if bias is None else (weight, bias)
    if (
        chosen_backend() == "triton"
        and not is_tracing()
        and features.dtype in DTYPES
        and runs_on_triton("exit_step", (features, *head, *tensors))
        and not needs_grad((features, *head, *tensors))
        and not torch.is_autocast_enabled(features.device.type)
    ):
        logits, scores, order, on_device = triton_kernels("exit_gate").exit_gate_and_order(
            features, weight, bias, layout, pool, score, threshold, temperature
        )
        return logits, scores, triton_kernels("compact").compact_by(order, on_device, tensors, dims)
    own = _index_of(features, tensors)
    kernels = None
    if not is_tracing() and not prefers_gemm(rows, weight) and not torch.is_autocast_enabled("cpu"):
        if own is None:
            head = (features, *head)
        if features.dtype in DTYPES and not needs_grad((features, *head)):
            kernels = kernels_for("exit_step", (*head, *tensors))
    if kernels is None:
        logits, scores, leaves = exit_gate(
            features, weight, bias, layout=layout, pool=pool, score=score, threshold=threshold, temperature=temperature
        )
        return logits, scores, compact(leaves, tensors, dims)

    if own is not None and not (dims[own] == 0 and _moves_on_the_way(features, pool)):
        own = None
    survivors = None if own is None else _room_for_survivors(features)
    order = features.new_empty(rows, dtype=torch.int64)
    logits, scores, count = fused_cpp(
        kernels,
        features,
        weight,
        bias,
        layout,
        pool,
        score,
        threshold,
        temperature,
        order=order,
        survivors=survivors,
    )
    staying, leaving = split(order, count)
    if count == rows:
        return logits, scores, Compaction(staying, leaving, list(tensors))
    if own is None or survivors is None or count > survivors.shape[0]:
        return logits, scores, Compaction(staying, leaving, move(kernels, tensors, dims, staying))
    others = [i for i in range(len(tensors)) if i != own]
    moved = move(kernels, [tensors[i] for i in others], [dims[i] for i in others], staying) if others else []
    kept = survivors[:count]
    # Few survivors do not hold on to the memory of many.
    moved.insert(own, kept.clone() if _MUCH_ROOM * count <= survivors.shape[0] else kept)
    return logits, scores, Compaction(staying, leaving, moved)


def _index_of(features: Tensor, tensors: Sequence[Tensor]) -> int | None:
    for index, tensor in enumerate(tensors):
        if tensor is features:
            return index
    return None


def _moves_on_the_way(features: Tensor, pool: Pool) -> bool:
    """Whether each row of the features is one piece of memory, and moving it right after its gate pays."""
    if features.shape[0] == 1:
        return False  # it leaves, or it stays where it is
    if pool == "first" and features.ndim > 2:
        return False  # the rest of the row is not in cache
    return features.is_contiguous() or (
        features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last)
    )


def _room_for_survivors(features: Tensor) -> Tensor:
    """Memory for all rows; where kept memory has room for half of them or more, only for so many.

    Fresh memory would cost more than moving the rows afterwards, if more should stay.
    """
    rows = features.shape[0]
    size = features.numel() * features.element_size()
    if KEPT_MEMORY < size <= 2 * KEPT_MEMORY:
        features = features[: rows * KEPT_MEMORY // size]
    return torch.empty_like(features)
