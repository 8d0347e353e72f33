"""Static int8 quantisation of a model's stages by ONNX Runtime.

Weights of convolutions and matrix products have a scale per channel, activations one per tensor, as pairs of
QuantizeLinear and DequantizeLinear nodes. The last layer of each exit keeps its precision: the score of an exit tells
finer differences than eight bits hold.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from cet.deploy.description import ExportError, reason_of
from cet.deploy.loaded import Array
from cet.deploy.onnx_nodes import IR_VERSION
from cet.deploy.segments import ExportedStages
from cet.deploy.stage_samples import blaming_samples, calls_of, refuse_not_finite, refuse_nothing_to_quantise

_PRODUCTS = ("Conv", "MatMul", "Gemm")


def quantized(graph: ir.Graph, exit_logits: Sequence[ir.Value], feeds: Iterable[Mapping[str, Array]]) -> ir.Graph:
    """The graph in int8, with the same inputs and outputs.

    Args:
        graph: of float32 tensors.
        exit_logits: those of its outputs whose last layer stays as it is.
        feeds: what the graph takes, by name, from whose activations the scales are set.

    Raises:
        ExportError: where ONNX Runtime cannot quantise it, or where there is nothing to quantise.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Feeds(CalibrationDataReader):  # type: ignore[misc]
        rest = iter(feeds)

        def get_next(self) -> Mapping[str, Array] | None:
            return next(self.rest, None)

    chosen = _chosen(graph, [value.producer() for value in exit_logits])
    if not chosen:
        refuse_nothing_to_quantise(_PRODUCTS)
    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
        model = ir.Model(graph, ir_version=IR_VERSION)
        model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"  # or it warns that this was not done
        ir.save(model, plain)
        try:
            # Of constants such as -Inf, a mask's, it finds that they have no scale, and leaves them.
            with np.errstate(divide="ignore", invalid="ignore"):
                quantize_static(
                    plain,
                    small,
                    Feeds(),
                    quant_format=QuantFormat.QDQ,
                    nodes_to_quantize=chosen,
                    per_channel=True,
                    extra_options={"DedicatedQDQPair": True},  # values that several nodes share are not fused
                    activation_type=QuantType.QUInt8,  # of signed ones ONNX Runtime leaves most convolutions unfused
                    weight_type=QuantType.QInt8,
                    reduce_range=True,  # 7 bits: sums of two products of 8 overflow on x86 without VNNI
                )
        except ExportError:
            raise
        except Exception as error:
            raise ExportError(
                f"ONNX Runtime cannot quantise the stages ({reason_of(error)}); leave quantize out"
            ) from error
        return ir.load(small).graph


def _chosen(graph: ir.Graph, last: Sequence[ir.Node | None]) -> list[str]:
    """The names of the nodes to quantise: products, and what stands between convolutions, where values would else be
    turned back and forth. The residual stream of a transformer, which has outliers, stays as it is."""
    chosen, convolved = [], set[ir.Node]()
    for number, node in enumerate(graph):
        node.name = f"{node.op_type}.{number}"  # unlike those that the exits' nodes get beside them
        of_conv = any(value is not None and value.producer() in convolved for value in node.inputs)
        if node.op_type == "Conv" or (node.op_type in ("Add", "Relu") and of_conv):
            convolved.add(node)
        if node not in last and (node in convolved or node.op_type in _PRODUCTS):
            chosen.append(node.name)
    return chosen


@torch.no_grad()
def feeds_of(
    stages: ExportedStages, names: Sequence[str], batches: Iterable[Any], batch: int | None
) -> Iterator[dict[str, Array]]:
    """What the graph of all segments takes, where no row leaves.

    Args:
        stages: the segments.
        names: of the graph's inputs, in its order.
        batches: the inputs of calls.
        batch: how many rows the segments take; None for any.
    """
    for given in calls_of(stages, batches, batch):
        with blaming_samples():
            feed = dict(zip(names, _taken(stages, given), strict=True))
        yield feed


def _taken(stages: ExportedStages, inputs: Sequence[Any]) -> Iterator[Array]:
    """The tensors that each segment takes, one segment after the other."""
    sized = [inputs[index] for index in stages.sized]
    values: list[Tensor] = [inputs[index] for index in stages.entry_tensors]
    for segment in stages.segments:
        for tensor in (*sized, *values):
            yield np.ascontiguousarray(tensor.detach().cpu().numpy())
        logits, *made = segment(sized, values)
        refuse_not_finite(logits, "the model")
        sources = {"made": made, "taken": values}
        values = [sources[kind][index] for kind, index in segment.handed_on]
