"""The exit step on padded batches: fixed capacity, fixed addresses, and counts that only the device knows.

A padded batch has ``B`` rows of which the first ``count`` are real. Nothing here waits for the device, and every result
is written where the caller gives room or depends on shapes alone, so that a CUDA graph can hold it. Counts, orders and
positions are int32. Order and count are those of :class:`cet.ops.compact.RowOrder`, and are not trimmed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cet.ops.compact import triton as triton_compact
from cet.ops.compact.definition import RowPairs, gather_and_scatter_rows_definition
from cet.ops.definitions import Layout, Pool, ScoreName, pool_features
from cet.ops.exit_gate import NOT_FUSED, triton
from cet.ops.exit_gate.definition import DTYPES, padded_gate_definition, padded_scores_definition
from cet.ops.registration import AUTOCAST, Choice, Operation, explained_by

__all__ = [
    "Answers",
    "PaddedExit",
    "RowPairs",
    "gather_and_scatter_rows",
    "padded_exit_step",
    "padded_gate",
    "padded_scores",
    "padded_step_of_logits",
]


class PaddedExit(NamedTuple):
    """Where the rows of a padded batch are decided.

    Attributes:
        decision: ``(2,)`` float32, the threshold and the temperature of :func:`cet.ops.gate`.
        exit_index: ``()`` int64, which exit this is.
        num_real: ``()`` int32, how many rows are real, at most ``B``.
        num_kept: ``()`` int32, receives how many of these are kept.
        positions: ``(B,)`` int32, where each row was in the batch.
        state: int64 zeros, at least ``2 + 2 B``, of use to kernels, which leave them zero; for one launch at a time.
    """

    decision: Tensor
    exit_index: Tensor
    num_real: Tensor
    num_kept: Tensor
    positions: Tensor
    state: Tensor


class Answers(NamedTuple):
    """Of a whole batch of ``N`` rows, by position: logits ``(N, K)``, scores ``(N,)`` float32, exits ``(N,)`` int64."""

    logits: Tensor
    scores: Tensor
    exits: Tensor

    def pairs(self, logits: Tensor, scores: Tensor, exit_index: Tensor) -> RowPairs:
        """What to scatter for rows that leave."""
        sources = logits.to(self.logits.dtype).contiguous(), scores, exit_index.expand(len(scores))
        return list(zip(sources, self, strict=True))


CountIsKnown = Callable[[], AbstractContextManager[None]]
"""Is entered once ``num_kept`` is on its way, and left when all else is."""

PADDED_SCORES = Operation(
    "padded_scores", definition=padded_scores_definition, kernels={"triton": triton.padded_scores}, dtypes=DTYPES
)
PADDED_GATE = Operation(
    "padded_gate", definition=padded_gate_definition, kernels={"triton": triton.padded_gate}, dtypes=DTYPES
)
GATHER_AND_SCATTER_ROWS = Operation(
    "gather_and_scatter_rows",
    definition=gather_and_scatter_rows_definition,
    kernels={"triton": triton_compact.gather_and_scatter_rows},
)


def padded_scores(logits: Tensor, decision: Tensor, count: Tensor, *, score: ScoreName) -> Tensor:
    """Scores ``(B,)`` float32 of the real rows, at the temperature of the decision; those of others are undefined."""
    scores: Tensor = PADDED_SCORES.run[PADDED_SCORES.dispatch((logits,)).backend](logits, decision, count, score)
    return scores


def _explain_padded_gate(
    logits: Tensor, decision: Tensor, count: Tensor, num_kept: Tensor, *, score: ScoreName, state: Tensor | None
) -> Choice:
    return PADDED_GATE.dispatch((logits,))


@explained_by(_explain_padded_gate)
def padded_gate(
    logits: Tensor,
    decision: Tensor,
    count: Tensor,
    num_kept: Tensor,
    *,
    score: ScoreName,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decide which of the real rows leave.

    Args:
        logits: ``(B, K)``, any floating dtype.
        decision: see :class:`PaddedExit`, as the next two.
        count: likewise.
        num_kept: likewise.
        score: which score, see :func:`cet.ops.exit_score`.
        state: see :class:`PaddedExit`; made for this call where there is none.

    Returns:
        The scores ``(B,)`` float32, those of rows that are not real undefined, and the order ``(2, B)`` int32.
    """
    gated: tuple[Tensor, Tensor] = PADDED_GATE.run[PADDED_GATE.dispatch((logits,)).backend](
        logits, decision, count, num_kept, score, state
    )
    return gated


