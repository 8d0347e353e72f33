"""Two recipes for the same net on the smartwatch data: plain joint training and consistent exits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch.utils.data import BatchSampler, SequentialSampler

from cet import perturb
from cet.data.smartwatch import Split
from cet.model.early_exit import EarlyExit
from cet.model.heads import HeadSpec
from cet.ops.consistent_exit_loss import Target, Teacher
from cet.training.fit import fit
from cet.training.lightning import MultiExitTraining, ShuffledBatches, batches
from cet.training.loss import ConsistentExitLoss
from cet.training.sensor_net import EXITS, SensorNet


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    ``severity`` is that of the perturbation in training, and ``augment`` puts perturbed input in the place of clean
    input; the other switches of the objective are those of
    :class:`cet.ConsistentExitLoss`, and the rest is for AdamW with a one-cycle schedule.
    """

    name: str
    consistency_weight: float
    target: Target = "soft"
    teacher: Teacher = "self"
    min_confidence: float = 0.0
    exit_weights: tuple[float, ...] | None = None
    severity: float = 1.0
    augment: bool = False
    epochs: int = 12
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2


JOINT = Recipe("joint", consistency_weight=0.0)
CONSISTENT = Recipe("consistent", consistency_weight=1.0)


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


def build(recipe: Recipe, split: Split, seed: int) -> EarlyExit:
    """An untrained model; the same seed gives all recipes the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        exits = dict.fromkeys(EXITS, HeadSpec(layout="channels_first"))
        return EarlyExit(SensorNet(len(split.train.classes)), exits, (split.train.x[:2],))


def train(
    recipe: Recipe,
    split: Split,
    seed: int,
    *,
    directory: Path | None = None,
    resume: bool = False,
    epochs: int | None = None,
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
        callbacks: further Lightning callbacks, such as a progress bar.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        ValueError: when the checkpoint belongs to another run.
    """
    epochs = recipe.epochs if epochs is None else epochs
    model = build(recipe, split, seed)
    loss = ConsistentExitLoss(
        perturbation(recipe.severity),
        consistency_weight=recipe.consistency_weight,
        target=recipe.target,
        teacher=recipe.teacher,
        min_confidence=recipe.min_confidence,
        exit_weights=recipe.exit_weights,
    )
    training = MultiExitTraining(
        model,
        loss,
        seed=seed,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        augment=perturbation(recipe.severity) if recipe.augment else None,
        identity={
            "persons": sorted(set(split.train.person.tolist())),
            "seed": seed,
            **asdict(recipe),
            "epochs": epochs,
        },
    )
    shuffled = ShuffledBatches(len(split.train), recipe.batch_size, seed=seed)
    in_order = BatchSampler(SequentialSampler(split.calibration.y), 1024, drop_last=False)
    return fit(
        training,
        batches(split.train.x, split.train.y, shuffled),
        batches(split.calibration.x, split.calibration.y, in_order),
        epochs=epochs,
        directory=directory,
        resume=resume,
        callbacks=callbacks,
    )
