"""The score of a row and the decision to leave, against their definitions in double precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cet.ops import exit_score, gate
from cet.ops.definitions import SCORE_NAMES

LN2, LN4 = math.log(2), math.log(4)
INF, NAN = math.inf, math.nan

TABLE = [
    # logits, entropy, confidence, margin
    ([0.0, 0.0], LN2, 0.5, 0.0),
    ([7.0, 7.0, 7.0, 7.0], LN4, 0.25, 0.0),
    ([0.0, math.log(3)], 0.5623351446, 0.75, 0.5),
    ([0.0, -INF], 0.0, 1.0, 1.0),
    ([5.0, 5.0, -INF, -INF], LN2, 0.5, 0.0),
    ([3e4, -3e4], 0.0, 1.0, 1.0),
    ([-3e4, -3e4], LN2, 0.5, 0.0),
    ([NAN, 0.0], NAN, NAN, NAN),
    ([INF, 0.0], NAN, NAN, NAN),
    ([-INF, -INF], NAN, NAN, NAN),
]


def scores_by_definition(logits, temperature):
    p = torch.softmax(logits.double() / temperature, dim=1)
    top = p.sort(dim=1, descending=True).values
    return {
        "entropy": -torch.where(p > 0, p * p.log(), 0.0 * p).sum(1),
        "confidence": top[:, 0],
        "margin": top[:, 0] - top[:, 1],
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("logits", "entropy", "confidence", "margin"), TABLE)
def test_scores_of_known_rows(logits, entropy, confidence, margin, dtype):
    rows = torch.tensor([[0.0] * len(logits), logits], dtype=dtype)
    tolerance = 1e-6 if dtype in (torch.float32, torch.float64) else 1e-2  # ln 3 is rounded in half precision
    for name, expected in (("entropy", entropy), ("confidence", confidence), ("margin", margin)):
        score = exit_score(rows, name)
        assert score.dtype == torch.float32
        assert score[1].item() == pytest.approx(expected, abs=tolerance, nan_ok=True)
        assert score[0].isfinite()


@given(
    rows=st.integers(1, 9),
    classes=st.integers(2, 40),
    spread=st.sampled_from([0.01, 1.0, 20.0, 1e4]),
    temperature=st.sampled_from([0.1, 1.0, 7.5]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_scores_match_double_precision(rows, classes, spread, temperature, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, classes, generator=generator) * spread).to(dtype)
    for name, expected in scores_by_definition(logits, temperature).items():
        # One rounding of a logit z moves z / T by |z / T| * 2 ** -24, and the score by at most that times ln K.
        bound = 1e-5 + float(logits.abs().max()) / temperature * 2**-22
        got = exit_score(logits, name, temperature)
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("score", "threshold", "expected"),
    [
        # Rows of TABLE: uniform, 3:1, certain, NaN.
        ("entropy", 0.6, [False, True, True, False]),
        ("entropy", 0.0, [False, False, True, False]),
        ("entropy", INF, [True, True, True, False]),
        ("entropy", -INF, [False, False, False, False]),
        ("entropy", -0.1, [False, False, False, False]),
        ("confidence", 0.75 - 1e-6, [False, True, True, False]),
        ("confidence", 1.0, [False, False, True, False]),
        ("confidence", 1.1, [False, False, False, False]),
        ("confidence", -INF, [True, True, True, False]),
        ("margin", 0.0, [True, True, True, False]),
        ("margin", 0.6, [False, False, True, False]),
    ],
)
def test_who_leaves(score, threshold, expected):
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3)], [0.0, -INF], [NAN, 1.0]])
    scores, exit_mask = gate(logits, score=score, threshold=threshold)
    assert exit_mask.dtype == torch.bool
    assert exit_mask.tolist() == expected
    torch.testing.assert_close(scores, exit_score(logits, score), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_a_score_equal_to_the_threshold_leaves(score):
    logits = torch.randn(6, 5)
    for row, value in enumerate(exit_score(logits, score).tolist()):
        assert gate(logits, score=score, threshold=value)[1][row]


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_strided_and_empty_logits(score):
    logits = torch.randn(7, 10)
    strided = torch.stack([logits, -logits], dim=2)[..., 0]
    assert torch.equal(exit_score(strided, score), exit_score(logits, score))
    assert exit_score(logits[:0], score).shape == (0,)


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_the_answer_survives_autocast(score):
    logits = torch.randn(50, 10)
    expected = exit_score(logits, score)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exit_score(logits, score), expected)


def test_a_class_that_is_ruled_out_has_no_gradient():
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    exit_score(logits).sum().backward()
    kept = torch.tensor([[0.0, 1.0]], requires_grad=True)
    exit_score(kept).sum().backward()
    torch.testing.assert_close(logits.grad[0, [0, 2]], kept.grad[0])
    assert logits.grad[0, 1] == 0


@pytest.mark.parametrize("score", ["entropy", "confidence", "margin"])
def test_transforms_give_the_same(score):
    logits = torch.randn(5, 4)
    tangent = torch.randn(5, 4)
    expected = exit_score(logits, score)
    torch.testing.assert_close(torch.vmap(lambda row: exit_score(row[None], score)[0])(logits), expected)
    forward = torch.func.jvp(lambda x: exit_score(x, score), (logits,), (tangent,))[1]
    backward = torch.func.jacrev(lambda x: exit_score(x, score))(logits)
    torch.testing.assert_close(forward, (backward * tangent).sum(dim=(1, 2)))
