"""The scores that a policy may have: those that the operations know, and those that plain PyTorch computes here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor

from cet.ops.compact import Compaction, compact
from cet.ops.definitions import SCORE_NAMES, SCORES, ScoreName
from cet.ops.exit_gate import exit_score, gate


@dataclass(frozen=True)
class ScoreFunction:
    """A score of the user's own.

    Args:
        function: of logits ``(B, K)`` float32, divided by the exit's temperature; it returns scores ``(B,)``, each of
            its own row alone, which is checked on the first rows that it is given. A row whose logits hold NaN or +Inf
            never leaves, whatever the function gives.
        is_low_when_sure: whether a sample leaves at or below the threshold; else at or above it.
        name: for reports.

    Raises:
        TypeError: for what cannot be called.
    """

    function: Callable[[Tensor], Tensor]
    is_low_when_sure: bool = False
    name: str = "own"
    _is_checked: bool = field(default=False, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function is {self.function!r}; give a function of logits (B, K) that returns scores (B,)")

    def __call__(self, logits: Tensor) -> Tensor:
        """Scores ``(B,)`` float32 of logits, checked.

        Raises:
            TypeError, ValueError: for what is no tensor of numbers, or of another shape, and for a row that has another
                score alone than among others.
        """
        if not self._is_checked:
            rows = logits[logits.isfinite().all(dim=1)][:_CHECKED_ROWS]
            if len(rows) > 1:
                self._check_rows(rows)
                object.__setattr__(self, "_is_checked", True)
        return self._scores(logits)

    def _scores(self, logits: Tensor) -> Tensor:
        scores = self.function(logits)
        if not isinstance(scores, Tensor) or scores.is_complex():
            raise TypeError(f"score {self.name!r} gives {type(scores).__name__}; return a tensor of real scores (B,)")
        if scores.shape != logits.shape[:1]:
            raise ValueError(
                f"score {self.name!r} gives shape {tuple(scores.shape)} for logits {tuple(logits.shape)}; return one "
                "score per row, (B,)"
            )
        return scores.detach().to(logits.device, torch.float32)

    def _check_rows(self, logits: Tensor) -> None:
        """Refuse a function that gives a row another score alone than among others."""
        together = self._scores(logits)
        alone = torch.cat([self._scores(row) for row in torch.split(logits, 1)])
        if not torch.allclose(together, alone, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise ValueError(
                f"score {self.name!r} gives a row another score alone than among others; compute it from that row's "
                "logits only"
            )


_CHECKED_ROWS = 8

PolicyScore = ScoreName | Literal["patience"] | ScoreFunction
"""``"patience"``: how many open exits before this one, without a break, have named the same class as it does. One whose
logits hold NaN or +Inf names none."""

POLICY_SCORES: tuple[str, ...] = (*SCORE_NAMES, "patience")


def has_kernel(score: PolicyScore) -> TypeGuard[ScoreName]:
    """Whether the operations know it, so that every runner and format can have it."""
    return score in SCORE_NAMES


def require_kernel(score: PolicyScore, what: str) -> ScoreName:
    """Refuse another score.

    Raises:
        ValueError: then, in the name of ``what`` cannot have it.
    """
    if has_kernel(score):
        return score
    raise ValueError(
        f"{what} cannot have the score {score_name(score)!r}, which only the eager runner computes; set a policy whose "
        f"score is one of {', '.join(SCORE_NAMES)}"
    )


def check_score(score: Any) -> None:
    """Refuse what is no score.

    Raises:
        ValueError: then.
    """
    if not isinstance(score, ScoreFunction) and score not in POLICY_SCORES:
        raise ValueError(
            f"score {score!r} is unknown; choose one of {', '.join(POLICY_SCORES)}, or give a cet.ScoreFunction"
        )


def score_name(score: PolicyScore) -> str:
    """For reports and errors."""
    return score.name if isinstance(score, ScoreFunction) else score


def is_low_when_sure(score: PolicyScore) -> bool:
    """Whether a sample leaves at or below the threshold; else at or above it."""
    if isinstance(score, ScoreFunction):
        return score.is_low_when_sure
    return has_kernel(score) and SCORES[score].is_low_when_sure


class Scorer:
    """The scores of some rows, exit after exit.

    Args:
        score: of the policy.
    """

    def __init__(self, score: PolicyScore) -> None:
        self._score = score
        self._seen: list[Tensor] = []  # of patience: the class last named, and for how many exits before that one

    def __call__(self, logits: Tensor, temperature: float) -> Tensor:
        """``(n,)`` float32, of the rows' logits ``(n, K)`` at their next open exit."""
        if has_kernel(self._score):
            return exit_score(logits, self._score, temperature)
        logits = logits.detach().float()
        broken = (logits.isnan() | (logits == float("inf"))).any(dim=1)
        if isinstance(self._score, ScoreFunction):
            scores = self._score(logits / temperature)
        else:
            named = logits.argmax(dim=1).masked_fill(broken, -1)
            if self._seen:
                before, count = self._seen
                self._seen = [named, torch.where(named == before, count + 1, 0)]
            else:
                self._seen = [named, torch.zeros_like(named)]
            scores = self._seen[1].float()
        return scores.masked_fill(broken, float("nan"))

    def gate(self, logits: Tensor, threshold: float, temperature: float) -> tuple[Tensor, Tensor]:
        """Scores ``(n,)`` and exit mask ``(n,)``, as :func:`cet.ops.gate` gives them."""
        if has_kernel(self._score):
            return gate(logits, score=self._score, threshold=threshold, temperature=temperature)
        scores = self(logits, temperature)
        return scores, scores <= threshold if is_low_when_sure(self._score) else scores >= threshold

    def compact(self, exit_mask: Tensor, tensors: Sequence[Tensor], dims: Sequence[int]) -> Compaction:
        """As :func:`cet.ops.compact`; what is remembered of the rows moves with them."""
        seen = self._seen
        kept, exited, moved = compact(exit_mask, [*tensors, *seen], [*dims, *(0 for _ in seen)])
        self._seen = list(moved[len(tensors) :])
        return Compaction(kept, exited, moved[: len(tensors)])
