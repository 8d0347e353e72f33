"""Runs exported ``.pte`` files by ExecuTorch's Python runtime."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cet.deploy.description import KEY, ExportError
from cet.deploy.host_loop import StagesModel
from cet.deploy.loaded import Array
from cet.deploy.manifest import Manifest
from cet.measure.host import require
from cet.partition.export import quiet


class ExecutorchModel(StagesModel):
    """An exported ``.pte`` file in ExecuTorch."""

    def __init__(self, content: bytes, path: str) -> None:
        program = read_program(content, path)
        if KEY not in program.method_names:
            raise ExportError(f"{path} was not written by cet.export; give a file that was")
        (manifest,) = program.load_method(KEY).execute([])
        super().__init__(Manifest.from_json(manifest, path))
        self._methods = [StageMethod(program, stage.file, path) for stage in self.stages]
        self._lock = threading.Lock()  # the methods of a program share their memory

    def run_stage(self, index: int, values: Mapping[str, Array]) -> Sequence[Array]:
        arrays = [values[name] for name in self.stages[index].inputs]
        with self._lock:
            return self._methods[index](arrays)


def read_program(content: bytes, path: str) -> Any:
    """A program of ExecuTorch.

    Raises:
        ExportError: where it is damaged, naming ``path``.
        ModuleNotFoundError: where ExecuTorch is not installed.
    """
    require("a .pte file", ["executorch"], extra="executorch")
    with quiet():
        from executorch.runtime import Runtime
    try:
        return Runtime.get().load_program(content)
    except RuntimeError as error:
        raise ExportError(f"ExecuTorch cannot read {path} ({error}); export it again") from error


class StageMethod:
    """A method of a program, of arrays.

    Raises:
        ExportError: where it is missing, or needs what this runtime lacks.
    """

    def __init__(self, program: Any, name: str, path: str) -> None:
        self._program = program  # the method reads from its memory, and does not hold it
        try:
            self._method = program.load_method(name)
        except (KeyError, RuntimeError) as error:
            raise ExportError(
                f"ExecuTorch cannot load the method {name!r} of {path} ({error}); export it again for this version"
            ) from error

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        from_numpy = sys.modules["torch"].from_numpy
        outputs = self._method.execute([from_numpy(np.require(array, requirements=["C", "W"])) for array in arrays])
        return [output.numpy() for output in outputs]


def load(path: str | os.PathLike[str], threads: int | None = None) -> ExecutorchModel:
    """Read a ``.pte`` file that :func:`cet.export` wrote.

    Args:
        path: the file.
        threads: how many threads all of ExecuTorch may use in this process from now on; None: as before.

    Raises:
        ExportError: where the file is damaged, of another kind or of a newer format.
        ModuleNotFoundError: where ExecuTorch is not installed.
        OSError: where the file cannot be read.
    """
    name = os.fspath(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{name} is no file; give the path that cet.export wrote")
    loaded = ExecutorchModel(Path(path).read_bytes(), name)
    if threads is not None:
        from executorch.extension.pybindings import portable_lib

        portable_lib._unsafe_reset_threadpool(threads)
    return loaded