def padded_step_of_logits(
    logits: Tensor,
    at: PaddedExit,
    kept: RowPairs,
    answers: Answers,
    *,
    score: ScoreName,
    count_is_known: CountIsKnown = nullcontext,
) -> None:
    """:func:`padded_gate`, then :func:`gather_and_scatter_rows` of ``kept`` and of the answers of rows that leave."""
    scores, order = padded_gate(logits, at.decision, at.num_real, at.num_kept, score=score, state=at.state)
    with count_is_known():
        exited = answers.pairs(logits, scores, at.exit_index)
        gather_and_scatter_rows(order, at.positions, at.num_kept, at.num_real, kept, exited)


def _by_pytorch(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    at: PaddedExit,
    kept: RowPairs,
    answers: Answers,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    count_is_known: CountIsKnown,
) -> None:
    logits = F.linear(pool_features(features, layout, pool), weight, bias)
    padded_step_of_logits(logits, at, kept, answers, score=score, count_is_known=count_is_known)


def _on_triton(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    at: PaddedExit,
    kept: RowPairs,
    answers: Answers,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    count_is_known: CountIsKnown,
) -> None:
    triton.padded_exit_step(features, weight, bias, at, kept, answers, layout, score)
    with count_is_known():
        pass


PADDED_EXIT_STEP = Operation("padded_exit_step", definition=_by_pytorch, kernels={"triton": _on_triton}, dtypes=DTYPES)
MATRIX_PRODUCT = "PyTorch's matrix product, the gate's kernel, then the row copy"


def _choose_exit_step(features: Tensor, weight: Tensor, bias: Tensor | None, pool: Pool, kept: RowPairs) -> Choice:
    choice = PADDED_EXIT_STEP.dispatch((features, weight) if bias is None else (features, weight, bias))
    if choice.backend == "triton":
        reason = None
        if torch.is_autocast_enabled(features.device.type):
            reason = AUTOCAST
        elif not triton.fuses(features, weight, pool):
            reason = NOT_FUSED
        elif moved := [tensor for pair in kept for tensor in pair]:
            rows = GATHER_AND_SCATTER_ROWS.dispatch(moved)  # which the fused kernel moves by the same code
            reason = "; ".join(rows.reasons) if rows.backend != "triton" else None
        if reason is not None:
            return Choice("padded_exit_step", "reference", MATRIX_PRODUCT).but(MATRIX_PRODUCT, reason)
    return choice


def _explain_padded_exit_step(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    at: PaddedExit,
    kept: RowPairs,
    answers: Answers,
    *,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    count_is_known: CountIsKnown,
) -> Choice:
    return _choose_exit_step(features, weight, bias, pool, kept)


@explained_by(_explain_padded_exit_step)
def padded_exit_step(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    at: PaddedExit,
    kept: RowPairs,
    answers: Answers,
    *,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    count_is_known: CountIsKnown = nullcontext,
) -> None:
    """Pool the features and classify them, as :func:`cet.ops.exit_gate`, then :func:`padded_step_of_logits`.

    On Triton in one launch that reads the features from memory once: the rows that go on are copied from the cache.
    """
    PADDED_EXIT_STEP.run[_choose_exit_step(features, weight, bias, pool, kept).backend](
        features, weight, bias, at, kept, answers, layout, pool, score, count_is_known
    )


def _explain_rows(
    order: Tensor | None,
    positions: Tensor,
    num_kept: Tensor | None,
    count: Tensor,
    kept: RowPairs,
    exited: RowPairs,
) -> Choice:
    tensors = (positions, *(tensor for pair in (*kept, *exited) for tensor in pair))
    return GATHER_AND_SCATTER_ROWS.dispatch(tensors)


@explained_by(_explain_rows)
def gather_and_scatter_rows(
    order: Tensor | None,
    positions: Tensor,
    num_kept: Tensor | None,
    count: Tensor,
    kept: RowPairs,
    exited: RowPairs,
) -> None:
    """Gather the kept rows, and scatter those that leave to where they were in the batch, in one launch.

    ``target[j] = source[order[0, j]]`` for ``j < num_kept`` and each pair of ``kept``; ``target[positions[i]] =
    source[i]`` for ``i = order[1, j]``, ``j < count - num_kept`` and each pair of ``exited``. Nothing else is written.

    Args:
        order: ``(2, B)`` int32, from :func:`padded_gate`; None where no row is kept.
        positions: ``(B,)`` int32, where each row of the padded batch was in the batch.
        num_kept: ``()`` int32, None where no row is kept.
        count: ``()`` int32.
        kept: pairs of source ``(B, ...)`` and target ``(>= B, ...)``, of one dtype. A row is one block of memory, laid
            out alike in both; the sources may be expanded along the rows. No source shares memory with a target.
        exited: likewise, with targets that have a row for each position.
    """
    backend = _explain_rows(order, positions, num_kept, count, kept, exited).backend
    GATHER_AND_SCATTER_ROWS.run[backend](order, positions, num_kept, count, kept, exited)
