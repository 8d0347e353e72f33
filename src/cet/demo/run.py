"""The demonstration from data to report, in stages that can be stopped at any moment."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import cast

import torch

import cet
from cet.calibration import calibrate
from cet.calibration.cost import exit_costs
from cet.data.smartwatch import Split, Windows, find_dataset, load_windows, mislabelled, split_by_person
from cet.model.early_exit import EarlyExit
from cet.perturb.base import Perturbation
from cet.report.evaluation import perturbed
from cet.report.figures import Progress, Stages, evaluate, made_with, measure, sha256, threads, versions, write_report
from cet.report.folder import CHECKPOINTS, REPORT, STATE, RunFolder
from cet.report.markdown import SCOPE, wrong_labels_scope
from cet.report.schema import CONDITIONS, SCHEMA_VERSION, Data, RecipeReport, Report
from cet.training import AUGMENTATION, CONSISTENT, EXITS, JOINT, NOISY_LABELS, Recipe, build, perturbation, train
from cet.training.fit import ShowTraining

SEVERITIES = (0.0, 0.5, 1.0, 1.5, 2.0)
MAX_ACCURACY_DROP = 0.01
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Settings:
    """What decides the figures of a run, apart from the machine.

    Attributes:
        seed: of the split by person, the weights, the order of the data and the perturbations.
        threads: of torch; as many as it likes when not given.
        data: the recordings; those of the installed `seglearn` when not given.
        epochs: replaces the number that the recipes train.
        wrong_labels: share of the training windows whose label is wrong; where there are any, augmentation competes
            with the recipe for such labels.
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
    wrong_labels: float = 0.0
    test_windows: int | None = None
    timed_batches: int = 100
    timed_windows: int = 400
    energy_rounds: int = 5
    energy_window: float = 5.0


QUICK = Settings(epochs=2, test_windows=512, timed_batches=30, timed_windows=100, energy_rounds=3, energy_window=1.0)


