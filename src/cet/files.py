"""Files that are written at once or not at all, and folders that are looked at before anything is written to them."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


class OutputError(OSError):
    """A file or folder cannot be written."""

    exit_code = 20

    @classmethod
    def of(cls, path: str | os.PathLike[str], error: OSError) -> OutputError:
        """An error that names ``path``, whichever step of writing it failed."""
        return cls(error.errno, error.strerror, os.fspath(path))

    def __str__(self) -> str:
        if self.filename is None:
            return super().__str__()
        fix = "make the folder first" if self.errno == errno.ENOENT else "make room there"
        return f"{self.filename} cannot be written ({self.strerror}); give another path, or {fix}"


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` beside ``path``, then rename it into place; links are followed.

    Raises:
        OutputError: naming ``path``, whichever step failed.
    """
    target = Path(os.path.realpath(path))
    try:
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            with suppress(FileNotFoundError):  # a signal may come when it is in place already
                os.unlink(temporary)
            raise
    except OSError as error:
        raise OutputError.of(path, error) from error


def check_file(path: Path) -> None:
    """Refuse a file that cannot be written beside what its folder holds; nothing is left behind.

    Raises:
        OutputError: when its folder is missing, or takes no such file.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise OutputError.of(path, error) from error


def check_folder(folder: Path) -> None:
    """Refuse a folder in which no file can be made, or that is missing and cannot be made; nothing is left behind.

    Raises:
        OutputError: then.
    """
    existing = folder
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OutputError.of(folder, error) from error


def check_replaceable(path: str | os.PathLike[str], mark: str) -> None:
    """Refuse a path that is taken, unless by an empty folder or one that holds a file named ``mark``.

    Raises:
        OutputError: then.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir() and ((target / mark).is_file() or not any(target.iterdir())):
        return
    if os.path.lexists(target):
        error = FileExistsError(errno.EEXIST, f"it is there, and no folder with a {mark}")
        raise OutputError.of(path, error)


def write_folder_atomically(path: str | os.PathLike[str], contents: Mapping[str, bytes]) -> None:
    """Write a folder of files beside ``path``, then rename it into place; what is there is moved aside, then removed.

    Raises:
        OutputError: naming ``path``, whichever step failed.
    """
    target = Path(os.path.realpath(path))
    try:
        aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        try:
            made = aside / "new"
            made.mkdir()
            for name, content in contents.items():
                write_atomically(made / name, content)
            if target.exists():
                os.replace(target, aside / "old")
            os.replace(made, target)
        finally:
            if not target.exists() and (aside / "old").exists():
                os.replace(aside / "old", target)
            shutil.rmtree(aside)
    except OSError as error:
        raise OutputError.of(path, error) from error


def make_folder(folder: Path) -> None:
    """Make a folder and what is missing above it.

    Raises:
        OutputError: when it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError.of(folder, error) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
