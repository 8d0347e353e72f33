"""What an exit does to the rows that come to it: fused where its head is a plain linear one, else head, then gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cet.ops.compact import Compaction, compact
from cet.ops.definitions import SCORE_NAMES, SCORES, Layout, Pool, ScoreName
from cet.ops.exit_gate import exit_gate, gate
from cet.ops.exit_step import exit_step
from cet.ops.padded import Answers, CountIsKnown, PaddedExit, RowPairs, padded_exit_step, padded_step_of_logits
from cet.runtime.policy import ExitPolicy
from cet.runtime.scores import Scorer, has_kernel


class LinearHead(NamedTuple):
    """A head that pools and multiplies, which the fused operations take."""

    weight: Tensor
    bias: Tensor | None
    layout: Layout
    pool: Pool


def linear_head(head: nn.Module) -> LinearHead | None:
    """The parts of a head that the fused operations can stand in for; None where it must be called."""
    return getattr(head, "as_linear", None)


def head_logits(head: nn.Module, features: Tensor, mask: Tensor | None) -> Tensor:
    """Call a head, with the mask if it takes one. What it returns shares no memory with the features, which stages
    may write to, and which may be the user's own."""
    logits: Tensor = head(features) if mask is None else head(features, mask)
    if torch.compiler.is_dynamo_compiling():  # where nobody can ask what is an alias of what
        return logits if linear_head(head) is not None else logits.clone()
    if isinstance(logits, Tensor) and torch._C._is_alias_of(logits, features):  # type: ignore[attr-defined]
        return logits.clone()
    return logits


def take_exit(
    head: nn.Module,
    features: Tensor,
    mask: Tensor | None,
    tensors: Sequence[Tensor],
    dims: Sequence[int],
    policy: ExitPolicy,
    exit_index: int,
    scorer: Scorer,
) -> tuple[Tensor, Tensor, Compaction]:
    """Logits ``(n, K)`` and scores ``(n,)`` of the rows at an open exit, and the tensors of those that go on."""
    threshold = policy.thresholds[exit_index]
    assert threshold is not None
    score, temperature = policy.score, policy.temperature(exit_index)
    if not has_kernel(score):
        logits = _logits(head, features, mask)
        scores, exit_mask = scorer.gate(logits, threshold, temperature)
        return logits, scores, scorer.compact(exit_mask, tensors, dims)
    linear = linear_head(head)
    if linear is None:
        logits = head_logits(head, features, mask)
        scores, exit_mask = gate(logits, score=score, threshold=threshold, temperature=temperature)
        return logits, scores, compact(exit_mask, tensors, dims)
    return exit_step(
        features,
        linear.weight,
        linear.bias,
        tensors,
        dims,
        layout=linear.layout,
        pool=linear.pool,
        score=score,
        threshold=threshold,
        temperature=temperature,
        mask=_real_positions(head, features, mask),
    )


def score_exit(
    head: nn.Module, features: Tensor, mask: Tensor | None, policy: ExitPolicy, exit_index: int, scorer: Scorer
) -> tuple[Tensor, Tensor]:
    """Logits and scores of an exit for all rows, open or not: to the bit those that :func:`take_exit` compares."""
    score, temperature = policy.score, policy.temperature(exit_index)
    if not has_kernel(score):
        logits = _logits(head, features, mask)
        return logits, scorer(logits, temperature)
    return _scored(head, features, mask, score, temperature)


def _logits(head: nn.Module, features: Tensor, mask: Tensor | None) -> Tensor:
    """Of a head, to the bit those that the fused operations compute where they stand in for it."""
    return _scored(head, features, mask, SCORE_NAMES[0], 1.0)[0]


def _scored(
    head: nn.Module, features: Tensor, mask: Tensor | None, score: ScoreName, temperature: float
) -> tuple[Tensor, Tensor]:
    never = -float("inf") if SCORES[score].is_low_when_sure else float("inf")
    linear = linear_head(head)
    if linear is None:
        logits = head_logits(head, features, mask)
        return logits, gate(logits, score=score, threshold=never, temperature=temperature)[0]
    logits, scores, _ = exit_gate(
        features,
        linear.weight,
        linear.bias,
        layout=linear.layout,
        pool=linear.pool,
        score=score,
        threshold=never,
        temperature=temperature,
        mask=_real_positions(head, features, mask),
    )
    return logits, scores


def _real_positions(head: nn.Module, features: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask at the positions of the features."""
    return None if mask is None else head.real_positions(features, mask)  # type: ignore[operator]


def take_padded_exit(
    head: nn.Module,
    features: Tensor,
    mask: Tensor | None,
    at: PaddedExit,
    kept: RowPairs,
    answers: Answers,
    score: ScoreName,
    count_is_known: CountIsKnown,
) -> None:
    """At an open exit of a padded batch, answer the rows that leave, and move those that go on."""
    linear = linear_head(head)
    if linear is not None and mask is None and not torch.is_autocast_enabled(features.device.type):
        padded_exit_step(
            features,
            linear.weight,
            linear.bias,
            at,
            kept,
            answers,
            layout=linear.layout,
            pool=linear.pool,
            score=score,
            count_is_known=count_is_known,
        )
    else:
        logits = head_logits(head, features, mask)
        padded_step_of_logits(logits, at, kept, answers, score=score, count_is_known=count_is_known)
