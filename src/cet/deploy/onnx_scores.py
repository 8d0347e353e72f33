"""The scores of :data:`cet.ops.definitions.SCORES` as ONNX operators, in as few nodes as can be.

At a batch of one each node costs about half a microsecond, as much as the arithmetic of a small net.
"""

from __future__ import annotations

from collections.abc import Callable

from cet.deploy.onnx_nodes import Block, Value
from cet.ops.definitions import ScoreName

_CLASSES = 1


def _entropy(block: Block, logits: Value) -> Value:
    log_p = block.op("LogSoftmax", logits, axis=_CLASSES)
    # exp(-inf) * -inf is NaN: a class that is ruled out adds nothing. Of a NaN the other factor stays one.
    finite = block.op("Max", log_p, block.number(-1e30))
    terms = block.op("Mul", block.op("Exp", log_p), finite)
    return block.op("Neg", block.op("ReduceSum", terms, block.integers(_CLASSES), keepdims=1))


def _confidence(block: Block, logits: Value) -> Value:
    p = block.op("Softmax", logits, axis=_CLASSES)
    return block.op("ReduceMax", p, block.integers(_CLASSES), keepdims=1)


def _margin(block: Block, logits: Value) -> Value:
    p = block.op("Softmax", logits, axis=_CLASSES)
    top, _ = block.ops("TopK", p, block.integers(2), outputs=2, axis=_CLASSES)
    first, second = block.ops("Split", top, outputs=2, axis=_CLASSES, num_outputs=2)
    return block.op("Sub", first, second)


SCORES: dict[ScoreName, Callable[[Block, Value], Value]] = {
    "entropy": _entropy,
    "confidence": _confidence,
    "margin": _margin,
}


def score(block: Block, logits: Value, name: ScoreName, temperature: float) -> Value:
    """Scores ``(n, 1)`` float32 of logits ``(n, K)``, as :func:`cet.ops.exit_gate.definition.score_definition`."""
    logits = block.cast(logits, "float32")
    if temperature != 1:
        largest = block.op("ReduceMax", logits, block.integers(_CLASSES), keepdims=1)
        logits = block.op("Div", block.op("Sub", logits, largest), block.number(temperature))
    return SCORES[name](block, logits)
