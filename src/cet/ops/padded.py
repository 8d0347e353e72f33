"""The exit step on padded batches: fixed capacity, fixed addresses, and counts that only the device knows.

A padded batch has ``B`` rows of which the first ``count`` are real. Nothing here waits for the device, and every result
is written where the caller gives room or depends on shapes alone, so that a CUDA graph can hold it. Counts, orders and
positions are int32. Order and count are those of :class:`cet.ops.compact.RowOrder`, and are not trimmed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cet.ops.backend import chosen_backend, why_no_cuda_kernels
from cet.ops.compact import cuda
from cet.ops.compact import triton as triton_compact
from cet.ops.compact.definition import RowPairs, gather_and_scatter_rows_definition
from cet.ops.definitions import Layout, Pool, ScoreName, check_mask, pool_features
from cet.ops.exit_gate import BY_PYTORCH, triton
from cet.ops.exit_gate.definition import DTYPES, padded_gate_definition
from cet.ops.registration import AUTOCAST, MASKED, Choice, Operation, explained_by

__all__ = ["RowPairs", "gather_and_scatter_rows", "padded_exit_gate", "padded_gate"]


def _by_pytorch(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    decision: Tensor,
    count: Tensor,
    num_kept: Tensor,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(pool_features(features, layout, pool), weight, bias)
    return logits, *padded_gate(logits, decision, count, num_kept, score=score)


PADDED_GATE = Operation(
    "padded_gate", definition=padded_gate_definition, kernels={"triton": triton.padded_gate}, dtypes=DTYPES
)
PADDED_EXIT_GATE = Operation(
    "padded_exit_gate", definition=_by_pytorch, kernels={"triton": triton.padded_exit_gate}, dtypes=DTYPES
)
GATHER_AND_SCATTER_ROWS = Operation(
    "gather_and_scatter_rows",
    definition=gather_and_scatter_rows_definition,
    kernels={"triton": triton_compact.gather_and_scatter_rows},
)


def _explain_padded_gate(
    logits: Tensor, decision: Tensor, count: Tensor, num_kept: Tensor, *, score: ScoreName
) -> Choice:
    return PADDED_GATE.dispatch((logits,))


@explained_by(_explain_padded_gate)
def padded_gate(
    logits: Tensor, decision: Tensor, count: Tensor, num_kept: Tensor, *, score: ScoreName
) -> tuple[Tensor, Tensor]:
    """Decide which of the real rows leave.

    Args:
        logits: ``(B, K)``, any floating dtype.
        decision: ``(2,)`` float32, the threshold and the temperature of :func:`cet.ops.gate`.
        count: ``()`` int32, how many rows are real, at most ``B``.
        num_kept: ``()`` int32, receives how many of these are kept.
        score: which score, see :func:`cet.ops.exit_score`.

    Returns:
        The scores ``(B,)`` float32, and an order ``(B,)`` int32 of the rows: the real ones that are kept, ascending;
        the real ones that leave, ascending; the others, whose scores are not defined.
    """
    gated: tuple[Tensor, Tensor] = PADDED_GATE.run[PADDED_GATE.dispatch((logits,)).backend](
        logits, decision, count, num_kept, score
    )
    return gated


def _choose_exit_gate(features: Tensor, weight: Tensor, bias: Tensor | None) -> Choice:
    choice = PADDED_EXIT_GATE.dispatch((features, weight) if bias is None else (features, weight, bias))
    if choice.backend == "triton" and torch.is_autocast_enabled(features.device.type):
        return Choice("padded_exit_gate", "reference", BY_PYTORCH).but(BY_PYTORCH, AUTOCAST)
    return choice


def _explain_padded_exit_gate(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    decision: Tensor,
    count: Tensor,
    num_kept: Tensor,
    *,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    mask: Tensor | None,
) -> Choice:
    choice = _choose_exit_gate(features, weight, bias)
    return choice if mask is None else choice.but(choice.way, MASKED)


@explained_by(_explain_padded_exit_gate)
def padded_exit_gate(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    decision: Tensor,
    count: Tensor,
    num_kept: Tensor,
    *,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool the features and classify them, as :func:`cet.ops.exit_gate`, then :func:`padded_gate`.

    Returns:
        Logits ``(B, K)`` in the dtype of the features, scores and order. Those of rows that are not real are undefined.
    """
    if mask is not None:
        check_mask("padded_exit_gate", features, layout, pool, mask)
        features = pool_features(features, layout, pool, mask)
    gated: tuple[Tensor, Tensor, Tensor] = PADDED_EXIT_GATE.run[_choose_exit_gate(features, weight, bias).backend](
        features, weight, bias, decision, count, num_kept, layout, pool, score
    )
    return gated


def _choose_rows(order: Tensor, kept: RowPairs, exited: RowPairs) -> Choice:
    reason = None
    if order.is_cuda and chosen_backend() is None:
        reason = why_no_cuda_kernels(order.device)
        if reason is None:
            return _CUDA
    choice = GATHER_AND_SCATTER_ROWS.dispatch((order, *(tensor for pair in (*kept, *exited) for tensor in pair)))
    return choice if reason is None else choice.but(choice.way, f"backend 'cuda' {reason}")


_CUDA = Choice("gather_and_scatter_rows", "cuda", "kernel")


def _explain_rows(
    order: Tensor, positions: Tensor, num_kept: Tensor, count: Tensor, kept: RowPairs, exited: RowPairs
) -> Choice:
    return _choose_rows(order, kept, exited)


@explained_by(_explain_rows)
def gather_and_scatter_rows(
    order: Tensor, positions: Tensor, num_kept: Tensor, count: Tensor, kept: RowPairs, exited: RowPairs
) -> None:
    """Gather the kept rows, and scatter those that leave to where they were in the batch, in one launch.

    ``target[j] = source[order[j]]`` for ``j < num_kept`` and each pair of ``kept``; ``target[positions[order[j]]] =
    source[order[j]]`` for ``num_kept <= j < count`` and each pair of ``exited``. Nothing else is written.

    Args:
        order: ``(B,)`` int32, from :func:`padded_gate`.
        positions: ``(B,)`` int32, where each row of the padded batch was in the batch.
        num_kept: ``()`` int32.
        count: ``()`` int32.
        kept: pairs of source ``(B, ...)`` and target ``(>= B, ...)``, of one dtype. A row is one block of memory, laid
            out alike in both; the sources may be expanded along the rows. No source shares memory with a target.
        exited: likewise, with targets that have a row for each position.
    """
    choice = _choose_rows(order, kept, exited)
    run = cuda.gather_and_scatter_rows if choice is _CUDA else GATHER_AND_SCATTER_ROWS.run[choice.backend]
    run(order, positions, num_kept, count, kept, exited)
