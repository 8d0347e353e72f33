"""Operators of :mod:`cet.partition.opaque_ops` in ONNX, as ``torch.onnx`` takes them."""

# The types of onnxscript's operators know values that are traced, not the plain lists that they take as well.
# mypy: disable-error-code="type-var,arg-type,operator"

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset20 as op

_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}
"""The order of ONNX among PyTorch's gates."""


def _recurrent_layer(
    kind: str,
    x: Any,
    hx: Sequence[Any],
    weights: Sequence[Any],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Any]:
    """The output, then the last states."""
    directions = 2 if bidirectional else 1
    attributes: dict[str, Any] = {"direction": "bidirectional" if bidirectional else "forward"}
    if kind == "gru":
        attributes["linear_before_reset"] = 1
    elif kind == "rnn_relu":
        attributes["activations"] = ["Relu"] * directions
    layer = {"lstm": op.LSTM, "gru": op.GRU}.get(kind, op.RNN)
    per_direction = 4 if has_biases else 2
    stacked = [
        [_in_order(kind, weights[first + part]) for first in range(0, len(weights), per_direction)]
        for part in range(per_direction)
    ]
    if batch_first:
        x = op.Transpose(x, perm=[1, 0, 2])
    last_states: list[list[Any]] = [[] for _ in hx]
    for index in range(num_layers):
        here = slice(index * directions, (index + 1) * directions)
        w, r = (op.Concat(*parts[here], axis=0) for parts in stacked[:2])
        bias = None
        if has_biases:
            both = [op.Concat(*pair, axis=1) for pair in zip(stacked[2][here], stacked[3][here], strict=True)]
            bias = op.Concat(*both, axis=0)
        states = [op.Slice(state, [here.start], [here.stop], [0]) for state in hx]
        hidden = attributes | {"hidden_size": _hidden_size(weights)}
        y, *after = layer(x, w, r, bias, None, *states, **hidden)
        for collected, state in zip(last_states, after, strict=False):
            collected.append(state)
        # (T, directions, B, H) to (T, B, directions * H)
        x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1]) if bidirectional else op.Squeeze(y, [1])
    if batch_first:
        x = op.Transpose(x, perm=[1, 0, 2])
    return [x, *(op.Concat(*collected, axis=0) for collected in last_states)]


def _hidden_size(weights: Sequence[Any]) -> int:
    return int(weights[1].shape[1])


def _in_order(kind: str, weight: Any) -> Any:
    """A weight ``(gates * H, ...)`` as ``(1, gates * H, ...)``, the gates in the order of ONNX."""
    hidden = weight.shape[0] // len(_GATES[kind])
    order = [row for gate in _GATES[kind] for row in range(gate * hidden, (gate + 1) * hidden)]
    return op.Unsqueeze(op.Gather(weight, order, axis=0) if len(_GATES[kind]) > 1 else weight, [0])


def _max_pool1d(
    x: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Any:
    return op.MaxPool(
        x,
        kernel_shape=list(kernel_size),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        ceil_mode=int(ceil_mode),
    )


TRANSLATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.cet.recurrent_layer.default: _recurrent_layer,
    torch.ops.cet.max_pool1d.default: _max_pool1d,
}
