"""Objectives that the recipes are compared with; what wins nothing stays here, out of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cet import ConsistentExitLoss
from cet.data.batches import UNLABELLED
from cet.training import Recipe, perturbation

SMOOTHING = 0.1  # Szegedy et al. 2016, arXiv 1512.00567, section 7
OWN_SHARE = 0.2  # of the net's own answer in a target: Reed et al. 2015, arXiv 1412.6596, "hard"
TRUNCATION = 0.7  # q of Zhang & Sabuncu 2018, arXiv 1805.07836
WEAK = 0.25  # severity


def smoothed(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with smoothed labels, of ``(E, B, K)`` and ``(B,)``, mean over exits and rows, like those below."""
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)), label_smoothing=SMOOTHING)


def bootstrapped(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy with a mixture of the label and what the exit says itself."""
    of_exits, labels = logits.flatten(0, 1), y.repeat(len(logits))
    own = F.cross_entropy(of_exits, of_exits.argmax(1))
    return (1 - OWN_SHARE) * F.cross_entropy(of_exits, labels) + OWN_SHARE * own


def generalised(logits: Tensor, y: Tensor) -> Tensor:
    """Generalised cross-entropy: between cross-entropy (q -> 0) and the mean absolute error (q = 1)."""
    of_label = logits.softmax(-1).gather(-1, y.expand(len(logits), -1)[..., None])
    return ((1 - of_label**TRUNCATION) / TRUNCATION).mean()


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.repeat(len(logits)))


SUPERVISED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "label smoothing": smoothed,
    "bootstrapping": bootstrapped,
    "GCE": generalised,
    "GCE and consistency": generalised,
}
"""Terms that take the place of cross-entropy on both copies."""


def divergence(teacher: Tensor, logits: Tensor) -> Tensor:
    """KL from log-probabilities ``(B, K)`` or ``(E, B, K)``, which get no gradient, to logits ``(E, B, K)``."""
    target = teacher.detach().expand_as(logits)
    return F.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1).mean()


def mean_of_exits(logits: Tensor) -> Tensor:
    return logits.softmax(-1).mean(0).log()


def late_to_early(clean: Tensor, perturbed: Tensor) -> Tensor:
    """The last exit teaches the others on the same copy (Phuong & Lampert 2019)."""
    return sum((divergence(copy[-1].log_softmax(-1), copy) for copy in (clean, perturbed)), torch.tensor(0.0)) / 2


def exit_ensemble(clean: Tensor, perturbed: Tensor) -> Tensor:
    """The mean of all exits teaches each on the same copy (Lee & Lee 2021, arXiv 2104.00299)."""
    return sum((divergence(mean_of_exits(copy), copy) for copy in (clean, perturbed)), torch.tensor(0.0)) / 2


def same_decision(clean: Tensor, perturbed: Tensor) -> Tensor:
    """The gate's score, the entropy, is to be as on the clean copy; the classes may differ."""
    clean_score, score = (-(x.softmax(-1) * x.log_softmax(-1)).sum(-1) for x in (clean, perturbed))
    return (clean_score.detach() - score).square().mean()


def consistency(clean: Tensor, perturbed: Tensor) -> Tensor:
    """The recipes' term."""
    return divergence(mean_of_exits(clean), perturbed)


TERMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "late to early": late_to_early,
    "exit ensemble": exit_ensemble,
    "decisions": same_decision,
    "GCE and consistency": consistency,
}
"""Terms that take the place of consistency, of the logits on both copies."""


class Objective(ABC):
    """Changes what the usual objective of a recipe is given, or takes its place."""

    def __init__(self, usual: ConsistentExitLoss) -> None:
        assert usual.perturb is not None
        self.usual, self.perturb = usual, usual.perturb

    @abstractmethod
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        """The loss, as :class:`cet.ConsistentExitLoss` gives it."""


class OnLogits(Objective):
    """Cross-entropy, or what takes its place, on both copies, and a term of the logits of both."""

    def __init__(self, usual: ConsistentExitLoss, name: str) -> None:
        super().__init__(usual)
        self.supervised, self.term = SUPERVISED.get(name, cross_entropy), TERMS.get(name)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        clean, perturbed = torch.stack(model(torch.cat([x, self.perturb(x)]))).chunk(2, dim=1)
        has_label = y != UNLABELLED
        loss = sum(
            (self.supervised(copy[:, has_label], y[has_label]) for copy in (clean, perturbed)), clean.new_zeros(())
        )
        if self.term is not None:
            loss = loss + self.usual.consistency_weight * self.term(clean, perturbed)
        return loss, None


class WeakToStrong(Objective):
    """A weakly perturbed copy in the clean one's place, as in FixMatch (Sohn et al. 2020, arXiv 2001.07685)."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        return self.usual(model, perturbation(WEAK)(x), y)


class Neighbours(Objective):
    """The next window of the recording, perturbed, in the perturbed copy's place; ``x`` has its channels after those of
    the window itself."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        window, following = x.chunk(2, dim=1)
        self.usual.perturb = lambda _: self.perturb(following)
        return self.usual(model, window, y)


class WorstOf(Objective):
    """Of two perturbed copies of a row, that which the exits' clean answer diverges from more; to choose it costs a
    further pass over all three, without gradients."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        copies = [self.perturb(x), self.perturb(x)]
        with torch.no_grad():
            clean, *others = torch.stack(model(torch.cat([x, *copies]))).chunk(3, dim=1)
            teacher = mean_of_exits(clean)
            gaps = [(teacher.exp() * (teacher - o.log_softmax(-1))).sum(-1).mean(0) for o in others]
        first_is_worse = (gaps[0] > gaps[1])[:, None, None]
        self.usual.perturb = lambda _: torch.where(first_is_worse, *copies)
        return self.usual(model, x, y)


KINDS = {"weak to strong": WeakToStrong, "neighbours": Neighbours, "worst of two": WorstOf}


@dataclass(frozen=True)
class Compared(Recipe):
    """A recipe whose objective is one of those above, by name."""

    objective: str = ""

    def loss(self, perturb: Callable[[Any], Any] | None) -> Any:
        usual = super().loss(perturb)
        kind = KINDS.get(self.objective)
        return OnLogits(usual, self.objective) if kind is None else kind(usual)
