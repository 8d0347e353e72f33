"""How the command line reports errors."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import click

from cet.files import OutputError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""

EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError)
"""What cet raises itself, with a message made for the user."""


class LoadError(ValueError):
    """A model or data that cannot be loaded, or that do not fit each other."""

    exit_code = 21


class NoSuchExitError(ValueError):
    """An exit that the model does not have."""

    exit_code = 22


class Stopped(KeyboardInterrupt):
    """A signal asked the process to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise :class:`Stopped` in the main thread on SIGINT, SIGTERM and SIGHUP, so that what is finished can be kept."""

    def stop(signum: int, _frame: object) -> NoReturn:
        raise Stopped(signum)

    # Where there is no SIGHUP, nobody hangs up.
    stopping = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
    before = {signum: signal.signal(signum, stop) for signum in dict.fromkeys(stopping)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@dataclass
class Session:
    """One run of the command line."""

    debug: bool = False


def _set_debug(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Session).debug = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show the traceback of an error."
)
"""For the group and for every command, so that it counts wherever on the command line it stands."""


def one_sentence(error: BaseException) -> str:
    """What to tell the user, on one line."""
    if isinstance(error, click.UsageError):
        command = error.ctx.command_path if error.ctx else "cet"
        return f"{error.format_message()} See '{command} --help'."
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror and not isinstance(error, OutputError):
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    message = " ".join(str(error).split())
    if isinstance(error, EXPECTED) and message:
        return message
    return f"unexpected {type(error).__name__}: {message}; --debug shows where"
