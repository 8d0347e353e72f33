"""The output folder of a run: what is in it, whose it is, and what to go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from cet.files import make_folder, write_atomically

STATE = "run.json"
REPORT = "report.json"
SUMMARY = "report.md"
ACCURACY_PLOT = "accuracy.png"
EXITS_PLOT = "exits.png"
MODELS = tuple(f"{recipe}.safetensors" for recipe in ("joint", "augmentation", "consistent", "noisy-labels"))
"""Of which a run holds two."""
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class RunFolder:
    """One run of `cet demo`; `cet train` has a folder of its own kind.

    The state holds the settings of the run and is written first; the report is written last, so it marks a finished
    run. Every file is replaced at once or not at all.
    """

    path: Path

    @contextmanager
    def begun(self) -> Iterator[None]:
        """Make the folder and what is missing above it; they go again if the block fails and leaves them empty."""
        missing = list(takewhile(lambda folder: not folder.exists(), (self.path, *self.path.parents)))
        try:
            make_folder(self.path)
            yield
        except BaseException:
            for folder in missing:
                with suppress(OSError):  # which is not there, or not empty
                    folder.rmdir()
            raise

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def finished(self) -> bool:
        return (self / REPORT).is_file() and (self / STATE).is_file()

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a folder that holds a run, or files with the names of its results, unless ``overwrite`` is set.

        Raises:
            FileExistsError: then.
        """
        taken = [name for name in self._files() if (self / name).exists()]
        if overwrite or not taken:
            return
        if self.finished:
            raise FileExistsError(f"{self.path} holds a finished run; replace it with --overwrite")
        if (self / STATE).is_file():
            raise FileExistsError(
                f"{self.path} holds an unfinished run; go on with --resume, or replace it with --overwrite"
            )
        raise FileExistsError(f"{self.path} holds another {taken[0]}; give another folder, or --overwrite")

    def clear(self) -> None:
        """Remove an earlier run and nothing else."""
        self.tidy()
        for name in self._files():
            (self / name).unlink(missing_ok=True)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object.

        Raises:
            FileNotFoundError: when the file is missing.
            ValueError: when it is damaged.
        """
        try:
            content = json.loads((self / name).read_text())
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.path} holds no run to go on with; start one without --resume") from None
        except ValueError as error:
            raise ValueError(f"{self / name} is damaged ({error}); replace the run with --overwrite") from error
        if not isinstance(content, dict):
            raise ValueError(f"{self / name} is damaged (no JSON object); replace the run with --overwrite")
        return content

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self.write(name, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    def write(self, name: str, content: bytes) -> None:
        write_atomically(self / name, content)

    def tidy(self) -> None:
        """Remove checkpoints, and what a killed run has left half-written."""
        shutil.rmtree(self / CHECKPOINTS, ignore_errors=True)
        for name in self._files():
            for leftover in self.path.glob(f".{name}.*"):
                leftover.unlink()

    def results(self) -> tuple[str, ...]:
        """The names of the files that a finished run leaves for the user."""
        models = (name for name in MODELS if (self / name).is_file())
        return (SUMMARY, REPORT, ACCURACY_PLOT, EXITS_PLOT, *models)

    def _files(self) -> tuple[str, ...]:
        """The report comes first and the state last: when clearing is stopped half-way, the old run is unfinished."""
        return (REPORT, SUMMARY, ACCURACY_PLOT, EXITS_PLOT, *MODELS, STATE)
