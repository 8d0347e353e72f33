"""Segment, exit step, compact, next segment, on any device; on a GPU the host waits at each exit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cet.ops.compact import scatter_rows
from cet.partition.stages import Program
from cet.runtime.exits import head_logits, score_exit, take_exit
from cet.runtime.policy import ExitPolicy
from cet.runtime.scores import Scorer
from cet.runtime.segments import segments_of

Answers = tuple[Tensor, Tensor | None, Tensor | None]
"""Logits ``(B, K)``; exit index ``(B,)`` int64 and score ``(B,)`` float32 where they are wanted."""


class _Answers:
    """Collects the answers of the rows as they leave, at the positions that the rows had in the batch."""

    def __init__(self, batch_size: int, final: int, like: Tensor, with_scores: bool) -> None:
        self.logits = like.new_empty((batch_size, like.shape[1]))
        self.exit_index = self.scores = None
        if with_scores:
            self.exit_index = like.new_full((batch_size,), final, dtype=torch.int64)
            self.scores = like.new_empty((batch_size,), dtype=torch.float32)

    def put(self, exited: Tensor, rows: Tensor | None, logits: Tensor, exit_index: int, scores: Tensor | None) -> None:
        """Answer the rows ``exited`` of those on their way, which are the rows ``rows`` of the batch."""
        scatter_rows(self.logits, logits, exited, rows)
        if self.exit_index is not None and self.scores is not None and scores is not None:
            self.exit_index.index_fill_(0, exited if rows is None else rows[exited], exit_index)
            scatter_rows(self.scores, scores, exited, rows)

    def all(self) -> Answers:
        return self.logits, self.exit_index, self.scores


def run_batch(
    program: Program,
    heads: Sequence[nn.Module],
    policy: ExitPolicy,
    inputs: Sequence[Any],
    batch_size: int,
    *,
    with_scores: bool,
) -> Answers:
    """Answer every row of a batch of at least one.

    Rows that leave are written to the output at once; the others are compacted with everything that crosses the cut
    and go on as a smaller batch. A batch in which no row leaves is not copied.
    """
    sizes = program.input_sizes(inputs)
    values: Sequence[Any] = program.entry_values(inputs)
    *segments, last = segments_of(program, policy.thresholds)
    answers: _Answers | None = None
    scorer = Scorer(policy.score)
    rows: Tensor | None = None  # positions in the batch of the rows still on their way; None: all of them
    n = batch_size
    for segment in segments:
        features, values = segment.run(n, sizes, values)
        k = segment.exit_index
        held = segment.held
        tensors = [values[index] for index in held]
        logits, gate_scores, (kept, exited, moved) = take_exit(
            heads[k], features, segment.mask(values), tensors, segment.held_dims, policy, k, scorer
        )
        if exited.shape[0] == 0:
            continue
        if exited.shape[0] == batch_size:
            exit_index = exited.new_full((batch_size,), k) if with_scores else None
            return logits, exit_index, gate_scores if with_scores else None
        if answers is None:
            answers = _Answers(batch_size, last.exit_index, logits, with_scores)
        answers.put(exited, rows, logits, k, gate_scores if with_scores else None)
        n = kept.shape[0]
        if n == 0:
            return answers.all()
        rows = kept if rows is None else rows[kept]
        for index, tensor in zip(held, moved, strict=True):
            values[index] = tensor
    logits, _ = last.run(n, sizes, values)
    final = last.exit_index
    final_scores = scorer(logits, policy.temperature(final)) if with_scores else None
    if answers is None or rows is None:
        return logits, logits.new_full((n,), final, dtype=torch.int64) if with_scores else None, final_scores
    answers.put(torch.arange(n, device=rows.device), rows, logits, final, final_scores)
    return answers.all()


def every_exit(
    program: Program, heads: Sequence[nn.Module], policy: ExitPolicy, inputs: Sequence[Any], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and scores of every exit for all rows, shallow first, as :func:`run_batch` computes them with all exits
    open."""
    sizes = program.input_sizes(inputs)
    values: Sequence[Any] = program.entry_values(inputs)
    *segments, last = segments_of(program, (0.0,) * (len(program.stages) - 1))
    scorer = Scorer(policy.score)
    for segment in segments:
        features, values = segment.run(batch_size, sizes, values)
        k = segment.exit_index
        yield score_exit(heads[k], features, segment.mask(values), policy, k, scorer)
    logits, _ = last.run(batch_size, sizes, values)
    yield logits, scorer(logits, policy.temperature(last.exit_index))


def run_prefix(
    program: Program, inputs: Sequence[Any], num_rows: int, last: int, heads: Mapping[int, nn.Module]
) -> None:
    """The stages up to exit ``last``, and some heads for all rows, without any decision: for those who time them."""
    sizes = program.input_sizes(inputs)
    values: Sequence[Any] = program.entry_values(inputs)
    for segment in segments_of(program, (0.0,) * (len(program.stages) - 1))[: last + 1]:
        features, values = segment.run(num_rows, sizes, values)
        if segment.exit_index in heads:
            head_logits(heads[segment.exit_index], features, segment.mask(values) if values else None)


def choose_answers(exit_logits: Sequence[Tensor], policy: ExitPolicy, *, with_scores: bool) -> Answers:
    """The answers of a batch whose logits are known at every exit, as those of a backbone that ran uncut."""
    *early, logits = exit_logits
    rows, final = logits.shape[0], len(early)
    answered = logits.clone()
    exit_index = logits.new_full((rows,), final, dtype=torch.int64)
    scorer = Scorer(policy.score)
    scores: Tensor | None = None
    on_their_way = torch.ones(rows, dtype=torch.bool, device=logits.device)
    for k, (at_exit, threshold) in enumerate(zip(early, policy.thresholds, strict=True)):
        if threshold is None:
            continue
        exit_scores, exit_mask = scorer.gate(at_exit, threshold, policy.temperature(k))
        leaving = on_their_way & exit_mask
        answered = torch.where(leaving[:, None], at_exit.to(answered.dtype), answered)
        exit_index[leaving] = k
        if with_scores:
            scores = exit_scores if scores is None else torch.where(on_their_way, exit_scores, scores)
        on_their_way = on_their_way & ~leaving
    if with_scores:
        at_the_end = scorer(logits, policy.temperature(final))
        scores = at_the_end if scores is None else torch.where(on_their_way, at_the_end, scores)
    return answered, exit_index if with_scores else None, scores
