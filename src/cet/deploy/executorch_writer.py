"""Writes stages as one ExecuTorch program with a method for each, lowered to XNNPACK where that has the operators."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cet.deploy.description import KEY
from cet.deploy.executorch_int8 import quantized
from cet.deploy.manifest import Manifest
from cet.deploy.seal import sealed
from cet.deploy.stage_modules import StageModule, write_naming_stages
from cet.deploy.stage_samples import Taken
from cet.partition.export import CUTTING, quiet

MOST_ROWS = 64
"""Memory is planned for so many rows; a batch with more is answered in parts."""


def write(
    stages: Sequence[StageModule], manifest: Manifest | None = None, feeds: Iterable[Taken] | None = None
) -> bytes:
    """A ``.pte`` file with one method per stage, and one named ``cet`` that returns the manifest.

    Args:
        stages: to be lowered.
        manifest: of the file.
        feeds: what each of them takes; with it they become int8.

    Raises:
        ExportError: where a stage cannot be quantised or lowered, with the reason.
    """
    if feeds is not None:
        stages = quantized(stages, feeds)
    content = write_naming_stages("ExecuTorch", stages, lambda some: _lowered(some, manifest))
    return content if manifest is None else sealed(content)


def _lowered(stages: Sequence[StageModule], manifest: Manifest | None) -> bytes:
    programs = {stage.entry.file: stage.traced() for stage in stages}
    with CUTTING, quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        constants = None if manifest is None else {KEY: manifest.to_json()}
        lowered = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()], constant_methods=constants)
        return bytes(lowered.to_executorch().buffer)
