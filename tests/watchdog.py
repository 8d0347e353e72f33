"""Runs a function of a test file in a process of its own, which tells where it hangs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

SOURCE = """
import faulthandler, sys, warnings
faulthandler.enable()
faulthandler.dump_traceback_later({seconds}, exit=True)
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
torch.manual_seed(0)
warnings.simplefilter("ignore")
import {module}
{module}.{name}(*{args!r})
print("finished", flush=True)
"""


def in_a_process(function: Callable[..., None], *args: object, seconds: float = 60) -> None:
    """Run ``function(*args)``; an error or a hang fails the test with the traces of all threads."""
    code = sys.modules[function.__module__].__file__
    assert code is not None
    source = SOURCE.format(
        seconds=seconds,
        paths=[str(Path(__file__).parent), str(Path(code).parent)],
        module=Path(code).stem,
        name=function.__name__,
        args=args,
    )
    process = subprocess.Popen(
        [sys.executable, "-c", source],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds + 30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # and the children that it left hanging
        output, _ = process.communicate()
        output += "\nand it did not stop"
    assert process.returncode == 0, f"{output}\nexit status {process.returncode}"
    assert output.endswith("finished\n"), output
