"""Runs exported ``.pte`` files by ExecuTorch's Python runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cet.deploy.description import KEY, ExportError
from cet.deploy.host_loop import MethodsModel
from cet.deploy.loaded import Array, check_is_file
from cet.deploy.manifest import Manifest
from cet.deploy.seal import check_sealed
from cet.measure.host import require
from cet.partition.export import quiet


def load(path: str | os.PathLike[str], threads: int | None = None) -> MethodsModel:
    """Read a ``.pte`` file that :func:`cet.export` wrote.

    Args:
        path: the file.
        threads: how many threads ExecuTorch may use from now on, for all programs of this process; None: as before.

    Raises:
        ExportError: where the file is damaged, of another kind or of a newer format.
        ModuleNotFoundError: where ExecuTorch is not installed.
        OSError: where the file cannot be read.
    """
    check_is_file(path)
    require("a .pte file", ["executorch"], extra="executorch")
    content = Path(path).read_bytes()
    check_sealed(content, os.fspath(path))
    return model_of(content, os.fspath(path), threads)


def model_of(content: bytes, path: str, threads: int | None = None) -> MethodsModel:
    """The model in a ``.pte`` file, whose path is for errors."""
    program = read(content, path, threads)
    if KEY not in program.method_names:
        raise ExportError(f"{path} was not written by cet.export; give a file that was")
    (manifest,) = program.load_method(KEY).execute([])
    return MethodsModel(Manifest.from_json(manifest, path), partial(StageMethod, program, path=path))


def read(content: bytes, path: str, threads: int | None = None) -> Any:
    """A program of ExecuTorch.

    Raises:
        ExportError: where it is damaged, naming ``path``.
    """
    with quiet():
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime
    if threads is not None:
        portable_lib._unsafe_reset_threadpool(threads)
    try:
        return Runtime.get().load_program(content)
    except RuntimeError as error:
        raise ExportError(f"ExecuTorch cannot read {path} ({error}); export it again") from error


class StageMethod:
    """A method of a program, as a function of arrays.

    Raises:
        ExportError: where it is missing, or needs what this runtime lacks.
    """

    def __init__(self, program: Any, name: str, path: str) -> None:
        self._name = name
        self._program = program  # the method reads from its memory, and does not hold it
        try:
            self._method = program.load_method(name)
        except (KeyError, RuntimeError) as error:
            raise ExportError(
                f"ExecuTorch cannot load the method {name!r} of {path} ({error}); export it again for this version"
            ) from error

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        tensors = [torch.from_numpy(_own(array)) for array in arrays]
        try:
            outputs = self._method.execute(tensors)
        except RuntimeError as error:
            raise ExportError(
                f"ExecuTorch fails in {self._name} ({error}), as where its lowering fixed a size; export with batch=1"
            ) from error
        return [output.numpy() for output in outputs]


def _own(array: Array) -> Array:
    """Memory that a tensor may be made of."""
    return array if array.flags.c_contiguous and array.flags.writeable else np.array(array, order="C")
