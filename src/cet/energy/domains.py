"""What a meter reports: joules per domain, where each figure came from, and why one is missing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

Source = Literal["counter", "integral", "model"]
"""``counter``: the device's own energy counter; ``integral``: sampled power over time; ``model``: assumed watts."""

Scope = Literal["board", "module", "package", "core", "uncore", "dram", "psys"]
"""What a domain covers: a GPU ``board``, a Grace ``module`` (CPU, GPU and memory), or a RAPL zone of the CPU."""


SYSTEMATIC = 0.05
"""Relative half width of the error that all joules of one counter share, such as its gain. Ratios on one board cancel
most of it."""


class Flag(StrEnum):
    """What makes a figure less than it seems. Flagged figures are shown, never dropped."""

    explanation: str

    def __new__(cls, value: str, explanation: str) -> Flag:
        flag = str.__new__(cls, value)
        flag._value_ = value
        flag.explanation = explanation
        return flag

    COUNTER_BACKWARDS = "counter-backwards", "The energy counter ran backwards; the window has no joules."
    COUNTER_JUMPED = (
        "counter-jumped",
        "The energy counter rose by more than twice what the power limit allows; the window has no joules.",
    )
    COUNTER_FROZEN = "counter-frozen", "The energy counter did not move over the window."
    COUNTER_FAILED = "counter-failed", "The energy counter could not be read at an edge, even after retries."
    COUNTER_DISAGREES = (
        "counter-disagrees",
        "The energy counter and the integral of sampled power differ by more than 5 %.",
    )
    INTEGRAL_FAILED = "integral-failed", "Sampled power has a gap, so that there is no integral of it."
    INTEGRAL_OF_AVERAGE = (
        "integral-of-average",
        "The integral is of power averaged over about 1 s, which reaches back before the window.",
    )
    WRAP_UNKNOWN = "wrap-unknown", "The RAPL counter may have wrapped more than once; the window has no joules."
    SHORT_WINDOW = "short-window", "The window is shorter than 5 s or 50 update periods of the counter."
    UPDATE_PERIOD_UNKNOWN = "tick-unknown", "The update period of the counter could not be measured."
    TEMPERATURE_DRIFT = "temperature-drift", "The temperature changed by more than 5 degrees over the measurement."
    FEW_ROUNDS = "few-rounds", "Fewer than 10 rounds were measured."
    NOT_LEVEL = "not-level", "Clocks and temperature were not level when the warm-up ended."
    THROTTLED = "throttled", "The device lowered its clocks for heat or power."
    TIME_DRIFT = "time-drift", "The calls of a workload became more than 10 % slower or faster over the measurement."
    IDLE_DRIFT = "idle-drift", "Idle power before and after the measurement differs."
    SHARED_DEVICE = "shared-device", "Other processes used the device."
    MODELLED = "modelled", "Joules are assumed watts times measured time, not a measurement."


class ReadingError(Exception):
    """A device does not answer one question.

    Attributes:
        reason: in one sentence without a full stop.
        fix: what would help; ``None`` when nothing would.
    """

    def __init__(self, reason: str, fix: str | None = None) -> None:
        super().__init__(f"{reason}; {fix}" if fix else reason)
        self.reason = reason
        self.fix = fix


class EnergyError(RuntimeError):
    """Energy cannot be measured as asked. Each kind has its own exit code of the command line."""

    exit_code = 10


class NoCounterError(EnergyError):
    """A domain that was asked for has neither an energy counter nor power to integrate."""

    exit_code = 11


class DeviceSelectionError(EnergyError):
    """``CUDA_VISIBLE_DEVICES`` or a torch device names a GPU that cannot be identified."""

    exit_code = 12


class MigError(EnergyError):
    """Joules of a MIG instance were asked for; NVML has those of the whole GPU only."""

    exit_code = 13


class DeviceLostError(EnergyError):
    """A GPU was lost or needs a reset.

    Attributes:
        reading: of the window that it ended, without the joules of the lost GPU; ``None`` if none was open.
    """

    exit_code = 14

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.reading: EnergyReading | None = None


class CounterFrozenError(EnergyError):
    """The counter does not move under load, and there is no power to integrate."""

    exit_code = 15


class CounterUnstableError(EnergyError):
    """The counter ran backwards or failed so often that no window could be measured."""

    exit_code = 16


@dataclass(frozen=True)
class Unavailable:
    """A domain that this meter cannot measure.

    Attributes:
        domain: as in :class:`Domain`; ``"gpu"`` or ``"rapl"`` where the whole interface is missing.
        reason: why, in one sentence without a full stop.
        fix: what would make it available; ``None`` when nothing would.
        lost: whether it is a GPU that was lost or needs a reset.
    """

    domain: str
    reason: str
    fix: str | None = None
    lost: bool = False


