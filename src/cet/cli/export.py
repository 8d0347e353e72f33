"""`cet export`."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import click

from cet.cli.errors import debug_option
from cet.cli.parameters import PATH, FiniteRange, is_checkpoint
from cet.files import OutputError

if TYPE_CHECKING:
    from cet.model.early_exit import EarlyExit


@click.command("export")
@click.argument("model", metavar="RUN|MODULE:NAME|FILE")
@click.option("--backbone", metavar="MODULE:NAME", help="The backbone, which a FILE of EarlyExit.save needs.")
@click.option(
    "--output",
    type=PATH,
    required=True,
    metavar="FILE",
    help="Where the model goes: model.onnx; with a loop on the host model.stages, model.pt2 (AOTInductor), model.pte "
    "(ExecuTorch), model.tflite (LiteRT) or model.tflm (TFLite Micro).",
)
@click.option(
    "--batch",
    type=click.Choice(["dynamic", "1"]),
    default="dynamic",
    show_default=True,
    help="Any number of rows at a call, or one, which is faster for that.",
)
@click.option(
    "--thresholds",
    type=click.Choice(["baked", "input"]),
    default="baked",
    show_default=True,
    help="When samples leave: fixed in the file, or an input with the policy's as default.",
)
@click.option(
    "--int8",
    is_flag=True,
    help="Quantise a run of cet train by samples that it was trained on, and calibrate on those that it kept for that; "
    "for .onnx, .stages, .pte and .tflite.",
)
@click.option(
    "--max-drop",
    type=FiniteRange(0, 1, max_open=True),
    help="With --int8, how much accuracy may fall on new samples, as a fraction.  [default: 0.01]",
)
@click.option(
    "--no-guarantee", is_flag=True, help="With --int8, fit the thresholds on these samples, without a promise."
)
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@debug_option
def command(
    model: str,
    backbone: str | None,
    output: Path,
    batch: str,
    thresholds: Literal["baked", "input"],
    int8: bool,
    max_drop: float | None,
    no_guarantee: bool,
    overwrite: bool,
) -> None:
    """Write a model with its exits and policy for another runtime, as one file or a folder of stages.

    The model is a run of cet train, a function that returns a cet.EarlyExit, or a file of EarlyExit.save. The file is
    compared with it row by row before it is written, and timed beside the model without exits in the same runtime.

    \b
    Examples:
      cet export runs/mine --output model.onnx
      cet export net:build --output model.onnx --batch 1
      cet export runs/mine --output model.pte
      cet export runs/mine --output small.onnx --int8
    """
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists; give another file, or replace it with --overwrite")
    from cet.deploy.loading import format_of

    format_of(output)
    from cet.deploy.export import export

    if not int8 and (max_drop is not None or no_guarantee):
        raise click.UsageError("--max-drop and --no-guarantee are for --int8; calibrate a run by cet calibrate")
    if ":" not in model and not os.path.lexists(model):
        raise FileNotFoundError(f"{model} is not there; make a run with: cet train --output {model}")
    if int8 and not Path(model).is_dir():
        raise click.UsageError("--int8 is for a run of cet train, which keeps samples; in Python give quantize=")
    if backbone is not None and not is_checkpoint(model):
        raise click.UsageError(f"--backbone is for a file of EarlyExit.save, and {model} is none; leave it out")
    loaded, labels = _load(model, backbone)
    rows: Literal["dynamic", 1] = 1 if batch == "1" else "dynamic"
    drop = 0.01 if max_drop is None else max_drop
    samples = _calibrated_in_int8(Path(model), loaded, output, rows, drop, no_guarantee) if int8 else None
    if samples is None and thresholds == "baked" and labels is not None:
        _check_calibrated(Path(model))
    report = export(loaded, output, batch=rows, thresholds=thresholds, class_labels=labels, quantize=samples)
    click.echo(str(report))


def _check_calibrated(run: Path) -> None:
    from cet.cli.runs import CALIBRATION

    if not (run / CALIBRATION).is_file():
        raise click.UsageError(
            f"every exit is closed: the run is not calibrated; cet calibrate {run}, or give --thresholds input."
        )


def _calibrated_in_int8(
    folder: Path, model: EarlyExit, output: Path, batch: Literal["dynamic", 1], max_drop: float, no_guarantee: bool
) -> list[Any]:
    """Give the model the thresholds that keep the accuracy in int8; the samples that it is quantised by."""
    import cet
    from cet.cli.runs import TrainingFolder, load_run
    from cet.data.arrays import Arrays

    run = load_run(TrainingFolder(folder))
    parts, samples = run.kept(folder)
    groups = samples.group if isinstance(samples, Arrays) else None
    # Not by those that calibrate: what is promised of new samples must not be judged by what the scales were fitted to.
    quantize = run.some_for_training(parts)
    with TemporaryDirectory() as temporary:
        path = Path(temporary, f"int8{output.suffix}")
        report = cet.export(model, path, batch=batch, thresholds="input", quantize=quantize)
        calibration = cet.calibrate(
            cet.load_exported(path),
            run.labelled(samples),
            max_drop,
            guarantee=None if no_guarantee else "auto",
            groups=None if no_guarantee else groups,
            costs=report.costs,
        )
    click.echo(f"{calibration.report}\n")
    model.policy = calibration.policy
    return quantize


def _load(spec: str, backbone: str | None) -> tuple[EarlyExit, tuple[str, ...] | None]:
    """The model in eval mode, and the labels of its classes where they are known."""
    if Path(spec).is_dir():
        from cet.cli.runs import TrainingFolder, load_run

        run = load_run(TrainingFolder(Path(spec)))
        return run.model, tuple(map(str, run.classes))
    from cet.cli.errors import LoadError
    from cet.cli.loading import load_model
    from cet.model.early_exit import EarlyExit

    loaded = load_model(spec, backbone, None)
    if not isinstance(loaded, EarlyExit):
        raise LoadError(f"{spec} gives {type(loaded).__name__}; give a cet.EarlyExit")
    return loaded, None
