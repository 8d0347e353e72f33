"""Runs exported ``.onnx`` files by ONNX Runtime. Nothing here imports torch."""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from cet.deploy.description import KEY, OUTPUTS, THRESHOLDS, Description, ExportError, reason_of
from cet.deploy.loaded import Array, LoadedModel, Thresholds, check_is_file
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
        _check_seal(file.fileno(), name)
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


SEAL = "cet.sha256"
"""The last of a file's metadata: how many bytes come before it, and their hash."""

_DIGITS = 12


def sealed(content: bytes) -> bytes:
    """A file with its seal, since ONNX Runtime takes flipped bytes among the weights for weights."""
    return content + _seal(content)


def _seal(content: bytes | memoryview) -> bytes:
    """A message of the field ``metadata_props``, which may stand anywhere in a model, its length and two strings."""
    value = f"{len(content):0{_DIGITS}}:{sha256(content).hexdigest()}"
    pair = b"".join(bytes([tag, len(text)]) + text.encode() for tag, text in ((0x0A, SEAL), (0x12, value)))
    return bytes([0x72, len(pair)]) + pair


_SEAL_BYTES = len(_seal(b""))
_VALUE_BYTES = len(f"{0:0{_DIGITS}}:{sha256().hexdigest()}")


def _check_seal(file: int, name: str) -> None:
    """Refuse a sealed file whose bytes have changed while their number has not: a tool that edits models changes that
    too, or writes its own metadata behind.

    Raises:
        ExportError: then.
    """
    size = os.fstat(file).st_size - _SEAL_BYTES
    if size < 0:
        return
    with mmap.mmap(file, 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as content:
        found = bytes(content[size:])
        expected = _seal(b"")[:-_VALUE_BYTES] + f"{size:0{_DIGITS}}:".encode()
        if not found.startswith(expected):
            return
        with content[:size] as body:
            if _seal(body) != found:
                raise ExportError(
                    f"{name} is damaged: its bytes are not those that were written; export it again, or remove its "
                    f"metadata {SEAL!r} where it was edited on purpose"
                )
