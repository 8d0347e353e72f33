"""The loop of a firmware on this machine: early_exit.c compiled by gcc, its stages run by TFLite Micro's package."""

from __future__ import annotations

import ctypes
import re
import subprocess
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from tflite_micro import runtime

C99 = ["gcc", "-std=c99", "-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fPIC", "-shared"]
SHORT = ctypes.POINTER(ctypes.c_uint16)
POINTERS = ctypes.POINTER(ctypes.c_void_p)
RUN = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, POINTERS, POINTERS)


class Stage(ctypes.Structure):
    """CetStage of model.h."""

    _fields_ = (
        *(("file", ctypes.c_void_p), ("inputs", SHORT), ("outputs", SHORT)),
        *((name, ctypes.c_uint32) for name in ("file_bytes", "arena_bytes")),
        ("threshold", ctypes.c_float),
        *((name, ctypes.c_uint16) for name in ("exit_index", "num_inputs", "num_outputs")),
    )


class Firmware:
    """A folder that cet.export wrote as .tflm, in C.

    Args:
        folder: that holds model.c.
        library: where the compiled code goes.
    """

    def __init__(self, folder: Path, library: Path) -> None:
        here = Path(__file__).parent
        sources = [here / "early_exit.c", folder / "model.c"]
        subprocess.run([*C99, "-I", here, "-I", folder, *sources, "-o", library, "-lm"], check=True)
        self.numbers = {n: int(v) for n, v in re.findall(r"define CET_(\w+) (\d+)", (folder / "model.h").read_text())}
        self.code = ctypes.CDLL(str(library.resolve()))
        self.stages = (Stage * self.numbers["STAGES"]).in_dll(self.code, "cet_stages")
        self.interpreters = [
            runtime.Interpreter.from_bytes(ctypes.string_at(s.file, s.file_bytes), arena_size=s.arena_bytes)
            for s in self.stages
        ]
        floats = ctypes.c_float * self.numbers["CLASSES"]
        fields = [("label", ctypes.c_int), ("exit_index", ctypes.c_int), ("score", ctypes.c_float), ("logits", floats)]
        self.answer = type("Answer", (ctypes.Structure,), {"_fields_": fields})
        self.scratch = np.empty(self.numbers["SCRATCH_BYTES"] + 16, np.uint8)
        self.run = RUN(self.run_stage)

    def predict(self, *inputs: np.ndarray, thresholds: np.ndarray | None = None) -> Any:
        """The answer to one row, CetAnswer of early_exit.h."""
        answer, given = self.answer(), (ctypes.c_void_p * len(inputs))(*(array.ctypes.data for array in inputs))
        scratch = ctypes.c_void_p(-(-self.scratch.ctypes.data // 16) * 16)
        own = None if thresholds is None else ctypes.c_void_p(thresholds.ctypes.data)
        failed = self.code.cet_predict(self.run, None, given, scratch, own, ctypes.byref(answer))
        if failed:
            raise RuntimeError(f"a stage failed with {failed}")
        return answer

    def run_stage(self, _: Any, index: int, inputs: Any, outputs: Any) -> int:
        """What a firmware does with its own interpreter."""
        interpreter, stage = self.interpreters[index], self.stages[index]
        try:
            for i in range(stage.num_inputs):
                wanted = interpreter.get_input_details(i)
                size = int(np.prod(wanted["shape"])) * np.dtype(wanted["dtype"]).itemsize
                array = np.frombuffer(ctypes.string_at(inputs[i], size), wanted["dtype"])
                interpreter.set_input(array.reshape(wanted["shape"]), i)
            interpreter.invoke()
            for i in range(2 + stage.num_outputs):
                made = interpreter.get_output(i)
                ctypes.memmove(outputs[i], made.tobytes(), made.nbytes)
        except Exception:
            traceback.print_exc()
            return 1
        return 0
