"""NVIDIA GPUs through nvidia-ml-py: energy counter, power and state, with a behaviour for each of NVML's error codes.

Behaviour per code: a GPU that is lost or needs a reset raises :class:`cet.energy.DeviceLostError`; what may pass by
itself is tried again, a bounded number of times; everything else is a :class:`ReadingError` of that call alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from typing import Any, NamedTuple

import pynvml

from cet.energy.clock import Clock
from cet.energy.domains import (
    CounterReading,
    DeviceFacts,
    DeviceLostError,
    DeviceState,
    Domain,
    Flag,
    ReadingError,
    Scope,
    Source,
    Unavailable,
)

ATTEMPTS = 3
PAUSE = 0.002
"""s between two attempts: short against a window, so that a retried edge stays where it is."""

_OWED = 1.0  # s of power from before a window that a counter may add to it, at its first change

_LOST = (pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED)
_MAY_PASS = (pynvml.NVML_ERROR_UNKNOWN, pynvml.NVML_ERROR_TIMEOUT)
_FIXES = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "install the NVIDIA driver, whose libnvidia-ml.so.1 was not found",
    pynvml.NVML_ERROR_DRIVER_NOT_LOADED: "load the NVIDIA kernel module, or start the container with --gpus all",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "restart the machine: library and loaded driver differ in version",
    pynvml.NVML_ERROR_NO_PERMISSION: "run as a user who may open /dev/nvidiactl",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "update the NVIDIA driver",
    **dict.fromkeys(_LOST, "reset it by nvidia-smi --gpu-reset, or restart the machine"),
}

_MODULE = "GH200"
"""In the name of a GPU whose counter is that of the whole module, Grace CPU and memory included."""

_POWER_FIELDS = {"instant": pynvml.NVML_FI_DEV_POWER_INSTANT, "average": pynvml.NVML_FI_DEV_POWER_AVERAGE}
_VALUE_TYPES = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""Members of a field's value by its type, in the order of NVML's ``nvmlValueType_t``."""

_THROTTLE = {
    "SwPowerCap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "HwSlowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
    "SwThermalSlowdown": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    "HwThermalSlowdown": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "HwPowerBrakeSlowdown": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
}


