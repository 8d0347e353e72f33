"""The energy meter: joules of all domains of this machine over windows of time.

Energy counters are read at the two edges of a window and nowhere else, because reading them often makes some GPUs lose
energy. Power is sampled over the window, in a thread, only where that is asked for or where there is no counter.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cet.energy import nvml
from cet.energy.clock import Clock, MonotonicClock
from cet.energy.devices import NO_MIG, VISIBLE, checked_devices, gpu_of, visible_gpus
from cet.energy.domains import (
    DeviceFacts,
    DeviceLostError,
    DeviceSelectionError,
    DeviceState,
    Domain,
    EnergyReading,
    MigError,
    NoCounterError,
    ReadingError,
    Unavailable,
    with_domain,
)
from cet.energy.rapl import POWERCAP, Zone, zones
from cet.energy.window import Meterable, Window

if TYPE_CHECKING:  # measuring other programs needs no torch
    import torch

POWERCAP_ROOT = "CET_POWERCAP_ROOT"
"""Environment variable with another root of the powercap tree, for containers that mount it elsewhere."""

_CHANGES, _POLL, _PATIENCE = 10, 0.001, 3.0  # changes to see, s between looks, s to wait for the next


class EnergyMeter:
    """Measures joules per domain over a with-block::

        with EnergyMeter() as meter:
            work()
        print(meter.reading.joules)

    or over many windows, between :meth:`start` and :meth:`stop`, on counters that are :meth:`opened` once. CUDA devices
    that torch works on are synchronised at the edges of a window only. Windows nest, and so do meters. A meter belongs
    to one thread; threads that measure at once use one each.

    Args:
        devices: torch devices whose GPUs to measure; by default all GPUs that ``CUDA_VISIBLE_DEVICES`` shows. ``cpu``
            adds nothing.
        integral: whether to sample power too, and report its integral beside the counter.
        rapl: whether to measure the CPU, whatever the devices.
        clock: by default the system's monotonic clock.
        powercap: root of the powercap tree; by default that of ``CET_POWERCAP_ROOT``, else ``/sys/class/powercap``.

    Attributes:
        clock: what it takes the time from.

    Raises:
        ValueError: for devices that are neither ``cuda`` nor ``cpu``.
        TypeError: for one device instead of a sequence.
        RuntimeError: when it is used from two threads at once.
    """

    def __init__(
        self,
        devices: Sequence[torch.device | str] | None = None,
        *,
        integral: bool = False,
        rapl: bool = True,
        clock: Clock | None = None,
        powercap: str | os.PathLike[str] | None = None,
    ) -> None:
        self.clock = clock or MonotonicClock()
        self._reading: EnergyReading | None = None
        self._devices = None if devices is None else checked_devices(devices)
        self._integral = integral
        self._rapl = rapl
        self._powercap = Path(powercap or os.environ.get(POWERCAP_ROOT) or POWERCAP)
        self._meterables: dict[str, Meterable] = {}
        self._unavailable: list[Unavailable] = []
        self._update_periods: dict[str, float] = {}
        self._windows: list[Window] = []
        self._depth = 0
        self._thread = 0
        self._entered: list[tuple[ExitStack, int]] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.opened())
            self.start()
            self._entered.append((stack.pop_all(), len(self._windows)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack, depth = self._entered.pop()
        with stack:
            self._abandon(depth)
            try:
                self.stop()
            except Exception as failure:
                if error is None:
                    raise
                error.add_note(f"The energy of the block was not measured: {failure}")

    @contextmanager
    def opened(self) -> Iterator[Self]:
        """Open the counters, for many windows; inside another such block they are open already.

        Raises:
            MigError: when a GPU that was asked for, here or by ``CUDA_VISIBLE_DEVICES``, is split into MIG instances.
            DeviceSelectionError: when there is no such GPU.
            DeviceLostError: when it is lost.
        """
        with ExitStack() as stack:
            if self._depth:
                self._require_open()
            else:
                self._open(stack)
                self._thread = threading.get_ident()
                stack.callback(self._abandon, 0)
            self._depth += 1
            try:
                yield self
            finally:
                self._depth -= 1

    @property
    def reading(self) -> EnergyReading:
        """Of the window that ended last.

        Raises:
            RuntimeError: when none has ended yet.
        """
        if self._reading is None:
            raise RuntimeError("no window has ended yet; the reading is there after the with-block")
        return self._reading

    @property
    def domains(self) -> tuple[Domain, ...]:
        """What it measures, once it was opened."""
        return tuple(meterable.domain for meterable in self._meterables.values())

    @property
    def unavailable(self) -> tuple[Unavailable, ...]:
        """What it cannot measure, and why, once it was opened."""
        return tuple(self._unavailable)

    def require(self, *, gpu: bool = False, any_domain: bool = False) -> None:
        """Refuse to go on with what could be opened.

        Args:
            gpu: whether the joules of a GPU are needed.
            any_domain: whether those of anything are.

        Raises:
            DeviceLostError: for a GPU that was lost before.
            NoCounterError: where there are no such joules, with the reasons.
        """
        _raise_lost(self._unavailable)
        for needed, what, begin in ((gpu, "GPU's joules", "gpu"), (any_domain, "joules", "")):
            if needed and not any(name.startswith(begin) for name in self._meterables):
                raise no_counter(what, [row for row in self._unavailable if row.domain.startswith(begin)])

    def start(self, *, integral: bool | None = None) -> None:
        """Begin a window, inside the one that is open, if one is.

        Args:
            integral: whether to sample power over this window; by default as the meter was made.

        Raises:
            DeviceLostError: when a GPU is lost.
        """
        self._require_open()
        self.synchronize()
        sampled = self._integral if integral is None else integral
        self._windows.append(Window(list(self._meterables.values()), self.clock, integral=sampled))

    def stop(self) -> EnergyReading:
        """End the window that began last.

        Raises:
            DeviceLostError: when a GPU was lost; its ``reading`` is that of the window without it.
        """
        if not self._windows:
            raise RuntimeError("no window is open; call start first")
        self._require_open()
        window = self._windows.pop()
        try:
            self.synchronize()
            self._reading = window.end(self._unavailable, self._update_periods)
        except DeviceLostError as lost:
            self._reading = lost.reading
            raise
        finally:
            window.abandon()
        return self._reading

    def synchronize(self) -> None:
        """Wait for the CUDA devices that torch works on: those asked for, by default all that hold memory of torch."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return
        if self._devices is None:
            for index in range(torch.cuda.device_count()):
                if torch.cuda.memory_reserved(index):
                    torch.cuda.synchronize(index)
        else:
            for device in self._devices:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

    def read_wrapping(self) -> None:
        """Read the counters of the CPU, which wrap: in windows of more than a minute, call this every 30 s or so.

        Each wrap is noticed when a counter is read; one that may have wrapped twice in between has no joules.
        """
        self._require_open()
        for meterable in self._meterables.values():
            if isinstance(meterable, Zone):
                with suppress(ReadingError):
                    meterable.read()

    def measure_update_period(self, domain: str) -> float | None:
        """Time between updates of an energy counter, in s, which later readings then show.

        The counter is read every millisecond until it has moved ten times, so not while a window is open whose joules
        count. ``None`` if it stands still for 3 s, cannot be read, or is not there.

        Raises:
            ValueError: for a domain that is not measured.
            DeviceLostError: when the GPU is lost.
        """
        meterable = self._meterable(domain)
        if meterable.domain.source != "counter":
            return None
        moved: list[float] = []
        try:
            last = meterable.read()
            patience = last.time + _PATIENCE
            while len(moved) <= _CHANGES:
                self.clock.sleep(_POLL)
                reading = meterable.read()
                if reading.raw != last.raw:
                    moved.append(reading.time)
                    patience = reading.time + _PATIENCE
                elif reading.time > patience:
                    return None
                last = reading
        except ReadingError:
            return None
        period = median(b - a for a, b in pairwise(moved))
        self._update_periods[domain] = period
        return period

    def state(self, domain: str) -> DeviceState:
        """How a GPU is now; of the CPU nothing is known.

        Raises:
            ValueError: for a domain that is not measured.
            DeviceLostError: when the GPU is lost.
        """
        meterable = self._meterable(domain)
        return meterable.state() if isinstance(meterable, nvml.Gpu) else DeviceState()

    def facts(self, domain: str) -> DeviceFacts | None:
        """What a measurement should know of a GPU beforehand; ``None`` for the CPU.

        Raises:
            ValueError: for a domain that is not measured.
            DeviceLostError: when the GPU is lost.
        """
        meterable = self._meterable(domain)
        return meterable.facts() if isinstance(meterable, nvml.Gpu) else None

    def _require_open(self) -> None:
        if not self._depth:
            raise RuntimeError("the meter is not open; use it in a with-block")
        if threading.get_ident() != self._thread:
            raise RuntimeError("the meter is open in another thread; give each thread a meter of its own")

    def _meterable(self, domain: str) -> Meterable:
        self._require_open()
        if domain not in self._meterables:
            names = ", ".join(self._meterables) or "none"
            raise ValueError(f"domain {domain!r} is not measured; measured are: {names}")
        return self._meterables[domain]

    def _open(self, stack: ExitStack) -> None:
        self._meterables, self._unavailable, self._update_periods = {}, [], {}
        if self._devices is None or any(device.type == "cuda" for device in self._devices):
            self._open_gpus(stack)
        if self._rapl:
            found, unavailable = zones(self._powercap, self.clock)
            self._meterables.update((zone.domain.name, zone) for zone in found)
            self._unavailable += unavailable
        if not self._meterables and not self._unavailable:
            self._unavailable.append(Unavailable("cpu", "it is left out, and no GPU is asked for"))

    def _open_gpus(self, stack: ExitStack) -> None:
        try:
            gpus, silent = stack.enter_context(nvml.opened(self.clock))
        except ReadingError as error:
            self._unavailable.append(Unavailable("gpu", error.reason, error.fix))
            return
        asked_for = self._devices is not None or VISIBLE in os.environ
        if not asked_for:
            self._unavailable += silent
        ignored = None
        try:
            if self._devices is None:
                chosen, ignored = visible_gpus(gpus)
            else:
                chosen = list(dict.fromkeys(gpu_of(device, gpus) for device in self._devices if device.type == "cuda"))
        except DeviceSelectionError as error:
            _raise_lost(silent, error)
            raise
        if ignored:
            _raise_lost(silent)
            self._unavailable.append(Unavailable("gpu", ignored, "name GPUs that nvidia-smi -L lists, each once"))
        for gpu in chosen:
            try:
                if gpu.in_mig_mode():
                    raise MigError(f"{gpu.label} is in MIG mode: {NO_MIG}")
                self._meterables[gpu.domain.name] = gpu
            except ReadingError as error:
                self._unavailable.append(Unavailable(gpu.label, error.reason, error.fix))
            except (MigError, DeviceLostError) as error:
                if asked_for:
                    raise
                lost = isinstance(error, DeviceLostError)
                self._unavailable.append(Unavailable(gpu.label, str(error), lost=lost))
        if not self._meterables and not self._unavailable:
            row = Unavailable("gpu", "the NVIDIA driver is loaded but shows no GPU", "give this process a GPU")
            if gpus:
                row = Unavailable("gpu", f"{VISIBLE}={os.environ[VISIBLE]} hides all GPUs", f"unset {VISIBLE}")
            self._unavailable.append(row)

    def _abandon(self, keep: int) -> None:
        """End all windows but the first ``keep``, without a reading."""
        while len(self._windows) > keep:
            self._windows.pop().abandon()


def no_counter(what: str, unavailable: Iterable[Unavailable]) -> NoCounterError:
    """The error that ``what`` cannot be measured, for reasons."""
    reasons = "; ".join(with_domain(row.domain, row.reason) for row in unavailable)
    return NoCounterError(f"no {what} can be measured ({reasons}); cet doctor shows the fix")


def _raise_lost(silent: Sequence[Unavailable], cause: Exception | None = None) -> None:
    """Blame a GPU that was lost, which does not even answer with its name, for one that is nowhere to be found."""
    for missing in silent:
        if missing.lost:
            raise DeviceLostError(missing.reason) from cause
