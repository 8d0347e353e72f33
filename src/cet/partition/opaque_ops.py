"""Operations that ``torch.export`` would fix to one size, recorded as one node each.

Recurrent layers are unrolled over time when traced, and 1-D max-pooling becomes a kernel whose size check names a
number. Both would tie a program to the length of its example. While a backbone is traced they are recorded as operators
of their own; the generated code then calls PyTorch's functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_LAYERS = ("gru", "lstm", "rnn_tanh", "rnn_relu")


def recurrent_layer(
    kind: str,
    x: Tensor,
    hx: list[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    """``torch.gru`` and its kind on padded sequences, without dropout: the output, then the last states."""
    state = hx if kind == "lstm" else hx[0]
    run = getattr(torch, kind)
    return list(run(x, state, weights, has_biases, num_layers, 0.0, False, bidirectional, batch_first))


def max_pool1d(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    """``torch.max_pool1d``."""
    return torch.max_pool1d(x, kernel_size, stride, padding, dilation, ceil_mode)


_recurrent_op = torch.library.custom_op("cet::recurrent_layer", recurrent_layer, mutates_args=())
_max_pool1d_op = torch.library.custom_op("cet::max_pool1d", max_pool1d, mutates_args=())


@_recurrent_op.register_fake
def _(
    kind: str,
    x: Tensor,
    hx: list[Tensor],
    weights: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
) -> list[Tensor]:
    width = hx[0].shape[-1] * (2 if bidirectional else 1)
    return [x.new_empty((x.shape[0], x.shape[1], width)), *(state.new_empty(state.shape) for state in hx)]


@_max_pool1d_op.register_fake
def _(
    x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], ceil_mode: bool
) -> Tensor:
    span = dilation[0] * (kernel_size[0] - 1)
    free = x.shape[-1] + 2 * padding[0] - span - 1
    torch._check(free >= 0)  # type: ignore[no-untyped-call]
    length = (free + stride[0] - 1 if ceil_mode else free) // stride[0] + 1
    return x.new_empty((*x.shape[:-1], length))


def under_autocast(
    device_type: str, dtype: torch.dtype, enabled: bool, cache_enabled: bool, body: Any, *values: Any
) -> Any:
    """What ``torch.export`` makes of a ``with torch.autocast(...)`` block."""
    with torch.autocast(device_type, dtype, enabled, cache_enabled):
        return body(*values)


def under_grad_mode(enabled: bool, body: Any, *values: Any) -> Any:
    """What ``torch.export`` makes of ``with torch.no_grad()`` and its like."""
    with torch.set_grad_enabled(enabled):
        return body(*values)


IMPLEMENTATIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.higher_order.wrap_with_autocast: under_autocast,
    torch.ops.higher_order.wrap_with_set_grad_enabled: under_grad_mode,
    torch.ops.cet.recurrent_layer.default: recurrent_layer,
    torch.ops.cet.max_pool1d.default: max_pool1d,
}
"""What generated code calls instead of these operators."""


class OpaqueOps(TorchFunctionMode):
    """Record the operations of this module as operators of their own."""

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _LAYERS and len(args) == 9 and not kwargs and not args[6]:
            x, hx, weights, has_biases, num_layers, _, _, bidirectional, batch_first = args
            if x.ndim == 3 and isinstance(has_biases, bool):  # the variant for packed sequences has other arguments
                states = list(hx) if name == "lstm" else [hx]
                if name != "lstm" or states[0].shape[-1] == states[1].shape[-1]:  # no projection
                    output = _recurrent_op(
                        name, x, states, list(weights), has_biases, num_layers, bidirectional, batch_first
                    )
                    return tuple(output)
        if function is F.max_pool1d or function is torch.max_pool1d:
            pooled = _pooled(*args, **kwargs)
            if pooled is not None:
                return pooled
        return function(*args, **kwargs)


def _pooled(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor | None:
    """The pooled input, or None where the call is not of the plain form. The names are those of the function."""
    if return_indices or input.ndim != 3:
        return None
    kernel = _as_list(kernel_size)
    if ceil_mode and _as_list(padding) != [0]:
        return None  # the last window may begin in the padding, and is then left out
    steps = _as_list(stride) if stride else kernel
    if ceil_mode and steps[0] > kernel[0]:
        return None
    pooled: Tensor = _max_pool1d_op(input, kernel, steps, _as_list(padding), _as_list(dilation), ceil_mode)
    return pooled


def _as_list(size: Any) -> list[int]:
    return [size] if isinstance(size, int) else list(size)
