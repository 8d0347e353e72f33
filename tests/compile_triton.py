"""Compiles the Triton kernels for GPUs that need not be there: ``python compile_triton.py 80 90``.

The launchers run on CPU tensors, so each kernel is specialised as in a real launch, but it is only compiled. Prints one
JSON object per kernel. The interpreter must be off.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from cet.kernels import compact, consistent_exit_loss
from cet.ops.compact import RowOrder
from cet.ops.compact import triton as triton_compact
from cet.ops.consistent_exit_loss import LossConfig, Target, Teacher
from cet.ops.definitions import Layout, ScoreName
from cet.ops.exit_gate import triton as triton_gate
from cet.ops.padded import Answers, PaddedExit

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MEMORY_INSTRUCTION = re.compile(r"\b(?:LDG|STG|LDL|STL)\b[.\w]*")


class AbsentGPU:
    """What Triton asks a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # what is compiled is cached by device

    def get_current_stream(self, device: int) -> int:
        return 0


def step(
    shape: tuple[int, ...],
    classes: int,
    dtype: torch.dtype,
    layout: Layout = "channels_first",
    score: ScoreName = "entropy",
) -> None:
    """A gate with a move of the features on the way."""
    weight = torch.zeros(classes, shape[-1 if layout == "channels_last" else 1], dtype=dtype)
    features, bias = torch.zeros(shape, dtype=dtype), torch.zeros(classes, dtype=dtype)
    moves = triton_compact.Gathering(shape[0], [features], [0]).moves
    triton_gate.exit_gate_and_order(features, weight, bias, layout, "mean", score, 0.5, 1.0, moves=moves)


def gate(rows: int, classes: int, dtype: torch.dtype, score: ScoreName = "entropy") -> None:
    logits, (count, num_kept) = torch.zeros(rows, classes, dtype=dtype), torch.zeros(2, dtype=torch.int32)
    triton_gate.padded_gate(logits, torch.ones(2), count, num_kept, score)


def padded(rows: int) -> None:
    features, weight = torch.zeros(rows, 64, 128), torch.zeros(12, 64)
    count, num_kept, numbers = torch.zeros((), dtype=torch.int32), torch.zeros((), dtype=torch.int32), torch.zeros(2)
    positions, state = torch.zeros(rows, dtype=torch.int32), torch.zeros(2 + 2 * rows, dtype=torch.int64)
    answers = Answers(torch.zeros(rows, 12), torch.zeros(rows), torch.zeros(rows, dtype=torch.int64))
    at = PaddedExit(numbers, torch.zeros((), dtype=torch.int64), count, num_kept, positions, state)
    kept = [(positions, positions.clone()), (features, features.clone())]
    triton_gate.padded_exit_step(features, weight, None, at, kept, answers, "channels_first", "margin")


def loss(rows: int, classes: int, exits: int, dtype: torch.dtype, target: Target, teacher: Teacher) -> None:
    logits, labels = [torch.zeros(rows, classes, dtype=dtype)] * (2 * exits), torch.zeros(rows, dtype=torch.int64)
    config = LossConfig(1.0, 1.0, target, teacher, 0.5, (1 / exits,) * exits)
    consistent_exit_loss.losses_and_gradients(logits, labels, config, [True] * (2 * exits))


def scale(dtype: torch.dtype) -> None:
    factors = [(0.25, 0.25)] * 8 if dtype is HALF else None
    gradients, labelled = [torch.zeros(1024, 1000, dtype=dtype)] * 8, torch.ones(2, dtype=torch.int32)
    consistent_exit_loss.scale_into(gradients, torch.ones(()), factors, labelled)


def partition(rows: int) -> None:
    compact.order_rows_into(torch.zeros(rows, dtype=torch.bool), *RowOrder.empty(torch.zeros(rows)))


def take(*tensors: torch.Tensor) -> None:
    rows = len(tensors[0])
    order, num_kept = RowOrder.empty(torch.zeros(rows))
    moves = [compact.as_move(tensor, torch.empty_like(tensor), 0) for tensor in tensors]
    compact.moves_into(moves, [], rows, order, None, num_kept, None)


def send(rows: int) -> None:
    order, num_kept = torch.zeros(2, rows, dtype=torch.int32), torch.zeros((), dtype=torch.int32)
    pair = torch.zeros(rows, 64, 128), torch.zeros(rows, 64, 128)
    triton_compact.gather_and_scatter_rows(order, order[0], num_kept, num_kept, [pair], [pair])


FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
ROWS = (1024, 999)
CASES: dict[str, Callable[[int], None]] = {
    "sensor rows": lambda rows: step((rows, 128, 64), 7, FLOAT),
    "sensor rows, tiny": lambda rows: step((rows, 6, 32), 7, HALF),
    "images": lambda rows: step((rows, 64, 784), 100, FLOAT, score="margin"),
    "tokens": lambda rows: step((rows, 196, 768), 30, BFLOAT, "channels_last"),
    "one long recording": lambda _: step((1, 64, 16000), 7, HALF, score="confidence"),
    "100 classes": lambda rows: gate(rows, 100, FLOAT),
    "1000 classes": lambda rows: gate(rows, 1000, BFLOAT),
    "32000 classes": lambda _: gate(64, 32000, FLOAT, score="margin"),
    "padded": padded,
    "partition": partition,
    "row copy": lambda rows: take(torch.zeros(rows, 128, 64)),
    "row copy, channels last": lambda rows: take(torch.zeros(rows, 32, 4, 4).to(memory_format=torch.channels_last)),
    "row copy, several": lambda rows: take(torch.zeros(rows, 64, 64), torch.zeros(rows).bool(), torch.zeros(rows, 7)),
    "row copy, transposed": lambda _: take(torch.zeros(196, 1024).T),
    "row copy, padded": send,
    "loss, 7 classes": lambda rows: loss(rows, 7, 4, FLOAT, "soft", "mean"),
    "loss, 1000 classes": lambda rows: loss(rows, 1000, 4, BFLOAT, "hard", "final"),
    "loss, 32000 classes": lambda _: loss(64, 32000, 3, FLOAT, "soft", "mean"),
    "loss, 50257 classes": lambda _: loss(64, 50257, 3, BFLOAT, "soft", "mean"),
    "loss, 4097 classes": lambda _: loss(64, 4097, 2, FLOAT, "hard", "final"),
    "gradients": lambda _: scale(FLOAT),
    "gradients in float16": lambda _: scale(HALF),
}


def described(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage, code = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": Counter(MEMORY_INSTRUCTION.findall(code)),
        "ptx": kernel.asm["ptx"],
    }


def main(capabilities: list[int]) -> None:
    launch = JITFunction.run
    compiled: dict[str, tuple[str, Any]] = {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = self.__name__, kernel
        return kernel

    JITFunction.run = compile_only
    for capability in capabilities:
        driver.set_active(AbsentGPU(capability))
        for case, run in CASES.items():
            for rows in ROWS:
                run(rows)
            for name, kernel in compiled.values():
                print(json.dumps({"capability": capability, "case": case, "kernel": name, **described(kernel)}))
            compiled.clear()


if __name__ == "__main__":
    main([int(capability) for capability in sys.argv[1:]])
