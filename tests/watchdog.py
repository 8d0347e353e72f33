"""Runs a function of a test file in a process of its own, which tells where it hangs."""

from __future__ import annotations

import faulthandler
import os
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from unittest import mock

import torch

# A server that has imported PyTorch and what torch.export imports, which takes seconds, and has done nothing else: each
# process is a fork of it.
_IMPORTED = ["pytest", "hypothesis.strategies", "networkx", "torch", "cet.model.early_exit"]
_IMPORTED += [f"torch.{name}" for name in ("export", "onnx", "testing", "distributed", "utils.data")]
_IMPORTED += [f"torch.{name}" for name in ("_dynamo", "_export", "_inductor.utils")]
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(_IMPORTED)


def _run(function: Callable[..., None], args: tuple[object, ...], seconds: float, output: str) -> None:
    os.setsid()
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(seconds, exit=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    function(*args)
    print("finished", flush=True)


def start(function: Callable[..., None], args: tuple[object, ...], seconds: float, output: Path) -> ForkServerProcess:
    """``function(*args)`` under way in a process of its own, for so long at most; what it prints goes to a file."""
    process = _CONTEXT.Process(target=_run, args=(function, args, seconds, str(output)))
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
        process.start()
    return process


def in_a_process(function: Callable[..., None], *args: object, seconds: float = 60) -> None:
    """Run ``function(*args)``; an error or a hang fails the test with the traces of all threads."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "output"
        process = start(function, args, seconds, file)
        process.join(seconds + 30)
        is_over = process.exitcode is not None
        if not is_over:
            os.killpg(process.pid or 0, 9)  # and the children that it left hanging
            process.join()
        output = file.read_text() if file.exists() else ""
    assert is_over, f"{output}\nand it did not stop"
    assert process.exitcode == 0, f"{output}\nexit status {process.exitcode}"
    assert output.endswith("finished\n"), output
