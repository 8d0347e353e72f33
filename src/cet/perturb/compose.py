"""Perturbations made of perturbations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from .base import Bounds, Draws, Perturbation, check_input

Batch = TypeVar("Batch", Tensor, Mapping[str, Any])


@dataclass(frozen=True, init=False)
class _Several(Perturbation):
    perturbs: tuple[Perturbation, ...]

    def __init__(self, *perturbs: Perturbation) -> None:
        if not perturbs:
            raise ValueError(f"{type(self).__name__}: no perturbations given; pass at least one")
        for perturb in perturbs:
            _check_member(self, perturb)
        object.__setattr__(self, "perturbs", perturbs)

    def with_severity(self, severity: float) -> Self:
        return type(self)(*(perturb.with_severity(severity) for perturb in self.perturbs))


class Compose(_Several):
    """Applies perturbations one after another. Takes a mapping if its members do (see `On`)."""

    def __call__(self, x: Batch, *, generator: torch.Generator | None = None) -> Batch:
        for perturb in self.perturbs:
            x = perturb(x, generator=generator)
        return x


class RandomChoice(_Several):
    """Applies to each row one of the perturbations, all equally likely; costs as much as all of them."""

    def __call__(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        check_input(self, x, generator)
        candidates: list[Tensor] = [perturb(x, generator=generator) for perturb in self.perturbs]
        choice = Draws(x, generator).integers(*(1,) * (x.ndim - 1), high=len(candidates) - 1)
        chosen = candidates[0]
        for index, candidate in enumerate(candidates[1:], start=1):
            chosen = torch.where(choice == index, candidate, chosen)
        return chosen


@dataclass(frozen=True)
class RandomApply(Perturbation):
    """Applies a perturbation to each row with a probability, which the severity leaves alone.

    Args:
        perturb: a perturbation of tensors.
        probability: chance of each row to be perturbed.
    """

    perturb: Perturbation
    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_member(self, self.perturb)
        Bounds(high=1.0).check("RandomApply: probability", self.probability)

    def __call__(self, x: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        check_input(self, x, generator)
        perturbed = self.perturb(x, generator=generator)
        applied = Draws(x, generator).uniform(*(1,) * (x.ndim - 1)) < self.probability
        return torch.where(applied, perturbed, x)

    def with_severity(self, severity: float) -> Self:
        return dataclasses.replace(self, perturb=self.perturb.with_severity(severity))


@dataclass(frozen=True)
class On(Perturbation):
    """Perturbs one entry of a mapping, such as a model's keyword inputs; the result is a new dict.

    Args:
        key: the entry.
        perturb: its perturbation.
    """

    key: str
    perturb: Perturbation

    def __post_init__(self) -> None:
        _check_member(self, self.perturb)

    def __call__(self, x: Mapping[str, Any], *, generator: torch.Generator | None = None) -> dict[str, Any]:
        if not isinstance(x, Mapping):
            raise TypeError(f"On: x must be a mapping, got {type(x).__name__}; call its perturbation on it directly")
        if self.key not in x:
            raise ValueError(f"On: x has no entry {self.key!r}; name one of {list(x)}")
        return {**x, self.key: self.perturb(x[self.key], generator=generator)}

    def with_severity(self, severity: float) -> Self:
        return dataclasses.replace(self, perturb=self.perturb.with_severity(severity))


def _check_member(owner: Perturbation, perturb: object) -> None:
    if not isinstance(perturb, Perturbation):
        raise TypeError(
            f"{type(owner).__name__}: {perturb!r} is not a perturbation; pass an instance from cet.perturb"
            " or of your own subclass of TensorPerturbation"
        )
