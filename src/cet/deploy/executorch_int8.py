"""Static int8 quantisation of stages for ExecuTorch, by torchao and the quantiser of XNNPACK.

Weights of convolutions and linear layers have a scale per channel, activations one per tensor. The last layer of each
exit keeps its precision, as does all that is computed of its logits: the score of an exit tells finer differences than
eight bits hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from cet.deploy.description import ExportError, reason_of
from cet.deploy.stage_modules import StageModule
from cet.deploy.stage_samples import Taken, refuse_nothing_to_quantise
from cet.partition.export import CUTTING, quiet

_aten = torch.ops.aten
_LINEAR = {_aten.linear.default}
_CONVOLUTIONS = {
    _aten.conv1d.default,
    _aten.conv1d.padding,
    _aten.conv2d.default,
    _aten.conv2d.padding,
    _aten.conv_transpose1d.default,
    _aten.conv_transpose2d.input,
}
_RELU = {_aten.relu.default, _aten.relu_.default}
_MOVES = {
    _aten.max_pool2d.default,
    _aten.view.default,
    _aten.reshape.default,
    _aten.flatten.using_ints,
    _aten.permute.default,
    _aten.transpose.int,
    _aten.squeeze.dim,
    _aten.dropout.default,
}
_BETWEEN = {_aten.add.Tensor, _aten.add_.Tensor, *_RELU, *_MOVES}
_ANNOTATION = "quantization_annotation"


def quantized(stages: Sequence[StageModule], feeds: Iterable[Taken]) -> list[StageModule]:
    """The stages in int8, which take and return what they did.

    Args:
        stages: of float32 tensors.
        feeds: what each of them takes, from whose activations the scales are set.

    Raises:
        ExportError: where a stage cannot be quantised, with the reason, or where there is nothing to quantise.
    """
    observed = [_observed(stage) for stage in stages]
    if not any(any(_is_observer(module) for module in graph.modules()) for graph in observed):
        refuse_nothing_to_quantise(("Conv1d", "Conv2d", "ConvTranspose", "Linear"))
    with torch.no_grad(), quiet():
        for taken in feeds:
            for graph, tensors in zip(observed, taken, strict=True):
                graph(*tensors)
    return [_converted(stage, graph) for stage, graph in zip(stages, observed, strict=True)]


def _observed(stage: StageModule) -> fx.GraphModule:
    """The graph of a stage, which looks at what goes through it."""
    graph = stage.traced().module(check_guards=False)
    with _naming(stage):
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

        observed: fx.GraphModule = prepare_pt2e(graph, _quantizer())
        return observed


def _converted(stage: StageModule, graph: fx.GraphModule) -> StageModule:
    with _naming(stage):
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        graph = convert_pt2e(graph)
        _copy_for_each_user(graph)
        return replace(stage, module=_Graph(graph))


@contextmanager
def _naming(stage: StageModule) -> Iterator[None]:
    """Raise what goes wrong as an error that names the stage."""
    try:
        with CUTTING, quiet(), torch.no_grad():
            yield
    except Exception as error:
        raise ExportError(f"{stage.title} cannot be quantised ({reason_of(error)}); leave quantize out") from error


def _copy_for_each_user(graph: fx.GraphModule) -> None:
    """Turn values back into float32 for each of their users alone: where one of several takes them in another order of
    dimensions, XNNPACK's passes give it to all, what the stage returns included."""
    for node in [*graph.graph.nodes]:
        if node.target is torch.ops.quantized_decomposed.dequantize_per_tensor.default:
            for user in [*node.users][1:]:
                with graph.graph.inserting_before(user):
                    user.replace_input_with(node, graph.graph.node_copy(node))
    graph.recompile()


class _Graph(nn.Module):
    """A graph as a module whose inputs are one by one."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.stage = graph  # not named graph, as torch.export takes that for the module's own

    def forward(self, *given: Tensor) -> Any:
        return self.stage(*given)


def _is_observer(module: nn.Module) -> bool:
    from torchao.quantization.pt2e import ObserverBase

    return isinstance(module, ObserverBase)


def _quantizer() -> Any:
    """That of XNNPACK, for the chosen nodes alone."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

    class Chosen(XNNPACKQuantizer):  # type: ignore[misc]
        # Batch norm is part of convolutions by now; to trace the patterns that hold it takes ten seconds a stage.
        SUPPORTED_PATTERNS = [pattern for pattern in XNNPACKQuantizer.SUPPORTED_PATTERNS if not pattern.is_qat]  # noqa: RUF012

        def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
            return model  # or sums of indices and a number would become sums of floats

        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            chosen = _chosen(model.graph)
            for node in model.graph.nodes:
                if node.op == "call_function" and node not in chosen:  # or it would share the scale of what is before
                    node.meta[_ANNOTATION] = QuantizationAnnotation(_annotated=True)
            self.set_filter_function(lambda node: node.op != "call_function" or node in chosen)
            super().annotate(model)
            return model

    return Chosen().set_global(get_symmetric_quantization_config(is_per_channel=True))


def _chosen(graph: fx.Graph) -> set[fx.Node]:
    """The nodes to quantise: products, and what stands between convolutions, where values would else be turned back and
    forth. The residual stream of a transformer, which has outliers, stays as it is."""
    kept = _kept(graph)
    chosen, convolved = set[fx.Node](), set[fx.Node]()
    for node in graph.nodes:
        if node.op != "call_function" or node in kept:
            continue
        of_conv = any(given in convolved for given in node.all_input_nodes)
        is_number_added = node.target not in _MOVES and not all(isinstance(given, fx.Node) for given in node.args)
        if node.target in _CONVOLUTIONS or (node.target in _BETWEEN and of_conv and not is_number_added):
            convolved.add(node)
        is_fused = node.target in _RELU and node.args[0] in chosen
        if node in convolved or node.target in _LINEAR or is_fused:
            chosen.add(node)
    return chosen


def _kept(graph: fx.Graph) -> set[fx.Node]:
    """The nodes of the last layer before the logits, and all behind it."""
    outputs = graph.output_node().args[0]
    logits = outputs[0] if isinstance(outputs, tuple | list) else outputs
    assert isinstance(logits, fx.Node)
    return _reached(logits, _before) | _reached(logits, lambda node: node.users)


def _before(node: fx.Node) -> Iterable[fx.Node]:
    """What a node takes, unless it is a layer."""
    return () if node.target in _LINEAR | _CONVOLUTIONS else node.all_input_nodes


def _reached(start: fx.Node, step: Callable[[fx.Node], Iterable[fx.Node]]) -> set[fx.Node]:
    """The nodes to which steps lead, and the one that they start from."""
    reached, rest = set[fx.Node](), [start]
    while rest:
        node = rest.pop()
        if node not in reached:
            reached.add(node)
            rest += step(node)
    return reached
