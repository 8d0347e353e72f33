"""Runs exported ``.tflite`` files by LiteRT. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cet.deploy.description import KEY, ExportError, reason_of
from cet.deploy.host_loop import MethodsModel
from cet.deploy.loaded import Array, check_is_file
from cet.deploy.manifest import Manifest
from cet.deploy.seal import check_sealed
from cet.measure.host import require


def load(path: str | os.PathLike[str], threads: int | None = None) -> MethodsModel:
    """Read a ``.tflite`` file that :func:`cet.export` wrote.

    Args:
        path: the file.
        threads: how many threads LiteRT may use within an operator; None: one.

    Raises:
        ExportError: where the file is damaged, of another kind or of a newer format.
        ModuleNotFoundError: where LiteRT is not installed.
        OSError: where the file cannot be read.
    """
    check_is_file(path)
    require("a .tflite file", ["ai-edge-litert"], extra="litert")
    content = Path(path).read_bytes()
    check_sealed(content, os.fspath(path))
    return model_of(content, os.fspath(path), threads)


def model_of(content: bytes, path: str, threads: int | None = None) -> MethodsModel:
    """The model in a ``.tflite`` file, whose path is for errors."""
    interpreter = read(content, path, threads)
    from ai_edge_litert.schema_py_generated import Model

    model = Model.GetRootAs(content)
    held = [model.Metadata(index) for index in range(model.MetadataLength())]
    buffers = [metadata.Buffer() for metadata in held if metadata.Name() == KEY.encode()]
    if not buffers:
        raise ExportError(f"{path} was not written by cet.export; give a file that was")
    manifest = Manifest.from_json(model.Buffers(buffers[0]).DataAsNumpy().tobytes(), path)
    return MethodsModel(manifest, partial(StageMethod, interpreter, path=path))


def read(content: bytes, path: str, threads: int | None = None) -> Any:
    """An interpreter of LiteRT.

    Raises:
        ExportError: where the file is damaged, naming ``path``.
    """
    from ai_edge_litert.interpreter import Interpreter

    try:
        return Interpreter(model_content=content, num_threads=threads)
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"LiteRT cannot read {path} ({reason_of(error)}); export it again") from error


class StageMethod:
    """A signature of a model, as a function of arrays.

    Raises:
        ExportError: where it is missing, or needs what this runtime lacks.
    """

    def __init__(self, interpreter: Any, name: str, path: str) -> None:
        self._name = name
        try:
            self._run = interpreter.get_signature_runner(name)
            inputs = self._run.get_input_details()
            num_outputs = len(self._run.get_output_details())
        except (RuntimeError, ValueError) as error:
            raise ExportError(
                f"LiteRT cannot load the signature {name!r} of {path} ({error}); export it again for this version"
            ) from error
        self._inputs = [(f"args_{index}", inputs[f"args_{index}"]["dtype"]) for index in range(len(inputs))]
        self._outputs = [f"output_{index}" for index in range(num_outputs)]

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        # It has no 64-bit integers.
        given = {
            name: array.astype(dtype, copy=False) for (name, dtype), array in zip(self._inputs, arrays, strict=True)
        }
        try:
            made = self._run(**given)
        except RuntimeError as error:
            raise ExportError(f"LiteRT fails in {self._name} ({error}); export the model again") from error
        return [made[name] for name in self._outputs]
