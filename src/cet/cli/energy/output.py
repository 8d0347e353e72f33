"""Where the results of a measurement go."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import click

from cet.energy import report
from cet.files import OutputError, check_file, check_folder, make_folder, write_atomically


@dataclass(frozen=True)
class Outputs:
    """The files that the user asked for; ``None`` where not.

    Attributes:
        document: JSON, written again after every block.
        prometheus: metrics for the text-file collector of Prometheus' node exporter.
        plots: a folder of PNG files.
    """

    document: Path | None
    prometheus: Path | None
    plots: Path | None = None

    def check(self, *, overwrite: bool) -> None:
        """Refuse what cannot be written, before anything is measured.

        Raises:
            click.UsageError: for two that are the same file or folder, by whatever spelling or link.
            OutputError: for a file or folder that cannot be written, a document that exists without ``overwrite``, and
                for anything else than what cet has written there before.
        """
        options = {"--output": self.document, "--prometheus": self.prometheus, "--plots": self.plots}
        given = {name: os.path.realpath(path) for name, path in options.items() if path is not None}
        for first, second in combinations(given, 2):
            if given[first] == given[second]:
                raise click.UsageError(
                    f"{first} {options[first]} and {second} {options[second]} are the same; give each its own."
                )
        if self.plots is not None:
            check_folder(self.plots)
        for path in filter(None, (self.document, self.prometheus)):
            if path.is_dir():
                raise OutputError(f"{path} is a folder; give a file")
            check_file(path)
        if self.document is not None and self.document.exists() and not overwrite:
            raise OutputError(f"{self.document} exists; give another file, or replace it with --overwrite")
        _check_replaceable(self.document, report.JSON_START)
        _check_replaceable(self.prometheus, report.PROMETHEUS_START)

    def save(self, document: Mapping[str, Any]) -> None:
        """Write the document and the metrics, each at once or not at all."""
        if self.document is not None:
            write_atomically(self.document, report.to_json(document).encode())
        if self.prometheus is not None:
            write_atomically(self.prometheus, report.to_prometheus(document).encode())

    def draw(self, document: Mapping[str, Any]) -> None:
        """Draw the plots that the document has figures for."""
        if self.plots is not None:
            from cet.energy import plots

            make_folder(self.plots)
            for name, content in plots.draw(document).items():
                write_atomically(self.plots / name, content)


def _check_replaceable(path: Path | None, start: str) -> None:
    """Refuse to replace devices, pipes, and files of others, such as the checkpoint that is measured."""
    if path is None or not path.exists():
        return
    if not path.is_file():
        raise OutputError(f"{path} is no regular file; give a file")
    try:
        with path.open("rb") as file:
            found = file.read(len(start))
    except OSError as error:
        raise OutputError.of(path, error) from error
    if found not in (b"", start.encode()):
        raise OutputError(f"{path} holds something else than cet energy writes there; give another file")
