"""The demonstration from data to report, in stages that can be stopped at any moment."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, Protocol, cast

import lightning
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

import cet
from cet.calibration import calibrate
from cet.calibration.cost import exit_costs
from cet.demo import plots
from cet.demo.energy import measure_energy
from cet.demo.evaluation import accuracy_compute_curve, at_severity, curve_thresholds, perturbed
from cet.demo.folder import ACCURACY_PLOT, CHECKPOINTS, EXITS_PLOT, REPORT, STATE, SUMMARY, RunFolder
from cet.demo.markdown import to_markdown
from cet.demo.report import CONDITIONS, SCHEMA_VERSION, Cost, Data, RecipeReport, Report, Speeds, Timing
from cet.demo.timing import measure_latency, measure_throughput
from cet.measure.host import host_facts
from cet.model.early_exit import EarlyExit
from cet.training import (
    CONSISTENT,
    EXITS,
    JOINT,
    Recipe,
    Split,
    Windows,
    build,
    find_dataset,
    load_windows,
    split_by_person,
    train,
)

SEVERITIES = (0.0, 0.5, 1.0, 1.5, 2.0)
MAX_ACCURACY_DROP = 0.01
THROUGHPUT_BATCH = 256


@dataclass(frozen=True)
class Settings:
    """What decides the figures of a run, apart from the machine.

    Attributes:
        seed: of the split by person, the weights, the order of the data and the perturbations.
        threads: of torch; as many as it likes when not given.
        data: the recordings; those of the installed `seglearn` when not given.
        epochs: replaces the number that the recipes train.
        test_windows: how many windows of the test persons to use; all when not given.
        timed_batches: rounds of the throughput measurement.
        timed_windows: windows of the latency measurement.
        energy_rounds: rounds of the energy measurement, where there is an energy counter.
        energy_window: s of each of its windows.
    """

    seed: int = 0
    threads: int | None = None
    data: str | None = None
    epochs: int | None = None
    test_windows: int | None = None
    timed_batches: int = 100
    timed_windows: int = 400
    energy_rounds: int = 5
    energy_window: float = 5.0


QUICK = Settings(epochs=2, test_windows=512, timed_batches=30, timed_windows=100, energy_rounds=3, energy_window=1.0)


class Step(Protocol):
    """One stage of a run, as it is shown to the user."""

    def advance(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


class Progress(Protocol):
    """Shows the stages of a run to the user."""

    def stage(self, title: str) -> AbstractContextManager[Step]: ...


def start(folder: RunFolder, settings: Settings, progress: Progress, *, overwrite: bool = False) -> Report:
    """Run the demonstration.

    Raises:
        FileExistsError: when the folder holds another run and ``overwrite`` is not set.
        FileNotFoundError: when the recordings are missing.
        ValueError: when they are damaged.
    """
    folder.check_free(overwrite=overwrite)
    settings = replace(settings, threads=settings.threads or torch.get_num_threads())
    stages = _Stages(progress)
    path, windows = _read_recordings(settings, stages)
    with folder.begun():
        folder.clear()
        folder.write_json(STATE, {"settings": asdict(settings), "made_with": _made_with(path)})
    return _run(folder, settings, path, windows, stages)


def resume(folder: RunFolder, progress: Progress) -> Report:
    """Go on with a run, with the settings that it was started with.

    At most one epoch of training is done again, and all figures but the timings are those of a run that was never
    stopped. The report of a finished run is read from the folder.

    Raises:
        FileNotFoundError: when the folder holds no run, or the recordings are gone.
        ValueError: when the run was started with other recordings, or another version of cet or torch.
    """
    state = folder.read_json(STATE)
    if folder.finished:
        return cast(Report, folder.read_json(REPORT))
    try:
        settings, made_with = Settings(**state["settings"]), dict(state["made_with"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / STATE} is damaged ({error}); replace the run with --overwrite") from error
    stages = _Stages(progress)
    path, windows = _read_recordings(settings, stages)
    for name, now in _made_with(path).items():
        if made_with.get(name) != now:
            raise ValueError(
                f"the run in {folder.path} was started with {name} {made_with.get(name)} and cannot go on with {now}; "
                "go back to the former, or replace the run with --overwrite"
            )
    return _run(folder, settings, path, windows, stages)


def _run(folder: RunFolder, settings: Settings, path: Path, windows: Windows, stages: _Stages) -> Report:
    assert settings.threads is not None
    split = split_by_person(windows, seed=settings.seed)
    test = _some(split.test, settings.test_windows, settings.seed)
    recipes = [replace(recipe, epochs=settings.epochs or recipe.epochs) for recipe in (JOINT, CONSISTENT)]
    with _threads(settings.threads):
        models = {recipe.name: _train(folder, recipe, split, settings.seed, stages) for recipe in recipes}
        folder.tidy()
        evaluated: dict[str, RecipeReport] = {}
        for recipe in recipes:
            model = models[recipe.name]
            with stages.stage(f"Evaluate {recipe.name}"):
                evaluated[recipe.name] = _evaluate(model, recipe, split.calibration, test, settings.seed)
            model.save(folder / f"{recipe.name}.safetensors")
        timing = _timed(models, test, settings, stages)
    report = Report(
        schema_version=SCHEMA_VERSION,
        settings={**asdict(settings), "data": None if settings.data is None else path.name},
        versions=_versions(),
        exits=[*EXITS, "final"],
        conditions=CONDITIONS,
        data=_describe(path, split, test),
        recipes=evaluated,
        timing=timing,
    )
    with stages.stage("Write report"):
        folder.write(ACCURACY_PLOT, plots.plot_accuracy(report))
        folder.write(EXITS_PLOT, plots.plot_exits(report))
        folder.write(SUMMARY, to_markdown(report).encode())
        folder.write_json(REPORT, report)  # the last of all, since it marks a finished run
    return report


def _read_recordings(settings: Settings, stages: _Stages) -> tuple[Path, Windows]:
    with stages.stage("Read recordings") as step:
        path = find_dataset() if settings.data is None else Path(settings.data)
        windows = load_windows(path)
        step.note(f"{len(windows)} windows of {len(_persons(windows))} persons")
    return path, windows


def _train(folder: RunFolder, recipe: Recipe, split: Split, seed: int, stages: _Stages) -> EarlyExit:
    """The trained model; one that an earlier attempt has finished is reused."""
    path = folder / f"{recipe.name}.safetensors"
    with stages.stage(f"Train {recipe.name}") as step:
        if not path.is_file():
            checkpoints = folder / CHECKPOINTS / recipe.name
            train(recipe, split, seed, directory=checkpoints, resume=True, callbacks=[_ShowTraining(step)]).save(path)
        # Read back in any case, so that a resumed run computes with the very same tensors.
        return cet.load(path, build(recipe, split, seed).backbone)


def _evaluate(model: EarlyExit, recipe: Recipe, calibration: Windows, test: Windows, seed: int) -> RecipeReport:
    """Calibrate the model, which then has the new policy, and evaluate it."""
    costs = exit_costs(model)
    # On what it will meet: thresholds for clean input alone let too many perturbed samples leave.
    batches = [(perturbed(calibration, severity, seed), calibration.y) for severity in CONDITIONS.values()]
    calibrated = calibrate(model, batches, MAX_ACCURACY_DROP, costs=costs)
    model.policy = calibrated.policy
    inputs = {severity: perturbed(test, severity, seed) for severity in SEVERITIES}
    thresholds = curve_thresholds(model, calibration)
    early = range(model.num_exits - 1)
    alone = [costs.cumulative([k == other for other in early])[k].item() for k in early]
    return RecipeReport(
        recipe=asdict(recipe),
        policy=model.policy.to_dict(),
        calibration=calibrated.report.to_dict(),
        flops=Cost(full=costs.full, exits=[*alone, costs.full]),
        severities=[at_severity(model, x, test.y, costs, severity) for severity, x in inputs.items()],
        curves={
            condition: accuracy_compute_curve(model, inputs[severity], test.y, costs, thresholds)
            for condition, severity in CONDITIONS.items()
        },
    )


def _timed(models: Mapping[str, EarlyExit], test: Windows, settings: Settings, stages: _Stages) -> Timing:
    """Time and joules, and where they were measured."""
    throughput, latency = _measure(models, test, settings, stages)
    with stages.stage("Measure energy") as step:
        joules = measure_energy(
            models[CONSISTENT.name],
            CONSISTENT.name,
            test.x,
            batch_size=THROUGHPUT_BATCH,
            rounds=settings.energy_rounds,
            window=settings.energy_window,
            seed=settings.seed,
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


def _measure(
    models: Mapping[str, EarlyExit], test: Windows, settings: Settings, stages: _Stages
) -> tuple[Speeds, Speeds]:
    """Throughput and latency of each model on clean and perturbed windows."""
    throughput: Speeds = {name: {} for name in models}
    latency: Speeds = {name: {} for name in models}
    seed = settings.seed
    with stages.stage("Measure time") as step:
        for done, (name, condition) in enumerate(product(models, CONDITIONS)):
            step.advance(done, len(models) * len(CONDITIONS))
            model, x = models[name], perturbed(test, CONDITIONS[condition], seed)
            throughput[name][condition] = measure_throughput(
                model, x, batch_size=THROUGHPUT_BATCH, num_rounds=settings.timed_batches, seed=seed
            )
            latency[name][condition] = measure_latency(model, x, windows=settings.timed_windows, seed=seed)
    return throughput, latency


def _describe(path: Path, split: Split, test: Windows) -> Data:
    parts = {"train": split.train, "calibration": split.calibration, "test": test}
    return Data(
        sha256=_sha256(path),
        classes=list(test.classes),
        persons={name: _persons(part) for name, part in parts.items()},
        windows={name: len(part) for name, part in parts.items()},
    )


def _persons(windows: Windows) -> list[int]:
    return sorted(set(windows.person.tolist()))


def _made_with(path: Path) -> dict[str, str]:
    """What must not change between the parts of one run."""
    return {"cet": cet.__version__, "torch": torch.__version__, "recordings_sha256": _sha256(path)}


def _versions() -> dict[str, str]:
    return {
        "cet": cet.__version__,
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(windows: Windows, count: int | None, seed: int) -> Windows:
    """``count`` of the windows at random, or all."""
    if count is None or count >= len(windows):
        return windows
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]
    return replace(windows, x=windows.x[chosen], y=windows.y[chosen], person=windows.person[chosen])


class _Stages:
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


class _ShowTraining(Callback):
    """Shows how far a training is."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        per_epoch, epochs = int(trainer.num_training_batches), trainer.max_epochs or 1
        self.step.advance(trainer.global_step, per_epoch * epochs)

    def on_validation_end(self, trainer: Trainer, _: LightningModule) -> None:
        accuracy = trainer.callback_metrics["accuracy_final"].item()
        self.step.note(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, accuracy {accuracy:.3f}")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
