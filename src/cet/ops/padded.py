"""The exit step on padded batches: fixed capacity, fixed addresses, and counts that only the device knows.

A padded batch has ``B`` rows of which the first ``count`` are real. Nothing here waits for the device, and every result
is written where the caller says or depends on shapes alone, so that a CUDA graph can hold it. Counts, orders and
positions are int32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cet.ops.backend import chosen_backend, cuda_extension, runs_on_triton, triton_kernels
from cet.ops.definitions import Layout, Pool, ScoreName, pool_features
from cet.ops.exit_gate import DTYPES, score_reference

RowPairs = Sequence[tuple[Tensor, Tensor]]


def padded_gate_reference(
    logits: Tensor, decision: Tensor, count: Tensor, staying: Tensor, score: ScoreName
) -> tuple[Tensor, Tensor]:
    """The definition of :func:`padded_gate`."""
    threshold, temperature = decision
    scores = score_reference(logits, score, temperature)
    leaves = scores <= threshold if score == "entropy" else scores >= threshold
    is_real = torch.arange(len(leaves), device=leaves.device) < count
    staying.copy_((is_real & ~leaves).sum())
    # False sorts before true: those that stay, then those that leave, then padding.
    return scores, torch.where(is_real, leaves.int(), 2).argsort(stable=True).int()


def padded_gate(
    logits: Tensor, decision: Tensor, count: Tensor, staying: Tensor, *, score: ScoreName
) -> tuple[Tensor, Tensor]:
    """Decide which of the real rows leave.

    Args:
        logits: ``(B, K)``, any floating dtype.
        decision: ``(2,)`` float32, the threshold and the temperature of :func:`cet.ops.gate`.
        count: ``()`` int32, how many rows are real, at most ``B``.
        staying: ``()`` int32, receives how many of these stay.
        score: which score, see :func:`cet.ops.exit_score`.

    Returns:
        The scores ``(B,)`` float32, and an order ``(B,)`` int32 of the rows: the real ones that stay, ascending; the
        real ones that leave, ascending; the others, whose scores are not defined.
    """
    if runs_on_triton("padded_gate", (logits,), DTYPES):
        gated: tuple[Tensor, Tensor] = triton_kernels("exit_gate").padded_gate(logits, decision, count, staying, score)
        return gated
    return padded_gate_reference(logits, decision, count, staying, score)


def padded_exit_gate(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    decision: Tensor,
    count: Tensor,
    staying: Tensor,
    *,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool the features and classify them, as :func:`cet.ops.exit_gate`, then :func:`padded_gate`.

    Returns:
        Logits ``(B, K)`` in the dtype of the features, scores and order. Those of rows that are not real are undefined.
    """
    head = (weight,) if bias is None else (weight, bias)
    on_triton = runs_on_triton("padded_exit_gate", (features, *head), DTYPES)
    if on_triton and not torch.is_autocast_enabled(features.device.type):
        gated: tuple[Tensor, Tensor, Tensor] = triton_kernels("exit_gate").padded_exit_gate(
            features, weight, bias, decision, count, staying, layout, pool, score
        )
        return gated
    logits = F.linear(pool_features(features, layout, pool), weight, bias)
    return logits, *padded_gate(logits, decision, count, staying, score=score)


def move_rows_reference(
    order: Tensor, positions: Tensor, staying: Tensor, count: Tensor, stay: RowPairs, leave: RowPairs
) -> None:
    """The definition of :func:`move_rows`."""
    place = torch.arange(len(order), device=order.device)
    for source, target in stay:
        kept = target[: len(order)]
        kept.copy_(torch.where(_per_row(place < staying, source), source[order], kept))
    is_leaving = (staying <= place) & (place < count)
    for source, target in leave:
        capacity = len(target)
        # Rows that do not leave share one entry behind the last, where it does not matter who comes second.
        entry = torch.where(is_leaving, positions[order], capacity).long()
        origin = order.new_full((capacity + 1,), -1).scatter(0, entry, order)[:-1]
        target.copy_(torch.where(_per_row(origin >= 0, source), source[origin.clamp(min=0)], target))


def _per_row(flags: Tensor, rows: Tensor) -> Tensor:
    return flags.view(-1, *(1,) * (rows.ndim - 1))


def _move_rows_cuda(
    extension: Any,
    order: Tensor,
    positions: Tensor,
    staying: Tensor,
    count: Tensor,
    stay: RowPairs,
    leave: RowPairs,
) -> None:
    moves = []
    for pairs, leaves in ((stay, False), (leave, True)):
        for source, target in pairs:
            itemsize = source.element_size()
            strides = source.stride(0) * itemsize, target.stride(0) * itemsize
            row_bytes = math.prod(source.shape[1:]) * itemsize
            moves.append((source.data_ptr(), target.data_ptr(), *strides, row_bytes, leaves))
    addresses = [tensor.data_ptr() for tensor in (order, positions, staying, count)]
    stream = torch.cuda.current_stream(order.device).cuda_stream
    extension.move_rows(order.device.index, stream, moves, *addresses, len(order))


def move_rows(
    order: Tensor, positions: Tensor, staying: Tensor, count: Tensor, stay: RowPairs, leave: RowPairs
) -> None:
    """Move the rows that stay together, and those that leave to where they were in the batch.

    ``target[j] = source[order[j]]`` for ``j < staying`` and each pair of ``stay``; ``target[positions[order[j]]] =
    source[order[j]]`` for ``staying <= j < count`` and each pair of ``leave``. Nothing else is written.

    Args:
        order: ``(B,)`` int32, from :func:`padded_gate`.
        positions: ``(B,)`` int32, where each row of the padded batch was in the batch.
        staying: ``()`` int32.
        count: ``()`` int32.
        stay: pairs of source ``(B, ...)`` and target ``(>= B, ...)``, of one dtype. A row is one block of memory, laid
            out alike in both; the sources may be expanded along the rows. No source shares memory with a target.
        leave: likewise, with targets that have a row for each position.
    """
    extension = cuda_extension() if order.is_cuda and chosen_backend() is None else None
    if extension is not None:
        _move_rows_cuda(extension, order, positions, staying, count, stay, leave)
    elif runs_on_triton("move_rows", (order, *(tensor for pair in (*stay, *leave) for tensor in pair))):
        triton_kernels("compact").move_rows(order, positions, staying, count, stay, leave)
    else:
        move_rows_reference(order, positions, staying, count, stay, leave)
