"""The scores of :data:`cet.ops.definitions.SCORES` as ONNX operators, in as few nodes as can be.

At a batch of one each node costs about half a microsecond, as much as the arithmetic of a small net. So the gate
compares how sure a sample is, which is its score or its negative, and the score itself is made where a sample leaves.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from cet.deploy.onnx_nodes import Block, Value
from cet.ops.definitions import SCORES, ScoreName

_CLASSES = 1


def _entropy(block: Block, logits: Value, excludes: bool, keepdims: int) -> Value:
    log_p = block.op("LogSoftmax", logits, axis=_CLASSES)
    # exp(-inf) * -inf is NaN: a class that is ruled out adds nothing. Of a NaN the other factor stays one.
    finite = block.op("Max", log_p, block.number(-1e30)) if excludes else log_p
    terms = block.op("Mul", block.op("Exp", log_p), finite)
    return block.op("ReduceSum", terms, block.integers(_CLASSES), keepdims=keepdims)


def _confidence(block: Block, logits: Value, excludes: bool, keepdims: int) -> Value:
    p = block.op("Softmax", logits, axis=_CLASSES)
    return block.op("ReduceMax", p, block.integers(_CLASSES), keepdims=keepdims)


def _margin(block: Block, logits: Value, excludes: bool, keepdims: int) -> Value:
    p = block.op("Softmax", logits, axis=_CLASSES)
    top, where = block.ops("TopK", p, block.integers(2), outputs=2, axis=_CLASSES)
    where.type = ir.TensorType(ir.DataType.INT64)
    first, second = block.ops("Split", top, outputs=2, axis=_CLASSES, num_outputs=2)
    margin = block.op("Sub", first, second)
    return margin if keepdims else block.op("Squeeze", margin, block.integers(_CLASSES))


SURENESS: dict[ScoreName, Callable[[Block, Value, bool, int], Value]] = {
    "entropy": _entropy,
    "confidence": _confidence,
    "margin": _margin,
}


def sureness(
    block: Block, logits: Value, name: ScoreName, temperature: float, *, excludes: bool, keepdims: bool
) -> Value:
    """How sure samples are, ``(n, 1)`` or ``(n,)`` float32, of logits ``(n, K)``: the score of
    :func:`cet.ops.exit_gate.definition.score_definition`, or its negative where a low one means sure.

    Args:
        block: where the nodes go.
        logits: of any floating dtype.
        name: of the score.
        temperature: that the logits are divided by.
        excludes: whether logits may be ``-inf``, which rules a class out; the score is NaN where they are in spite.
        keepdims: whether the result has the second dimension.
    """
    logits = block.cast(logits, "float32")
    if temperature != 1:
        largest = block.op("ReduceMax", logits, block.integers(_CLASSES), keepdims=1)
        logits = block.op("Div", block.op("Sub", logits, largest), block.number(temperature))
    return SURENESS[name](block, logits, excludes, int(keepdims))


def negated(name: ScoreName) -> bool:
    """Whether the score is the negative of :func:`sureness`."""
    return SCORES[name].is_low_when_sure
