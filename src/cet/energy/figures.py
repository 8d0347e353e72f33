"""The figures of a measurement, a flat list from which tables, CSV, metrics and plots are made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from cet.energy.domains import SYSTEMATIC, EnergyReading, Source, with_domain

if TYPE_CHECKING:
    from cet.energy.comparison import Comparison, Verdict
    from cet.energy.profile import BatchProfile
    from cet.energy.statistics import Estimate

POLICY = "policy"
"""In the place of an exit's name: the figures of the policy."""

UNLABELLED = "the data has no labels"
UNCOUNTED = "the model has no operation whose FLOPs are counted"

PlainFigure = Mapping[str, Any]
"""A :class:`Figure` as it stands in a document."""

_PREFIXES = {-9: "n", -6: "µ", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T"}


@dataclass(frozen=True)
class Figure:
    """One figure with what it is of.

    Attributes:
        name: ``"joules"``, ``"net_joules"`` (above idle), ``"seconds"``, ``"watts"``, ``"flops"``, ``"rate"``,
            ``"accuracy"``.
        unit: ``"J"``, ``"s"``, ``"W"``, ``"FLOP"``, or ``"1"``.
        value: ``None`` if unknown, never 0 for it.
        low: lower end of the interval of the statistical error, or in a lone window, by how much the updates of the
            counter at its ends can be wrong at most; ``None`` without one.
        high: its upper end.
        systematic: half width of the error that repetition does not show; ``None`` where it is unknown.
        rounds: that the figure is of.
        source: ``"counter"``, ``"integral"``, ``"model"``, joined by ``+`` where it has several.
        reason: why ``value`` is ``None``, or else why it has no interval.
        per: ``"window"`` or ``"sample"``.
        batch: rows per batch.
        exit: the exit, ``"policy"`` for the mixed run.
        part: ``"cumulative"``, ``"marginal"``, ``"backbone"``, ``"head"``, ``"gate"``; ``"predicted"``, ``"measured"``,
            ``"residual"``, ``"ratio"``.
        workload: what was run.
        domain: of this domain alone; ``None`` for the total.
        verdict: of a comparison: whether the first workload takes ``"less"`` or ``"more"``, they are ``"not
            distinguishable"``, or it is ``"unknown"``.
    """

    name: str
    unit: str
    value: float | None
    low: float | None = None
    high: float | None = None
    systematic: float | None = None
    rounds: int | None = None
    source: str | None = None
    reason: str | None = None
    per: str | None = None
    batch: int | None = None
    exit: str | None = None
    part: str | None = None
    workload: str | None = None
    domain: str | None = None
    verdict: Verdict | None = None

    @classmethod
    def of(cls, name: str, estimate: Estimate, **labels: Any) -> Figure:
        """From an estimate."""
        return cls(
            name,
            estimate.unit,
            estimate.value,
            estimate.low,
            estimate.high,
            estimate.systematic,
            estimate.rounds,
            "+".join(estimate.sources) or None,
            estimate.reason,
            **labels,
        )


def profile_figures(profile: BatchProfile) -> Iterator[Figure]:
    """Of one batch size."""
    batch = profile.batch_size
    for row in profile.exits:
        labels: dict[str, Any] = {"batch": batch, "exit": row.name}
        yield Figure("rate", "1", row.rate, **labels)
        yield Figure("accuracy", "1", row.accuracy, reason=_unless(row.accuracy, UNLABELLED), **labels)
        yield Figure("flops", "FLOP", row.flops, per="sample", reason=_unless(row.flops, UNCOUNTED), **labels)
        for name in ("seconds", "joules", "net_joules"):
            split = getattr(row, name)
            for field in fields(split):
                yield Figure.of(name, getattr(split, field.name), per="sample", part=field.name, **labels)
    policy: dict[str, Any] = {"batch": batch, "exit": POLICY}
    yield Figure(
        "accuracy", "1", profile.accuracy, reason=_unless(profile.accuracy, "the data has no labels"), **policy
    )
    for name in ("seconds", "joules", "net_joules"):
        prediction = getattr(profile, name)
        for field in fields(prediction):
            yield Figure.of(name, getattr(prediction, field.name), per="sample", part=field.name, **policy)


def comparison_figures(comparison: Comparison) -> Iterator[Figure]:
    """Of both models and of their ratio."""
    for contrast in comparison.contrasts:
        name, domain = contrast.quantity, contrast.domain
        for workload, estimate in ((comparison.a, contrast.a), (comparison.b, contrast.b)):
            yield Figure.of(name, estimate, per="sample", workload=workload, domain=domain)
        labels: dict[str, Any] = {
            "workload": f"{comparison.a}/{comparison.b}",
            "domain": domain,
            "verdict": contrast.verdict,
        }
        yield Figure.of(name, contrast.ratio, part="ratio", **labels)


def window_figures(reading: EnergyReading, idle: Sequence[EnergyReading] = ()) -> Iterator[Figure]:
    """Of a lone window: its length, and joules and mean watts of each domain and in total.

    Args:
        reading: the window.
        idle: windows of the idle machine, for the joules above idle; their mean power is taken off.
    """
    yield Figure("seconds", "s", reading.seconds, per="window")
    for domain in (*(part.domain for part in reading.domains), None):
        power = _Power.of(reading, domain)
        yield power.figure("joules", "J", domain, reading.seconds)
        yield power.figure("watts", "W", domain)
        yield power.above([_Power.of(each, domain) for each in idle]).figure("net_joules", "J", domain, reading.seconds)
    for missing in reading.unavailable:
        for name, unit in (("joules", "J"), ("watts", "W"), ("net_joules", "J")):
            yield Figure(name, unit, None, reason=missing.reason, per="window", domain=missing.domain)


@dataclass(frozen=True)
class _Power:
    """Mean power over a window, or why it is not known.

    Attributes:
        watts: ``None`` if unknown.
        hidden: W that the counter can be wrong by, as it moves once per update period; ``None`` if unknown.
        sources: of the joules.
        reason: why ``watts`` are unknown, or else ``hidden``.
    """

    watts: float | None
    hidden: float | None
    sources: frozenset[Source]
    reason: str | None

    @classmethod
    def of(cls, reading: EnergyReading, domain: str | None) -> _Power:
        """Of a domain, or in total."""
        parts = [part for part in reading.domains if (part.in_total if domain is None else part.domain == domain)]
        sources = frozenset(part.source for part in parts if part.source)
        joules = reading.joules if domain is None else reading[domain].joules
        if joules is None:
            if domain is not None:
                return cls(None, None, frozenset(), reading[domain].reason)
            missing = {part.domain: part.reason for part in parts if part.joules is None} or reading.reasons
            reasons = [with_domain(name, reason) for name, reason in missing.items()]
            return cls(None, None, frozenset(), "; ".join(reasons) or "no domain was to be measured")
        hidden = 0.0
        for part in parts:
            if part.source != "counter" or part.update_period is None or part.joules is None:
                return cls(
                    joules / reading.seconds, None, sources, f"no counter of {part.domain} has a known update period"
                )
            hidden += part.joules * part.update_period / reading.seconds**2
        return cls(joules / reading.seconds, hidden, sources, None)

    def above(self, idle: Sequence[_Power]) -> _Power:
        """Less the mean of some others."""
        if not idle:
            return replace(self, watts=None, reason=self._why_unknown or "the idle machine was not measured")
        watts, hidden = self.watts, self.hidden
        for each in idle:
            if watts is None or each.watts is None:
                return replace(self, watts=None, reason=self._why_unknown or each.reason)
            watts -= each.watts / len(idle)
            hidden = None if hidden is None or each.hidden is None else hidden + each.hidden / len(idle)
        reason = self.reason or next((each.reason for each in idle if each.reason), None)
        return _Power(watts, hidden, self.sources, reason)

    def figure(self, name: str, unit: str, domain: str | None, factor: float = 1.0) -> Figure:
        """``factor`` times the power."""
        value = low = high = systematic = None
        if self.watts is not None:
            value = factor * self.watts
            if self.hidden is not None:
                low, high = value - factor * self.hidden, value + factor * self.hidden
            systematic = None if "model" in self.sources else SYSTEMATIC * abs(value)
        source = None if value is None else "+".join(sorted(self.sources)) or None
        return Figure(
            name, unit, value, low, high, systematic, source=source, reason=self.reason, per="window", domain=domain
        )

    @property
    def _why_unknown(self) -> str | None:
        return self.reason if self.watts is None else None


class Figures:
    """The figures of a document, found by their labels."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._figures: list[PlainFigure] = document["figures"]

    def __call__(self, name: str, **labels: Any) -> PlainFigure:
        """The one figure with these labels; those that are not named are None."""
        expected = {"batch": None, "exit": None, "part": None, "workload": None, "domain": None, **labels}
        return next(
            figure
            for figure in self._figures
            if figure["name"] == name and all(figure[key] == value for key, value in expected.items())
        )

    @property
    def modelled(self) -> bool:
        """Whether joules are assumed watts times time."""
        return any(figure["source"] == "model" for figure in self._figures)

    def values(self, label: str) -> list[Any]:
        """The values of a label, each once, in order."""
        return list(dict.fromkeys(figure[label] for figure in self._figures if figure[label] is not None))


def si_prefix(value: float) -> tuple[int, str]:
    """The power of ten and the SI prefix with which a value has one to three digits before the point."""
    power = 3 * math.floor(math.log10(abs(value)) / 3) if value else 0
    power = min(max(power, min(_PREFIXES)), max(_PREFIXES))
    return power, _PREFIXES[power]


def _unless(value: float | None, reason: str) -> str | None:
    return reason if value is None else None
