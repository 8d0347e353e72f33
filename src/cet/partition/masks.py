"""Takes masks out of an exported graph that let every key through, whatever the sizes and the inputs.

Models of ``transformers`` leave such a mask out where they run as they are, but compute it while they are exported.
Attention is slower with one: a ViT in float32 took three times as long on an H200, where no fused kernel took the mask.

What is known of a tensor is between which two numbers all its elements lie, where True is 1. It follows from the
operations of the graph alone, never from the values of the example.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from cet.partition.graph import views, writes
from cet.partition.sizes import expression_of

_SDPA = torch.ops.aten.scaled_dot_product_attention.default

_FAR = 2**31
"""Positions and what is added to them stay below this, so that nothing wraps around in int64."""
_EXACT = 127
"""Each of these dtypes but bool holds all integers up to this one."""
_DTYPES = {
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.bfloat16, torch.float16, torch.float32, torch.float64),
}


class _Bounds(NamedTuple):
    """The least and the greatest number that an element may be."""

    low: float
    high: float


_TRUE, _FALSE, _EITHER = _Bounds(1, 1), _Bounds(0, 0), _Bounds(0, 1)

# By the names of operators. Each element of the result is an element of the first argument, perhaps of another dtype.
_SAME_ELEMENTS = {
    "_to_copy",
    "alias",
    "clone",
    "contiguous",
    "detach",
    "expand",
    "expand_as",
    "flatten",
    "narrow",
    "permute",
    "repeat",
    "reshape",
    "select",
    "slice",
    "squeeze",
    "t",
    "to",
    "transpose",
    "type_as",
    "unflatten",
    "unsqueeze",
    "view",
    "view_as",
}
_FILLED_WITH: dict[str, float | int] = {  # a number, or the position of the argument that is the number
    "ones": 1.0,
    "ones_like": 1.0,
    "new_ones": 1.0,
    "zeros": 0.0,
    "zeros_like": 0.0,
    "new_zeros": 0.0,
    "full": 1,
    "full_like": 1,
    "new_full": 2,
    "scalar_tensor": 0,
}
_COMPARISONS = {"eq", "ge", "gt", "le", "lt", "ne"}
_ARITHMETIC = {"add", "mul", "rsub", "sub"}
_AND = {"__and__", "bitwise_and", "logical_and"}
_OR = {"__or__", "bitwise_or", "logical_or"}
_NOT = {"bitwise_not", "logical_not"}


def drop_open_masks(graph: fx.Graph) -> None:
    """Let attention run without a mask that is True everywhere, or adds zero everywhere.

    What only computed such a mask stays in the graph, unused.
    """
    written = _written(graph)
    known: dict[fx.Node, _Bounds] = {}
    for node in list(graph.nodes):
        name = _name(node)
        bounds = _bounds(name, node, known) if name else None
        if bounds is not None and node not in written:
            known[node] = bounds
        elif name in _AND:
            _drop_true_operand(node, known, written)
        elif node.target is _SDPA:
            _drop_open_mask(node, known)


def _drop_open_mask(node: fx.Node, known: Mapping[fx.Node, _Bounds]) -> None:
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if not isinstance(mask, fx.Node) or mask not in known:
        return
    if known[mask] != (_TRUE if _dtype(mask) is torch.bool else _FALSE):
        return
    if len(node.args) > 3:  # the result has the shape that it had, as PyTorch refuses masks that enlarge it
        node.update_arg(3, None)
    else:
        node.update_kwarg("attn_mask", None)


def _drop_true_operand(node: fx.Node, known: Mapping[fx.Node, _Bounds], written: set[fx.Node]) -> None:
    """In place of ``mask & True`` use the mask itself.

    Only where that is a tensor of the same shape, nobody writes to either, and no user minds how it lies in memory.
    """
    for true, other in (node.args, node.args[::-1]):
        if not isinstance(true, fx.Node) or not isinstance(other, fx.Node) or known.get(true) != _TRUE:
            continue
        is_same = _dtype(other) is _dtype(node) is torch.bool and _shape(other) == _shape(node)
        if is_same and node not in written and written.isdisjoint(_memory(other)):
            node.replace_all_uses_with(other, lambda user: user.target is _SDPA or _name(user) in {*_AND, *_OR, *_NOT})
            return


def _bounds(name: str, node: fx.Node, known: Mapping[fx.Node, _Bounds]) -> _Bounds | None:
    """What is known of the result of an operator of this name."""
    if name == "arange":
        found = _bounds_of_arange(node)
    elif name in _FILLED_WITH:
        fill = _FILLED_WITH[name]
        found = _of_number(fill if isinstance(fill, float) else node.args[fill] if len(node.args) > fill else None)
        if found is not None and _dtype(node) is torch.bool:
            found = _as_bool(found)
    elif name in _SAME_ELEMENTS and node.target is not torch.ops.aten.view.dtype:
        found = _of(node.args[0], known)
        if found is not None and _dtype(node) is torch.bool:
            found = _as_bool(found)
    elif name in _COMPARISONS | _ARITHMETIC:
        found = _bounds_of_operation(name, node, known)
    elif name in _AND | _OR | _NOT:
        found = _bounds_of_logic(name, node, known)
    elif name in {"where", "masked_fill"} and len(node.args) == 3:
        x, condition, value = node.args if name == "masked_fill" else (node.args[2], *node.args[:2])
        chosen = {_TRUE: value, _FALSE: x}.get(_of(condition, known) or _EITHER)
        found = _of(chosen, known)
    else:
        found = None
    return None if found is None else _held(found, _dtype(node))


def _bounds_of_arange(node: fx.Node) -> _Bounds | None:
    start, end, step = {1: (0, *node.args, 1), 2: (*node.args, 1)}.get(len(node.args), node.args)
    # A size that varies may end the range, as there is no tensor of so many elements that they would wrap around.
    if isinstance(start, int) and isinstance(step, int) and 0 < step <= _EXACT:
        return _Bounds(start, max(start, end - 1) if isinstance(end, int) else math.inf)
    return None


def _bounds_of_operation(name: str, node: fx.Node, known: Mapping[fx.Node, _Bounds]) -> _Bounds | None:
    """Comparisons, sums and products of two."""
    if node.kwargs or len(node.args) != 2:  # a factor, or a way to round
        return None
    left, right = (_of(operand, known) for operand in node.args)
    if name == "mul" and left == _FALSE and _is_within(node.args[1], _dtype(node)):
        return _FALSE
    if left is None or right is None:
        return None
    is_small = min(left.low, right.low) >= 0 and max(left.high, right.high) <= _EXACT
    dtypes = {_dtype(operand) for operand in node.args if isinstance(operand, fx.Node)}
    # Among small numbers nothing is rounded and nothing wraps around when operands get one dtype.
    if not is_small and dtypes != {torch.int64}:
        return None
    if name in _COMPARISONS:
        return _compared(name, left, right)
    num_open = sum(any(map(math.isinf, bounds)) for bounds in (left, right))
    if _dtype(node) is torch.bool or num_open > (name != "mul"):  # or it might grow until it wraps around
        return None
    if name == "mul":
        products = [x * y for x in left for y in right]
        return _Bounds(min(products), max(products))
    if name == "add":
        return _Bounds(left.low + right.low, left.high + right.high)
    if name == "rsub":
        left, right = right, left
    return _Bounds(left.low - right.high, left.high - right.low)


def _compared(name: str, left: _Bounds, right: _Bounds) -> _Bounds | None:
    """True or False where no two numbers within the bounds compare otherwise."""
    if name in ("le", "lt"):
        name, left, right = {"le": "ge", "lt": "gt"}[name], right, left
    is_apart = left.low > right.high or left.high < right.low
    is_one = left.low == left.high == right.low == right.high
    always, never = {
        "ge": (left.low >= right.high, left.high < right.low),
        "gt": (left.low > right.high, left.high <= right.low),
        "ne": (is_apart, is_one),
        "eq": (is_one, is_apart),
    }[name]
    return _TRUE if always else _FALSE if never else None


def _bounds_of_logic(name: str, node: fx.Node, known: Mapping[fx.Node, _Bounds]) -> _Bounds | None:
    """Of booleans; one of which nothing is known is either."""
    if not all(_dtype(operand) is torch.bool for operand in node.args):
        return None
    operands = [_of(operand, known) or _EITHER for operand in node.args]
    if name in _NOT:
        ((low, high),) = operands
        found = _Bounds(1 - high, 1 - low)
    else:
        pick = min if name in _AND else max
        found = _Bounds(pick(b.low for b in operands), pick(b.high for b in operands))
    return None if found == _EITHER else found


def _held(bounds: _Bounds, dtype: torch.dtype | None) -> _Bounds | None:
    """The bounds, if numbers within them are the same in this dtype."""
    if dtype is torch.int64:
        return bounds if all(math.isinf(bound) or abs(bound) < _FAR for bound in bounds) else None
    greatest = 1 if dtype is torch.bool else _EXACT if dtype in _DTYPES else -1
    return bounds if bounds.low >= 0 and bounds.high <= greatest else None


def _as_bool(bounds: _Bounds) -> _Bounds:
    return _TRUE if bounds.low > 0 or bounds.high < 0 else _FALSE if bounds == _FALSE else _EITHER


def _of(value: Any, known: Mapping[fx.Node, _Bounds]) -> _Bounds | None:
    return known.get(value) if isinstance(value, fx.Node) else _of_number(value)


def _of_number(value: Any) -> _Bounds | None:
    """Of an integer, even one that is written as a float."""
    if not _is_finite(value) or value != int(value) or abs(value) > (_EXACT if isinstance(value, float) else _FAR):
        return None
    return _Bounds(int(value), int(value))


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _is_within(value: Any, dtype: torch.dtype | None) -> bool:
    """Whether a number stays finite in this dtype: zero times infinity is no zero."""
    if dtype is None or not dtype.is_floating_point:
        return False
    return _is_finite(value) and abs(value) <= torch.finfo(dtype).max


def _written(graph: fx.Graph) -> set[fx.Node]:
    """All values that an operation may change, itself or by way of another one that lies in the same memory."""
    written: set[fx.Node] = set()
    for node in graph.nodes:
        is_block = node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator)
        if is_block or writes(node):
            for argument in node.all_input_nodes:
                if argument not in written:
                    written.update(_memory(argument))
    return written


def _memory(node: fx.Node) -> Iterator[fx.Node]:
    """A value and all that it may share memory with among those that it was computed from.

    Not every operator that may return its argument says so, hence all arguments of the same dtype count.
    """
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        node = pending.pop()
        value = node.meta.get("val")
        if node in seen or isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            continue
        seen.add(node)
        yield node
        pending += views(node)
        dtype = _dtype(node)
        pending += [x for x in node.all_input_nodes if dtype is None or _dtype(x) in (None, dtype)]


def _name(node: fx.Node) -> str:
    """The name of an operator of PyTorch's own, without that of its overload."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten" and not writes(node):
        return str(target.overloadpacket.__name__)
    return ""


def _dtype(value: Any) -> torch.dtype | None:
    """Of a tensor, or of a number that is True or False."""
    if isinstance(value, fx.Node):
        found = value.meta.get("val")
        return found.dtype if isinstance(found, Tensor) else None
    return torch.bool if isinstance(value, bool) else None


def _shape(node: Any) -> tuple[Any, ...]:
    """To compare two sizes themselves would be a condition on them, which the graph would then depend on."""
    return tuple(expression_of(size) for size in node.meta["val"].shape)