def ask(clock: Clock, subject: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function`` of pynvml returns.

    ``pynvml.NVMLError`` defines equality without a hash, and with a value that other exceptions lack, which breaks code
    that compares exceptions or keeps them in sets. It is replaced here and never leaves this module.

    Args:
        clock: to wait on between attempts.
        subject: whom to name in an error.

    Raises:
        ReadingError: for all errors but those of a lost GPU.
        DeviceLostError: for those.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            clock.sleep(PAUSE)
        try:
            return function(*arguments)
        except pynvml.NVMLError as error:
            code, text = int(error.value), str(error)
        if code not in _MAY_PASS:
            break
    tried = f" {ATTEMPTS} times" if code in _MAY_PASS else ""
    reason = f"{subject}: {function.__name__} failed{tried}: {text} (NVML error {code})"
    if code in _LOST:
        raise DeviceLostError(f"{reason}; {_FIXES[code]}")
    raise ReadingError(reason, _FIXES.get(code))


class Power(NamedTuple):
    """How a GPU reports its power.

    Attributes:
        kind: ``"instant"`` (field 186), ``"average"`` of about 1 s (field 185), or ``"usage"``
            (``nvmlDeviceGetPowerUsage``), which is such an average too on most GPUs since Ampere.
        watts: reads it.
    """

    kind: str
    watts: Callable[[], float]


class Gpu:
    """One GPU that NVML shows; what it reads is passed through :func:`ask`."""

    def __init__(self, index: int, handle: Any, clock: Clock) -> None:
        self.index = index
        self.label = f"gpu:{index}"
        self._handle = handle
        self._clock = clock
        self.name = str(self._ask(pynvml.nvmlDeviceGetName))
        self.uuid = str(self._ask(pynvml.nvmlDeviceGetUUID))
        self.scope: Scope = "module" if _MODULE in self.name else "board"

    @cached_property
    def domain(self) -> Domain:
        """How its energy is measured: by its counter, else by the integral of its power.

        Raises:
            ReadingError: when it reports neither.
        """
        source: Source = "counter"
        reason = None
        try:
            if self.read().raw == 0:
                raise ReadingError(f"{self.label}: the energy counter stands at 0, which no GPU that answers can show")
        except ReadingError as no_counter:
            source, reason = "integral", str(no_counter)
            try:
                _ = self.power
            except ReadingError as no_power:
                raise ReadingError(f"{no_counter.reason}; {no_power.reason}", no_counter.fix or no_power.fix) from None
        return Domain(self.label, f"{self.name} ({self.uuid})", self.scope, True, source, reason)

    def read(self) -> CounterReading:
        """Total energy since the driver was loaded."""
        raw = int(self._ask(pynvml.nvmlDeviceGetTotalEnergyConsumption))
        return CounterReading(self._clock.now(), raw / 1e3, raw, "mJ")

    def fault(self, start: CounterReading, end: CounterReading) -> tuple[Flag, str] | None:
        """What makes the joules between two readings wrong."""
        if end.raw < start.raw:
            return Flag.COUNTER_BACKWARDS, f"{self.label}: the counter ran backwards, from {start.raw} to {end.raw} mJ"
        seconds = end.time - start.time + _OWED
        if self._power_limit is not None and end.joules - start.joules > 2 * self._power_limit * seconds:
            jump = f"the counter jumped from {start.raw} to {end.raw} mJ, at a power limit of {self._power_limit:g} W"
            return Flag.COUNTER_JUMPED, f"{self.label}: {jump}"
        return None

    @cached_property
    def _power_limit(self) -> float | None:
        """W."""
        limit = self._optional(pynvml.nvmlDeviceGetEnforcedPowerLimit)
        return limit / 1e3 if limit else None

    @cached_property
    def power(self) -> Power:
        """The best way to read its power that works: instant, then averaged, both by name, then what it calls usage."""
        for kind, field in _POWER_FIELDS.items():
            way = Power(kind, partial(self._field, field))
            try:
                way.watts()
            except ReadingError:
                continue
            return way
        self._usage()
        return Power("usage", self._usage)

    def in_mig_mode(self) -> bool:
        """Whether it is split into MIG instances; GPUs and drivers that do not know MIG are not."""
        mode = self._optional(pynvml.nvmlDeviceGetMigMode)
        return mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE

    def state(self) -> DeviceState:
        """How it is now."""
        reasons = self._optional(pynvml.nvmlDeviceGetCurrentClocksEventReasons)
        try:
            watts = self.power.watts()
        except ReadingError:
            watts = None
        return DeviceState(
            temperature=self._optional(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
            sm_clock=self._optional(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_SM),
            memory_clock=self._optional(pynvml.nvmlDeviceGetClockInfo, pynvml.NVML_CLOCK_MEM),
            watts=watts,
            throttle=None if reasons is None else tuple(name for name, bit in _THROTTLE.items() if reasons & bit),
        )

    def facts(self) -> DeviceFacts:
        """What a measurement should know of it beforehand."""
        persistence = self._optional(pynvml.nvmlDeviceGetPersistenceMode)
        processes = self._optional(pynvml.nvmlDeviceGetComputeRunningProcesses_v3)
        try:
            driver = ask(self._clock, "NVML", pynvml.nvmlSystemGetDriverVersion)
        except ReadingError:
            driver = None
        return DeviceFacts(
            name=self.name,
            uuid=self.uuid,
            driver=driver,
            power_limit=self._power_limit,
            persistence=None if persistence is None else persistence == pynvml.NVML_FEATURE_ENABLED,
            processes=None if processes is None else tuple(process.pid for process in processes),
        )

    def _field(self, field: int) -> float:
        # The counter of a module counts the module, and so must the power that is held against it.
        scope = pynvml.NVML_POWER_SCOPE_MODULE if self.scope == "module" else pynvml.NVML_POWER_SCOPE_GPU

        def power_field(handle: Any) -> Any:
            entry = pynvml.nvmlDeviceGetFieldValues(handle, [(field, scope)])[0]
            if entry.nvmlReturn != pynvml.NVML_SUCCESS:
                raise pynvml.NVMLError(entry.nvmlReturn)
            return getattr(entry.value, _VALUE_TYPES[entry.valueType])

        return self._watts(self._ask(power_field))

    def _usage(self) -> float:
        return self._watts(self._ask(pynvml.nvmlDeviceGetPowerUsage))

    def _watts(self, milliwatts: float) -> float:
        if milliwatts <= 0:
            raise ReadingError(f"{self.label} reports a power of {milliwatts:g} mW, which no GPU that answers does")
        return milliwatts / 1e3

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return ask(self._clock, self.label, function, self._handle, *arguments)

    def _optional(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._ask(function, *arguments)
        except ReadingError:
            return None


@contextmanager
def opened(clock: Clock) -> Iterator[tuple[list[Gpu], list[Unavailable]]]:
    """The GPUs that NVML shows, in its order, and those that do not answer; it is shut down at the end.

    Raises:
        ReadingError: when NVML does not start.
    """
    ask(clock, "NVML", pynvml.nvmlInit)
    try:
        gpus: list[Gpu] = []
        silent: list[Unavailable] = []
        for index in range(ask(clock, "NVML", pynvml.nvmlDeviceGetCount)):
            domain = f"gpu:{index}"
            try:
                handle = ask(clock, domain, pynvml.nvmlDeviceGetHandleByIndex, index)
                gpus.append(Gpu(index, handle, clock))
            except ReadingError as error:
                silent.append(Unavailable(domain, error.reason, error.fix))
            except DeviceLostError as lost:
                silent.append(Unavailable(domain, str(lost), lost=True))
        yield gpus, silent
    finally:
        with suppress(pynvml.NVMLError):  # there is nothing left to do about it
            pynvml.nvmlShutdown()
