"""Recipes by name, and how one trains the small net on the smartwatch data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from torch.utils.data import BatchSampler, SequentialSampler

from cet import perturb
from cet.data.smartwatch import Split
from cet.model.early_exit import EarlyExit
from cet.model.heads import HeadSpec
from cet.ops.consistent_exit_loss import Target, Teacher
from cet.training.fit import fit
from cet.training.lightning import MultiExitTraining
from cet.training.loss import ConsistentExitLoss
from cet.training.sampling import batches, shuffled
from cet.training.sensor_net import WIDTHS, SensorNet, exits_of


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    ``severity`` is that of the perturbation in training; ``labelled_share`` that of labelled rows in a batch, where
    some rows have no label, see :class:`cet.training.LabelledShare`. The other switches of the objective are those of
    :class:`cet.ConsistentExitLoss`, and the rest is for AdamW with a one-cycle schedule.
    """

    name: str
    consistency_weight: float
    supervise_perturbed: float = 1.0
    target: Target = "soft"
    teacher: Teacher | Literal["ema"] = "mean"
    min_confidence: float = 0.0
    exit_weights: tuple[float, ...] | None = None
    severity: float = 1.0
    labelled_share: float = 0.5
    epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2

    def loss(self, perturb: Callable[[Any], Any] | None) -> ConsistentExitLoss:
        """The objective, with what may happen to an input."""
        return ConsistentExitLoss(
            perturb,
            consistency_weight=self.consistency_weight,
            supervise_perturbed=self.supervise_perturbed,
            target=self.target,
            teacher=self.teacher,
            min_confidence=self.min_confidence,
            exit_weights=self.exit_weights,
        )


JOINT = Recipe("joint", consistency_weight=0.0, supervise_perturbed=0.0, labelled_share=1.0)
AUGMENTATION = Recipe("augmentation", consistency_weight=0.0, labelled_share=1.0)
CONSISTENT = Recipe("consistent", consistency_weight=1.0)
NOISY_LABELS = Recipe("noisy-labels", consistency_weight=3.0)
RECIPES = {recipe.name: recipe for recipe in (JOINT, AUGMENTATION, CONSISTENT, NOISY_LABELS)}
"""Cross-entropy on clean input; on the clean and on the perturbed copy; and with the consistency term, for labels that
can be trusted, and for such as are partly wrong or mostly missing. Rows without a label serve the latter two alone."""


def perturbation(severity: float) -> perturb.Perturbation:
    """What happens to a watch in daily life, for windows ``(B, 6, L)``; severity 0 is the identity.

    It is worn turned, its sensors are miscalibrated and noisy, packets get lost, an axis fails, and the movement is
    done at another pace.
    """
    return perturb.Compose(
        perturb.TimeWarp(),
        perturb.AxisRotation(),
        perturb.Scaling(),
        perturb.Jitter(),
        perturb.RandomApply(perturb.TimeMask(), 0.5),
        perturb.ChannelDropout(),
    ).with_severity(severity)


def build(recipe: Recipe, split: Split, seed: int, widths: Sequence[int] = WIDTHS) -> EarlyExit:
    """An untrained model, with an exit behind each block but the last; a seed gives all recipes the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        exits = dict.fromkeys(exits_of(widths), HeadSpec(layout="channels_first"))
        return EarlyExit(SensorNet(len(split.train.classes), widths=widths), exits, (split.train.x[:2],))


def train(
    recipe: Recipe,
    split: Split,
    seed: int,
    *,
    directory: Path | None = None,
    resume: bool = False,
    epochs: int | None = None,
    widths: Sequence[int] = WIDTHS,
    callbacks: Sequence[Callback] = (),
) -> EarlyExit:
    """Train a model on the training persons.

    Args:
        recipe: how.
        split: the data; the accuracy on the calibration persons is logged after each epoch.
        seed: of the weights, the order of the data and the perturbations.
        directory: where a checkpoint is written after each epoch; none is written when not given.
        resume: go on from the checkpoint in ``directory``, if there is one. The result has the same weights, bit for
            bit on the same CPU and number of threads, as that of a run that was never interrupted.
        epochs: replaces the recipe's number.
        widths: of the net's blocks.
        callbacks: further Lightning callbacks, such as a progress bar.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        ValueError: when the checkpoint belongs to another run.
    """
    epochs = recipe.epochs if epochs is None else epochs
    training = MultiExitTraining(
        build(recipe, split, seed, widths),
        recipe.loss(perturbation(recipe.severity)),
        seed=seed,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        identity={
            "persons": sorted(set(split.train.person.tolist())),
            "seed": seed,
            **asdict(recipe),
            "epochs": epochs,
        },
    )
    order = shuffled(split.train.y, recipe.batch_size, recipe.labelled_share, seed=seed)
    in_order = BatchSampler(SequentialSampler(split.calibration.y), 1024, drop_last=False)
    return fit(
        training,
        batches(split.train.x, split.train.y, order),
        batches(split.calibration.x, split.calibration.y, in_order),
        epochs=epochs,
        directory=directory,
        resume=resume,
        callbacks=callbacks,
    )
