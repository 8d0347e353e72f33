"""Runs exported ``.pt2`` files, the machine code of AOTInductor, by PyTorch. The backbone's code is not needed."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cet.deploy.description import KEY, Description, ExportError, reason_of
from cet.deploy.host_loop import MethodsModel
from cet.deploy.loaded import Array, LoadedModel, Thresholds, check_is_file
from cet.deploy.manifest import Manifest
from cet.deploy.seal import check_sealed
from cet.partition.export import quiet

NESTED = "one_row"
"""The model that holds all stages of a file for one row."""


def load(path: str | os.PathLike[str], threads: int | None = None) -> LoadedModel:
    """Read a ``.pt2`` file that :func:`cet.export` wrote. It holds machine code, which reading it makes runnable: read
    only files that you trust.

    Args:
        path: the file.
        threads: how many threads PyTorch may use within an operator from now on, in all of this process; None: as
            before.

    Raises:
        ExportError: where the file is damaged, of another kind, of a newer format, or of another kind of machine.
        OSError: where the file cannot be read.
    """
    check_is_file(path)
    content = Path(path).read_bytes()
    check_sealed(content, os.fspath(path))
    return model_of(content, os.fspath(path), threads)


def model_of(content: bytes, path: str, threads: int | None = None) -> LoadedModel:
    """The model in a ``.pt2`` file, whose path is for errors."""
    archive = read(content, path, threads)
    if KEY not in archive.extra_files:
        raise ExportError(f"{path} was not written by cet.export; give a file that was")
    if NESTED in archive.aoti_runners:
        description = Description.from_json(archive.extra_files[KEY], path)
        return NestedModel(description, StageMethod(archive, NESTED, path))
    manifest = Manifest.from_json(archive.extra_files[KEY], path)
    return MethodsModel(manifest, partial(StageMethod, archive, path=path))


def read(content: bytes, path: str, threads: int | None = None) -> Any:
    """A package of AOTInductor.

    Raises:
        ExportError: where the file is damaged, naming ``path``.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with quiet():
            from torch.export.pt2_archive._package import load_pt2

            return load_pt2(io.BytesIO(content))
    except Exception as error:
        raise ExportError(
            f"PyTorch cannot read {path} ({reason_of(error)}); export it again, on such a machine"
        ) from error


class NestedModel(LoadedModel):
    """A model for one row that branches by itself, run by PyTorch."""

    def __init__(self, description: Description, method: StageMethod) -> None:
        super().__init__(description)
        self._method = method
        self._lock = threading.Lock()  # its runs share its memory

    def run(self, arrays: Sequence[Array], thresholds: Thresholds) -> tuple[Array, Array, Array]:
        with self._lock:
            logits, exit_index, score = self._method([*arrays, self._threshold_array(thresholds)])
        return logits, exit_index, score


class StageMethod:
    """A model of a package, as a function of arrays.

    Raises:
        ExportError: where it is missing.
    """

    def __init__(self, archive: Any, name: str, path: str) -> None:
        if name not in archive.aoti_runners:
            raise ExportError(f"{path} lacks the model {name!r}, which its manifest names; export it again")
        # Its caller for Python takes apart nested inputs, at more than the cost of a small stage.
        self._run = archive.aoti_runners[name].loader.boxed_run

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        outputs = self._run([torch.from_numpy(np.require(array, requirements=("C", "W"))) for array in arrays])
        return [output.numpy() for output in outputs]
