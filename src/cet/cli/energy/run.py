"""`cet energy run`."""

from __future__ import annotations

import signal
from contextlib import suppress
from pathlib import Path

import click

from cet.cli.energy.options import FILES, FORMAT, METER, MOST_SECONDS, check_assumption, checked_outputs, decorated
from cet.cli.errors import debug_option
from cet.cli.parameters import FiniteRange


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.argument("arguments", metavar="-- COMMAND [ARG]...", nargs=-1, type=click.UNPROCESSED, required=True)
@click.option(
    "--idle",
    type=FiniteRange(min=0, max=MOST_SECONDS),
    default=0.0,
    metavar="S",
    help="Measure the idle machine for S seconds before and after, and take it off.  [default: 0]",
)
@decorated(*METER, *FILES, FORMAT, debug_option)
@click.pass_context
def command(
    context: click.Context,
    arguments: tuple[str, ...],
    idle: float,
    require_gpu: bool,
    no_rapl: bool,
    integral: bool,
    assume_watts: float | None,
    output: Path | None,
    prometheus: Path | None,
    overwrite: bool,
    form: str,
) -> None:
    """Joules while a command runs.

    They are those of everything on the devices, from the command's start to its end. The result goes to stderr, since
    stdout is the command's. Signals are passed on to the command. The exit code is the command's own; if that is 0 and
    the measurement failed, that of the failure.

    \b
    Examples:
      cet energy run -- python train.py
      cet energy run --idle 5 --output run.json -- ./server --port 80
    """
    if idle and assume_watts is not None:
        raise click.UsageError("--idle measures what --assume-watts assumes; leave one of them out.")
    if not hasattr(signal, "sigtimedwait"):
        raise click.UsageError("cet energy run passes signals on by what only Linux has; run it there.")
    from cet.energy import process

    process.check_command(arguments[0])
    with process.signals_held() as mask:
        # Not before: what starts threads must find the signals held.
        from cet.cli.energy.tables import show
        from cet.cli.energy.text import of_run
        from cet.energy import EnergyMeter
        from cet.energy.run import measure

        outputs = checked_outputs(output, prometheus, None, overwrite=overwrite)
        with EnergyMeter(rapl=not no_rapl, integral=integral).opened() as meter:
            check_assumption(meter, assume_watts)
            meter.require(gpu=require_gpu)
            measured = measure(meter, arguments, mask, idle=idle, assume_watts=assume_watts)
        document = measured.document()
        outputs.save(document)
    with suppress(OSError):  # a stderr that is closed or full takes nothing from the command's exit code
        show(document, form, of_run(document), to_stderr=True)
    context.exit(measured.exit_code)
