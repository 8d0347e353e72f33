"""Models for whole commands on the simulated NVML: they work on the CPU and load the simulated GPU meanwhile."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import cet


class Loaded(nn.Module):
    """Passes its input on, after the simulated GPU has drawn ``watts`` beyond idle for 10 ms.

    Args:
        watts: of the load.
        fault: commands of nvml.c, ``;`` between them, that are carried out once at the first call that finds the file
            ``after``; ``at +S`` counts from then.
        after: a file.
    """

    def __init__(self, watts: float, fault: str = "", after: str = "") -> None:
        super().__init__()
        self._watts, self._fault, self._after = watts, fault, after
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1") if "NVML_SIMULATION" in os.environ else None

    def forward(self, x: Tensor) -> Tensor:
        if self._nvml:
            self._nvml.simulation_load(0, ctypes.c_double(self._watts))
            if self._fault and os.path.exists(self._after):
                self._inject(self._nvml)
        time.sleep(0.01)
        if self._nvml:
            self._nvml.simulation_load(0, ctypes.c_double(0))
        return x

    def _inject(self, nvml: ctypes.CDLL) -> None:
        nvml.simulation_time.restype = ctypes.c_double
        for command in self._fault.split(";"):
            if command.startswith("at +"):
                _, delay, rest = command.split(" ", 2)
                command = f"at {nvml.simulation_time() + float(delay)} {rest}"
            nvml.simulation_command(command.encode())
        self._fault = ""


def small() -> nn.Module:
    """100 W; with the fault ``SIMULATED_FAULT`` once ``SIMULATED_FAULT_AFTER`` exists, both environment variables."""
    fault = (os.environ.get(name, "") for name in ("SIMULATED_FAULT", "SIMULATED_FAULT_AFTER"))
    return nn.Sequential(Loaded(100, *fault), nn.Linear(6, 4))


def large() -> nn.Module:
    return nn.Sequential(Loaded(200), nn.Linear(6, 4))


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 4))


def early_exit() -> cet.EarlyExit:
    """Three exits at which samples leave; the first one is called "0"."""
    model = cet.EarlyExit(backbone(), ["0", "1"], (torch.zeros(2, 6),))
    model.policy = cet.ExitPolicy("entropy", (1.3, 1.35))
    return model


def data() -> Iterator[tuple[Tensor, Tensor]]:
    """24 labelled samples."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield torch.randn(8, 6, generator=generator), torch.randint(4, (8,), generator=generator)


def unlabelled() -> list[tuple[Tensor, Tensor]]:
    return [(x, torch.full_like(y, -100)) for x, y in data()]


not_a_model = 3


def broken() -> None:
    raise KeyError("spam")
