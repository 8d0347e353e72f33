"""Drives the simulated libnvidia-ml.so.1 of nvml.c."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pynvml

SOURCE = Path(__file__).with_name("nvml.c")
LIBRARY = "libnvidia-ml.so.1"
FOR_GOOD = 2**31
"""As the count of a fault: all further calls."""


def build(folder: Path) -> Path:
    """Compile the library into ``folder``, under the name by which nvidia-ml-py loads it."""
    library = folder / LIBRARY
    flags = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY}"]
    subprocess.run(["cc", *flags, str(SOURCE), "-o", str(library), "-lm", "-lpthread"], check=True)
    return library


def environment(library: Path, script: Path) -> dict[str, str]:
    """Environment of a process that finds the simulation and carries out ``script`` when it loads it."""
    path = os.pathsep.join(filter(None, (str(library.parent), os.environ.get("LD_LIBRARY_PATH"))))
    return {**os.environ, "LD_LIBRARY_PATH": path, "NVML_SIMULATION": str(script)}


class VirtualClock:
    """A :class:`cet.energy.Clock` that stands still until somebody sleeps."""

    def __init__(self) -> None:
        self._now = 0.0
        self._followers: dict[object, Callable[[float], object]] = {}
        self._due: dict[object, tuple[float, float, Callable[[], None]]] = {}

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        end = self._now + seconds
        while self._due:
            key, (due, period, action) = min(self._due.items(), key=lambda item: item[1][0])
            if due > end:
                break
            self._go_to(due)
            self._due[key] = due + period, period, action
            action()
        self._go_to(end)

    def every(self, seconds: float, action: Callable[[], None]) -> Callable[[], None]:
        key = object()
        self._due[key] = self._now + seconds, seconds, action

        def stop() -> None:
            self._due.pop(key, None)

        return stop

    def follow(self, action: Callable[[float], object]) -> Callable[[], None]:
        """Call ``action`` with the seconds whenever time has passed; returns a function that ends it."""
        key = object()
        self._followers[key] = action

        def stop() -> None:
            del self._followers[key]

        return stop

    @property
    def busy(self) -> bool:
        """Whether something is called in the background."""
        return bool(self._due)

    def _go_to(self, time: float) -> None:
        seconds, self._now = time - self._now, max(time, self._now)
        if seconds > 0:
            for action in list(self._followers.values()):
                action(seconds)


class Simulation:
    """The library, loaded into this process and put under nvidia-ml-py, with a virtual clock."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.simulation_advance.argtypes = [ctypes.c_double]
        self._library.simulation_load.argtypes = [ctypes.c_int, ctypes.c_double]
        self._library.simulation_energy.restype = ctypes.c_double
        self._library.simulation_time.restype = ctypes.c_double
        self.reset()

    def reset(self, gpus: int = 1, *, real_time: bool = False) -> None:
        """Start anew: time 0, ``gpus`` new GPUs, no faults."""
        self.command(f"clock {'real' if real_time else 'virtual'}")
        self.command(f"gpus {gpus}")
        self.clock = VirtualClock()
        self.clock.follow(self._library.simulation_advance)

    def install(self) -> None:
        """Have nvidia-ml-py use this library, as if it had just been imported."""
        pynvml.nvmlLib = self._library
        pynvml._nvmlLib_refcount = 0
        pynvml._nvmlGetFunctionPointer_cache.clear()

    @staticmethod
    def uninstall() -> None:
        """Have nvidia-ml-py look for its library again."""
        pynvml.nvmlLib = None
        pynvml._nvmlLib_refcount = 0
        pynvml._nvmlGetFunctionPointer_cache.clear()

    def command(self, line: str) -> None:
        """Carry out a command of nvml.c."""
        self._library.simulation_command(line.encode())

    def gpu(self, index: int = 0, parameters: Mapping[str, float | str] | None = None, **more: float | str) -> None:
        """Set parameters of a GPU; they are listed in nvml.c."""
        for key, value in {**(parameters or {}), **more}.items():
            self.command(f"gpu {index} {key} {value}")

    def at(self, time: float, command: str) -> None:
        """Carry out a command when the simulation comes to ``time``, in s."""
        self.command(f"at {time} {command}")

    def fault(self, function: str, code: int, *, gpu: int = -1, first: int = 0, count: int = FOR_GOOD) -> None:
        """Have calls of ``function``, named as nvml.c says, return ``code``, from the ``first`` from now on."""
        self.command(f"fault {function} {gpu} {code} {first} {count}")

    def heal(self) -> None:
        """End all faults."""
        self.command("heal")

    def load(self, watts: float, gpu: int = 0) -> None:
        """What work adds to the power of a GPU from now on."""
        self._library.simulation_load(gpu, watts)

    def energy(self, gpu: int = 0) -> float:
        """The truth: joules since the start."""
        return float(self._library.simulation_energy(gpu))

    @property
    def time(self) -> float:
        """s since the start."""
        return float(self._library.simulation_time())

    @property
    def references(self) -> int:
        """How often NVML is initialised and not shut down."""
        return int(self._library.simulation_references())
