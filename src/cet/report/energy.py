"""Early exit against the full network in joules, where this machine can measure them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cet.energy import EnergyMeter
from cet.energy.comparison import compare
from cet.energy.measurement import Settings
from cet.energy.protocol import Progress, Workload
from cet.model.early_exit import EarlyExit
from cet.report.schema import Joules

BATCHES = 8
"""So many batches are run again and again."""


def measure_energy(
    model: EarlyExit,
    recipe: str,
    x: Tensor,
    *,
    batch_size: int,
    rounds: int,
    window: float,
    seed: int,
    progress: Progress | None = None,
) -> Joules:
    """Joules per sample of the model and of its backbone on the CPU, by :func:`cet.energy.comparison.compare`."""
    batches = torch.split(x[: BATCHES * batch_size], batch_size)
    joules = Joules(
        recipe=recipe,
        batch_size=len(batches[0]),
        full=None,
        early=None,
        ratio=None,
        low=None,
        high=None,
        source=None,
        flags=None,
        reason=None,
    )
    with EnergyMeter(["cpu"]).opened() as meter:
        if not meter.domains:
            reasons = "; ".join(missing.reason for missing in meter.unavailable)
            joules["reason"] = f"no energy counter of the CPU ({reasons})"
            return joules
        samples = sum(map(len, batches))
        early = Workload("early", _passes(model, batches), samples)
        full = Workload("full", _passes(model.backbone, batches), samples)
        settings = Settings(rounds=rounds, window=window, warmup=min(1.0, window), seed=seed)
        comparison = compare(early, full, meter, settings, progress=progress)
    contrast = next(row for row in comparison.contrasts if row.quantity == "joules" and row.domain is None)
    joules["full"], joules["early"] = contrast.b.value, contrast.a.value
    joules["ratio"], joules["low"], joules["high"] = contrast.ratio.value, contrast.ratio.low, contrast.ratio.high
    joules["source"] = "+".join(contrast.ratio.sources) or None
    joules["flags"] = ", ".join(comparison.measurement.flags) or None
    joules["reason"] = contrast.ratio.reason
    return joules


def _passes(model: Callable[[Tensor], object], batches: tuple[Tensor, ...]) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        for batch in batches:
            model(batch)

    return run
