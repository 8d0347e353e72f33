"""What the runs differ in: what becomes of the training labels, how a model is trained, what happens to its input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from benchmarks.quality.objectives import Compared
from cet import perturb
from cet.data.batches import UNLABELLED
from cet.data.smartwatch import Windows, mislabelled
from cet.perturb.base import Draws, TensorPerturbation
from cet.training import AUGMENTATION, CONSISTENT, JOINT, NOISY_LABELS, Recipe, perturbation
from cet.training.sampling import mixed_seed

WIDTHS = (16, 24, 32, 64)
EPOCHS = 6
SPLITS = (10, 11, 12, 13, 14)
"""A partition of the ten people into test persons on which nothing was chosen."""


@dataclass(frozen=True)
class Method:
    """How a model is trained: the recipe, the widths of its net, and one of :data:`benchmarks.quality.ways.WAYS`."""

    recipe: Recipe
    widths: tuple[int, ...] = WIDTHS
    way: str = "usual"


def _method(recipe: Recipe, widths: tuple[int, ...] = WIDTHS, way: str = "usual", **changes: object) -> Method:
    return Method(replace(recipe, **{"epochs": EPOCHS, **changes}), widths, way)


def _compared(recipe: Recipe, objective: str, way: str = "usual", **changes: object) -> Method:
    """The recipe with an objective of :mod:`benchmarks.quality.objectives`."""
    return _method(Compared(**{**asdict(recipe), **changes}, objective=objective), way=way)


def consistent(labels: str) -> Recipe:
    """The recipe that docs/quality.md advises for such labels."""
    return CONSISTENT if labels == "full" else NOISY_LABELS


METHODS: dict[str, Callable[[str], Method]] = {
    "augmentation": lambda _: _method(AUGMENTATION),
    "consistent": lambda labels: _method(consistent(labels)),
    # Two blocks with no exit that counts: what a user would take instead.
    "static": lambda _: _method(AUGMENTATION, WIDTHS[:2], exit_weights=(0.0, 1.0)),
    # As many rows a step, and as many steps, as the others, which see a perturbed copy of each row.
    "joint": lambda _: _method(JOINT, batch_size=2 * JOINT.batch_size, epochs=2 * EPOCHS),
    "augmentation, 3 times as long": lambda _: _method(AUGMENTATION, epochs=3 * EPOCHS),
    "augmentation, perturbed 3 times": lambda _: _method(AUGMENTATION, supervise_perturbed=3.0),
    "self teacher": lambda labels: _method(consistent(labels), teacher="self"),
    "final teacher": lambda labels: _method(consistent(labels), teacher="final"),
    "confident hard targets": lambda labels: _method(consistent(labels), target="hard", min_confidence=0.95),
    # Further objectives.
    "consistent, 3 times as long": lambda labels: _method(consistent(labels), epochs=3 * EPOCHS),
    "EMA teacher": lambda labels: _method(consistent(labels), teacher="ema"),
    "weak to strong, confident": lambda labels: _compared(
        consistent(labels), "weak to strong", target="hard", min_confidence=0.95
    ),
    "ramp": lambda labels: _method(consistent(labels), way="ramp"),
    "neighbours": lambda labels: _compared(consistent(labels), "neighbours", way="neighbours"),
    "decisions": lambda labels: _compared(consistent(labels), "decisions"),
    "worst of two": lambda labels: _compared(consistent(labels), "worst of two"),
    # Other ways to train exits.
    "backbone, then heads": lambda _: _method(AUGMENTATION, way="backbone, then heads"),
    "backbone, then all": lambda _: _method(AUGMENTATION, way="backbone, then all"),
    "late to early": lambda labels: _compared(consistent(labels), "late to early"),
    "exit ensemble": lambda labels: _compared(consistent(labels), "exit ensemble"),
    "gradient equilibrium": lambda _: _method(AUGMENTATION, way="gradient equilibrium"),
    "wearer": lambda labels: _method(consistent(labels), way="wearer"),
    # Remedies for wrong labels.
    "label smoothing": lambda _: _compared(AUGMENTATION, "label smoothing"),
    "bootstrapping": lambda _: _compared(AUGMENTATION, "bootstrapping"),
    "GCE": lambda _: _compared(AUGMENTATION, "GCE"),
    "GCE and consistency": lambda labels: _compared(consistent(labels), "GCE and consistency"),
    "early stopping": lambda _: _method(AUGMENTATION, way="early stopping"),
    "co-teaching": lambda labels: _method(
        AUGMENTATION, way="co-teaching, 40 %" if labels.startswith("40") else "co-teaching, 20 %"
    ),
}
"""By name, for each kind of labels; batches, steps and rows a step are the same unless the name says otherwise."""


def _few(windows: Windows, draw: torch.Generator) -> Tensor:
    """Labels of 5 % of the windows."""
    kept = torch.randperm(len(windows), generator=draw)[: round(0.05 * len(windows))]
    return torch.full_like(windows.y, UNLABELLED).index_copy(0, kept, windows.y[kept])


LABELS: dict[str, Callable[[Windows, torch.Generator], Tensor]] = {
    "full": lambda windows, _: windows.y,
    "5 % labels": _few,
    "20 % wrong recordings": lambda windows, draw: mislabelled(windows, 0.2, draw, whole_recordings=True),
    "40 % wrong windows": lambda windows, draw: mislabelled(windows, 0.4, draw),
}
"""What becomes of the labels of the training persons; those of calibration and test persons stay right."""


def with_labels(windows: Windows, labels: str, split: int, seed: int) -> Windows:
    """The same windows with such labels, drawn alike for all methods."""
    draw = torch.Generator().manual_seed(mixed_seed(split, seed))
    return replace(windows, y=LABELS[labels](windows, draw))


@dataclass(frozen=True)
class AxisSwap(TensorPerturbation):
    """Each window with probability ``severity / 2``: the axes of both sensors change places, as on a watch put together
    otherwise."""

    layouts = ("(B, C, L)",)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        order = draws.uniform(3).argsort(dim=1)
        both = torch.cat([order, order + 3], dim=1)
        swapped = x.gather(1, both[:, :, None].expand_as(x))
        return torch.where(draws.uniform(1, 1) < self.severity / 2, swapped, x)


@dataclass(frozen=True)
class DroppedPackets(TensorPerturbation):
    """Packets of four samples are lost, each with probability ``0.3 severity``; the last sample received is held."""

    layouts = ("(B, C, L)",)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        length = x.shape[2]
        lost = (draws.uniform(-(-length // 4)) < 0.3 * self.severity).repeat_interleave(4, dim=1)[:, :length]
        received = torch.where(lost, 0, torch.arange(length)).cummax(dim=1).values
        return x.gather(2, received[:, None].expand_as(x))


@dataclass(frozen=True)
class Resampling(TensorPerturbation):
    """The sensor runs at a rate lower by the factor ``1 + 2 severity``, and is interpolated linearly."""

    layouts = ("(B, C, L)",)

    def _perturb(self, x: Tensor, _: Draws) -> Tensor:
        length = x.shape[2]
        few = torch.nn.functional.interpolate(x, max(2, round(length / (1 + 2 * self.severity))), mode="nearest")
        return torch.nn.functional.interpolate(few, length, mode="linear", align_corners=True)


@dataclass(frozen=True)
class SensorLoss(TensorPerturbation):
    """Each window with probability ``severity / 2``: one of the two sensors gives nothing."""

    layouts = ("(B, C, L)",)

    def _perturb(self, x: Tensor, draws: Draws) -> Tensor:
        which = (draws.uniform(1, 1) < 0.5).expand(-1, 3, 1)
        is_lost = torch.cat([which, ~which], dim=1) & (draws.uniform(1, 1) < self.severity / 2)
        return torch.where(is_lost, 0.0, x)


SEEN = "seen"
KINDS: dict[str, Callable[[float], perturb.Perturbation]] = {
    SEEN: perturbation,
    "drift": perturb.Drift().with_severity,
    "axis swap": AxisSwap().with_severity,
    "dropped packets": DroppedPackets().with_severity,
    "resampling": Resampling().with_severity,
    "sensor loss": SensorLoss().with_severity,
}
"""What happens to test windows: the kinds that training uses, then others."""

SEVERITIES = (0.25, 0.5, 1.0, 1.5, 2.0)
INPUTS = [(SEEN, 0.0), *((kind, severity) for kind in KINDS for severity in SEVERITIES)]
"""Clean first; 1 is the severity of training."""
