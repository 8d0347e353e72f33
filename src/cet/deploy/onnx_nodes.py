"""Nodes of an ONNX graph, block by block: a graph, or a branch of an ``If`` within it."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from itertools import chain, count
from typing import Any

import numpy as np
import onnx_ir as ir

Value = ir.Value

IR_VERSION = 10
"""Of the files."""

_DTYPES = {
    "ArgMax": ir.DataType.INT64,
    "Equal": ir.DataType.BOOL,
    "GreaterOrEqual": ir.DataType.BOOL,
    "LessOrEqual": ir.DataType.BOOL,
    "NonZero": ir.DataType.INT64,
    "Size": ir.DataType.INT64,
    "If": None,
    "ConstantOfShape": None,
}
"""What these operators return; others return what their first input is, Where what its second is, or what they cast
to."""


class Weights:
    """The initialisers of a model, each held once, whatever it is called in the graphs that it comes from."""

    def __init__(self) -> None:
        self._of: dict[tuple[Any, ...], Value] = {}
        self._names: set[str] = set()

    @property
    def values(self) -> list[Value]:
        """All of them."""
        return list(self._of.values())

    def of(self, tensor: ir.TensorProtocol, name: str) -> Value:
        """The initialiser that holds such a tensor."""
        shape = [int(size) for size in tensor.shape]  # type: ignore[arg-type]
        key = (tensor.dtype, tuple(shape), sha256(tensor.tobytes()).digest())
        if key not in self._of:
            self._of[key] = self._named(tensor, shape, name)
        return self._of[key]

    def copy(self, value: Value) -> Value:
        """An initialiser of its own with the same numbers."""
        assert value.const_value is not None
        tensor = ir.tensor(value.const_value.numpy(), dtype=value.const_value.dtype)
        copied = self._named(tensor, [int(size) for size in tensor.shape], str(value.name))  # type: ignore[arg-type]
        self._of[(copied.name,)] = copied
        return copied

    def _named(self, tensor: ir.TensorProtocol, shape: Sequence[int], name: str) -> Value:
        unique = next(n for n in chain([name], (f"{name}_{i}" for i in count(1))) if n not in self._names)
        self._names.add(unique)
        tensor.name = unique
        return ir.Value(name=unique, shape=ir.Shape(shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


class Block:
    """Collects the nodes of a graph or branch.

    Args:
        weights: of the whole model.
        prefix: of the names of the values.
    """

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.weights = weights
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def op(self, kind: str, *inputs: Value, **attributes: Any) -> Value:
        """Append a node with one output."""
        (output,) = self.ops(kind, *inputs, outputs=1, **attributes)
        return output

    def ops(self, kind: str, *inputs: Value, outputs: int, **attributes: Any) -> tuple[Value, ...]:
        """Append a node with several outputs."""
        where = f"{self.prefix}{kind}_{len(self.nodes)}"
        dtype = _DTYPES.get(kind, inputs[kind == "Where"].dtype)
        type_ = None if dtype is None else ir.TensorType(attributes.get("to", dtype))
        values = [ir.Value(name=f"{where}_{index}" if outputs > 1 else where, type=type_) for index in range(outputs)]
        self.nodes.append(ir.node(kind, inputs, attributes, outputs=values, name=where))
        return tuple(values)

    def cast(self, value: Value, dtype: str) -> Value:
        """The value in this dtype."""
        wanted = ir.DataType.from_numpy(np.dtype(dtype))
        return value if value.dtype is wanted else self.op("Cast", value, to=wanted)

    def number(self, value: float) -> Value:
        """A float32 scalar."""
        return self.constant(np.float32(value))

    def integers(self, *values: int) -> Value:
        """An int64 vector."""
        return self.constant(np.array(values, np.int64))

    def constant(self, array: Any) -> Value:
        """An initialiser."""
        return self.weights.of(ir.tensor(np.asarray(array)), "constant")

    def take(self, nodes: Sequence[ir.Node]) -> None:
        """Append nodes of another graph."""
        for node in nodes:
            node.name = f"{self.prefix}{node.name}"
            node.doc_string = None
            node.metadata_props.clear()
            for output in node.outputs:
                output.name = f"{self.prefix}{output.name}"
                output.shape = None  # in symbols of its graph: a tool would take those of the same name for one size
                output.metadata_props.clear()
        self.nodes += nodes
