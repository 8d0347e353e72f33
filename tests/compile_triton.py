"""Compiles and launches the Triton kernels for GPUs that need not be there: ``python compile_triton.py 80 90``.

The launchers run on CPU tensors, through Triton's own, on a driver that notes what it is given and runs nothing. Prints
one JSON object per kernel. ``python compile_triton.py host`` prints what an exit costs the host instead. The
interpreter must be off.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import driver

from cet.kernels import compact, consistent_exit_loss, launch
from cet.ops.compact import RowOrder
from cet.ops.compact import triton as triton_compact
from cet.ops.consistent_exit_loss import LossConfig, Target, Teacher
from cet.ops.definitions import Layout, ScoreName
from cet.ops.exit_gate import triton as triton_gate
from cet.ops.padded import Answers, PaddedExit

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
INSTRUCTION_BYTES = 16
INSTRUCTION = re.compile(r"/\*([0-9a-f]+)\*/ +(?:@!?\w+ +)?((?:LDG|STG|LDL|STL|MEMBAR|CCTL|ATOMG?|REDG?|BAR)\b[.\w]*)")
STREAM = 0xABC


class _Noted(ctypes.Structure):
    """The ``noted`` of fake_driver.c."""

    _fields_ = (
        ("launches", ctypes.c_int64),
        ("grid", ctypes.c_int32 * 3),
        ("threads", ctypes.c_int32),
        ("shared", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("sizes", ctypes.c_int32 * 256),
        ("stream", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("values", ctypes.c_uint64 * 256),
    )


def load_fake_driver(folder: Path) -> _Noted:
    """Build fake_driver.c and load it as the CUDA driver of this process; what it notes."""
    library = folder / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    source = Path(__file__).with_name("fake_driver.c")
    command = ["cc", "-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}", source, "-o", library]
    subprocess.run(command, check=True)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)  # to link against; at runtime the name is known already
    return _Noted.in_dll(ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL), "noted")


class AbsentGPU:
    """What Triton asks a driver, and its own launcher."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        self.utils = CudaUtils()
        self.launcher_cls = CudaLauncher

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # what is compiled is cached by device

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


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


def alone(shape: tuple[int, ...], classes: int, dtype: torch.dtype) -> None:
    """A head and its gate, without an order of the rows."""
    features, weight = torch.zeros(shape, dtype=dtype), torch.zeros(classes, shape[1], dtype=dtype)
    triton_gate.exit_gate(features, weight, None, "channels_first", "mean", "entropy", 0.5, 1.0)


def scores(rows: int, classes: int) -> None:
    triton_gate.padded_scores(torch.zeros(rows, classes), torch.ones(2), torch.ones((), dtype=torch.int32), "entropy")


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


def mixed(_: int) -> None:
    """What needs other kernels than what came before: rows that begin anywhere, other strides, other dtypes."""
    numbers = torch.zeros(3 * 129)
    for logits in (
        numbers[:384].view(3, 128),
        numbers[1:385].view(3, 128),
        numbers.view(3, 129)[:, :128],
        numbers[:384].view(128, 3).T,
        numbers[:384].view(3, 128).to(HALF),
    ):
        triton_gate.gate(logits, "entropy", 0.5, 1.0)


FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
ROWS = (1024, 999, 1)
CASES: dict[str, Callable[[int], object]] = {
    "sensor rows": lambda rows: step((rows, 128, 64), 7, FLOAT),
    "sensor rows, tiny": lambda rows: step((rows, 6, 32), 7, HALF),
    "images": lambda rows: step((rows, 64, 784), 100, FLOAT, score="margin"),
    "tokens": lambda rows: step((rows, 196, 768), 30, BFLOAT, "channels_last"),
    "many rows of half precision": lambda _: step((4096, 64, 128), 7, BFLOAT, score="margin"),
    "one long recording": lambda _: step((1, 64, 16000), 7, HALF, score="confidence"),
    "100 classes": lambda rows: gate(rows, 100, FLOAT),
    "1000 classes": lambda rows: gate(rows, 1000, BFLOAT),
    "whole numbers": lambda rows: [triton_gate.gate(torch.zeros(rows, 7), "margin", t, t) for t in (0.5, 1, 16)],
    "32000 classes": lambda _: gate(64, 32000, FLOAT, score="margin"),
    "without an order": lambda rows: alone((rows, 6, 32), 7, FLOAT),
    "without an order, long rows": lambda _: alone((2, 64, 16000), 7, BFLOAT),
    "without an order, 7 classes": lambda rows: triton_gate.gate(torch.zeros(rows, 7), "entropy", 0.5, 1.0),
    "without an order, 32000 classes": lambda _: triton_gate.gate(torch.zeros(64, 32000), "entropy", 0.5, 1.0),
    "scores, 100 classes": lambda rows: scores(rows, 100),
    "scores, 32000 classes": lambda _: scores(64, 32000),
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
    "loss, 4000 classes": lambda _: loss(64, 4000, 2, FLOAT, "soft", "final"),
    "loss, 4097 classes": lambda _: loss(64, 4097, 2, FLOAT, "hard", "final"),
    "mixed": mixed,
    "gradients": lambda _: scale(FLOAT),
    "gradients in float16": lambda _: scale(HALF),
}


def machine_code(cubin: bytes) -> bytes:
    """The one section of an ELF file that holds code."""
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, sections + index * size) for index in range(count)]
    (code,) = (h for h in headers if cubin.startswith(b".text.", headers[names][4] + h[0]))
    return cubin[code[4] : code[4] + code[5]]


