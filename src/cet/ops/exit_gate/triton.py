"""The gate on Triton's kernels, which are imported when a call needs them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from cet.ops.compact.definition import RowOrder, RowPairs
from cet.ops.definitions import Layout, Pool, ScoreName, pool_features

if TYPE_CHECKING:
    from cet.kernels.compact import RowMove
    from cet.kernels.exit_gate import Gate
    from cet.ops.padded import Answers, PaddedExit


def fuses(features: Tensor, weight: Tensor, pool: Pool) -> bool:
    """Whether one kernel takes such features and head; else PyTorch multiplies, and the gate takes its logits."""
    from cet.kernels import exit_gate as kernels

    return bool(kernels.fuses(features, weight, pool))


def gate(logits: Tensor, score: ScoreName, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
    """See :func:`cet.ops.gate`."""
    from cet.kernels import exit_gate as kernels

    exit_mask = logits.new_empty(logits.shape[0], dtype=torch.bool)
    where = _decided(logits, threshold, temperature, exit_mask_ptr=exit_mask)
    kernels.gate_into(logits, score, where)
    return where.scores_ptr, exit_mask


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
    exit_mask = features.new_empty(features.shape[0], dtype=torch.bool)
    where = _decided(features, threshold, temperature, exit_mask_ptr=exit_mask)
    return _run(features, weight, bias, layout, pool, score, where), where.scores_ptr, exit_mask


def exit_gate_and_order(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    threshold: float,
    temperature: float,
    *,
    moves: Sequence[tuple[RowMove, int]],
) -> tuple[Tensor, Tensor, RowOrder]:
    """As :func:`exit_gate`, but with the rows in order instead of the exit mask, and with moves of kept rows; in one
    launch where it fuses."""
    row_order = RowOrder.empty(features)
    order, num_kept = row_order
    where = _decided(features, threshold, temperature, order_ptr=order, num_kept_ptr=num_kept)
    logits = _run(features, weight, bias, layout, pool, score, where, moves)
    return logits, where.scores_ptr, row_order


def padded_scores(logits: Tensor, decision: Tensor, count: Tensor, score: ScoreName) -> Tensor:
    """See :func:`cet.ops.padded.padded_scores`."""
    from cet.kernels import exit_gate as kernels

    where = kernels.Gate(_new_scores(logits), decision_ptr=decision, count_ptr=count)
    kernels.gate_into(logits, score, where)
    scores: Tensor = where.scores_ptr
    return scores


def padded_gate(
    logits: Tensor, decision: Tensor, count: Tensor, num_kept: Tensor, score: ScoreName, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`cet.ops.padded.padded_gate`."""
    from cet.kernels import exit_gate as kernels

    order = num_kept.new_empty(2, logits.shape[0])
    where = kernels.Gate(
        _new_scores(logits),
        decision_ptr=decision,
        count_ptr=count,
        num_kept_ptr=num_kept,
        order_ptr=order,
        state_ptr=state,
    )
    kernels.gate_into(logits, score, where)
    return where.scores_ptr, order


def padded_exit_step(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    at: PaddedExit,
    kept: RowPairs,
    answers: Answers,
    layout: Layout,
    score: ScoreName,
) -> None:
    """See :func:`cet.ops.padded.padded_exit_step`, of features and a head that it fuses."""
    from cet.kernels import compact
    from cet.kernels import exit_gate as kernels

    moves = compact.moves_of(kept)
    rows = features.shape[0]
    where = kernels.Gate(
        answers.scores,
        decision_ptr=at.decision,
        count_ptr=at.num_real,
        state_ptr=at.state,
        num_kept_ptr=at.num_kept,
        order_ptr=at.num_kept.new_empty(2, rows) if len(moves) > compact.MAX_MOVES else None,
        logits_ptr=answers.logits,
        positions_ptr=at.positions,
        exits_ptr=answers.exits,
        exit_index_ptr=at.exit_index,
    )
    kernels.exit_gate_into(features, weight, bias, layout, score, where, moves[: compact.MAX_MOVES])
    if where.order_ptr is not None:
        others = moves[compact.MAX_MOVES :]
        compact.moves_into(others, [], rows, where.order_ptr, None, at.num_kept, None)


def _decided(like: Tensor, threshold: float, temperature: float, **where: Tensor) -> Gate:
    """Of every row, by numbers of one kind: whole ones would be compiled for."""
    from cet.kernels import exit_gate as kernels

    return kernels.Gate(_new_scores(like), float(threshold), float(temperature), **where)


def _new_scores(like: Tensor) -> Tensor:
    return like.new_empty(like.shape[0], dtype=torch.float32)


def _run(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    layout: Layout,
    pool: Pool,
    score: ScoreName,
    where: Gate,
    moves: Sequence[tuple[RowMove, int]] = (),
) -> Tensor:
    from cet.kernels import compact
    from cet.kernels import exit_gate as kernels

    if kernels.fuses(features, weight, pool):
        logits = features.new_empty(features.shape[0], weight.shape[0])
        on_the_way = moves[: compact.MAX_MOVES]
        kernels.exit_gate_into(features, weight, bias, layout, score, where._replace(logits_ptr=logits), on_the_way)
        moves = moves[compact.MAX_MOVES :]
    else:
        logits = F.linear(pool_features(features, layout, pool), weight, bias)
        kernels.gate_into(logits, score, where)
    if moves:
        rows = features.shape[0]
        compact.moves_into(moves, [], rows, where.order_ptr, None, where.num_kept_ptr, None)
    return logits