def start(folder: RunFolder, settings: Settings, progress: Progress, *, overwrite: bool = False) -> Report:
    """Run the demonstration.

    Raises:
        FileExistsError: when the folder holds another run and ``overwrite`` is not set.
        FileNotFoundError: when the recordings are missing.
        ValueError: when they are damaged.
    """
    folder.check_free(overwrite=overwrite)
    settings = replace(settings, threads=settings.threads or torch.get_num_threads())
    stages = Stages(progress)
    path, windows = _read_recordings(settings, stages)
    with folder.begun():
        folder.clear()
        folder.write_json(STATE, {"settings": asdict(settings), "made_with": made_with(path)})
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
        settings, before = Settings(**state["settings"]), dict(state["made_with"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / STATE} is damaged ({error}); replace the run with --overwrite") from error
    stages = Stages(progress)
    path, windows = _read_recordings(settings, stages)
    for name, now in made_with(path).items():
        if before.get(name) != now:
            raise ValueError(
                f"the run in {folder.path} was started with {name} {before.get(name)} and cannot go on with {now}; "
                "go back to the former, or replace the run with --overwrite"
            )
    return _run(folder, settings, path, windows, stages)


def _run(folder: RunFolder, settings: Settings, path: Path, windows: Windows, stages: Stages) -> Report:
    assert settings.threads is not None
    split = split_by_person(windows, seed=settings.seed)
    test = _some(split.test, settings.test_windows, settings.seed)
    chosen = (JOINT, CONSISTENT)
    if settings.wrong_labels:
        draw = torch.Generator().manual_seed(settings.seed)
        y = mislabelled(split.train, settings.wrong_labels, draw)
        split, chosen = replace(split, train=replace(split.train, y=y)), (AUGMENTATION, NOISY_LABELS)
    recipes = [replace(recipe, epochs=settings.epochs or recipe.epochs) for recipe in chosen]
    with threads(settings.threads):
        models = {recipe.name: _train(folder, recipe, split, settings.seed, stages) for recipe in recipes}
        folder.tidy()
        evaluated: dict[str, RecipeReport] = {}
        for recipe in recipes:
            model = models[recipe.name]
            with stages.stage(f"Evaluate {recipe.name}"):
                evaluated[recipe.name] = _evaluate(model, recipe, split.calibration, test, settings.seed)
            model.save(folder / f"{recipe.name}.safetensors")
        timing = measure(
            models,
            recipes[1].name,
            test,
            stages,
            conditions=CONDITIONS,
            timed_batches=settings.timed_batches,
            timed_windows=settings.timed_windows,
            energy_rounds=settings.energy_rounds,
            energy_window=settings.energy_window,
            seed=settings.seed,
        )
    report = Report(
        schema_version=SCHEMA_VERSION,
        title="Early exit on smartwatch data",
        scope=SCOPE if not settings.wrong_labels else f"{wrong_labels_scope(settings.wrong_labels)} {SCOPE}",
        settings={**asdict(settings), "data": None if settings.data is None else path.name},
        versions=versions(),
        exits=[*EXITS, "final"],
        conditions=CONDITIONS,
        data=_describe(path, split, test),
        recipes=evaluated,
        timing=timing,
    )
    with stages.stage("Write report"):
        write_report(folder, report)
    return report


def _read_recordings(settings: Settings, stages: Stages) -> tuple[Path, Windows]:
    with stages.stage("Read recordings") as step:
        path = find_dataset() if settings.data is None else Path(settings.data)
        windows = load_windows(path)
        step.note(f"{len(windows)} windows of {len(_persons(windows))} persons")
    return path, windows


def _train(folder: RunFolder, recipe: Recipe, split: Split, seed: int, stages: Stages) -> EarlyExit:
    """The trained model; one that an earlier attempt has finished is reused."""
    path = folder / f"{recipe.name}.safetensors"
    with stages.stage(f"Train {recipe.name}") as step:
        if not path.is_file():
            checkpoints = folder / CHECKPOINTS / recipe.name
            train(recipe, split, seed, directory=checkpoints, resume=True, callbacks=[ShowTraining(step)]).save(path)
        # Read back in any case, so that a resumed run computes with the very same tensors.
        return cet.load(path, build(recipe, split, seed).backbone)


def _evaluate(model: EarlyExit, recipe: Recipe, calibration: Windows, test: Windows, seed: int) -> RecipeReport:
    """Calibrate the model, which then has the new policy, and evaluate it.

    Asked for is a promise about new people. Where the calibration persons are too few for it, the thresholds are fitted
    on their windows instead, which promises nothing, and the report says so.
    """
    costs = exit_costs(model)
    # On what it will meet: thresholds for clean input alone let too many perturbed samples leave.
    perturb: dict[str, Perturbation] = {
        name: perturbation(severity) for name, severity in CONDITIONS.items() if severity
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the report says it
        calibrated = calibrate(
            model,
            [(calibration.x, calibration.y)],
            MAX_ACCURACY_DROP,
            CONFIDENCE,
            groups=calibration.person,
            perturb=perturb,
            seed=seed,
            costs=costs,
        )
        certificate = calibrated.report.certificate
        assert certificate is not None
        if not certificate.certified:
            batches = [(perturbed(calibration, severity, seed), calibration.y) for severity in CONDITIONS.values()]
            calibrated = calibrate(model, batches, MAX_ACCURACY_DROP, guarantee=None, costs=costs)
    model.policy = calibrated.policy
    return evaluate(
        model,
        recipe,
        calibrated,
        certificate,
        costs,
        calibration,
        test,
        severities=SEVERITIES,
        conditions=CONDITIONS,
        seed=seed,
    )


def _describe(path: Path, split: Split, test: Windows) -> Data:
    parts = {"train": split.train, "calibration": split.calibration, "test": test}
    return Data(
        sha256=sha256(path),
        classes=list(test.classes),
        length=test.x.shape[2],
        persons={name: _persons(part) for name, part in parts.items()},
        windows={name: len(part) for name, part in parts.items()},
    )


def _persons(windows: Windows) -> list[int]:
    return sorted(set(windows.person.tolist()))


def _some(windows: Windows, count: int | None, seed: int) -> Windows:
    """``count`` of the windows at random, or all."""
    if count is None or count >= len(windows):
        return windows
    chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))[:count]
    return windows.rows(chosen)
