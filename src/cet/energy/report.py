"""What `cet energy` writes: one document with every figure and the raw windows behind it, as JSON, CSV and metrics.

The document is plain data of schema 1. Its ``figures`` are those of :mod:`cet.energy.figures`; its ``measurements``
hold settings, devices and the windows with the counters as they were read.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import cet
from cet.energy.domains import EnergyReading, Flag
from cet.energy.figures import Figure

if TYPE_CHECKING:
    from cet.energy.measurement import Measurement, WindowRecord

SCHEMA = "cet-energy"
SCHEMA_VERSION = 1

JSON_START, PROMETHEUS_START = f'{{\n  "schema": "{SCHEMA}"', "# HELP cet_energy_"
"""How every document and every metrics file begins."""

Kind = Literal["run", "profile", "compare", "benchmark"]
Document = dict[str, Any]


def document(
    kind: Kind,
    figures: Iterable[Figure],
    measurements: Sequence[Mapping[str, Any]],
    *,
    flags: Iterable[Flag] = (),
    stopped: str | None = None,
    about: Mapping[str, Any],
) -> Document:
    """The document of one command.

    Args:
        kind: which command.
        figures: what it found.
        measurements: the windows behind them, see :func:`plain_measurement` and :func:`plain_reading`.
        flags: all that were raised; they are explained in the document.
        stopped: why it is partial; ``None`` if it is complete.
        about: what was measured, and where.
    """
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "status": "complete" if stopped is None else "partial",
        "stopped": stopped,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "cet": cet.__version__,
        **about,
        "flags": {str(flag): flag.explanation for flag in flags},
        "figures": [asdict(figure) for figure in figures],
        "measurements": list(measurements),
    }


_SCHEMA_NAMES = {
    "rounds": "blocks",
    "windows": "blocks",
    "round_index": "round",
    "update_period": "tick",
    "update_periods": "ticks",
    "assume_watts": "estimate_watts",
    "fix": "mend",
}
"""What schema 1 calls attributes that have better names since."""


def plain(record: Any) -> dict[str, Any]:
    """A dataclass by the names of schema 1."""
    return {_SCHEMA_NAMES.get(name, name): value for name, value in asdict(record).items()}


def plain_reading(reading: EnergyReading) -> dict[str, Any]:
    """A window as the meter read it, with the sum over its domains; what is unavailable stands once, elsewhere."""
    domains = [plain(part) for part in reading.domains]
    return {"start": reading.start, "seconds": reading.seconds, "joules": reading.joules, "domains": domains}


def plain_window(window: WindowRecord) -> dict[str, Any]:
    """A window of the protocol."""
    return {**plain(window), "reading": plain_reading(window.reading), "seconds": window.seconds, "watts": window.watts}


def plain_measurement(measurement: Measurement, **labels: Any) -> dict[str, Any]:
    """A measurement with its windows."""
    return {
        **labels,
        **{
            _SCHEMA_NAMES.get(field.name, field.name): getattr(measurement, field.name) for field in fields(measurement)
        },
        "settings": plain(measurement.settings),
        "domains": [plain(domain) for domain in measurement.domains],
        "unavailable": [plain(missing) for missing in measurement.unavailable],
        "preflight": {name: plain(facts) for name, facts in measurement.preflight.items()},
        "blocks": [plain_window(window) for window in measurement.windows],
    }


def to_json(document: Mapping[str, Any]) -> str:
    """Indented, with a newline at the end; NaN and infinity are refused by ``ValueError``."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def to_csv(document: Mapping[str, Any]) -> str:
    """The figures, one per line; what is unknown is an empty field."""
    text = io.StringIO()
    columns = ["kind", "status", *(field.name for field in fields(Figure))]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    common = {"kind": document["kind"], "status": document["status"]}
    writer.writerows({**common, **figure} for figure in document["figures"])
    return text.getvalue()


_LABELS = ("per", "batch", "exit", "part", "workload", "domain", "source")
_BOUNDS = {"value": "", "low": "_low", "high": "_high"}
_HELP = {
    "complete": "Whether nothing stopped the measurement.",
    "unknown": "A figure that is not known, and why.",
    "joules": "Energy, gross.",
    "net_joules": "Energy above that of the idle machine.",
    "seconds": "Time.",
    "watts": "Mean power.",
    "flops": "Floating-point operations.",
    "rate": "Fraction of the samples that leave at the exit.",
    "accuracy": "Fraction of the samples that are classified correctly.",
    "ratio": "Quotient of two figures.",
}


def to_prometheus(document: Mapping[str, Any]) -> str:
    """The figures in the text format of Prometheus (exposition format 0.0.4), all of them gauges.

    A known figure is a sample of ``cet_energy_NAME``, and the ends of its interval are samples of
    ``cet_energy_NAME_low`` and ``_high``. An unknown one has a sample of ``cet_energy_unknown`` with the reason as a
    label, and none else.
    """
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import Metric

    metrics: dict[str, Metric] = {}

    def add(name: str, labels: Mapping[str, Any], value: float, bound: str = "value") -> None:
        full = f"cet_energy_{name}{_BOUNDS[bound]}"
        text = _HELP[name] if bound == "value" else f"{_HELP[name]} The {bound} end of the interval."
        metric = metrics.setdefault(full, Metric(full, text, "gauge"))
        metric.add_sample(full, {key: str(label) for key, label in labels.items()}, value)

    add("complete", {"kind": document["kind"]}, document["status"] == "complete")
    for figure in document["figures"]:
        labels = {"kind": document["kind"], **{key: figure[key] for key in _LABELS if figure[key] is not None}}
        name = figure["name"]
        if figure["part"] == "ratio":
            name, labels["of"] = "ratio", name
        if figure["value"] is None:
            add("unknown", labels | {"of": figure["name"], "reason": figure["reason"]}, 1)
            continue
        for bound in _BOUNDS:
            if figure[bound] is not None:
                add(name, labels, figure[bound], bound)
    registry = CollectorRegistry()
    registry.register(_Metrics(metrics.values()))
    return generate_latest(registry).decode()


class _Metrics:
    """What prometheus-client takes for a collector."""

    def __init__(self, metrics: Iterable[Any]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Any]:
        return self._metrics
