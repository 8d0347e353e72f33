"""Runs exported ``.onnx`` files by ONNX Runtime. Nothing here imports torch."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any

from cet.deploy.description import KEY, OUTPUTS, THRESHOLDS, Description, ExportError, reason_of
from cet.deploy.loaded import Array, LoadedModel, Thresholds, check_is_file
from cet.deploy.seal import SEAL, VALUE_BYTES, check_unless_edited
from cet.measure.host import require


def session_of(model: str | bytes, threads: int | None = None) -> Any:
    """A session of ONNX Runtime on the CPU.

    Raises:
        ModuleNotFoundError: where ONNX Runtime is not installed.
    """
    require("an .onnx file", ["onnxruntime"], extra="onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # its warnings tell of nodes that it takes out
    if threads is not None:
        options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OnnxModel(LoadedModel):
    """An exported ``.onnx`` file in ONNX Runtime.

    Attributes:
        session: the ``onnxruntime.InferenceSession``.
    """

    def __init__(self, session: Any, path: str) -> None:
        metadata = session.get_modelmeta().custom_metadata_map
        if KEY in metadata and tuple(output.name for output in session.get_outputs()) != OUTPUTS:
            raise ExportError(f"{path} is one stage of a model; give the folder that it is in")
        super().__init__(Description.from_json(metadata.get(KEY), path))
        self.session = session
        self._names = [given.name for given in self.description.inputs]

    def run(self, arrays: Sequence[Array], thresholds: Thresholds) -> tuple[Array, Array, Array]:
        feeds = dict(zip(self._names, arrays, strict=True))
        if thresholds is not self.description.thresholds:
            feeds[THRESHOLDS] = self._threshold_array(thresholds)
        logits, exit_index, score = self.session.run(OUTPUTS, feeds)
        return logits, exit_index, score


def load(path: str | os.PathLike[str], threads: int | None = None) -> OnnxModel:
    """Read an ``.onnx`` file that :func:`cet.export` wrote.

    Args:
        path: the file.
        threads: how many threads ONNX Runtime may use within an operator; None: as many as it likes.

    Raises:
        ExportError: where the file is damaged, of another kind or of a newer format.
        ModuleNotFoundError: where ONNX Runtime is not installed.
        OSError: where the file cannot be read.
    """
    name = os.fspath(path)
    check_is_file(path)
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size:  # what is empty cannot be mapped
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as content:
                check_unless_edited(content, name, BEFORE_SEAL)
    return OnnxModel(read_session(name, name, threads), name)


def read_session(model: str | bytes, name: str, threads: int | None = None) -> Any:
    """A session of a file, or of what is in it.

    Raises:
        ExportError: where it is damaged, naming ``name``.
        ModuleNotFoundError: where ONNX Runtime is not installed.
    """
    try:
        return session_of(model, threads)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # onnxruntime has a class of its own for each kind, none of them public
        raise ExportError(f"ONNX Runtime cannot read {name} ({reason_of(error)}); export it again") from error


def _before_seal() -> bytes:
    """What makes the seal a message of the field ``metadata_props``, which may stand anywhere in a model: two strings,
    each behind its length."""
    name = bytes([0x0A, len(SEAL)]) + SEAL.encode() + bytes([0x12, VALUE_BYTES])
    return bytes([0x72, len(name) + VALUE_BYTES]) + name


BEFORE_SEAL = _before_seal()