@dataclass(frozen=True)
class Domain:
    """Something whose energy a meter can measure.

    Attributes:
        name: ``"gpu:0"`` (the NVML index), ``"rapl:package-0"``, ``"rapl:dram-0"``.
        device: name and UUID of a GPU, path of a RAPL zone.
        scope: what is covered.
        in_total: whether it adds to the total; ``False`` if another measured domain contains it.
        source: where its joules come from when nothing fails.
        reason: why not from the counter; ``None`` if they do.
    """

    name: str
    device: str
    scope: Scope
    in_total: bool
    source: Source
    reason: str | None = None


@dataclass(frozen=True)
class CounterReading:
    """An energy counter at one moment.

    Attributes:
        time: s, on the meter's clock.
        joules: since the counter's origin.
        raw: the counter as read.
        unit: of ``raw``, ``"mJ"`` (NVML) or ``"uJ"`` (RAPL).
    """

    time: float
    joules: float
    raw: int
    unit: str


@dataclass(frozen=True)
class PowerSample:
    """Power at one moment: ``time`` in s on the meter's clock, ``watts``."""

    time: float
    watts: float


@dataclass(frozen=True)
class DomainEnergy:
    """Energy of one domain over one window.

    Attributes:
        domain: name of the :class:`Domain`.
        device: its device.
        scope: what is covered.
        in_total: whether it adds to the total.
        joules: ``None`` if unknown, never 0 for it.
        source: of ``joules``; ``None`` with them.
        reason: why ``joules`` are missing, or why they are not from the counter.
        counter_joules: from the counter, if it worked.
        integral_joules: from sampled power, if it was sampled and worked.
        start: the counter at the window's start.
        end: the counter at its end.
        samples: power over the window, if it was sampled.
        update_period: s between two changes of the counter; ``None`` when not measured.
        flags: what makes the figure less than it seems.
    """

    domain: str
    device: str
    scope: Scope
    in_total: bool
    joules: float | None
    source: Source | None
    reason: str | None = None
    counter_joules: float | None = None
    integral_joules: float | None = None
    start: CounterReading | None = None
    end: CounterReading | None = None
    samples: tuple[PowerSample, ...] = ()
    update_period: float | None = None
    flags: tuple[Flag, ...] = ()


@dataclass(frozen=True)
class EnergyReading:
    """Energy of all domains of a meter over one window.

    Attributes:
        start: s, on the meter's clock.
        seconds: length of the window.
        domains: what the meter measures.
        unavailable: what it cannot measure, and why.
    """

    start: float
    seconds: float
    domains: tuple[DomainEnergy, ...]
    unavailable: tuple[Unavailable, ...] = ()

    @property
    def joules(self) -> float | None:
        """Of all measured domains that do not overlap; ``None`` if one of them is unknown, or if there is none."""
        parts = [domain.joules for domain in self.domains if domain.in_total]
        known = [part for part in parts if part is not None]
        return sum(known) if known and len(known) == len(parts) else None

    @property
    def reasons(self) -> dict[str, str]:
        """Why joules are missing, by domain."""
        missing = {part.domain: part.reason or "" for part in self.domains if part.joules is None}
        return missing | {row.domain: row.reason for row in self.unavailable}

    @property
    def flags(self) -> tuple[Flag, ...]:
        """Of all domains, each once."""
        return unique(flag for domain in self.domains for flag in domain.flags)

    def __getitem__(self, domain: str) -> DomainEnergy:
        """The domain of that name."""
        for row in self.domains:
            if row.domain == domain:
                return row
        raise KeyError(domain)


@dataclass(frozen=True)
class DeviceState:
    """How a GPU is at one moment; what it does not report is ``None``.

    Attributes:
        temperature: degrees Celsius.
        sm_clock: MHz.
        memory_clock: MHz.
        watts: drawn now.
        throttle: why clocks are lowered, for heat or power; names as in NVML's ``ClocksEventReasons``.
    """

    temperature: float | None = None
    sm_clock: int | None = None
    memory_clock: int | None = None
    watts: float | None = None
    throttle: tuple[str, ...] | None = None


@dataclass(frozen=True)
class DeviceFacts:
    """What a measurement should know of a GPU beforehand; what it does not report is ``None``.

    Attributes:
        name: of the product.
        uuid: ``GPU-...``.
        driver: its version.
        power_limit: W, the enforced one.
        persistence: whether the driver stays loaded without clients.
        processes: ids of the processes that compute on it, this one among them if it does.
    """

    name: str
    uuid: str
    driver: str | None = None
    power_limit: float | None = None
    persistence: bool | None = None
    processes: tuple[int, ...] | None = None

    @property
    def others(self) -> tuple[int, ...]:
        """Those of other processes than this one."""
        return tuple(sorted(set(self.processes or ()) - {os.getpid()}))


def with_domain(domain: str, reason: str | None) -> str:
    """A reason that names its domain, which most of them do themselves."""
    return reason if reason and reason.startswith(domain) else f"{domain}: {reason}"


def unique(flags: Iterable[Flag]) -> tuple[Flag, ...]:
    """Each flag once, in the order of its first appearance."""
    return tuple(dict.fromkeys(flags))
