"""The `cet` command. Heavy imports happen inside the commands, so that help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

import cet
from cet.cli import completion, demo, doctor, energy
from cet.cli.errors import INTERRUPTED, Session, Stopped, debug_option, one_sentence, speak_plainly


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(cet.__version__, message="%(prog)s %(version)s")
@debug_option
@click.pass_context
def cli(context: click.Context) -> None:
    """Consistent early exit: neural networks that stop computing when they are sure.

    \b
    Examples:
      cet demo --quick     train, calibrate and measure on smartwatch data
      cet doctor           what this machine can run and measure
      cet energy --help    joules of a command, of each exit, of two models
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


cli.add_command(demo.command)
cli.add_command(doctor.command)
cli.add_command(energy.command)
cli.add_command(completion.command)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, 1 after an error, 2 for bad usage, 130 after Ctrl-C.

    An error is one sentence on stderr, or with ``--debug`` a traceback. Errors with an ``exit_code`` exit with it.
    """
    session = Session()
    speak_plainly()
    try:
        code = cli.main(args, prog_name="cet", standalone_mode=False, obj=session)
    except click.Abort as abort:
        signal = abort.__cause__
        click.echo(f"Stopped by {signal}." if isinstance(signal, Stopped) else "Interrupted.", err=True)
        sys.exit(getattr(signal, "exit_code", INTERRUPTED))
    except Exception as error:
        if session.debug:
            raise
        click.echo(f"Error: {one_sentence(error)}", err=True)
        sys.exit(getattr(error, "exit_code", 1))
    sys.exit(code)
