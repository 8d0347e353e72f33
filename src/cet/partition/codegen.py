"""Python source for one stage of an exported graph.

A stage runs as one flat Python function: no module tree, no interpreter, no dictionary of values. Weights are read from
the ``_parameters`` and ``_buffers`` of the backbone's own submodules at each call, so that a weight that was replaced,
moved or cast is the one that is used. ATen operators are called through PyTorch's Python bindings where one with the
same signature exists: these cost a fraction of a microsecond, a call through ``torch.ops`` costs two or three.
"""

from __future__ import annotations

import linecache
import math
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from cet.partition.opaque_ops import IMPLEMENTATIONS

# Operators whose Python binding takes the operator's own arguments in the same order.
_IN_TORCH = (
    "abs add addmm adaptive_avg_pool1d argmax avg_pool1d baddbmm batch_norm bmm cat clamp clone conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d cos cumsum div eq erf exp flatten ge group_norm gru gt "
    "index_select layer_norm le log log_softmax lstm lt masked_fill matmul max_pool1d max_pool2d max_pool3d mean mul "
    "ne neg permute pow reciprocal relu relu_ reshape rsqrt select sigmoid sigmoid_ sin softmax split sqrt squeeze "
    "stack sub sum tanh tanh_ transpose unsqueeze where"
)
_IN_NN = (
    "adaptive_avg_pool2d adaptive_avg_pool3d avg_pool2d avg_pool3d elu gelu hardsigmoid hardswish hardtanh hardtanh_ "
    "leaky_relu leaky_relu_ linear scaled_dot_product_attention silu silu_ softplus"
)
_IN_TENSOR = "add_ contiguous expand mul_ sub_ view"

BINDINGS: dict[str, Callable[..., Any]] = {
    name: getattr(owner, name)
    for owner, names in ((torch, _IN_TORCH), (torch._C._nn, _IN_NN), (torch.Tensor, _IN_TENSOR))
    for name in names.split()
}


class StageWriter:
    """Collects the lines and the globals of one stage function.

    Args:
        name: name of the function, also the file name in tracebacks.
        expressions: for values that are not local variables (weights and sizes), the source that yields them.
        namespace: the globals that these expressions refer to.
    """

    def __init__(self, name: str, expressions: dict[fx.Node, str], namespace: dict[str, Any]) -> None:
        self.name = name
        self._expressions = expressions
        self._globals = {**namespace, "math": math}
        self._names: dict[int, str] = {}
        self._lines: list[str] = []

    def call(self, node: fx.Node) -> None:
        """Append the call that computes ``node``."""
        if node.target is operator.getitem:
            container, index = node.args
            self._lines.append(f"{node.name} = {self._format(container)}[{self._format(index)}]")
            return
        arguments = [self._format(a) for a in node.args]
        arguments += [f"{key}={self._format(value)}" for key, value in node.kwargs.items()]
        self._lines.append(f"{node.name} = {self._callee(node)}({', '.join(arguments)})")

    def forget(self, nodes: Sequence[fx.Node]) -> None:
        """Drop local variables, so that their memory is free for what follows."""
        if nodes:
            self._lines.append("del " + ", ".join(node.name for node in nodes))

    def compile(self, parameters: Sequence[str], result: Any) -> tuple[Callable[..., Any], str]:
        """The function with these parameters that returns ``result``, and its source."""
        body = [*self._lines, f"return {self._format(result)}"]
        source = f"def {self.name}({', '.join(parameters)}):\n" + "".join(f"    {line}\n" for line in body)
        filename = f"<cet {self.name} {id(self):x}>"
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        exec(compile(source, filename, "exec"), self._globals)
        function = self._globals[self.name]
        weakref.finalize(function, linecache.cache.pop, filename, None)
        return function, source

    def _callee(self, node: fx.Node) -> str:
        target = node.target
        function: Any = target
        if target in IMPLEMENTATIONS:
            function = IMPLEMENTATIONS[target]
            name = function.__name__
        elif isinstance(target, torch._ops.OpOverload):
            packet = target._schema.name.removeprefix("aten::")
            name = packet
            if target.namespace == "aten" and "out" not in target._overloadname:
                function = BINDINGS.get(packet, target)
        else:
            name = getattr(target, "__name__", "function")
        return self._global(function, name if name.isidentifier() else "function")

    def _global(self, value: Any, name: str) -> str:
        key = id(value)
        if key not in self._names:
            unique = f"{name.upper()}_{len(self._names)}"
            self._names[key] = unique
            self._globals[unique] = value
        return self._names[key]

    def _format(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._expressions.get(value, value.name)
        if isinstance(value, (tuple, list)):
            return "(" + "".join(f"{self._format(v)}, " for v in value) + ")"  # of constants, a constant itself
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key!r}: {self._format(v)}" for key, v in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self._format(value.start)}, {self._format(value.stop)}, {self._format(value.step)})"
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        return self._global(value, type(value).__name__)
