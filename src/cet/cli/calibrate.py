"""`cet calibrate`."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from cet.cli.demo import NEEDED
from cet.cli.errors import debug_option
from cet.cli.parameters import PATH, FiniteRange

if TYPE_CHECKING:
    from rich.console import Console

    from cet.calibration import Calibration, ExitCosts
    from cet.cli.runs import Run, TrainingFolder
    from cet.data.arrays import Arrays
    from cet.report.figures import Progress, Stages
    from cet.report.schema import Report

SEVERITIES = (0.0, 0.5, 1.0, 1.5, 2.0)


@click.command("calibrate")
@click.argument("run", type=PATH)
@click.option(
    "--data",
    metavar="FILE|MODULE:NAME",
    help="Labelled samples: an .npz file, or a function that returns batches.  [default: what the run kept]",
)
@click.option(
    "--max-drop",
    type=FiniteRange(0, 1, max_open=True),
    default=0.01,
    show_default=True,
    help="How much the metric may fall on new samples, as a fraction.",
)
@click.option(
    "--confidence",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    default=0.95,
    show_default=True,
    help="With what probability it stays within that.",
)
@click.option(
    "--no-guarantee", is_flag=True, help="Fit the thresholds on these samples, without a promise about new ones."
)
@click.option(
    "--metric",
    type=click.Choice(["accuracy", "balanced", "per_class", "disagreement", "brier"]),
    default="accuracy",
    show_default=True,
    help="What may fall: accuracy, the mean recall, or the recall of each class; or what may grow.",
)
@click.option(
    "--score", type=click.Choice(["entropy", "confidence", "margin", "patience"]), default="entropy", show_default=True
)
@click.option(
    "--severity",
    type=FiniteRange(0, 10),
    default=0.0,
    show_default=True,
    help="Calibrate on samples that are perturbed as in training, too; 0: on the samples as they are.",
)
@click.option(
    "--cost",
    type=click.Choice(["flops", "ms", "joules"]),
    default="flops",
    show_default=True,
    help="What is saved: operations as counted, or time or energy as measured here.",
)
@click.option(
    "--mean-budget",
    type=FiniteRange(0, min_open=True),
    help="What samples may cost on average; lose the least within it.",
)
@click.option("--worst-budget", type=FiniteRange(0, min_open=True), help="What no sample may cost more than.")
@click.option("--any-drop", is_flag=True, help="Keep the budget, whatever the metric loses; leave out --max-drop.")
@click.option("--quick", is_flag=True, help="Measure time and energy for a moment only.")
@debug_option
def command(run: Path, data: str | None, quick: bool, severity: float, **options: Any) -> None:
    """Choose when samples leave: cheap thresholds that keep what is asked for on new samples.

    Where the samples are in groups, such as people, the promise is about new groups. Where it cannot be made, every
    exit is closed, and the text says why.

    RUN is the folder of a run of cet train. Its model gets the thresholds, and calibration.json what they do on the
    samples, by exit and by class. A run on arrays also gets a report, with plots, of accuracy, compute, time and energy
    on the samples that it kept for testing.

    \b
    Examples:
      cet calibrate runs/mine
      cet calibrate runs/mine --data val.npz --max-drop 0.01
      cet calibrate runs/mine --metric per_class --max-drop 0.02
      cet calibrate runs/mine --cost ms --mean-budget 0.2 --any-drop
      cet calibrate runs/mine --no-guarantee
    """
    if options["any_drop"]:
        if click.get_current_context().get_parameter_source("max_drop") is not ParameterSource.DEFAULT:
            raise click.UsageError("--any-drop and --max-drop exclude each other; leave one out")
        if options["mean_budget"] is None and options["worst_budget"] is None:
            raise click.UsageError("--any-drop needs a budget to keep; give --mean-budget or --worst-budget")
    from rich.console import Console

    from cet.cli.progress import show
    from cet.cli.runs import TrainingFolder
    from cet.files import check_folder
    from cet.measure.host import require

    folder = TrainingFolder(run)
    folder.read_run()
    check_folder(run)
    require("cet calibrate", NEEDED, extra="demo")
    console = Console(highlight=False)
    with show(console) as progress:
        written = _calibrate(folder, data, quick, severity, options, progress, console)
    console.print(f"\nIn {run}: {', '.join(written)}", markup=False, soft_wrap=True)


def _calibrate(
    folder: TrainingFolder,
    data: str | None,
    quick: bool,
    severity: float,
    options: dict[str, Any],
    progress: Progress,
    console: Console,
) -> list[str]:
    """Calibrate the run and report on it; the names of the files that were written."""
    from cet.calibration import calibrate, exit_costs
    from cet.cli.runs import CALIBRATION, FRONT_PLOT, MODEL, load_run
    from cet.data.arrays import Arrays, check_disjoint, listed
    from cet.energy.measurement import Settings
    from cet.energy.profile import CostUnit, measured_costs
    from cet.plotting import png
    from cet.report.figures import Stages, threads, write_report
    from cet.report.folder import ACCURACY_PLOT, EXITS_PLOT, REPORT, SUMMARY
    from cet.report.markdown import calibration_verdict, energy_verdict, time_verdict

    stages = Stages(progress)
    run = load_run(folder)
    settings, model = run.settings, run.model
    if severity and (settings.preset is None or settings.is_function):
        raise click.UsageError("--severity needs a run on arrays that was trained with a perturbation; leave it out.")
    with threads(settings.threads):
        with stages.stage("Read data") as step:
            parts, samples = run.kept(folder.path)
            if data is not None:
                samples = run.read(data)
            if isinstance(samples, Arrays):
                check_disjoint([("training", run.facts["groups"].get("train", [])), ("calibration", samples.groups())])
                step.note(f"{len(samples)} samples")
            loader = run.labelled(samples)
            perturb = None
            if severity and isinstance(samples, Arrays):
                assert settings.preset is not None
                perturb = {f"severity {severity:g}": settings.preset(severity)}
            groups = samples.group if isinstance(samples, Arrays) else None
        measured = None
        if options["cost"] != "flops":
            with stages.stage("Measure costs") as step:
                short = Settings(rounds=2, window=0.05, update_periods=1, warmup=0.05) if quick else None
                unit: CostUnit = "ms" if options["cost"] == "ms" else "J"
                loader = list(loader)
                measured = measured_costs(
                    model, loader, unit, short, progress=lambda done, total, _: step.advance(done, total)
                )
        with stages.stage("Calibrate"), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the report says it
            costs = measured or exit_costs(model)
            calibration = calibrate(
                model,
                loader,
                None if options["any_drop"] else options["max_drop"],
                options["confidence"],
                guarantee=None if options["no_guarantee"] else "auto",
                groups=None if options["no_guarantee"] else groups,
                perturb=perturb,
                seed=settings.seed,
                score=options["score"],
                metric=options["metric"],
                costs=costs,
                mean_budget=options["mean_budget"],
                worst_budget=options["worst_budget"],
            )
        model.policy, certificate = calibration.policy, calibration.report.certificate
        report = None
        if parts is not None and parts.test is not None and isinstance(samples, Arrays):
            report = _report(run, calibration, costs, samples, parts.test, severity, quick, stages)
        with stages.stage("Write"):
            model.save(folder / MODEL)
            classes = [str(label) for label in run.classes]
            folder.write_json(CALIBRATION, {"classes": classes, **calibration.report.to_dict()})
            if certificate is not None:
                folder.write(FRONT_PLOT, png(certificate.plot_front()))
            if report is not None:
                write_report(folder, report)
    console.print(f"\n{calibration.report}", markup=False, soft_wrap=True)
    if certificate is not None:
        console.print(f"\n{certificate.front_table()}", markup=False, soft_wrap=True)
    if certificate is not None and not certificate.certified:
        console.print(
            "--no-guarantee fits thresholds on these samples, without a promise", markup=False, soft_wrap=True
        )
    if not settings.is_function:
        names = ", ".join(f"{index} is {name}" for index, name in enumerate(run.classes))
        console.print(f"of the classes, {names}", markup=False, soft_wrap=True)
    absent = sorted(set(range(len(run.classes))) - {row.label for row in calibration.report.classes})
    if absent:
        missing = listed([run.classes[index] for index in absent])
        console.print(
            f"warning: no sample of {missing}: nothing is known of their recall", markup=False, soft_wrap=True
        )
    if report is not None:
        for text in (calibration_verdict(report), time_verdict(report), energy_verdict(report)):
            console.print(f"\n{text}", markup=False, soft_wrap=True)
    front = [] if certificate is None else [FRONT_PLOT]
    return [MODEL, CALIBRATION, *front, *([SUMMARY, REPORT, ACCURACY_PLOT, EXITS_PLOT] if report is not None else [])]


def _report(
    run: Run,
    calibration: Calibration,
    costs: ExitCosts,
    samples: Arrays,
    test: Arrays,
    severity: float,
    quick: bool,
    stages: Stages,
) -> Report:
    """The report on the samples that the run kept for testing."""
    from cet.perturb import Compose
    from cet.report.figures import evaluate, measure, sha256, versions
    from cet.report.schema import SCHEMA_VERSION, Condition, Data, Report

    settings, recipe = run.settings, run.settings.training
    preset = settings.preset or (lambda _severity: Compose())
    conditions: dict[Condition, float] = {"clean": 0.0, **({"perturbed": severity} if severity else {})}
    severities = sorted({*conditions.values(), *(SEVERITIES if settings.preset else (0.0,))})
    windows = run.windows(test)
    with stages.stage("Evaluate"):
        evaluated = evaluate(
            run.model,
            recipe,
            calibration,
            calibration.report.certificate,
            costs,
            run.windows(samples),
            windows,
            severities=tuple(severities),
            conditions=conditions,
            seed=settings.seed,
            preset=preset,
        )
    timing = measure(
        {recipe.name: run.model},
        recipe.name,
        windows,
        stages,
        conditions=conditions,
        timed_batches=10 if quick else 100,
        timed_windows=40 if quick else 400,
        energy_rounds=1 if quick else 5,
        energy_window=0.1 if quick else 5.0,
        seed=settings.seed,
        preset=preset,
    )
    groups = {**run.facts["groups"], "calibration": samples.groups()}
    return Report(
        schema_version=SCHEMA_VERSION,
        title=f"Early exit on {Path(settings.data).name}",
        scope="One split and one seed: this shows what early exit does to one model, not what it gains on average.",
        settings={**asdict(settings), "data": Path(settings.data).name},
        versions=versions(),
        exits=[name.removeprefix("net.") for name in run.model.exit_names],
        conditions=conditions,
        data=Data(
            sha256=sha256(Path(settings.data)),
            classes=list(map(str, run.classes)),
            length=windows.x.shape[2],
            persons=groups,
            windows={"train": run.facts["samples"]["train"], "calibration": len(samples), "test": len(windows)},
        ),
        recipes={recipe.name: evaluated},
        timing=timing,
    )
