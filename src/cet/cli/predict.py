"""`cet predict`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cet.cli.demo import NEEDED
from cet.cli.errors import debug_option
from cet.cli.parameters import PATH
from cet.files import OutputError

if TYPE_CHECKING:
    from torch import Tensor

    from cet.cli.runs import Run
    from cet.model.output import ExitOutput
    from cet.report.figures import Step


@click.command("predict")
@click.argument("run", type=PATH)
@click.option(
    "--data",
    required=True,
    metavar="FILE|MODULE:NAME",
    help="An .npz file with x and, if known, y and group; or a function that returns batches (x, y).",
)
@click.option("--output", type=PATH, required=True, metavar="FILE", help="Where the answers go, as CSV.")
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@debug_option
def command(run: Path, data: str, output: Path, overwrite: bool) -> None:
    """Answer new samples with the model of a run of cet train.

    Each line of FILE answers one sample, in the order of the data: its label, the exit that it took, and its score
    there. Where the data have labels, the accuracy is printed.

    \b
    Examples:
      cet predict runs/mine --data new.npz --output answers.csv
    """
    from rich.console import Console

    from cet.cli.progress import show
    from cet.cli.runs import TrainingFolder
    from cet.files import check_file
    from cet.measure.host import require

    folder = TrainingFolder(run)
    folder.read_run()
    if output.is_dir():
        raise OutputError(f"{output} is a folder; give a file")
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists; give another file, or replace it with --overwrite")
    check_file(output)
    require("cet predict", NEEDED, extra="demo")
    console = Console(highlight=False)
    with show(console) as progress:
        summary = _predict(folder, data, output, progress)
    console.print(f"\n{summary}", markup=False, soft_wrap=True)


def _predict(folder: Any, data: str, output: Path, progress: Any) -> str:
    """Write the answers; what they are, in a few lines."""
    import torch

    from cet.cli.runs import CALIBRATION, load_run
    from cet.data.arrays import Arrays
    from cet.files import write_atomically
    from cet.report.figures import threads

    run = load_run(folder)
    with threads(run.settings.threads):
        with progress.stage("Read data") as step:
            samples = run.read(data)
            groups = samples.group if isinstance(samples, Arrays) else None
            labels = samples.y if isinstance(samples, Arrays) else None
            if isinstance(samples, Arrays):
                step.note(f"{len(samples)} samples")
        with progress.stage("Predict") as step:
            answers, y = _answers(run, samples, step)
    exit_index = torch.cat([answer.exit_index for answer in answers]).tolist()
    predicted = torch.cat([answer.labels for answer in answers]).tolist()
    scores = torch.cat([answer.score for answer in answers]).tolist()
    names = [name.removeprefix("net.") for name in run.model.exit_names]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sample", "label", "exit", "score", *(["group"] if groups is not None else [])])
    for row, (label, exit_, score) in enumerate(zip(predicted, exit_index, scores, strict=True)):
        whose = [groups[row]] if groups is not None else []
        writer.writerow([row, run.classes[label], names[exit_], f"{score:.6g}", *whose])
    write_atomically(output, text.getvalue().encode())
    shares = [f"{exit_index.count(k) / len(exit_index):.1%} at {name}" for k, name in enumerate(names)]
    lines = [f"{len(predicted)} answers in {output}; samples left: {', '.join(shares)}"]
    if labels is not None:
        right = [run.classes[label] == truth for label, truth in zip(predicted, labels.tolist(), strict=True)]
        lines.append(f"accuracy {sum(right) / len(right):.2%}")
    elif y is not None:
        lines.append(f"accuracy {(torch.tensor(predicted) == y).double().mean().item():.2%}")
    if not any(threshold is not None for threshold in run.model.policy.thresholds):
        if (folder.path / CALIBRATION).is_file():
            lines.append(f"every exit is closed, as calibration found best; {folder.path / CALIBRATION} says why")
        else:
            lines.append(f"every exit is closed: the run is not calibrated; cet calibrate {folder.path}")
    return "\n".join(lines)


def _answers(run: Run, samples: Any, step: Step) -> tuple[list[ExitOutput], Tensor | None]:
    """What the model answers to each batch, and the labels, where batches have them."""
    import torch

    from cet.cli.errors import LoadError
    from cet.cli.runs import BATCH_SIZE
    from cet.data.arrays import Arrays
    from cet.data.batches import as_call, read_batches

    batches: Iterable[tuple[Any, Any]]
    if isinstance(samples, Arrays):
        batches = ((x, None) for x in torch.split(samples.x, BATCH_SIZE))
    else:
        batches = read_batches(samples, run.model.num_classes)
    answers, y, done = [], [], 0
    for x, labels in batches:
        args, kwargs = as_call(x)
        answers.append(run.model.predict(*args, **kwargs))
        done += len(answers[-1].exit_index)
        if isinstance(samples, Arrays):
            step.advance(done, len(samples))
        if labels is not None:
            y.append(labels)
    if not done:
        raise LoadError("--data gives no sample; give at least one batch (x, y)")
    return answers, torch.cat(y) if y else None
