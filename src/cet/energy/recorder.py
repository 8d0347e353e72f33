"""Keeps what is measured on disk while a measurement is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cet.energy import report
from cet.energy.domains import Flag
from cet.energy.figures import Figure, comparison_figures, profile_figures
from cet.energy.meter import EnergyMeter
from cet.files import OutputError, check_file, check_folder, make_folder, write_atomically

if TYPE_CHECKING:
    from cet.energy.measurement import Measurement, Settings, WindowRecord
    from cet.energy.profile import Batches
    from cet.energy.protocol import Progress, Workload
    from cet.model.early_exit import EarlyExit

UNFINISHED = "not finished"
"""Why a document is partial that was written amid a measurement."""


@dataclass(frozen=True)
class Outputs:
    """The files to write; ``None`` where none is asked for.

    Attributes:
        document: JSON, written again after every window.
        prometheus: metrics for the text-file collector of Prometheus' node exporter.
        plots: a folder of PNG files.
    """

    document: Path | None = None
    prometheus: Path | None = None
    plots: Path | None = None

    def check(self, *, overwrite: bool) -> None:
        """Refuse what cannot be written, before anything is measured.

        Raises:
            OutputError: for a file or folder that cannot be written, a document that exists without ``overwrite``, and
                for anything else than what cet has written there before.
        """
        if self.plots is not None:
            check_folder(self.plots)
        for path, start, _ in self._files():
            if path.is_dir():
                raise OutputError(f"{path} is a folder; give a file")
            check_file(path)
            if path == self.document and path.exists() and not overwrite:
                raise OutputError(f"{path} exists; give another file, or replace it with --overwrite")
            _check_replaceable(path, start)

    def save(self, document: Mapping[str, Any]) -> None:
        """Write the files, each at once or not at all.

        Raises:
            OutputError: when one cannot be written.
        """
        for path, _, to_text in self._files():
            write_atomically(path, to_text(document).encode())

    def draw(self, document: Mapping[str, Any]) -> None:
        """Draw the plots that the document has figures for.

        Raises:
            OutputError: when one cannot be written.
        """
        if self.plots is not None:
            from cet.energy import plots

            make_folder(self.plots)
            for name, content in plots.draw(document).items():
                write_atomically(self.plots / name, content)

    def _files(self) -> list[tuple[Path, str, Callable[[Mapping[str, Any]], str]]]:
        """The files, how each begins, and what makes its text."""
        files = (
            (self.document, report.JSON_START, report.to_json),
            (self.prometheus, report.PROMETHEUS_START, report.to_prometheus),
        )
        return [(path, start, to_text) for path, start, to_text in files if path is not None]


def _check_replaceable(path: Path, start: str) -> None:
    """Refuse to replace devices, pipes, and files of others, such as the checkpoint that is measured."""
    if not path.exists():
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


@dataclass(frozen=True)
class Recorded:
    """A document as it was written, and the exit code of the command that wrote it."""

    document: report.Document
    exit_code: int


class Recorder:
    """Builds the document of one command, and writes it after every window.

    Args:
        kind: of the document.
        outputs: where it goes.
        meter: the open one.
        about: what is measured, and where.
    """

    def __init__(self, kind: report.Kind, outputs: Outputs, meter: EnergyMeter, about: Mapping[str, Any]) -> None:
        self._kind = kind
        self._outputs = outputs
        self._meter = meter
        self._about = about
        self._labels: Mapping[str, Any] = {}
        self._windows: list[dict[str, Any]] = []
        self._figures: list[Figure] = []
        self._measurements: list[dict[str, Any]] = []
        self._flags: list[Flag] = []

    def profile(
        self,
        model: EarlyExit,
        by_size: Mapping[int, Batches],
        settings: Settings,
        *,
        exits: Sequence[str] | None,
        progress: Callable[[str], AbstractContextManager[Progress]],
    ) -> Recorded:
        """Profile a model at several batch sizes, by :func:`cet.energy.profile.profile`, until one is stopped.

        Args:
            model: in eval mode.
            by_size: the batches by their size, at least one.
            settings: of the protocol.
            exits: the early exits to profile; ``None`` as for :func:`~cet.energy.profile.profile`.
            progress: what shows how far the measurement of this title is.
        """
        from cet.energy.profile import profile

        for size, batches in by_size.items():
            with self._measurement(batch_size=size), progress(f"batch {size}") as shown:
                profiled = profile(
                    model, batches, self._meter, settings, exits=exits, progress=shown, on_window=self._add_window
                )
            recorded = self._finish(profiled.measurement, profile_figures(profiled))
            if profiled.measurement.stopped:
                break
        return recorded

    def compare(
        self,
        a: Workload,
        b: Workload,
        settings: Settings,
        *,
        progress: Callable[[str], AbstractContextManager[Progress]],
    ) -> Recorded:
        """Compare two workloads, by :func:`cet.energy.comparison.compare`."""
        from cet.energy.comparison import compare

        with self._measurement(), progress(f"{a.name} against {b.name}") as shown:
            compared = compare(a, b, self._meter, settings, progress=shown, on_window=self._add_window)
        return self._finish(compared.measurement, comparison_figures(compared))

    @contextmanager
    def _measurement(self, **labels: Any) -> Iterator[None]:
        """One measurement begins; if it fails, the windows until then are written with the reason."""
        self._labels, self._windows = labels, []
        try:
            yield
        except BaseException as error:
            reason = str(error) or ("interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__)
            self._outputs.save(self._partial(reason))
            raise

    def _add_window(self, window: WindowRecord) -> None:
        """A window ended."""
        self._windows.append(report.plain_window(window))
        self._outputs.save(self._partial(UNFINISHED))

    def _finish(self, measurement: Measurement, figures: Iterable[Figure]) -> Recorded:
        """The measurement ended; the document until then, as it was written."""
        self._figures += figures
        self._flags += measurement.flags
        self._measurements.append(report.plain_measurement(measurement, **self._labels))
        self._windows = []
        document = self._document(self._measurements, measurement.stopped)
        self._outputs.save(document)
        return Recorded(document, measurement.exit_code)

    def _partial(self, reason: str) -> report.Document:
        """With the windows of a measurement that has not ended."""
        under_way = {
            **self._labels,
            "domains": [report.plain(domain) for domain in self._meter.domains],
            "unavailable": [report.plain(missing) for missing in self._meter.unavailable],
            "blocks": self._windows,
        }
        return self._document([*self._measurements, under_way], reason)

    def _document(self, measurements: list[dict[str, Any]], stopped: str | None) -> report.Document:
        return report.document(
            self._kind,
            self._figures,
            measurements,
            flags=dict.fromkeys(self._flags),
            stopped=stopped,
            about=self._about,
        )
