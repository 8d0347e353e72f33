"""What a data set of benchmarks.quality.sets is, and where installed packages keep theirs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from torch import Tensor

import cet
from cet.data.smartwatch import Windows
from cet.perturb import Perturbation

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
        learning_rate: that of the recipe when not given.
    """

    samples: Callable[[], Arrays]
    build: Callable[[Windows], cet.EarlyExit]
    perturbation: Callable[[float], Perturbation]
    inputs: Callable[[Tensor], Any] = lambda x: x
    epochs: int | None = None
    learning_rate: float | None = None


def inside(package: str, *path: str, wheel: str | None = None) -> Path:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    file = next(iter(p for p in (spec and spec.submodule_search_locations) or [] if Path(p, *path).exists()), None)
    if file is None:
        raise click.ClickException(
            f"{package} is not installed; pip install --no-deps {wheel or package.replace('_', '-')}"
        )
    return Path(file, *path)
