"""RAPL, the energy counters of x86 CPUs, through Linux's powercap tree (powercap.rst of the kernel)."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from pathlib import Path

from cet.energy.clock import Clock
from cet.energy.domains import CounterReading, Domain, Flag, ReadingError, Scope, Unavailable

POWERCAP = Path("/sys/class/powercap")

MOST_WATTS = 1000.0
"""No zone draws more. A counter that could run through its range at this power since it was last read may have wrapped
more than once, and a step back that would take more power as a wrap is a reset."""

_SCOPES: Mapping[str, Scope] = {scope: scope for scope in ("package", "core", "uncore", "dram", "psys")}
_TICK, _LOOKS = 0.002, 10  # s, twice the time after which counters are renewed; how often a change is looked for


class Zone:
    """One RAPL zone; its joules are unwrapped from reading to reading."""

    def __init__(self, name: str, folder: Path, clock: Clock) -> None:
        scope = _SCOPES.get(name.removeprefix("rapl:").partition("-")[0])
        if scope is None:
            raise ReadingError(f"{folder} is a RAPL zone of an unknown kind")
        self.domain = Domain(name, str(folder), scope, scope in ("package", "dram"), "counter")
        self._counter = folder / "energy_uj"
        self._clock = clock
        self._range = _range(folder)
        self._last: CounterReading | None = None
        self._faults: list[tuple[float, Flag, str]] = []

    def read(self) -> CounterReading:
        """The counter now, its joules counted on over wraps.

        Raises:
            ReadingError: when it cannot be read.
        """
        raw, time = _read_counter(self._counter), self._clock.now()
        if self._last is None:
            self._last = CounterReading(time, raw / 1e6, raw, "uJ")
        else:
            step = self._step(self._last, raw, time)
            self._last = CounterReading(time, self._last.joules + step / 1e6, raw, "uJ")
        return self._last

    def fault(self, start: CounterReading, end: CounterReading) -> tuple[Flag, str] | None:
        """What makes the joules between two readings wrong."""
        inside = ((flag, reason) for time, flag, reason in self._faults if start.time < time <= end.time)
        return next(inside, None)

    def check(self) -> None:
        """See that the counter runs.

        Raises:
            ReadingError: when it cannot be read, or stands still, as where it is masked.
        """
        first = self.read().raw
        for _ in range(_LOOKS):
            self._clock.sleep(_TICK)
            if self.read().raw != first:
                return
        raise ReadingError(f"{self._counter} stands still at {first} uJ, as where it is masked")

    def _step(self, last: CounterReading, raw: int, time: float) -> int:
        """uJ from the last reading to this one; doubts about it are noted."""
        most = MOST_WATTS * (time - last.time + _TICK) * 1e6
        step = raw - last.raw
        if step < 0 and self._range is not None:
            step += self._range
        if step < 0 or (raw < last.raw and step > most):
            reason = f"{self.domain.name}: the counter ran backwards, from {last.raw} to {raw} uJ"
            self._faults.append((time, Flag.COUNTER_BACKWARDS, reason))
            return 0
        if self._range is not None and most >= self._range:
            reason = (
                f"{self.domain.name}: the counter wraps every {self._range / 1e6:.0f} J and was not read for "
                f"{time - last.time:.0f} s, so that it may have wrapped unseen; measure shorter windows"
            )
            self._faults.append((time, Flag.WRAP_UNKNOWN, reason))
        return step


def zones(root: Path, clock: Clock) -> tuple[list[Zone], list[Unavailable]]:
    """The zones of a powercap tree whose counters run, and the others.

    ``intel-rapl-mmio`` shows zones of ``intel-rapl`` a second time, and serves only where the first is missing. Cores
    and uncore are parts of their package, and packages of the platform (``psys``). All are measured, but only packages
    and their memory add to the total.
    """
    if platform.system() != "Linux":
        return [], [Unavailable("rapl", f"RAPL is read through Linux's {POWERCAP}; this is {platform.system()}")]
    folders: dict[str, Path] = {}
    for control in ("intel-rapl", "intel-rapl-mmio"):
        for folder in sorted(root.glob(f"{control}:*"), key=_numbers):
            folders.setdefault(_name(folder), folder)
    if not folders:
        reason = f"there is no RAPL zone in {root}; virtual machines and containers hide it"
        return [], [Unavailable("rapl", reason, "run on bare metal, with the kernel module intel_rapl_msr loaded")]

    running: list[Zone] = []
    unavailable: list[Unavailable] = []
    for name, folder in folders.items():
        try:
            zone = Zone(name, folder, clock)
            zone.check()
        except ReadingError as error:
            unavailable.append(Unavailable(name, error.reason, error.fix))
        else:
            running.append(zone)
    return running, unavailable


def _name(folder: Path) -> str:
    """Domain name of a zone: a package is called what the kernel calls it, its parts get its number: ``dram-1``."""
    control, number, *part = folder.name.split(":")
    label = _label(folder)
    if not part:
        return f"rapl:{label}"
    package = _label(folder.with_name(f"{control}:{number}"))
    return f"rapl:{label}-{package.removeprefix('package-')}"


def _label(folder: Path) -> str:
    try:
        return (folder / "name").read_text().strip()
    except OSError:
        return folder.name


def _numbers(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder.name)]


def _range(folder: Path) -> int | None:
    """uJ after which the counter starts again at 0; ``None`` if the kernel does not show it."""
    try:
        return int((folder / "max_energy_range_uj").read_text()) or None
    except (OSError, ValueError):
        return None


def _read_counter(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError:
        raise ReadingError(f"{path} is readable by root only", f"sudo chmod a+r {path}") from None
    except OSError as error:
        raise ReadingError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ReadingError(f"{path} holds no number") from None
