"""How a batch runs through the stages.

- ``"eager"``: stage by stage from Python, each on just the rows that are left. Any device.
- ``"graphs"``: a CUDA graph per segment (the stages up to the next open exit) and bucket (a number of rows, to which
  kept rows are padded). The host waits for one count per exit and launches the graph that fits.
- ``"device"``: the same graphs under SWITCH nodes in one: the device picks the bucket, and the host never waits.
  Experimental.
- ``"auto"``: the first of ``"device"``, ``"graphs"`` and ``"eager"`` that works for the inputs.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from cet.runtime.cuda_graphs import why_no_switch
from cet.runtime.graphs import Capture, GraphRunner

RunnerName = Literal["eager", "graphs", "device", "auto"]

__all__ = ["Capture", "GraphRunner", "RunnerName", "check_runner", "runner_for"]


def check_runner(wanted: RunnerName | None) -> None:
    """Refuse a runner that does not exist, or that this installation of cet lacks.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for ``"device"`` where it cannot run, with the reason.
    """
    if wanted is not None and wanted not in get_args(RunnerName):
        raise ValueError(f"runner {wanted!r} is unknown; choose one of {', '.join(get_args(RunnerName))}, or None")
    reason = why_no_switch() if wanted == "device" else None
    if reason is not None:
        raise RuntimeError(f"runner 'device' cannot run: {reason}, or choose another runner")


def runner_for(device: torch.device, wanted: RunnerName | None) -> RunnerName:
    """The runner for inputs on ``device``: what is wanted, else ``"eager"``, which needs no capture.

    Raises:
        ValueError: when the wanted one cannot run there.
    """
    if device.type == "cuda":
        if wanted == "auto":
            return "graphs" if why_no_switch() else "device"
        return wanted or "eager"
    if device.type == "meta":
        raise ValueError("the inputs are on meta, which holds no values to decide by; move model and inputs")
    if wanted == "graphs" or wanted == "device":
        raise ValueError(
            f"runner {wanted!r} needs a CUDA device, but the inputs are on {device}; move model and inputs, or choose "
            "runner='eager'"
        )
    return "eager"
