"""Keeps what is measured on disk while a measurement is under way."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cet.cli.energy.output import Outputs
from cet.cli.errors import one_sentence
from cet.energy import EnergyMeter, Flag, report
from cet.energy.report import Figure

if TYPE_CHECKING:
    from cet.energy.measurement import Block, Measurement


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
        self._blocks: list[dict[str, Any]] = []
        self._figures: list[Figure] = []
        self._measurements: list[dict[str, Any]] = []
        self._flags: list[Flag] = []

    @contextmanager
    def measurement(self, **labels: Any) -> Iterator[None]:
        """One measurement begins; if it fails, the windows until then are written with the reason."""
        self._labels, self._blocks = labels, []
        try:
            yield
        except BaseException as error:
            reason = one_sentence(error) if isinstance(error, Exception) else str(error) or "interrupted"
            self._outputs.save(self._partial(reason))
            raise

    def add_block(self, block: Block) -> None:
        """A window ended."""
        self._blocks.append(report.plain_block(block))
        self._outputs.save(self._partial(report.UNFINISHED))

    def finish(self, measurement: Measurement, figures: Iterable[Figure]) -> dict[str, Any]:
        """The measurement ended; the document until then, as it was written."""
        self._figures += figures
        self._flags += measurement.flags
        self._measurements.append(report.plain_measurement(measurement, **self._labels))
        self._blocks = []
        document = self._document(self._measurements, measurement.stopped)
        self._outputs.save(document)
        return document

    def _partial(self, reason: str) -> report.Document:
        """With the windows of a measurement that has not ended."""
        under_way = {
            **self._labels,
            "domains": [asdict(domain) for domain in self._meter.domains],
            "unavailable": [asdict(missing) for missing in self._meter.unavailable],
            "blocks": self._blocks,
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
