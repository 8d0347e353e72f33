"""`cet export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cet.cli.errors import debug_option
from cet.cli.parameters import PATH
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
    "(ExecuTorch) or model.tflite (LiteRT).",
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
@click.option("--overwrite", is_flag=True, help="Replace the file.")
@debug_option
def command(
    model: str,
    backbone: str | None,
    output: Path,
    batch: str,
    thresholds: Literal["baked", "input"],
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
    """
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists; give another file, or replace it with --overwrite")
    from cet.deploy.loading import format_of

    format_of(output)
    from cet.deploy.export import export

    loaded, labels = _load(model, backbone)
    rows: Literal["dynamic", 1] = 1 if batch == "1" else "dynamic"
    click.echo(str(export(loaded, output, batch=rows, thresholds=thresholds, class_labels=labels)))


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
