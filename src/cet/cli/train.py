"""`cet train`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cet.cli.demo import NEEDED
from cet.cli.errors import debug_option
from cet.cli.parameters import PATH, FiniteRange
from cet.signals import INTERRUPTED

if TYPE_CHECKING:
    from cet.cli.runs import Prepared, Settings, TrainingFolder

RECIPES = ("joint", "augmentation", "consistent", "noisy-labels")
PERTURBATIONS = ("sensor", "rotated-sensor", "audio-waveform", "audio-spectrogram", "image", "none")
OF_THE_COMMAND = ("output", "config", "resume", "overwrite")


def _read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    """Take the options of an earlier run for defaults, so that they are checked as those of the command line are."""
    if path is None:
        return None
    try:
        content = json.loads(path.read_text())
        settings = dict(content.get("settings", content))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise click.BadParameter(f"{path} holds no options ({reason}); give the run.json of a run.") from error
    known = {p.name for p in context.command.params if p.name not in OF_THE_COMMAND}
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise click.BadParameter(f"{path} holds {unknown[0]!r}, which is no option of cet train; leave it out.")
    context.default_map = {name: value for name, value in settings.items() if value is not None}
    return path


@click.command("train")
@click.option(
    "--data",
    metavar="FILE|MODULE:NAME",
    help="An .npz file with x, y and, if known, group; or a function that returns a model and its batches.",
)
@click.option("--output", type=PATH, default="runs/train", show_default=True, help="The folder of the run.")
@click.option(
    "--config",
    type=PATH,
    is_eager=True,
    callback=_read_config,
    metavar="FILE",
    help="Take the options from the run.json of another run; those on the command line go first.",
)
@click.option("--calibration-data", type=PATH, metavar="FILE", help="An .npz file to validate and calibrate on.")
@click.option("--test-data", type=PATH, metavar="FILE", help="An .npz file for the report.")
@click.option(
    "--calibration-share",
    type=FiniteRange(0, 0.9),
    default=0.2,
    show_default=True,
    help="Of the groups in --data, or of its samples where there are none, to calibrate on.",
)
@click.option(
    "--test-share", type=FiniteRange(0, 0.9), default=0.2, show_default=True, help="Likewise to test on; 0 for none."
)
@click.option(
    "--perturb",
    type=click.Choice(PERTURBATIONS),
    help="What may happen to samples, and should not change answers.  [default: sensor for a file, else none]",
)
@click.option("--severity", type=FiniteRange(0, 10), default=1.0, show_default=True, help="Of the perturbation.")
@click.option("--augment", is_flag=True, help="Train on perturbed samples in the place of those given.")
@click.option(
    "--recipe",
    type=click.Choice(RECIPES),
    help="How to train; the options that follow change it.  [default: consistent, joint without a perturbation]",
)
@click.option("--consistency-weight", type=FiniteRange(0), help="Of the consistency term.")
@click.option("--supervise-perturbed", type=FiniteRange(0), help="The weight of the labels on perturbed samples.")
@click.option("--target", type=click.Choice(["soft", "hard"]))
@click.option("--teacher", type=click.Choice(["mean", "self", "final"]), help="Mean: of all exits.")
@click.option("--min-confidence", type=FiniteRange(0, 1), help="Of a teacher.")
@click.option(
    "--labelled-share",
    type=FiniteRange(0, 1, min_open=True),
    help="Of a batch, where some samples have no label.  [default: 0.5; 1 without consistency]",
)
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True)
@click.option("--batch-size", type=click.IntRange(2), default=64, show_default=True)
@click.option("--learning-rate", type=FiniteRange(0, min_open=True), default=3e-3, show_default=True)
@click.option("--weight-decay", type=FiniteRange(0), default=1e-2, show_default=True)
@click.option(
    "--seed", type=click.IntRange(0), default=0, metavar="N", help="Of the split and the training.  [default: 0]"
)
@click.option("--threads", type=click.IntRange(1, 1024), metavar="N", help="CPU threads.  [default: torch's choice]")
@click.option("--resume", is_flag=True, help="Go on with the run in the output folder, with the options it began with.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the output folder.")
@debug_option
@click.pass_context
def command(
    context: click.Context, /, output: Path, resume: bool, overwrite: bool, config: Path | None, **options: Any
) -> None:
    """Train a model with early exits on your own data.

    FILE holds x, numbers (samples, channels, length); y, a whole number or string per sample, -100 or an empty string
    where it has no label; and group, whose each sample is: no person or device is then in two of the parts that train,
    calibrate and test. The net is a small 1-D
    CNN that standardises its channels. For any other model or data, MODULE:NAME is a function without arguments that
    returns a cet.EarlyExit, an iterable of batches to train on, and one to validate on.

    Stopped by Ctrl-C or anything else, it goes on with --resume.

    Recipes: joint trains all exits on the samples as they are; augmentation on a perturbed copy of each too;
    consistent also wants the same answer on both, and noisy-labels wants that three times as much, for labels that are
    partly wrong or mostly missing.

    \b
    Examples:
      cet train --data recordings.npz --output runs/mine
      cet train --data recordings.npz --recipe noisy-labels --output runs/mine
      cet train --data mynet:build --epochs 30 --output runs/mine
      cet train --resume --output runs/mine
    """
    if resume:
        explicit = click.core.ParameterSource.COMMANDLINE
        for name in (*options, "config", "overwrite"):
            if context.get_parameter_source(name) == explicit:
                option = name.replace("_", "-")
                raise click.UsageError(f"--resume goes on with the options the run began with; leave out --{option}.")
    elif options["data"] is None:
        raise click.UsageError("Missing option '--data'.")

    try:
        _train(output, options, resume, overwrite)
    except KeyboardInterrupt:
        kept = (output / "checkpoints" / "last.ckpt").is_file()
        fix = f"go on with: cet train --resume --output {output}" if kept else "nothing was kept"
        click.echo(f"Interrupted; {fix}", err=True)
        context.exit(INTERRUPTED)


def _train(output: Path, options: dict[str, Any], resume: bool, overwrite: bool) -> None:
    from rich.console import Console

    from cet.cli.progress import show
    from cet.files import check_folder
    from cet.measure.host import require

    check_folder(output)
    require("cet train", NEEDED, extra="demo")
    from cet.cli.runs import MODEL, TrainingFolder, check_same, prepare
    from cet.report.figures import made_with, threads
    from cet.report.folder import STATE

    folder = TrainingFolder(output)

    if resume:
        settings, facts = folder.read_run()
        if folder.finished:
            click.echo(f"{folder.path} is trained already; go on with: cet calibrate {folder.path}")
            return
    else:
        folder.check_free(overwrite=overwrite)
        settings, facts = _settings(options), {}
    console = Console(highlight=False)
    with show(console) as progress, threads(settings.threads):
        with progress.stage("Read data") as step:
            prepared = prepare(settings)
            made = made_with(None if settings.is_function else Path(settings.data))
            if resume:
                check_same(facts["made_with"], made, folder.path)
            counts = prepared.facts["samples"]
            step.note(", ".join(f"{count} for {name}" for name, count in counts.items()) or "batches of a function")
        with folder.kept_if_resumable():
            if not resume:
                folder.clear()
                state = {"settings": asdict(settings), "facts": {**prepared.facts, "made_with": made}}
                folder.write_json(STATE, state)
            with progress.stage("Train") as step:
                _fit(folder, settings, prepared, made, step).save(folder / MODEL)
            folder.tidy()
    console.print(
        f"In {folder.path}: {STATE}, {MODEL}. Next: cet calibrate {folder.path}", markup=False, soft_wrap=True
    )


def _settings(options: dict[str, Any]) -> Settings:
    import torch

    from cet.cli.runs import Settings, is_function

    paths = {
        name: None if options[name] is None else str(options[name].absolute())
        for name in ("calibration_data", "test_data")
    }
    data = options["data"]
    if not is_function(data):
        data = str(Path(data).absolute())
    elif any(paths.values()):
        raise click.UsageError("--data MODULE:NAME gives all batches; leave out --calibration-data and --test-data.")
    perturb = options["perturb"] or ("none" if is_function(data) else "sensor")
    recipe = options["recipe"] or ("joint" if perturb == "none" else "consistent")
    settings = Settings(**{**options, **paths, "data": data, "perturb": perturb, "recipe": recipe, "threads": 1})
    settings.loss()  # refuses what does not fit together
    return replace(settings, threads=options["threads"] or torch.get_num_threads())


def _fit(folder: TrainingFolder, settings: Settings, prepared: Prepared, made: dict[str, str], step: Any) -> Any:
    from cet.report.folder import CHECKPOINTS
    from cet.training.fit import ShowTraining, fit
    from cet.training.lightning import MultiExitTraining

    loss = settings.loss()
    training = MultiExitTraining(
        prepared.model,
        loss,
        seed=settings.seed,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        augment=loss.perturb if settings.augment else None,
        identity={**asdict(settings), **made},
    )
    return fit(
        training,
        prepared.train,
        prepared.validation,
        epochs=settings.epochs,
        directory=folder / CHECKPOINTS,
        resume=True,
        callbacks=[ShowTraining(step)],
    )
