"""A model and batches of one's own, which tests of the command line name by MODULE:NAME."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cet

CLASSES = 3


def samples(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points around one corner per class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (rows,), generator=generator)
    return torch.eye(5)[y] + 0.3 * torch.randn(rows, 5, generator=generator), y


def loader(rows: int, seed: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(rows, seed)), batch_size=32)


def model() -> cet.EarlyExit:
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    return cet.EarlyExit(net, {"1": None, "3": nn.Linear(16, CLASSES)}, (torch.zeros(2, 5),))


def build() -> tuple[cet.EarlyExit, DataLoader[Any], DataLoader[Any]]:
    return model(), loader(128, 0), loader(64, 1)


def new() -> DataLoader[Any]:
    return loader(40, 2)


def only_a_model() -> cet.EarlyExit:
    return model()


def no_batches() -> tuple[cet.EarlyExit, int, None]:
    return model(), 3, None


def slow() -> None:
    """Takes its time, for a test that stops it."""
    print("building", file=sys.stderr, flush=True)
    time.sleep(60)
