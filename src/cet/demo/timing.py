"""Early exit against the full network on the clock, interleaved in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cet.model.early_exit import EarlyExit

Floats = npt.NDArray[np.float64]

RESAMPLES = 2000
WARM_UP = 10
"""Batches that are run both ways before the first that is timed."""


class Speedup(TypedDict):
    """How many times as fast as the full network early exit is, with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Speed(TypedDict):
    """One comparison: percentile to value for the full network and for early exit, in ``unit``."""

    batch_size: int
    batches: int
    unit: str
    full: dict[str, float]
    early: dict[str, float]
    speedup: Speedup


def measure_throughput(model: EarlyExit, x: Tensor, *, batch_size: int, rounds: int, seed: int) -> Speed:
    """Samples per second, over random batches of ``x``; the speed-up is the median of the ratios within rounds."""
    rng = np.random.default_rng(seed)
    batch_size = min(batch_size, len(x))
    batches = [x[rng.permutation(len(x))[:batch_size]] for _ in range(rounds)]
    full, early = _seconds(model, batches, rng)
    return Speed(
        batch_size=batch_size,
        batches=rounds,
        unit="samples/s",
        full=_percentiles(batch_size / full, 20, 50, 80),
        early=_percentiles(batch_size / early, 20, 50, 80),
        speedup=_speedup(full, early, lambda full, early: np.median(full / early, axis=-1), rng),
    )


def measure_latency(model: EarlyExit, x: Tensor, *, windows: int, seed: int) -> Speed:
    """Milliseconds for one window at a time, over random windows of ``x``; the speed-up is that of the mean."""
    rng = np.random.default_rng(seed)
    batches = [x[i : i + 1] for i in rng.permutation(len(x))[:windows]]
    full, early = _seconds(model, batches, rng)
    return Speed(
        batch_size=1,
        batches=len(batches),
        unit="ms",
        full=_percentiles(full * 1e3, 50, 90),
        early=_percentiles(early * 1e3, 50, 90),
        speedup=_speedup(full, early, lambda full, early: full.mean(axis=-1) / early.mean(axis=-1), rng),
    )


@torch.no_grad()
def _seconds(model: EarlyExit, batches: Sequence[Tensor], rng: np.random.Generator) -> tuple[Floats, Floats]:
    """The time of each batch through the eager backbone and through the model, one right after the other.

    A coin decides which goes first, so that neither gains from a warm cache or loses to a busy moment.
    """
    runs: tuple[Callable[[Tensor], object], ...] = (model.backbone, model)
    for batch in batches[:WARM_UP]:
        for run in runs:
            run(batch)
    seconds = np.empty((2, len(batches)))
    for column, batch in enumerate(batches):
        for which in rng.permutation(2):
            start = time.perf_counter()
            runs[which](batch)
            seconds[which, column] = time.perf_counter() - start
    return seconds[0], seconds[1]


def _percentiles(values: Floats, *percents: int) -> dict[str, float]:
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in percents}


def _speedup(
    full: Floats, early: Floats, statistic: Callable[[Floats, Floats], Floats], rng: np.random.Generator
) -> Speedup:
    """The statistic, with the percentile interval of a bootstrap over pairs (Efron & Tibshirani 1993, chapter 13)."""
    pairs = rng.integers(len(full), size=(RESAMPLES, len(full)))
    low, high = np.percentile(statistic(full[pairs], early[pairs]), [2.5, 97.5])
    return Speedup(value=float(statistic(full, early)), low=float(low), high=float(high))
