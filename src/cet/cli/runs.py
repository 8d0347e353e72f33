"""A run on one's own data: its settings, its folder, and its model, as `cet train` makes and the others read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, SequentialSampler

import cet
from cet import perturb
from cet.cli.errors import LoadError
from cet.cli.loading import made
from cet.data.arrays import (
    Arrays,
    Classes,
    Parts,
    channel_statistics,
    check_classes,
    check_disjoint,
    listed,
    read_arrays,
    split_parts,
)
from cet.data.smartwatch import Windows
from cet.model.early_exit import EarlyExit
from cet.model.heads import ExitHead, HeadSpec
from cet.perturb.base import Perturbation
from cet.report.figures import made_with
from cet.report.folder import ACCURACY_PLOT, CHECKPOINTS, EXITS_PLOT, REPORT, STATE, SUMMARY, RunFolder
from cet.training.fit import CHECKPOINT
from cet.training.loss import ConsistentExitLoss
from cet.training.recipes import RECIPES, Recipe
from cet.training.sampling import batches, shuffled
from cet.training.sensor_net import EXITS, SensorNet, Standardized

MODEL = "model.safetensors"
CALIBRATION = "calibration.json"
FRONT_PLOT = "front.png"

BATCH_SIZE = 512

PRESETS: dict[str, Callable[[float], Perturbation]] = {
    "sensor": partial(perturb.sensor, rotate=False),
    "rotated-sensor": partial(perturb.sensor, rotate=True),
    "audio-waveform": perturb.audio_waveform,
    "audio-spectrogram": perturb.audio_spectrogram,
    "image": perturb.image,
}
"""What `--perturb` names: the perturbation of each severity."""


@dataclass(frozen=True)
class Settings:
    """Every option of `cet train`, as the run folder keeps them; see there. ``None`` is what the recipe says."""

    data: str
    calibration_data: str | None
    test_data: str | None
    calibration_share: float
    test_share: float
    perturb: str
    severity: float
    augment: bool
    recipe: str
    consistency_weight: float | None
    supervise_perturbed: float | None
    target: str | None
    teacher: str | None
    min_confidence: float | None
    labelled_share: float | None
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int
    threads: int

    @property
    def is_function(self) -> bool:
        """Whether the data are named by ``MODULE:NAME`` of a function, not by a file."""
        return is_function(self.data)

    @property
    def preset(self) -> Callable[[float], Perturbation] | None:
        """The perturbation of each severity; ``None`` without one."""
        return PRESETS.get(self.perturb)

    @property
    def training(self) -> Recipe:
        """The recipe, with what the options change of it."""
        own = {field.name: getattr(self, field.name, None) for field in fields(Recipe)}
        return replace(RECIPES[self.recipe], **{name: value for name, value in own.items() if value is not None})

    def loss(self) -> ConsistentExitLoss:
        """The objective.

        Raises:
            ValueError: for one that wants a perturbation when there is none, and for options that do not fit together.
        """
        recipe = self.training
        if self.preset is None and (recipe.consistency_weight > 0 or recipe.supervise_perturbed > 0):
            raise ValueError(
                f"recipe {self.recipe!r} compares samples with perturbed ones, but there is no perturbation; give "
                "--perturb, or leave out what compares with it, as --recipe joint does"
            )
        return recipe.loss(None if self.preset is None else self.preset(self.severity))


class TrainingFolder(RunFolder):
    """The folder of a run; the model marks a trained one."""

    @property
    def finished(self) -> bool:
        return (self / MODEL).is_file() and (self / STATE).is_file()

    @property
    def resumable(self) -> bool:
        """Whether an epoch of training or more was kept."""
        return (self / STATE).is_file() and (self / CHECKPOINTS / f"{CHECKPOINT}.ckpt").is_file()

    @contextmanager
    def kept_if_resumable(self) -> Iterator[None]:
        """Make the folder; where the block fails before anything worth keeping was done, it is gone again."""
        with self.begun():
            try:
                yield
            except BaseException:
                if not (self.finished or self.resumable):
                    self.clear()
                raise

    def read_run(self) -> tuple[Settings, dict[str, Any]]:
        """The settings of the run, and what is known of its data.

        Raises:
            FileNotFoundError: when the folder holds no run.
            ValueError: when its description is damaged.
        """
        if not (self / STATE).is_file():
            raise FileNotFoundError(f"{self.path} holds no run; make one with: cet train --output {self.path}")
        state = self.read_json(STATE)
        try:
            return Settings(**state["settings"]), dict(state["facts"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self / STATE} is damaged ({error}); train anew with --overwrite") from error

    def _files(self) -> tuple[str, ...]:
        return (REPORT, SUMMARY, ACCURACY_PLOT, EXITS_PLOT, CALIBRATION, FRONT_PLOT, MODEL, STATE)


@dataclass(frozen=True)
class Prepared:
    """An untrained model, the batches that train and validate it, and the ``facts`` that the folder keeps of them."""

    model: EarlyExit
    train: Iterable[Any]
    validation: Iterable[Any]
    facts: dict[str, Any]


def is_function(data: str) -> bool:
    """Whether data are named by ``MODULE:NAME``, not by a file."""
    return ":" in data and not Path(data).exists()


def prepare(settings: Settings) -> Prepared:
    """Load the data and build the model.

    Raises:
        ValueError, OSError: for data that cannot be read or used.
    """
    if settings.is_function:
        model, train, validation = call_function(settings)
        return Prepared(model, train, validation, {"classes": None, "groups": {}, "samples": {}})
    parts = read_parts(settings)
    classes = parts.train.classes()
    model = _build(classes, parts.train.x.shape[1], parts.train.x, settings.seed)
    labels = parts.train.class_indices(classes)
    if settings.preset is not None:
        settings.preset(settings.severity)(parts.train.x[:2])  # it may not fit such samples
    order = shuffled(labels, settings.batch_size, settings.training.labelled_share, seed=settings.seed)
    in_order = BatchSampler(SequentialSampler(range(len(parts.calibration))), 1024, drop_last=False)
    named = {"train": parts.train, "calibration": parts.calibration, "test": parts.test}
    return Prepared(
        model,
        batches(parts.train.x, labels, order),
        batches(parts.calibration.x, parts.calibration.class_indices(classes), in_order),
        {
            "classes": list(classes),
            "channels": parts.train.x.shape[1],
            "length": parts.train.x.shape[2],
            "groups": {name: [] if part is None else part.groups() for name, part in named.items()},
            "samples": {name: 0 if part is None else len(part) for name, part in named.items()},
        },
    )


def read_parts(settings: Settings) -> Parts:
    """The samples of a run that trains on arrays, split and checked.

    Raises:
        ValueError, OSError: for files that cannot be read or used.
    """
    data = read_windows(Path(settings.data))
    own = [None if path is None else Path(path) for path in (settings.calibration_data, settings.test_data)]
    shares = [
        0.0 if path is not None else share
        for path, share in zip(own, (settings.calibration_share, settings.test_share), strict=True)
    ]
    train, *drawn = split_parts(data, shares[0], shares[1], settings.seed)
    # Nothing can be said of samples without a label; training alone has a use for them.
    calibration, test = (
        read_windows(path).labelled() if path is not None else drawn.pop(0).labelled() if share > 0 else None
        for path, share in zip(own, shares, strict=True)
    )
    if calibration is None:
        raise ValueError("there are no samples to calibrate on; give --calibration-data, or a --calibration-share > 0")
    classes = data.classes()
    if len(classes) < 2:
        raise ValueError(f"{data.source}: y holds the label {listed(classes)} alone; give samples of two classes")
    named = {"train": train, "calibration": calibration} | ({} if test is None else {"test": test})
    for name, part in named.items():
        part.class_indices(classes)
        check_channels(part, data.x.shape[1])
        if name != "test":
            check_classes(part, name, classes)
    check_disjoint((name, part.groups()) for name, part in named.items())
    return Parts(train, calibration, test)


def read_windows(path: Path) -> Arrays:
    """As :func:`read_arrays`, of samples that the default net takes."""
    data = read_arrays(path)
    if data.x.ndim != 3:
        raise ValueError(
            f"{path}: x has shape {tuple(data.x.shape)}; give (samples, channels, length), x[:, None] for one channel, "
            "or a net of your own as --data MODULE:NAME"
        )
    return data


def check_channels(data: Arrays, channels: int) -> None:
    """Refuse samples of another number of channels than the model was trained with."""
    if data.x.ndim != 3 or data.x.shape[1] != channels:
        raise ValueError(
            f"{data.source}: x has shape {tuple(data.x.shape)} for a model of {channels} channels; "
            f"give (samples, {channels}, length)"
        )


@dataclass(frozen=True)
class Run:
    """A trained model, how it was trained, and what is known of its data.

    Attributes:
        model: in eval mode.
        settings: those of `cet train`.
        facts: what the folder keeps of the data.
        classes: the label of each class index.
    """

    model: EarlyExit
    settings: Settings
    facts: dict[str, Any]
    classes: Classes

    def read(self, data: str) -> Arrays | Iterable[Any]:
        """New samples: the arrays of a file, or the batches that a function gives.

        Raises:
            ValueError, OSError: when they cannot be read, or do not fit the model.
        """
        if is_function(data):
            batches_read = made(data)
            if not isinstance(batches_read, Iterable) or isinstance(batches_read, Tensor):
                raise LoadError(f"{data} gives {type(batches_read).__name__}; return an iterable of batches (x, y)")
            return batches_read
        if self.settings.is_function:
            return read_arrays(Path(data))
        arrays = read_windows(Path(data))
        check_channels(arrays, self.facts["channels"])
        return arrays

    def kept(self, where: Path) -> tuple[Parts | None, Arrays | Iterable[Any]]:
        """What the run split its arrays into, if it has any; and the samples that it kept for calibration.

        Raises:
            ValueError, OSError: when its data cannot be read any more, or are others than in training.
        """
        if self.settings.is_function:
            return None, call_function(self.settings)[2]
        check_same(self.facts["made_with"], made_with(Path(self.settings.data)), where)
        parts = read_parts(self.settings)
        return parts, parts.calibration

    def some_for_training(self, parts: Parts | None) -> list[Any]:
        """A few batches ``(x, y)`` of the samples that the run was trained on, spread over all of them where it has
        arrays."""
        if parts is None:
            return list(islice(call_function(self.settings)[1], 8))
        rows = np.linspace(0, len(parts.train) - 1, min(len(parts.train), 2 * BATCH_SIZE)).astype(np.int64)
        return list(self.labelled(parts.train.rows(rows)))

    def perturbed(self, arrays: Arrays, severity: float) -> Arrays:
        """The same samples, perturbed as in training but with this severity."""
        assert self.settings.preset is not None
        generator = torch.Generator().manual_seed(self.settings.seed)
        return replace(arrays, x=self.settings.preset(severity)(arrays.x, generator=generator))

    def labelled(self, samples: Arrays | Iterable[Any]) -> Iterable[Any]:
        """Batches ``(x, y)`` of samples."""
        if not isinstance(samples, Arrays):
            return samples
        y = samples.class_indices(self.classes)
        return list(zip(torch.split(samples.x, BATCH_SIZE), torch.split(y, BATCH_SIZE), strict=True))

    def windows(self, arrays: Arrays) -> Windows:
        """Labelled arrays as the report takes them."""
        _, group = np.unique(np.zeros(len(arrays)) if arrays.group is None else arrays.group, return_inverse=True)
        y = arrays.class_indices(self.classes)
        return Windows(arrays.x, y, torch.from_numpy(group), tuple(map(str, self.classes)))


def load_run(folder: TrainingFolder) -> Run:
    """The run in a folder.

    Raises:
        FileNotFoundError: when the folder holds no run, or no trained model.
        ValueError, OSError: when it is damaged, or the user's own function no longer gives such a model.
    """
    settings, facts = folder.read_run()
    if not folder.finished:
        raise FileNotFoundError(
            f"{folder.path} holds no trained model yet; go on with: cet train --resume --output {folder.path}"
        )
    if settings.is_function:
        built = call_function(settings)[0]
        own = {
            name: head for name, head in zip(built.exit_names, built.heads, strict=False) if type(head) is not ExitHead
        }
        model = cet.load(folder / MODEL, built.backbone, heads=own)
        return Run(model, settings, facts, tuple(range(model.num_classes)))
    try:
        classes, channels = tuple(facts["classes"]), facts["channels"]
        backbone = _backbone(len(classes), channels, torch.zeros(channels), torch.ones(channels))
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder / STATE} is damaged ({error}); train anew with --overwrite") from error
    return Run(cet.load(folder / MODEL, backbone), settings, facts, classes)


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuse to go on with other data or other versions.

    Raises:
        ValueError: then.
    """
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"the run in {where} was started with {name} {before.get(name)} and cannot go on with {value}; "
                "go back to the former, or start anew with --overwrite"
            )


