"""How the command line reports errors."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from re import match

import click

from cet.files import OutputError

EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError)
"""What cet raises itself, with a message made for the user."""


class LoadError(ValueError):
    """A model or data cannot be loaded."""

    exit_code = 21


class NoSuchExitError(ValueError):
    """The model has no such exit."""

    exit_code = 22


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
        return f"{error.format_message().removesuffix('.')}. See '{command} --help'."
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror and not isinstance(error, OutputError):
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, ModuleNotFoundError) and (extra := _extra_of(error.name)):
        return f"{error.name} is not installed; pip install 'cet[{extra}]'"
    message = " ".join(str(error).split())
    if isinstance(error, EXPECTED) and message:
        return message
    return f"unexpected {type(error).__name__}: {message}; --debug shows where"


def _extra_of(module: str | None) -> str | None:
    """The extra of cet that installs a module."""
    try:
        requirements = requires("cet") or []
    except PackageNotFoundError:
        return None
    for requirement in requirements:
        found = match(r"([\w.-]+)[^;]*; extra == [\"']([\w-]+)[\"']$", requirement)
        if found and found[1].replace("-", "_") == module:
            return found[2]
    return None
