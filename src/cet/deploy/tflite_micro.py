"""Runs folders of stages by TFLite Micro, whose reference kernels are in a package. Nothing here imports torch."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from cet.deploy.arena import MOST_ARENA, refusal
from cet.deploy.description import ExportError
from cet.deploy.host_loop import MethodsModel
from cet.deploy.loaded import Array
from cet.deploy.manifest import Manifest
from cet.deploy.stages import MANIFEST, read_folder
from cet.measure.host import require

IDENTIFIER = b"TFL3"
"""Of a ``.tflite`` file, behind its first four bytes."""


class MicroModel(MethodsModel):
    """Stages in TFLite Micro.

    Attributes:
        arena_bytes: for each stage the least arena in which it ran when it was written.
    """

    def __init__(self, contents: Mapping[str, bytes], path: str) -> None:
        manifest = Manifest.from_json(contents[MANIFEST], f"{path}/{MANIFEST}")
        sizes = [stage.arena_bytes for stage in manifest.stages if stage.arena_bytes is not None]
        if len(sizes) < len(manifest.stages):
            raise ExportError(f"{path} is not for TFLite Micro; give a folder that cet.export wrote as 'tflite-micro'")
        self.arena_bytes = tuple(sizes)
        super().__init__(manifest, partial(StageMethod, contents, path=path))


def load(path: str | os.PathLike[str], threads: int | None = None) -> MicroModel:
    """Read a folder for TFLite Micro that :func:`cet.export` wrote.

    Args:
        path: the folder.
        threads: not used: TFLite Micro has one.

    Raises:
        ExportError: where a file is damaged or missing, of another kind or of a newer format.
        ModuleNotFoundError: where TFLite Micro is not installed.
        OSError: where a file cannot be read.
    """
    return model_of(read_folder(path), os.fspath(path), threads)


def model_of(contents: Mapping[str, bytes], path: str, threads: int | None = None) -> MicroModel:
    """The model in the files of a folder, whose path is for errors."""
    return MicroModel(read(contents, path, threads), path)


def read(contents: Mapping[str, bytes], path: str, threads: int | None = None) -> Mapping[str, bytes]:
    """The files, where there is what runs them.

    Raises:
        ModuleNotFoundError: where TFLite Micro is not installed.
    """
    require("a folder for TFLite Micro", ["tflite-micro"], extra="tflite-micro")
    return contents


class StageMethod:
    """The model of a file, as a function of arrays.

    Raises:
        ExportError: where it is damaged, or needs what this version lacks.
    """

    def __init__(self, contents: Mapping[str, bytes], name: str, path: str) -> None:
        self._file = f"{path}/{name}"
        self._interpreter = _interpreter_of(contents[name], self._file)
        from tflite_micro.tensorflow.lite.micro.python.schema_py_generated import Model

        graph = Model.GetRootAs(contents[name]).Subgraphs(0)
        self._dtypes = [self._interpreter.get_input_details(index)["dtype"] for index in range(graph.InputsLength())]
        self._num_outputs = graph.OutputsLength()

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        for index, (array, dtype) in enumerate(zip(arrays, self._dtypes, strict=True)):
            # It has no 64-bit integers.
            self._interpreter.set_input(np.ascontiguousarray(array, dtype), index)
        try:
            self._interpreter.invoke()
        except RuntimeError as error:
            raise ExportError(f"TFLite Micro fails in {self._file} ({error}); export the model again") from error
        return [self._interpreter.get_output(index) for index in range(self._num_outputs)]


def _interpreter_of(content: bytes, file: str) -> Any:
    """An interpreter of TFLite Micro.

    Raises:
        ExportError: where it cannot run the file, with the reason.
    """
    if content[4:8] != IDENTIFIER:  # it dies of what is none
        raise ExportError(f"{file} is no .tflite file; export the model again")
    from tflite_micro import runtime

    with _heard() as said:
        try:  # in more memory than was measured: another version may need it, and dies where memory is short
            return runtime.Interpreter.from_bytes(content, arena_size=MOST_ARENA)
        except RuntimeError as error:
            failed = error
    raise refusal(file, said[0], MOST_ARENA) from failed


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What the process prints on standard error within, which is where TFLite Micro gives its reasons."""
    said: list[str] = []
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
