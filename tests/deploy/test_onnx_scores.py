"""Scores in ONNX are those of the definition, for logits of any kind."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cet.deploy.onnx import session_of
from cet.deploy.onnx_nodes import Block, Weights
from cet.deploy.onnx_scores import SCORE_NODES, negated, scores
from cet.ops.definitions import ScoreName
from cet.ops.exit_gate.definition import score_definition


@cache
def session(name: ScoreName, temperature: float, one_row: bool) -> Any:
    """A model of one score."""
    block = Block(Weights(), "")
    logits = ir.Value(name="logits", shape=ir.Shape(("n", "k")), type=ir.TensorType(ir.DataType.FLOAT))
    made = scores(block, logits, name, temperature, excludes=True, one_row=one_row)
    made = block.op("Neg" if negated(name, one_row) else "Identity", made)
    made.name, made.shape, made.type = "scores", ir.Shape(("n", 1)), ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [logits],
        [made],
        nodes=block.nodes,
        initializers=block.weights.values,
        opset_imports={"": 20},
        name="score",
    )
    return session_of(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString(), 1)


def test_every_score_has_a_form_in_onnx() -> None:
    assert SCORE_NODES.keys() == set(get_args(ScoreName))


ANY_LOGIT = st.one_of(
    st.floats(-50, 50, width=32),
    st.sampled_from([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-38, 88.0, -104.0, 3e38, -3e38]),
)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("name", get_args(ScoreName))
@given(data=st.data())
def test_scores_are_those_of_the_definition(name: ScoreName, temperature: float, data: st.DataObject) -> None:
    classes = data.draw(st.integers(2, 6))
    rows = data.draw(st.lists(st.lists(ANY_LOGIT, min_size=classes, max_size=classes), min_size=1, max_size=5))
    logits = np.array(rows, np.float32)
    (together,) = session(name, temperature, False).run(None, {"logits": logits})
    alone = [session(name, temperature, True).run(None, {"logits": row[None]})[0] for row in logits]
    expected = score_definition(torch.from_numpy(logits), name, temperature).numpy()
    for got in (together, np.concatenate(alone)):
        np.testing.assert_allclose(got[:, 0], expected, rtol=1e-4, atol=1e-5)