def call_function(settings: Settings) -> tuple[EarlyExit, Iterable[Any], Iterable[Any]]:
    """What the user's own function gives, with the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        built = made(settings.data)
    wanted = "a cet.EarlyExit, an iterable of batches to train on, and one to validate and calibrate on"
    if not (isinstance(built, tuple) and len(built) == 3 and isinstance(built[0], EarlyExit)):
        got = (
            f"({', '.join(type(item).__name__ for item in built)})"
            if isinstance(built, tuple)
            else type(built).__name__
        )
        raise LoadError(f"{settings.data} gives {got}; return {wanted}")
    model, train, validation = built
    for loader in (train, validation):
        if not isinstance(loader, Iterable) or isinstance(loader, Tensor):
            raise LoadError(f"{settings.data} gives {type(loader).__name__} for batches; return {wanted}")
    return model, train, validation


def _backbone(num_classes: int, channels: int, mean: Tensor, scale: Tensor) -> nn.Module:
    return Standardized(SensorNet(num_classes, channels), mean, scale)


def _build(classes: Classes, channels: int, x: Tensor, seed: int) -> EarlyExit:
    """An untrained model, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        exits = {f"net.{name}": HeadSpec(layout="channels_first") for name in EXITS}
        return EarlyExit(_backbone(len(classes), channels, *channel_statistics(x)), exits, (x[:2],))
