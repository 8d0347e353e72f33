"""Static int8 quantisation of the stages in a ``.tflite`` file, by ``ai-edge-quantizer``.

Weights of convolutions and linear layers have a scale per channel, activations one per tensor. The last layer of each
exit keeps its precision, as does all that is computed of its logits: the score of an exit tells finer differences than
eight bits hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from cet.deploy.description import ExportError, reason_of
from cet.deploy.stage_modules import StageModule
from cet.deploy.stage_samples import Taken, refuse_nothing_to_quantise
from cet.partition.export import quiet

_CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")
_PRODUCTS = (*_CONVOLUTIONS, "FULLY_CONNECTED")
_MOVES = ("RESHAPE", "TRANSPOSE", "PAD")
_BETWEEN = ("ADD", "RELU", "MAX_POOL_2D", *_MOVES)
_QUANTISERS_NAMES = {"TRANSPOSE_CONV": "CONV_2D_TRANSPOSE"}


def quantized(content: bytes, stages: Sequence[StageModule], feeds: Iterable[Taken]) -> bytes:
    """The file in int8, whose signatures take and return what they did.

    Args:
        content: of float32 tensors.
        stages: that it holds, a signature each.
        feeds: what each of them takes, from whose activations the scales are set.

    Raises:
        ExportError: where a stage cannot be quantised, with the reason, or where there is nothing to quantise.
    """
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(content)
    _name_tensors(model)
    content = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    subgraphs = {bytes(signature.signatureKey).decode(): signature.subgraphIndex for signature in model.signatureDefs}
    chosen = {stage.entry.file: _chosen(model, subgraphs[stage.entry.file]) for stage in stages}
    if not any(chosen.values()):
        refuse_nothing_to_quantise(_PRODUCTS)
    scales = _scales(content, stages, feeds, _recipe([pair for pairs in chosen.values() for pair in pairs]))
    try:
        return _written(content, [pair for pairs in chosen.values() for pair in pairs], scales)
    except Exception as together:
        what, error = "the model", together
        for stage in stages if len(stages) > 1 else ():
            try:
                _written(content, chosen[stage.entry.file], scales)
            except Exception as alone:
                what, error = stage.title, alone
                break
        raise ExportError(f"{what} cannot be quantised ({reason_of(error)}); leave quantize out") from error


def _name_tensors(model: Any) -> None:
    """Give each tensor a name of its own, as the quantiser knows them by their names."""
    for at, subgraph in enumerate(model.subgraphs):
        for index, tensor in enumerate(subgraph.tensors):
            tensor.name = f"{at}/{index}".encode()


def _scales(content: bytes, stages: Sequence[StageModule], feeds: Iterable[Taken], recipe: Any) -> Any:
    """The least and the largest value of each tensor."""
    from ai_edge_quantizer.calibrator import Calibrator
    from ai_edge_quantizer.utils.qsv_utils import min_max_update

    with quiet():
        calibrator = Calibrator(content, num_threads=1, qsv_update_func=min_max_update)
        for taken in feeds:
            given = {
                stage.entry.file: [{f"args_{index}": _as_array(tensor) for index, tensor in enumerate(tensors)}]
                for stage, tensors in zip(stages, taken, strict=True)
            }
            calibrator.calibrate(given, recipe)
    return calibrator.get_model_qsvs()


def _as_array(tensor: Any) -> Any:
    array = tensor.numpy()
    return array.astype("int32") if array.dtype == "int64" else array


def _recipe(chosen: Sequence[tuple[str, str]]) -> Any:
    from ai_edge_quantizer.qtyping import TFLOperationName
    from ai_edge_quantizer.recipe_manager import RecipeManager

    recipe = RecipeManager()
    for kind in sorted({kind for kind, _ in chosen}):
        names = "|".join(re.escape(name) for its, name in chosen if its == kind)
        operation = TFLOperationName(_QUANTISERS_NAMES.get(kind, kind))
        recipe.add_static_config(f"^({names});?$", operation, activation_num_bits=8, weight_num_bits=8)
    return recipe


def _written(content: bytes, chosen: Sequence[tuple[str, str]], scales: Any) -> bytes:
    from ai_edge_quantizer.quantizer import Quantizer

    with quiet():
        quantizer = Quantizer(content, _recipe(chosen).get_quantization_recipe())
        result = quantizer.quantize(scales, enable_progress_bar=False, enable_progress_report=False)
    return _with_outputs_of(content, bytes(result.quantized_model))


def _with_outputs_of(plain: bytes, small: bytes) -> bytes:
    """The quantised file, whose signatures return what its subgraphs do: where other operators read an output too, the
    quantiser leaves them with the tensor before it became float32 again."""
    from ai_edge_litert.tools import flatbuffer_utils

    before, model = map(flatbuffer_utils.read_model_from_bytearray, (plain, small))
    for was, signature in zip(before.signatureDefs, model.signatureDefs, strict=True):
        places = [*before.subgraphs[was.subgraphIndex].outputs]
        outputs = model.subgraphs[signature.subgraphIndex].outputs
        for old, new in zip(was.outputs, signature.outputs, strict=True):
            new.tensorIndex = outputs[places.index(old.tensorIndex)]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _chosen(model: Any, subgraph: int) -> list[tuple[str, str]]:
    """The operators to quantise in a stage, each with the name of what it makes: products, and what stands between
    convolutions, where values would else be turned back and forth. The residual stream of a transformer, which has
    outliers, stays as it is."""
    graph, (logits, *_) = model.subgraphs[subgraph], _outputs(model, subgraph)
    kinds = [_kind(model, op) for op in graph.operators]
    kept = _kept(graph.operators, kinds, logits)
    chosen, convolved = set[int](), set[int]()
    for at, (op, kind) in enumerate(zip(graph.operators, kinds, strict=True)):
        if at not in kept and (kind in _CONVOLUTIONS or (kind in _BETWEEN and not convolved.isdisjoint(op.inputs))):
            convolved |= {*op.outputs}
            chosen.add(at)
        elif at not in kept and kind in _PRODUCTS:
            chosen.add(at)
    users = _users(graph.operators)
    for at, op in reversed([*enumerate(graph.operators)]):  # what goes into convolutions alone is moved as int8 already
        after = {user for tensor in op.outputs for user in users.get(tensor, ())}
        into_conv = any(kinds[user] in (*_CONVOLUTIONS, *_MOVES) for user in after)
        if kinds[at] in _MOVES and at not in kept and into_conv and after <= chosen:
            chosen.add(at)
    return [(kinds[at], graph.tensors[graph.operators[at].outputs[0]].name.decode()) for at in sorted(chosen)]


def _kept(operators: Sequence[Any], kinds: Sequence[str], logits: int) -> set[int]:
    """The operators of the last layer before the logits, and all behind it."""
    makers = {tensor: at for at, op in enumerate(operators) for tensor in op.outputs}
    users = _users(operators)
    kept, before = set[int](), [logits]
    while before:
        at = makers.get(before.pop())
        if at is not None and at not in kept:
            kept.add(at)
            before += () if kinds[at] in _PRODUCTS else operators[at].inputs
    behind = [logits]
    while behind:
        found = {user for user in users.get(behind.pop(), ()) if user not in kept}
        kept |= found
        behind += [tensor for user in found for tensor in operators[user].outputs]
    return kept


def _users(operators: Sequence[Any]) -> dict[int, list[int]]:
    users: dict[int, list[int]] = {}
    for at, op in enumerate(operators):
        for tensor in op.inputs:
            users.setdefault(tensor, []).append(at)
    return users


def _outputs(model: Any, subgraph: int) -> list[int]:
    """The tensors that a stage returns, the logits first."""
    (signature,) = (signature for signature in model.signatureDefs if signature.subgraphIndex == subgraph)
    found = {bytes(output.name).decode(): output.tensorIndex for output in signature.outputs}
    return [found[f"output_{index}"] for index in range(len(found))]


def _kind(model: Any, op: Any) -> str:
    from ai_edge_litert.tools import flatbuffer_utils

    return str(flatbuffer_utils.opcode_to_name(model, op.opcodeIndex))