def memory_instructions(cubins: Sequence[bytes], capability: int) -> list[list[str]]:
    """Of each kernel, in order. All are disassembled at once, because starting the tool takes longer than its work."""
    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(b"".join(codes))
        command = [TOOLS / "nvdisasm", "--binary", f"SM{capability}", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    of_kernel = [index for index, code in enumerate(codes) for _ in range(len(code) // INSTRUCTION_BYTES)]
    found: list[list[str]] = [[] for _ in codes]
    for address, name in INSTRUCTION.findall(text):
        found[of_kernel[int(address, 16) // INSTRUCTION_BYTES]].append(name)
    return found


def described(kernel: Any, in_order: list[str]) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return {
        "registers": registers,
        "stack": stack,
        "local": local,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": Counter(in_order),
        "in_order": in_order,
        "ptx": kernel.asm["ptx"],
    }


def _flat(arguments: Sequence[Any], types: Sequence[Any]) -> Iterator[tuple[Any, str]]:
    """Those that are no constants of the kernel, each with its type."""
    for argument, kind in zip(arguments, types, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(argument, kind)
        elif kind != "constexpr":
            yield argument, kind


def _in_memory(argument: Any, kind: str) -> list[int]:
    """Size and bits of a parameter."""
    if kind.startswith("*"):
        return [8, argument if isinstance(argument, int) else argument.data_ptr()]
    if kind == "fp32":
        return [4, *struct.unpack("I", struct.pack("f", argument))]
    size = {"i32": 4, "i64": 8}[kind]
    return [size, argument % (1 << 8 * size)]


def wanted_by(kernel: Any, arguments: dict[str, Any], programs: int) -> dict[str, Any]:
    """What a launch should give to the driver."""
    signature = kernel.src.signature
    parameters = [_in_memory(*each) for each in _flat([arguments[name] for name in signature], [*signature.values()])]
    return {
        "grid": [programs, 1, 1],
        "threads": 32 * kernel.metadata.num_warps,
        "shared": kernel.metadata.shared,
        "stream": STREAM,
        "function": kernel.function,
        "parameters": [*parameters, [8, 0], [8, 0]],  # scratch memory, of which no kernel needs any
    }


def given_to(noted: _Noted) -> dict[str, Any]:
    given = {name: getattr(noted, name) for name in ("threads", "shared", "stream", "function")}
    parameters = [list(each) for each in zip(noted.sizes[: noted.count], noted.values, strict=False)]
    return {**given, "grid": list(noted.grid), "parameters": parameters}


class Launches:
    """Every launch twice: what was given to the driver, by Triton's own way and by cet's for what is compiled."""

    def __init__(self, noted: _Noted) -> None:
        self.kernels: dict[str, tuple[str, Any]] = {}
        self.wrong: list[dict[str, Any]] = []
        self._noted = noted
        self._launch = launch.launch
        for module in (launch, compact, consistent_exit_loss):
            module.launch = self

    def __call__(self, function: Any, programs: int, *args: Any, num_warps: int = 4, **constants: Any) -> None:
        constants["num_warps"] = num_warps
        kernel = function.warmup(*args, grid=(programs,), **constants)  # the one that Triton chooses
        self.kernels[kernel.hash] = function.__name__, kernel
        arguments = {**dict(zip(function.arg_names, args, strict=False)), **constants}
        for _ in range(2):
            before = self._noted.launches
            self._launch(function, programs, *args, **constants)
            assert self._noted.launches == before + 1, "not launched once"
            wanted, given = wanted_by(kernel, arguments, programs), given_to(self._noted)
            if given != wanted:
                self.wrong.append({"kernel": function.__name__, "wanted": wanted, "given": given})

    def taken(self) -> tuple[dict[str, tuple[str, Any]], list[dict[str, Any]]]:
        """The kernels since the last call, and the launches that were wrong."""
        taken = self.kernels, self.wrong
        self.kernels, self.wrong = {}, []
        launch._compiled.clear()
        return taken


def main(capabilities: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        launches = Launches(load_fake_driver(Path(folder)))
        for capability in capabilities:
            driver.set_active(AbsentGPU(capability))
            found = []
            for case, run in CASES.items():
                for rows in ROWS:
                    run(rows)
                kernels, wrong = launches.taken()
                found += [(case, wrong, *each) for each in kernels.values()]
            codes = memory_instructions([kernel.asm["cubin"] for *_, kernel in found], capability)
            for (case, wrong, name, kernel), in_order in zip(found, codes, strict=True):
                about = {"capability": capability, "case": case, "kernel": name, "wrong_launches": wrong}
                print(json.dumps({**about, **described(kernel, in_order)}))


def host_time() -> None:
    """Processor time of this thread for an exit step in eager mode, less the wait for the device."""
    with tempfile.TemporaryDirectory() as folder:
        load_fake_driver(Path(folder))
        driver.set_active(AbsentGPU(90))
        torch.set_num_threads(1)
        features, weight, bias = torch.zeros(32, 128, 64), torch.zeros(7, 128), torch.zeros(7)

        def step() -> None:
            moves = triton_compact.Gathering(32, [features], [0]).moves
            decided = "channels_first", "mean", "entropy", 0.5, 1.0
            triton_gate.exit_gate_and_order(features, weight, bias, *decided, moves=moves)

        step()
        times = []
        for _ in range(15):
            start = time.thread_time()
            for _ in range(200):
                step()
            times.append((time.thread_time() - start) / 200)
        print(f"{1e6 * min(times):.1f} us for an exit step: 7 tensors and a launch of 26 arguments")


if __name__ == "__main__":
    if sys.argv[1:] == ["host"]:
        host_time()
    else:
        main([int(capability) for capability in sys.argv[1:]])
