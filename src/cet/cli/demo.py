"""`cet demo`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cet.cli.errors import debug_option
from cet.cli.parameters import PATH, FiniteRange
from cet.signals import INTERRUPTED

if TYPE_CHECKING:
    from rich.console import Console

    from cet.report.schema import Report

NEEDED = ("lightning", "torchmetrics", "matplotlib")
OF_THE_RUN = ("quick", "wrong_labels", "seed", "threads", "data")


@click.command("demo")
@click.option("--output", type=PATH, default="runs/demo", show_default=True, help="Where the results go.")
@click.option("--quick", is_flag=True, help="Two epochs and fewer test windows: to see that it works, under a minute.")
@click.option(
    "--wrong-labels",
    type=FiniteRange(0, 0.9),
    default=0.0,
    show_default=True,
    help="Share of the training windows that get a wrong label.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Of the split and the training.  [default: 0]"
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.  [default: torch's choice]")
@click.option(
    "--data",
    type=PATH,
    help="The recordings, seglearn's watch_dataset.npy.  [default: that of the installed seglearn]",
)
@click.option("--resume", is_flag=True, help="Go on with the run in the output folder, with the options it began with.")
@click.option("--overwrite", is_flag=True, help="Replace the run in the output folder.")
@debug_option
@click.pass_context
def command(
    context: click.Context,
    output: Path,
    quick: bool,
    wrong_labels: float,
    seed: int,
    threads: int | None,
    data: Path | None,
    resume: bool,
    overwrite: bool,
) -> None:
    """Early exit on real sensor data, end to end, in a few minutes.

    Trains the same net twice on smartwatch recordings split by person, with joint cross-entropy and with consistent
    exits; calibrates thresholds; and measures accuracy, compute and time of early exit on people not seen in training,
    as the input gets worse. Models, report and plots go to the output folder.

    With --wrong-labels the nets are trained by augmentation, and by the recipe for such labels: there consistency earns
    its keep.

    Stopped by Ctrl-C or anything else, it goes on with --resume and ends with the same figures, but for the timings.

    \b
    Examples:
      cet demo
      cet demo --quick --output /tmp/demo
      cet demo --wrong-labels 0.4 --output runs/wrong
      cet demo --resume
    """
    if resume:
        explicit = click.core.ParameterSource.COMMANDLINE
        given = [name for name in (*OF_THE_RUN, "overwrite") if context.get_parameter_source(name) == explicit]
        if given:
            option = given[0].replace("_", "-")
            raise click.UsageError(f"--resume goes on with the options the run began with; leave out --{option}.")
    try:
        _demo(output, quick, wrong_labels, seed, threads, data, resume, overwrite)
    except KeyboardInterrupt:
        begun = (output / "run.json").is_file()
        fix = f"go on with: cet demo --resume --output {output}" if begun else "nothing was done yet"
        click.echo(f"Interrupted; {fix}", err=True)
        context.exit(INTERRUPTED)


def _demo(
    output: Path,
    quick: bool,
    wrong_labels: float,
    seed: int,
    threads: int | None,
    data: Path | None,
    resume: bool,
    overwrite: bool,
) -> None:
    from rich.console import Console

    from cet.cli.progress import show
    from cet.files import check_folder
    from cet.measure.host import require
    from cet.report.folder import RunFolder

    check_folder(output)
    folder = RunFolder(output)
    require("cet demo", NEEDED, extra="demo")
    from cet.demo import run

    console = Console(highlight=False)
    with show(console) as progress:
        if resume:
            report = run.resume(folder, progress)
        else:
            settings = replace(
                run.QUICK if quick else run.Settings(),
                wrong_labels=wrong_labels,
                seed=seed,
                threads=threads,
                data=None if data is None else str(data.absolute()),
            )
            report = run.start(folder, settings, progress, overwrite=overwrite)
    _print_summary(console, report)
    console.print(f"\nIn {folder.path}: {', '.join(folder.results())}", markup=False, soft_wrap=True)


def _print_summary(console: Console, report: Report) -> None:
    from rich.table import Table

    from cet.report.markdown import calibration_verdict, energy_verdict, time_verdict
    from cet.report.schema import at

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("recipe\n")
    table.add_column("input\n")
    batch_size = next(iter(report["timing"]["throughput"].values()))["clean"]["batch_size"]
    for header in (
        "accuracy,\nfull net",
        "accuracy,\nearly exit",
        "FLOPs,\nof full",
        f"speed-up,\nbatch {batch_size}",
        "speed-up,\nbatch 1",
    ):
        table.add_column(header, justify="right")
    for name, recipe in report["recipes"].items():
        for condition, severity in report["conditions"].items():
            row = at(recipe, severity)
            timing = report["timing"]
            speeds = timing["throughput"][name][condition], timing["latency"][name][condition]
            table.add_row(
                name,
                condition,
                f"{row['exits'][-1]['accuracy']:.1%}",
                f"{row['early']['accuracy']:.1%}",
                f"{row['early']['mean_flops'] / recipe['flops']['full']:.0%}",
                *(f"{speed['speedup']['value']:.2f}x" for speed in speeds),
            )
    console.print()
    console.print(table)
    for text in (
        calibration_verdict(report),
        time_verdict(report),
        energy_verdict(report),
        report["scope"],
    ):
        console.print()
        console.print(text, markup=False)
