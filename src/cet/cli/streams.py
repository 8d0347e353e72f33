"""What becomes of stdout and stderr where they cannot take what is written to them."""

from __future__ import annotations

import codecs
import io
import os
import sys
from contextlib import suppress

from cet.files import OutputError

_PLAIN = {"–": "-", "±": "+-", "µ": "u", "°": "deg ", "█": "#", "░": "."}


class _Pipe(io.FileIO):
    """A standard stream that drops what is written to it once its reader has left.

    A command whose exit code or files matter goes on, and ends as if somebody had read to the end. What cannot be
    written for another reason, such as a full disk, raises :class:`OutputError`.
    """

    reader_left = False

    def write(self, data: object) -> int:
        try:
            return super().write(data)  # type: ignore[arg-type]
        except BrokenPipeError:
            self.reader_left = True
            return memoryview(data).nbytes  # type: ignore[arg-type]
        except OSError as error:
            raise OutputError.of("stdout", error) from error


def prepare() -> None:
    """Have stdout outlive its reader, and have both streams write what their encoding lacks in ASCII, rather than fail
    behind a long measurement."""

    def plain(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        lacking = error.object[error.start : error.end]
        return "".join(_PLAIN.get(character, "?") for character in lacking), error.end

    codecs.register_error("cet.plain", plain)
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.flush()
        buffer = io.BufferedWriter(_Pipe(sys.stdout.fileno(), "w", closefd=False))
        sys.stdout = io.TextIOWrapper(buffer, sys.stdout.encoding, line_buffering=sys.stdout.line_buffering)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="cet.plain")


def reader_left() -> bool:
    """Whether nobody reads stdout any more, as far as writing to it has shown."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return isinstance(raw, _Pipe) and raw.reader_left


def give_up_unwritten() -> None:
    """Forget what stdout could not write: Python would try again at its end, and complain."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
