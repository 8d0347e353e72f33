"""Writes stages as one ``.pt2`` package with a model for each, compiled to machine code by AOTInductor."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch.export.pt2_archive._package import package_pt2

from cet.deploy.description import KEY, ExportError
from cet.deploy.manifest import Manifest
from cet.deploy.stage_modules import StageModule, write_naming_stages
from cet.partition.export import CUTTING, quiet

MOST_ROWS = 512
"""A batch with more rows is answered in parts."""

_COMPILERS = ("g++", "clang++", "c++")


def write(stages: Sequence[StageModule], manifest: Manifest | None = None) -> bytes:
    """A ``.pt2`` package with one model per stage, and the manifest among its extra files under ``cet``.

    Raises:
        ExportError: where there is no C++ compiler, or a stage cannot be compiled, with the reason.
    """
    if not any(map(shutil.which, _COMPILERS)):
        raise ExportError(f"AOTInductor compiles C++, and there is no {' or '.join(_COMPILERS)}; install one")
    return write_naming_stages("AOTInductor", stages, lambda some: _package(some, manifest))


def _package(stages: Sequence[StageModule], manifest: Manifest | None) -> bytes:
    package = io.BytesIO()
    with CUTTING, quiet(), torch.no_grad():
        from torch._inductor import aot_compile

        # With weights in the machine code, laid out for it, and as many threads as the process has.
        options = {"aot_inductor.package": True, "freezing": True, "cpp.dynamic_threads": True}
        files: dict[str, list[Any]] = {
            stage.entry.file: list(aot_compile(stage.traced().module(), stage.example, options=options))  # type: ignore[arg-type]
            for stage in stages
        }
        package_pt2(package, aoti_files=files, extra_files=None if manifest is None else {KEY: manifest.to_json()})
    return package.getvalue()
