"""Runs `cet energy` as a process of its own, on the simulated NVML."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from cet.cli import main
from nvml.simulation import Simulation, environment

CET = Path(sysconfig.get_path("scripts"), "cet")
TESTS = Path(__file__).parent
FAST = ("--rounds", "1", "--window", "0.2", "--warm-up", "0.05", "--batch-size", "8", "--threads", "1")
"""Windows as short as they can be told from each other; they are flagged for it."""


def within_energy(*args: str) -> list[str]:
    """The arguments of a command of `cet energy`, or of `cet doctor`."""
    return [*(() if args[0] == "doctor" else ("energy",)), *args]


def obey_permissions() -> None:
    """Have root be refused what others are: drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    drop = 24  # PR_CAPBSET_DROP
    for capability in (1, 2):
        ctypes.CDLL(None).prctl(drop, capability, 0, 0, 0)


@contextmanager
def ctrl_c_once_there_is(path: Path) -> Iterator[None]:
    """Ctrl-C in this process as soon as a file appears, unless the body has ended by then."""
    is_over = threading.Event()

    def watch() -> None:
        while not path.exists():
            if is_over.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGINT)

    # A shell that runs the tests in the background has them ignore the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        signal.signal(signal.SIGINT, before)


class Commands:
    """Commands on one simulated GPU whose counter ticks every 4 ms, and no RAPL.

    Args:
        library: the simulated libnvidia-ml.so.1.
        folder: where to keep scripts and outputs.
    """

    def __init__(self, library: Path, folder: Path) -> None:
        self._library = library
        self.folder = folder
        self.output = folder / "output.json"
        self.environment: dict[str, str] = {"CET_POWERCAP_ROOT": str(folder / "no-powercap"), "OMP_NUM_THREADS": "1"}

    def inject(self, *fault: str) -> None:
        """Commands of nvml.c for the net ``simulated_net:small`` to carry out when the first block has been saved."""
        self.environment |= {"SIMULATED_FAULT": ";".join(fault), "SIMULATED_FAULT_AFTER": str(self.output)}

    def start(self, *args: str, script: Sequence[str] = (), **more: Any) -> subprocess.Popen[str]:
        """``cet energy ARGS``, or ``cet doctor``, under way; ``script`` are commands of nvml.c."""
        path = self.folder / "script"
        path.write_text("\n".join(["clock real", "gpus 1", "gpu 0 tick 0.004", *script]))
        unset = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "COLUMNS", "NO_COLOR", "FORCE_COLOR")
        env = {key: value for key, value in environment(self._library, path).items() if key not in unset}
        return subprocess.Popen(
            [CET, *within_energy(*args)],
            cwd=TESTS,
            env={**env, **self.environment},
            text=True,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more},
        )

    def run(self, *args: str, script: Sequence[str] = (), **more: Any) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of ``cet energy ARGS``."""
        process = self.start(*args, script=script, **more)
        out, err = process.communicate(timeout=600)
        assert "Traceback" not in err, err
        return process.returncode, out, err

    def measure(self, *args: str, script: Sequence[str] = (), **more: Any) -> tuple[int, dict[str, Any], str]:
        """Exit code, the document of ``--output``, and stdout and stderr as one line."""
        code, out, err = self.run(args[0], "--output", str(self.output), *args[1:], script=script, **more)
        assert self.output.exists(), f"exit code {code}: {err}"
        return code, json.loads(self.output.read_text()), " ".join((out + err).split())


class CommandsHere(Commands):
    """The same in this process, which has imported PyTorch already: for what needs no process of its own."""

    def __init__(
        self, simulation: Simulation, folder: Path, capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch
    ) -> None:
        super().__init__(folder, folder)
        self._simulation, self._capture, self._patch = simulation, capture, patch
        self.environment |= {"COLUMNS": "80", "NVML_SIMULATION": ""}  # nets of simulated_net then load the GPU

    def run(self, *args: str, script: Sequence[str] = (), **_: Any) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of ``cet energy ARGS``."""
        self._simulation.reset(real_time=True)
        for command in ("gpu 0 tick 0.004", *script):
            self._simulation.command(command)
        for name, value in self.environment.items():
            self._patch.setenv(name, value)
        threads = torch.get_num_threads()
        with pytest.raises(SystemExit) as stop:
            main(within_energy(*args))
        torch.set_num_threads(threads)
        return int(stop.value.code or 0), *self._capture.readouterr()
