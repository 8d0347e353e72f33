"""Writes stages as a folder for TFLite Micro: a ``.tflite`` file for each, and C sources that hold them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cet.deploy import litert_writer
from cet.deploy.arena import MOST_ARENA, arena_of
from cet.deploy.c_source import Held, c_files
from cet.deploy.description import ExportError
from cet.deploy.manifest import Manifest
from cet.deploy.stage_modules import StageModule
from cet.deploy.stages import with_manifest
from cet.deploy.tflite_micro import IDENTIFIER

MOST_ROWS = litert_writer.MOST_ROWS
_DTYPES = {0: "float32", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8"}
"""Those that tensors of TFLite Micro may have, by their number in the file."""


def write(stages: Sequence[StageModule], manifest: Manifest | None = None) -> dict[str, bytes]:
    """The files of the folder by name; without a manifest the models of the stages alone, by their names.

    Raises:
        ExportError: where TFLite Micro cannot run a stage, with the stage, the operator and the reason.
    """
    models = {stage.entry.file: _for_micro(litert_writer.write([stage])) for stage in stages}
    arenas = {stage.entry.file: arena_of(models[stage.entry.file], stage.title, MOST_ARENA) for stage in stages}
    if manifest is None:
        return models
    entries = [replace(entry, file=f"{entry.file}.tflite", arena_bytes=arenas[entry.file]) for entry in manifest.stages]
    contents = dict(zip([entry.file for entry in entries], models.values(), strict=True))
    held: dict[str, Held] = {}
    for stage, entry in zip(stages, entries, strict=True):
        taken, (logits, _, *made) = _tensors(contents[entry.file], stage.title)
        if logits.dtype != "float32":
            raise ExportError(f"the logits of {stage.title} are {logits.dtype}, not float32; export model.float()")
        held |= zip((*entry.inputs, *entry.outputs), (*taken, *made), strict=True)
    folder = with_manifest(manifest.description, [(e, contents[e.file]) for e in entries], manifest.most_rows)
    return {**folder, **c_files(manifest.description, entries, contents, held)}


def _tensors(content: bytes, title: str) -> tuple[list[Held], list[Held]]:
    """What the model in a file takes and makes.

    Raises:
        ExportError: for tensors of types that NumPy or C lack.
    """
    from ai_edge_litert.schema_py_generated import Model

    graph = Model.GetRootAs(content).Subgraphs(0)
    tensors = [graph.Tensors(index) for index in (*graph.InputsAsNumpy(), *graph.OutputsAsNumpy())]
    if not {tensor.Type() for tensor in tensors} <= _DTYPES.keys():
        known = ", ".join(_DTYPES.values())
        raise ExportError(f"{title} takes or makes a tensor that is none of {known}; export model.float()")
    held = [
        Held(_DTYPES[tensor.Type()], tuple(tensor.Shape(i) for i in range(tensor.ShapeLength()))) for tensor in tensors
    ]
    return held[: graph.InputsLength()], held[graph.InputsLength() :]


def _for_micro(content: bytes) -> bytes:
    """A ``.tflite`` file without names, whose inputs and outputs are in the order of its signature.

    A firmware knows tensors by their order alone. Constants lie at multiples of 16 bytes, as kernels read them in
    place. Of the two operators that select, TFLite Micro has the one that broadcasts.
    """
    from ai_edge_litert.schema_py_generated import BuiltinOperator, Model, ModelT

    model = ModelT.InitFromObj(Model.GetRootAs(content))
    [signature], graph = model.signatureDefs, model.subgraphs[0]
    graph.inputs, graph.outputs = _in_order(signature.inputs), _in_order(signature.outputs)
    model.signatureDefs, model.metadata, model.description = [], [], None
    for index, code in enumerate(model.operatorCodes):
        if code.builtinCode == BuiltinOperator.SELECT and _are_alike(model, index):
            code.builtinCode = code.deprecatedBuiltinCode = BuiltinOperator.SELECT_V2
    for each in model.subgraphs:
        each.name = None
        for tensor in each.tensors:
            tensor.name = None
    builder = _aligned_builder(len(content) + 1024)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def _in_order(tensors: Sequence[Any]) -> list[int]:
    """The tensors of a signature, ``args_0``, ``args_1``, ... or ``output_0``, ..., by that number."""
    return [tensor.tensorIndex for tensor in sorted(tensors, key=lambda tensor: int(tensor.name.rpartition(b"_")[2]))]


def _are_alike(model: Any, code: int) -> bool:
    """Whether all operators with this code have inputs of one shape."""
    return all(
        len({tuple(graph.tensors[tensor].shape) for tensor in operator.inputs}) == 1
        for graph in model.subgraphs
        for operator in graph.operators
        if operator.opcodeIndex == code
    )


def _aligned_builder(size: int) -> Any:
    """Lets vectors of bytes begin at multiples of 16."""
    import flatbuffers

    class Aligned(flatbuffers.Builder):  # type: ignore[misc]
        def StartVector(self, elemSize: int, numElems: int, alignment: int) -> Any:  # noqa: N802, N803
            return super().StartVector(elemSize, numElems, max(alignment, 16) if elemSize == 1 else alignment)

    return Aligned(size)
