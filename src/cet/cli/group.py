"""The group of all commands, and how a run of it ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

import click

import cet
from cet.cli import streams
from cet.cli.errors import Session, debug_option, one_sentence
from cet.signals import INTERRUPTED, Stopped


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(cet.__version__, message="%(prog)s %(version)s")
@debug_option
@click.pass_context
def cli(context: click.Context) -> None:
    """Consistent early exit: neural networks that stop computing when they are sure.

    \b
    Examples:
      cet demo --quick     train, calibrate and measure on smartwatch data
      cet train --help     your own data: train, then cet calibrate and cet predict
      cet doctor           what this machine can run and measure
      cet energy --help    joules of a command, of each exit, of two models
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def run(args: Sequence[str], commands: Sequence[str]) -> int:
    """The exit code of a run.

    Args:
        args: of the command line.
        commands: the modules of :mod:`cet.cli` that hold the commands.
    """
    for name in commands:
        cli.add_command(import_module(f"cet.cli.{name}").command)
    session = Session()
    streams.prepare()
    try:
        code = cli.main(args, prog_name="cet", standalone_mode=False, obj=session)
        sys.stdout.flush()  # a full disk shows here at the latest
    except click.Abort as abort:
        signal = abort.__cause__
        click.echo(f"Stopped by {signal}." if isinstance(signal, Stopped) else "Interrupted.", err=True)
        return getattr(signal, "exit_code", INTERRUPTED)
    except Exception as error:
        if session.debug:
            raise
        if isinstance(error, click.UsageError) and error.ctx is None:
            error.ctx = _context_of(args)
        click.echo(f"Error: {one_sentence(error)}", err=True)
        return getattr(error, "exit_code", 1)
    finally:
        streams.give_up_unwritten()
    return code or 0


def _context_of(args: Sequence[str]) -> click.Context:
    """The context of the command that the arguments name, which click leaves out of some errors."""
    context = click.Context(cli, info_name="cet", **cli.context_settings)
    for name in args:
        group = context.command
        if isinstance(group, click.Group) and name in group.commands:
            context = click.Context(group.commands[name], parent=context, info_name=name)
    return context
