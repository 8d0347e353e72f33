"""Stage, exit step, compact, next stage, on any device; on a GPU the host waits at each exit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cet.model.heads import ExitHead
from cet.ops.compact import Compaction, compact, scatter_rows
from cet.ops.exit_gate import exit_score, gate
from cet.ops.exit_step import exit_step
from cet.partition.stages import StagedProgram
from cet.runtime.policy import ExitPolicy


class _Answers:
    """Collects the answers of the rows as they leave, at the positions that the rows had in the batch."""

    def __init__(self, batch_size: int, final: int, like: Tensor, with_scores: bool) -> None:
        self.logits = like.new_empty((batch_size, like.shape[1]))
        self.exit_index = self.scores = None
        if with_scores:
            self.exit_index = like.new_full((batch_size,), final, dtype=torch.int64)
            self.scores = like.new_empty((batch_size,), dtype=torch.float32)

    def put(self, leaving: Tensor, rows: Tensor | None, logits: Tensor, exit_index: int, scores: Tensor | None) -> None:
        """Answer the rows ``leaving`` of those on their way, which are the rows ``rows`` of the batch."""
        scatter_rows(self.logits, logits, leaving, rows)
        if self.exit_index is not None and self.scores is not None and scores is not None:
            self.exit_index.index_fill_(0, leaving if rows is None else rows[leaving], exit_index)
            scatter_rows(self.scores, scores, leaving, rows)


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
        held = [index for index, dim in enumerate(stage.row_dims) if dim is not None]
        row_dims = [dim for dim in stage.row_dims if dim is not None]
        logits, gate_scores, (staying, leaving, moved) = _exit_step(
            head, feature, [values[index] for index in held], row_dims, policy, k, threshold
        )
        if leaving.shape[0] == 0:
            continue
        if leaving.shape[0] == batch_size:
            exit_index = leaving.new_full((batch_size,), k) if with_scores else None
            return logits, exit_index, gate_scores if with_scores else None
        if answers is None:
            answers = _Answers(batch_size, final, logits, with_scores)
        answers.put(leaving, rows, logits, k, gate_scores if with_scores else None)
        n = staying.shape[0]
        if n == 0:
            return answers.logits, answers.exit_index, answers.scores
        rows = staying if rows is None else rows[staying]
        values = list(values)
        for index, tensor in zip(held, moved, strict=True):
            values[index] = tensor
    logits = program.stages[final].run(n, *sizes, *values)
    final_scores = exit_score(logits, policy.score, policy.temperature(final)) if with_scores else None
    if answers is None or rows is None:
        return logits, logits.new_full((n,), final, dtype=torch.int64) if with_scores else None, final_scores
    answers.put(torch.arange(n, device=rows.device), rows, logits, final, final_scores)
    return answers.logits, answers.exit_index, answers.scores


def _exit_step(
    head: nn.Module,
    feature: Tensor,
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    policy: ExitPolicy,
    exit_index: int,
    threshold: float,
) -> tuple[Tensor, Tensor, Compaction]:
    """Logits and scores of the rows at an exit, and the tensors of those that stay; fused where the head allows it."""
    temperature = policy.temperature(exit_index)
    if type(head) is ExitHead and head.is_plain:
        layout, pool = head.spec.layout, head.spec.pool
        assert layout is not None
        return exit_step(
            feature,
            head.linear.weight,
            head.linear.bias,
            tensors,
            dims,
            layout=layout,
            pool=pool,
            score=policy.score,
            threshold=threshold,
            temperature=temperature,
        )
    logits = head(feature)
    scores, leaves = gate(logits, score=policy.score, threshold=threshold, temperature=temperature)
    return logits, scores, compact(leaves, tensors, dims)
