"""What a report tells of trained models: quality with and without early exit, time, energy, and where it was."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Protocol

import lightning
import numpy as np
import torch

import cet
from cet.calibration import Calibration, Certificate, ExitCosts
from cet.data.smartwatch import Windows
from cet.measure.host import host_facts
from cet.model.early_exit import EarlyExit
from cet.report import plots
from cet.report.energy import measure_energy
from cet.report.evaluation import Preset, accuracy_compute_curve, at_severity, curve_thresholds, perturbed
from cet.report.folder import ACCURACY_PLOT, EXITS_PLOT, REPORT, SUMMARY, RunFolder
from cet.report.markdown import to_markdown
from cet.report.schema import Condition, Cost, RecipeReport, Report, Speeds, Timing
from cet.report.timing import measure_latency, measure_throughput
from cet.training import Recipe, perturbation

THROUGHPUT_BATCH = 256


class Step(Protocol):
    """One stage of a run, as it is shown to the user."""

    def advance(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


class Progress(Protocol):
    """Shows the stages of a run to the user."""

    def stage(self, title: str) -> AbstractContextManager[Step]: ...


class Stages:
    """Shows the stages of a run and keeps their times."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, title: str) -> Iterator[Step]:
        begin = time.monotonic()
        with self.progress.stage(title) as step:
            yield step
        self.seconds[title] = time.monotonic() - begin


def evaluate(
    model: EarlyExit,
    recipe: Recipe,
    calibrated: Calibration,
    certificate: Certificate | None,
    costs: ExitCosts,
    calibration: Windows,
    test: Windows,
    *,
    severities: tuple[float, ...],
    conditions: Mapping[Condition, float],
    seed: int,
    preset: Preset = perturbation,
) -> RecipeReport:
    """How a calibrated model does on the test windows, as the input gets worse, beside what could be guaranteed."""
    inputs = {severity: perturbed(test, severity, seed, preset) for severity in severities}
    thresholds = curve_thresholds(model, calibration)
    early = range(model.num_exits - 1)
    alone = [costs.cumulative([k == other for other in early])[k].item() for k in early]
    return RecipeReport(
        recipe=asdict(recipe),
        policy=model.policy.to_dict(),
        calibration=calibrated.report.to_dict(),
        certificate={} if certificate is None else certificate.to_dict(),
        flops=Cost(full=costs.full, exits=[*alone, costs.full]),
        severities=[at_severity(model, x, test.y, test.person, costs, severity) for severity, x in inputs.items()],
        curves={
            condition: accuracy_compute_curve(model, inputs[severity], test.y, costs, thresholds)
            for condition, severity in conditions.items()
        },
    )


def measure(
    models: Mapping[str, EarlyExit],
    energy_of: str,
    test: Windows,
    stages: Stages,
    *,
    conditions: Mapping[Condition, float],
    timed_batches: int,
    timed_windows: int,
    energy_rounds: int,
    energy_window: float,
    seed: int,
    preset: Preset = perturbation,
) -> Timing:
    """Throughput and latency of each model under each condition, and the energy of the model ``energy_of``."""
    throughput: Speeds = {name: {} for name in models}
    latency: Speeds = {name: {} for name in models}
    with stages.stage("Measure time") as step:
        for done, (name, condition) in enumerate(product(models, conditions)):
            step.advance(done, len(models) * len(conditions))
            model, x = models[name], perturbed(test, conditions[condition], seed, preset)
            throughput[name][condition] = measure_throughput(
                model, x, batch_size=THROUGHPUT_BATCH, num_rounds=timed_batches, seed=seed
            )
            latency[name][condition] = measure_latency(model, x, windows=timed_windows, seed=seed)
    with stages.stage("Measure energy") as step:
        joules = measure_energy(
            models[energy_of],
            energy_of,
            test.x,
            batch_size=THROUGHPUT_BATCH,
            rounds=energy_rounds,
            window=energy_window,
            seed=seed,
            progress=lambda done, total, _: step.advance(done, total),
        )
    return Timing(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        host=host_facts(),
        stages=stages.seconds,
        throughput=throughput,
        latency=latency,
        joules=joules,
    )


def write_report(folder: RunFolder, report: Report) -> None:
    """As JSON, as text and as plots."""
    folder.write(ACCURACY_PLOT, plots.plot_accuracy(report))
    folder.write(EXITS_PLOT, plots.plot_exits(report))
    folder.write(SUMMARY, to_markdown(report).encode())
    folder.write_json(REPORT, report)  # the last of all, since it marks a finished run


def made_with(data: Path | None) -> dict[str, str]:
    """What must not change between the parts of one run."""
    now = {"cet": cet.__version__, "torch": str(torch.__version__)}
    return now if data is None else {**now, "recordings_sha256": sha256(data)}


def versions() -> dict[str, str]:
    """Of what computed the figures."""
    return {
        "cet": cet.__version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def sha256(path: Path) -> str:
    """Of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Have torch compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
