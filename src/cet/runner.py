"""Runs one batch through the stages: stage, exit step, compact, next stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cet.ops.compact import compact
from cet.ops.exit_gate import exit_gate, exit_score
from cet.policy import ExitPolicy
from cet.stages import StagedProgram


class _Answers:
    """Collects the answers of the rows as they leave, at the positions that the rows had in the batch."""

    def __init__(self, batch_size: int, final: int, like: Tensor, with_scores: bool) -> None:
        self.logits = like.new_empty((batch_size, like.shape[1]))
        self.exit_index = self.scores = None
        if with_scores:
            self.exit_index = like.new_full((batch_size,), final, dtype=torch.int64)
            self.scores = like.new_empty((batch_size,), dtype=torch.float32)

    def put(self, rows: Tensor, logits: Tensor, exit_index: int, scores: Tensor | None) -> None:
        self.logits.index_copy_(0, rows, logits.to(self.logits.dtype))
        if self.exit_index is not None and self.scores is not None and scores is not None:
            self.exit_index.index_fill_(0, rows, exit_index)
            self.scores.index_copy_(0, rows, scores)


def run_batch(
    program: StagedProgram,
    heads: Sequence[nn.Module],
    policy: ExitPolicy,
    leaves: Sequence[Any],
    batch_size: int,
    *,
    with_scores: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Answer every row of a batch of at least one.

    Rows that leave are written to the output at once; the others are compacted with everything that crosses the cut
    and go on as a smaller batch. A batch in which no row leaves is not copied.

    Returns:
        Logits ``(B, K)``, and with ``with_scores`` exit index ``(B,)`` int64 and score ``(B,)`` float32.
    """
    sizes = program.input_sizes(leaves)
    values: Sequence[Any] = [leaves[index] for index in program.entry]
    final = len(program.stages) - 1
    answers: _Answers | None = None
    rows: Tensor | None = None  # positions in the batch of the rows still on their way; None: all of them
    n = batch_size
    for k, (stage, head, threshold) in enumerate(zip(program.stages, heads, policy.thresholds, strict=False)):
        feature, *values = stage.run(n, *sizes, *values)
        if threshold is None:
            continue
        logits = head(feature)
        scores, leaves_now = exit_gate(
            logits, score=policy.score, threshold=threshold, temperature=policy.temperature(k)
        )
        leaving = leaves_now.nonzero().squeeze(1)
        if leaving.numel() == 0:
            continue
        if leaving.numel() == batch_size:
            exit_index = leaving.new_full((batch_size,), k) if with_scores else None
            return logits, exit_index, scores if with_scores else None
        if answers is None:
            answers = _Answers(batch_size, final, logits, with_scores)
        answers.put(
            leaving if rows is None else rows[leaving],
            logits.index_select(0, leaving),
            k,
            scores.index_select(0, leaving) if with_scores else None,
        )
        n -= leaving.numel()
        if n == 0:
            return answers.logits, answers.exit_index, answers.scores
        staying = leaves_now.logical_not().nonzero().squeeze(1)
        rows = staying if rows is None else rows[staying]
        values = _compact_values(staying, values, stage.row_dims)
    logits = program.stages[final].run(n, *sizes, *values)
    final_scores = exit_score(logits, policy.score, policy.temperature(final)) if with_scores else None
    if answers is None or rows is None:
        return logits, logits.new_full((n,), final, dtype=torch.int64) if with_scores else None, final_scores
    answers.put(rows, logits, final, final_scores)
    return answers.logits, answers.exit_index, answers.scores


def _compact_values(staying: Tensor, values: Sequence[Any], row_dims: Sequence[int | None]) -> list[Any]:
    """Compact the values that hold rows; hand on the others."""
    held = [index for index, dim in enumerate(row_dims) if dim is not None]
    compacted = list(values)
    moved = compact(staying, [values[i] for i in held], [dim for dim in row_dims if dim is not None])
    for index, tensor in zip(held, moved, strict=True):
        compacted[index] = tensor
    return compacted
