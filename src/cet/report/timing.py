"""Early exit against the full network on the clock, interleaved in one run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from cet.measure.rounds import Timings, rounds
from cet.measure.statistics import Floats, bootstrap_interval
from cet.measure.timers import timer_for, warm_up
from cet.model.early_exit import EarlyExit

WARM_UP = 0.1
"""s for which batches are run each way before the first that is timed."""


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


def measure_throughput(model: EarlyExit, x: Tensor, *, batch_size: int, num_rounds: int, seed: int) -> Speed:
    """Samples per second, over random batches of ``x``; the speed-up is the median of the ratios within rounds."""
    rng = np.random.default_rng(seed)
    batch_size = min(batch_size, len(x))
    batches = [x[rng.permutation(len(x))[:batch_size]] for _ in range(num_rounds)]
    full, early = _seconds(model, batches, rng)
    return Speed(
        batch_size=batch_size,
        batches=num_rounds,
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
    """The time of each batch through the eager backbone and through the model, one right after the other."""
    ways: dict[str, Callable[[Tensor], object]] = {"full": model.backbone, "early": model}
    timer = timer_for(batches[0].device)
    for way in ways.values():
        results = map(way, cycle(batches))
        warm_up(partial(next, results), timer, WARM_UP)
    orders = rounds(list(ways), rng, min_rounds=len(batches))
    timings = Timings.of(
        [
            {name: timer(partial(ways[name], batch), 1) for name in order}
            for batch, order in zip(batches, orders, strict=True)
        ]
    )
    return timings.seconds["full"], timings.seconds["early"]


def _percentiles(values: Floats, *percents: int) -> dict[str, float]:
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in percents}


def _speedup(
    full: Floats, early: Floats, statistic: Callable[[Floats, Floats], Floats], rng: np.random.Generator
) -> Speedup:
    value, low, high = bootstrap_interval(statistic, full, early, rng=rng)
    return Speedup(value=value, low=low, high=high)
