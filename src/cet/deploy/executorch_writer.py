"""Writes stages as one ExecuTorch program with a method for each, lowered to XNNPACK where that has the operators."""

from __future__ import annotations

from collections.abc import Sequence

from torch.export import ExportedProgram

from cet.deploy.description import KEY, ExportError
from cet.deploy.manifest import Manifest
from cet.deploy.stage_modules import StageModule
from cet.partition.export import CUTTING, quiet

MOST_ROWS = 64
"""Memory is planned for so many rows; a batch with more is answered in parts."""


def write(stages: Sequence[StageModule], manifest: Manifest | None = None) -> bytes:
    """A ``.pte`` file with one method per stage, and one named ``cet`` that returns the manifest.

    Raises:
        ExportError: where a stage cannot be lowered, with the reason.
    """
    programs = {stage.entry.file: stage.traced() for stage in stages}
    try:
        return _lowered(programs, manifest)
    except Exception as together:
        for name, program in programs.items():
            try:
                _lowered({name: program}, None)
            except Exception as error:
                raise _refusal(name, error) from error
        raise _refusal("all stages together", together) from together


def _lowered(programs: dict[str, ExportedProgram], manifest: Manifest | None) -> bytes:
    with CUTTING, quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        constants = None if manifest is None else {KEY: manifest.to_json()}
        lowered = to_edge_transform_and_lower(programs, partitioner=[XnnpackPartitioner()], constant_methods=constants)
        return bytes(lowered.to_executorch().buffer)


def _refusal(name: str, error: Exception) -> ExportError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return ExportError(f"{name} has no form in ExecuTorch ({reason}); compute it with operators that ExecuTorch has")
