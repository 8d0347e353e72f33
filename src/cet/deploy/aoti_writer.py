"""Writes stages as one ``.pt2`` package, compiled to machine code by AOTInductor: as a model for each, or for
one row as one model that branches."""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import package_pt2

from cet.deploy.aoti import NESTED
from cet.deploy.description import KEY, ExportError, reason_of
from cet.deploy.manifest import Manifest
from cet.deploy.nested import NestedStages
from cet.deploy.seal import SEAL_BYTES, sealed
from cet.deploy.stage_modules import StageModule, write_naming_stages
from cet.partition.export import CUTTING, quiet

MOST_ROWS = 512
"""A batch with more rows is answered in parts."""

_COMPILERS = ("g++", "clang++", "c++")


def write(stages: Sequence[StageModule], manifest: Manifest | None = None) -> bytes:
    """A ``.pt2`` package with one model per stage, and the manifest among its extra files under ``cet``; of stages for
    one row with one model for all, and the description there.

    Raises:
        ExportError: where there is no C++ compiler, or a stage cannot be compiled, with the reason.
    """
    if not any(map(shutil.which, _COMPILERS)):
        raise ExportError(f"AOTInductor compiles C++, and there is no {' or '.join(_COMPILERS)}; install one")
    if manifest is not None and manifest.most_rows is None:
        try:
            nested = NestedStages(stages, manifest.description)
            return _package({NESTED: (nested.traced(), nested.example)}, manifest.description.to_json())
        except Exception as error:
            warnings.warn(
                f"the exits of this model have no form as branches ({reason_of(error)}); the file has a model per "
                "stage and needs a loop on the host",
                stacklevel=5,  # who called cet.export
            )
    described = None if manifest is None else manifest.to_json()
    return write_naming_stages(
        "AOTInductor",
        stages,
        lambda some: _package({stage.entry.file: (stage.traced(), stage.example) for stage in some}, described),
    )


def _package(models: Mapping[str, tuple[ExportedProgram, tuple[Tensor, ...]]], described: str | None) -> bytes:
    package = io.BytesIO()
    with CUTTING, quiet(), torch.no_grad():
        from torch._inductor import aot_compile
        from torch._inductor import config as inductor

        # With weights in the machine code, laid out for it, and as many threads as the process has.
        options = {"aot_inductor.package": True, "freezing": True, "cpp.dynamic_threads": True}
        if hasattr(inductor.aot_inductor, "enable_line_tables"):  # for profilers, at two megabytes a file
            options["aot_inductor.enable_line_tables"] = False
        files: dict[str, list[Any]] = {
            name: list(aot_compile(graph.module(), example, options=options))  # type: ignore[arg-type]
            for name, (graph, example) in models.items()
        }
        package_pt2(package, aoti_files=files, extra_files=None if described is None else {KEY: described})
    content = package.getvalue()
    assert described is None or content.endswith(b"\0\0")  # the length of the archive's comment, which comes last
    return content if described is None else sealed(content[:-2] + SEAL_BYTES.to_bytes(2, "little"))
