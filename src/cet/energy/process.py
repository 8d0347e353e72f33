"""Runs the command that `cet energy run` measures."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cet.signals import Stopped

NOT_EXECUTABLE, NOT_FOUND = 126, 127  # as shells have it
Mask = set[signal.Signals]

FORWARDED = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
_STOPPING = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM})
_WATCHED = FORWARDED | {signal.SIGCHLD}
_LOOK = 0.5
"""Seconds after which a command that has ended is noticed, whatever becomes of its signal."""


class CommandError(OSError):
    """A command that cannot be run."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    exit_code: int
    """Its own, or 128 and the number of the signal that killed it."""
    stopped_by: tuple[str, ...]
    """The names of the signals that asked it to stop, from the terminal or through this process."""


def check_command(name: str) -> None:
    """Refuse what cannot be run.

    Raises:
        CommandError: for a name that is not on the path, and a file that is not executable.
    """
    if shutil.which(name) is None:
        quoted = shlex.quote(name)
        if os.sep in name and os.path.exists(name):
            raise CommandError(f"{quoted} is not executable; give a program, or chmod +x {quoted}", NOT_EXECUTABLE)
        raise CommandError(f"{quoted} is not found; give a program on PATH or its path", NOT_FOUND)


@contextmanager
def signals_held() -> Iterator[Mask]:
    """Let signals wait until :func:`run_command` takes them; gives the mask from before.

    Threads inherit the mask, so it must be set before anything starts one: a thread without it would take the signals.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    try:
        yield {signal.Signals(number) for number in before}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def sleep(seconds: float) -> None:
    """Sleep within :func:`signals_held`.

    Raises:
        KeyboardInterrupt: when a signal comes.
    """
    received = signal.sigtimedwait(FORWARDED, seconds)
    if received is not None:
        raise Stopped(received.si_signo)


def run_command(arguments: Sequence[str], mask: Mask, *, every: float, action: Callable[[], object]) -> Ended:
    """Run a command to its end, within :func:`signals_held`, and pass on the signals that this process gets.

    What the terminal sends, such as Ctrl-C, it sends to the command as well, so that is not passed on.

    Args:
        arguments: the program and its arguments.
        mask: the signal mask that the command gets.
        every: s between calls of ``action`` while the command runs.
        action: what to do meanwhile.

    Raises:
        CommandError: when it cannot be started.
        KeyboardInterrupt: for a signal that came before it could.
    """
    sleep(0)
    try:
        pid = os.posix_spawnp(
            arguments[0],
            tuple(arguments),
            os.environ,
            setsigmask=mask,
            setsigdef={signal.SIGPIPE, signal.SIGXFSZ},  # which Python ignores
        )
    except OSError as error:
        code = NOT_FOUND if error.errno == errno.ENOENT else NOT_EXECUTABLE
        raise CommandError(f"{arguments[0]} cannot be run ({error.strerror}); give a program", code) from error
    stopped_by: list[str] = []
    due = time.monotonic() + every
    while True:
        # A thread that was there before the signals were held may have swallowed the child's, so look now and then.
        received = signal.sigtimedwait(_WATCHED, min(_LOOK, max(0.0, due - time.monotonic())))
        if received is not None and received.si_signo != signal.SIGCHLD:
            if received.si_code <= 0:  # sent by a process, not by the kernel on behalf of the terminal
                os.kill(pid, received.si_signo)
            if received.si_signo in _STOPPING:
                stopped_by.append(signal.Signals(received.si_signo).name)
            continue
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return Ended(code if code >= 0 else 128 - code, tuple(stopped_by))
        if time.monotonic() >= due:
            action()
            due += every
