"""A powercap tree on disk, as Linux shows RAPL under /sys/class/powercap."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cet.energy import Clock
from nvml.simulation import VirtualClock


class Powercap:
    """RAPL zones below ``root``; the environment variable ``CET_POWERCAP_ROOT`` points cet at it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def zone(self, folder: str, name: str, microjoules: int = 1_000_000, range_: int | None = 262_143_328_850) -> Path:
        """Make a zone such as ``intel-rapl:0`` or ``intel-rapl:0:1``; returns its folder."""
        path = self.root / folder
        path.mkdir()
        (path / "name").write_text(f"{name}\n")
        (path / "energy_uj").write_text(f"{microjoules}\n")
        if range_ is not None:
            (path / "max_energy_range_uj").write_text(f"{range_}\n")
        return path

    def set(self, folder: str, microjoules: int) -> None:
        """What the counter of a zone stands at; readers see the old value or the new one."""
        path = self.root / folder
        (path / "new").write_text(f"{microjoules}\n")
        os.replace(path / "new", path / "energy_uj")

    def follow(self, clock: Clock, folder: str, watts: float) -> Callable[[], None]:
        """Have the counter of a zone run at ``watts``, and wrap; returns a function that ends it."""
        path = self.root / folder
        first, start = int((path / "energy_uj").read_text()), clock.now()
        range_ = int((path / "max_energy_range_uj").read_text())

        def run(_: float = 0) -> None:
            self.set(folder, (first + round(1e6 * watts * (clock.now() - start))) % range_)

        return clock.follow(run) if isinstance(clock, VirtualClock) else clock.every(0.001, run)
