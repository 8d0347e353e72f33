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
        ValueError: for an unknown format or suffix, and where they contradict each other.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str) or "\0" in os.fspath(path):
        raise TypeError(f"path is {path!r}; give the name of a file, as a string or pathlib.Path")
    known = ", ".join(f"{name!r} ({suffix})" for suffix, name in FORMATS.items())
    suffix = Path(path).suffix
    if wanted is None:
        if suffix not in FORMATS:
            raise ValueError(f"{os.fspath(path)} ends in {suffix!r}, which is no known format; choose of {known}")
        return FORMATS[suffix]
    if wanted not in FORMATS.values():
        raise ValueError(f"format {wanted!r} is unknown; choose of {known}")
    if FORMATS.get(suffix, wanted) != wanted:
        raise ValueError(f"{os.fspath(path)} ends in {suffix!r}, which is not {wanted!r}; choose of {known}")
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
        TypeError, ValueError: for what is no path, an unknown format, and for no number of threads.
        ModuleNotFoundError: where its runtime is not installed.
        OSError: where it cannot be read.
    """
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads is {threads!r}; give a whole number from 1 on, or None for the runtime's own choice")
    reader = import_module(f"cet.deploy.{format_of(path, format).replace('-', '_')}")
    loaded: LoadedModel = reader.load(path, threads)
    return loaded
