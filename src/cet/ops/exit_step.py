"""The whole exit step: gate and compaction, reading the features once where they are what is compacted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cet.heads import Layout, Pool
from cet.ops.backend import is_tracing, kernels_for, needs_grad
from cet.ops.compact import Compaction, check_rows, compact, move, split
from cet.ops.exit_gate import DTYPES, check_decision, check_head, exit_gate, fused_cpp, prefers_gemm
from cet.policy import ScoreName

# Below, the features are still in cache when they are compacted, and rows that all stay need not be copied.
_FUSED_BYTES = 1 << 20


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
) -> tuple[Tensor, Tensor, Compaction]:
    """:func:`cet.ops.exit_gate`, then :func:`cet.ops.compact` of ``tensors`` by its flags.

    Where the features themselves are one of ``tensors`` and larger than a cache, each row is moved right after its gate,
    and is not read again; their new tensor then has the capacity of the old one.

    Returns:
        Logits ``(B, K)``, scores ``(B,)`` float32, and what :func:`cet.ops.compact` returns.

    Raises:
        ValueError, TypeError: as these two do.
    """
    if dims is None:
        dims = (0,) * len(tensors)
    own = next((i for i, tensor in enumerate(tensors) if tensor is features and dims[i] == 0), None)
    if own is not None and not is_tracing() and _fits_fused(features, weight, bias):
        check_head(features, weight, bias, layout, pool)
        check_decision("exit_step", score, threshold, temperature)
        check_rows("exit_step", features.shape[0], features.device, tensors, dims)
        given = (features, weight, *tensors) if bias is None else (features, weight, bias, *tensors)
        kernels = kernels_for("exit_step", given)
        if kernels is not None and not needs_grad(given):
            survivors = torch.empty_like(features)
            order = features.new_empty((features.shape[0],), dtype=torch.int64)
            logits, scores, _, count = fused_cpp(
                kernels, features, weight, bias, layout, pool, score, threshold, temperature, survivors, order
            )
            staying, leaving = split(order, count)
            others = [i for i in range(len(tensors)) if i != own]
            moved = move(kernels, [tensors[i] for i in others], [dims[i] for i in others], staying)
            moved.insert(own, survivors.narrow(0, 0, count))
            return logits, scores, Compaction(staying, leaving, moved)
    logits, scores, leaves = exit_gate(
        features, weight, bias, layout=layout, pool=pool, score=score, threshold=threshold, temperature=temperature
    )
    return logits, scores, compact(leaves, tensors, dims)


def _fits_fused(features: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel that moves rows on the way serves: rows in one piece of memory, and worth it."""
    return (
        features.numel() * features.element_size() >= _FUSED_BYTES
        and features.dtype in DTYPES
        and weight.ndim == 2
        and not prefers_gemm(features.shape[0], weight)
        and not torch.is_autocast_enabled("cpu")
        and (
            features.is_contiguous()
            or (features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last))
        )
    )
