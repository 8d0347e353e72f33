"""`cet.load_exported`: an exported file, by whichever runtime it is for. Nothing here imports torch."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from cet.deploy.loaded import LoadedModel

FORMATS = {
    ".onnx": "onnx",
    ".stages": "stages",
    ".pt2": "aoti",
    ".pte": "executorch",
    ".tflite": "litert",
    ".tflm": "tflite-micro",
}
"""The formats by the suffix of a file or folder."""


def format_of(path: str | os.PathLike[str], wanted: str | None = None) -> str:
    """The format of a file: the one that is wanted, or that of its suffix.

    Raises:
        ValueError: for an unknown format or suffix.
    """
    known = ", ".join(f"{name!r} ({suffix})" for suffix, name in FORMATS.items())
    if wanted is None:
        suffix = Path(path).suffix
        if suffix not in FORMATS:
            raise ValueError(f"{os.fspath(path)} ends in {suffix!r}, which is no known format; choose of {known}")
        return FORMATS[suffix]
    if wanted not in FORMATS.values():
        raise ValueError(f"format {wanted!r} is unknown; choose of {known}")
    return wanted


def load_exported(
    path: str | os.PathLike[str], *, format: str | None = None, threads: int | None = None
) -> LoadedModel:
    """Read a file that :func:`cet.export` wrote; the backbone's code is not needed, nor, but for ``.pt2`` and
    ``.pte``, torch.

    Args:
        path: the file, or the folder of stages.
        format: of the file, where its suffix does not tell.
        threads: how many threads the runtime may use within an operator; None: its own choice.

    Returns:
        A model whose ``predict`` takes what the exported model's took, as NumPy arrays or tensors.

    Raises:
        ExportError: where the file is damaged, of another kind or of a newer format.
        ModuleNotFoundError: where its runtime is not installed.
        OSError: where it cannot be read.
    """
    reader = import_module(f"cet.deploy.{format_of(path, format).replace('-', '_')}")
    loaded: LoadedModel = reader.load(path, threads)
    return loaded
