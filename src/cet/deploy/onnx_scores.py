"""The scores of :data:`cet.ops.definitions.SCORES` as ONNX operators, in as few nodes as can be.

At a batch of one each node costs about half a microsecond, as much as the arithmetic of a small net. So a sign is
turned once for all rows, where they have their answers, and not at each exit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir

from cet.deploy.onnx_nodes import Block, Value
from cet.ops.definitions import SCORES, ScoreName
from cet.runtime.scores import PolicyScore, has_kernel

_CLASSES = 1


def _entropy(block: Block, logits: Value, excludes: bool, one_row: bool) -> Value:
    log_p = block.op("LogSoftmax", logits, axis=_CLASSES)
    # exp(-inf) * -inf is NaN: a class that is ruled out adds nothing. Of a NaN the other factor stays one.
    finite = block.op("Max", log_p, block.number(-1e30)) if excludes else log_p
    p = block.op("Exp", log_p)
    if one_row:  # product, sum and sign in one node
        return block.op("Gemm", p, finite, transB=1, alpha=-1.0)
    return block.op("ReduceSum", block.op("Mul", p, finite), block.integers(_CLASSES), keepdims=1)


def _confidence(block: Block, logits: Value, excludes: bool, one_row: bool) -> Value:
    p = block.op("Softmax", logits, axis=_CLASSES)
    return block.op("ReduceMax", p, block.integers(_CLASSES), keepdims=1)


def _margin(block: Block, logits: Value, excludes: bool, one_row: bool) -> Value:
    p = block.op("Softmax", logits, axis=_CLASSES)
    top, where = block.ops("TopK", p, block.integers(2), outputs=2, axis=_CLASSES)
    where.type = ir.TensorType(ir.DataType.INT64)
    first, second = block.ops("Split", top, outputs=2, axis=_CLASSES, num_outputs=2)
    return block.op("Sub", first, second)


SCORE_NODES: dict[ScoreName, Callable[[Block, Value, bool, bool], Value]] = {
    "entropy": _entropy,
    "confidence": _confidence,
    "margin": _margin,
}


def scores(block: Block, logits: Value, name: ScoreName, temperature: float, *, excludes: bool, one_row: bool) -> Value:
    """The score of :func:`cet.ops.exit_gate.definition.score_definition`, ``(n, 1)`` float32, of logits ``(n, K)``.

    Args:
        block: where the nodes go.
        logits: of any floating dtype.
        name: of the score.
        temperature: that the logits are divided by.
        excludes: whether logits may be ``-inf``, which rules a class out; the score is NaN where they are in spite.
        one_row: whether n is one. Else a score that is low when sure comes as its negative, see :func:`negated`.
    """
    logits = block.cast(logits, "float32")
    if temperature != 1:
        largest = block.op("ReduceMax", logits, block.integers(_CLASSES), keepdims=1)
        logits = block.op("Div", block.op("Sub", logits, largest), block.number(temperature))
    return SCORE_NODES[name](block, logits, excludes, one_row)


def patience(block: Block, logits: Value, seen: Sequence[Value]) -> tuple[Value, list[Value]]:
    """How many exits in succession before this one have named the same class, ``(n, 1)`` float32, as
    :class:`cet.runtime.scores.Scorer` counts them; and what the next exit has to have seen.

    Args:
        block: where the nodes go.
        logits: ``(n, K)`` of any floating dtype.
        seen: what the exit before made; nothing at the first.
    """
    fine = _in_range(block, logits)
    largest = block.op("ArgMax", block.cast(logits, "float32"), axis=_CLASSES, keepdims=1)
    named = block.op("Where", fine, largest, block.integers(-1))
    if seen:
        before, count = seen
        more = block.op("Add", count, block.number(1.0))
        count = block.op("Where", block.op("Equal", named, before), more, block.number(0.0))
    else:
        count = block.op("Mul", block.cast(fine, "float32"), block.number(0.0))
    return block.op("Where", fine, count, block.number(math.nan)), [named, count]


def own_score(block: Block, logits: Value, function: ir.Graph, temperature: float) -> Value:
    """A score of the user's own, ``(n, 1)`` float32, as :class:`cet.runtime.scores.Scorer` computes it.

    Args:
        block: where the nodes go.
        logits: ``(n, K)`` of any floating dtype.
        function: takes logits ``(n, K)`` float32 and returns scores ``(n, 1)``.
        temperature: that the logits are divided by.
    """
    scaled = block.cast(logits, "float32")
    if temperature != 1:
        scaled = block.op("Div", scaled, block.number(temperature))
    graph = function.clone()
    for value in graph.initializers.values():
        assert value.const_value is not None
        value.replace_all_uses_with(block.weights.of(value.const_value, value.name or "weight"))
    (taken,), (score,) = graph.inputs, graph.outputs
    taken.replace_all_uses_with(scaled)
    nodes = list(graph)
    graph.outputs.clear()
    graph.remove(nodes)
    inner = Block(block.weights, f"{block.prefix}score/")
    inner.take(nodes)
    block.nodes += inner.nodes
    return block.op("Where", _in_range(block, logits), score, block.number(math.nan))


def _in_range(block: Block, logits: Value) -> Value:
    """Whether no logit of a row is NaN or +Inf, ``(n, 1)``."""
    each = block.op("LessOrEqual", block.cast(logits, "float32"), block.number(_LARGEST))
    least = block.op("ReduceMin", block.cast(each, "float32"), block.integers(_CLASSES), keepdims=1)
    return block.op("Cast", least, to=ir.DataType.BOOL)


_LARGEST = 3.4028234663852886e38
"""Of float32."""


def negated(score: PolicyScore, one_row: bool) -> bool:
    """Whether :func:`scores` returns the negative of the score."""
    return has_kernel(score) and SCORES[score].is_low_when_sure and not one_row
