"""Writes stages as one ``.tflite`` file with a signature for each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from cet.deploy.description import KEY, ExportError
from cet.deploy.litert_int8 import quantized
from cet.deploy.manifest import Manifest
from cet.deploy.seal import sealed
from cet.deploy.stage_modules import StageModule, write_naming_stages
from cet.deploy.stage_samples import Taken
from cet.partition.export import CUTTING, quiet

MOST_ROWS = 1
"""``litert-torch`` has no form for sizes that vary, so that the rows of a batch are answered one by one."""

_IDENTIFIER = b"TFL3"


def write(
    stages: Sequence[StageModule], manifest: Manifest | None = None, feeds: Iterable[Taken] | None = None
) -> bytes:
    """A ``.tflite`` file with one signature per stage, and the manifest among its metadata under ``cet``.

    Args:
        stages: to be converted.
        manifest: of the file.
        feeds: what each of them takes; with it they become int8.

    Raises:
        ExportError: where a stage cannot be converted or quantised, with the reason.
    """
    for stage in stages:
        lacking = {torch.float64, torch.float16, torch.bfloat16}.intersection(tensor.dtype for tensor in stage.example)
        if lacking:
            raise ExportError(f"{stage.title} takes {str(lacking.pop())[6:]}, which LiteRT lacks; export model.float()")
    content = write_naming_stages("LiteRT", stages, _converted)
    if feeds is not None:
        content = quantized(content, stages, feeds)
    return content if manifest is None else sealed(_with_metadata(content, manifest.to_json().encode()))


def _converted(stages: Sequence[StageModule]) -> bytes:
    with CUTTING, quiet(), torch.no_grad():
        from litert_torch import Converter
        from litert_torch.progress import console

        was_quiet, console.quiet = console.quiet, True
        try:
            converter = Converter()
            for stage in stages:
                converter.add_signature(stage.entry.file, stage.module, stage.example)
            return bytes(converter.convert().model_content())
        finally:
            console.quiet = was_quiet


def _with_metadata(content: bytes, value: bytes) -> bytes:
    import flatbuffers
    from ai_edge_litert.schema_py_generated import BufferT, MetadataT, Model, ModelT

    model = ModelT.InitFromObj(Model.GetRootAs(content))
    buffer, metadata = BufferT(), MetadataT()
    buffer.data = np.frombuffer(value, np.uint8)
    metadata.name, metadata.buffer = KEY, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), metadata]
    builder = flatbuffers.Builder(len(content) + len(value) + 1024)
    builder.Finish(model.Pack(builder), file_identifier=_IDENTIFIER)
    return bytes(builder.Output())
