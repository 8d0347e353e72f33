"""Work for the simulated GPU: it takes virtual time and power, and does nothing else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cet.energy.protocol import Workload
from nvml.simulation import Simulation


def work(
    simulation: Simulation,
    name: str,
    watts: float | Callable[[float], float],
    *,
    seconds: float = 0.047,
    jitter: float = 0.0,
    items: int = 1,
    rng: np.random.Generator | None = None,
) -> Workload:
    """A workload whose calls draw ``watts`` beyond idle, constant or by the time, for ``seconds``, give or take the
    relative standard deviation ``jitter``."""
    lengths = iter(()) if rng is None else iter(lambda: seconds * (1 + jitter * rng.standard_normal()), None)
    clock = simulation.clock

    def run() -> None:
        simulation.load(watts(clock.now()) if callable(watts) else watts)
        clock.sleep(next(lengths, seconds))
        simulation.load(0)

    return Workload(name, run, items)
