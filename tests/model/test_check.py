"""The answers of every exit by the stages compared with those of the backbone."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cet
from cet.model.check import AnswerMismatchError
from thinned import kept, slow

NAN, INF = float("nan"), float("inf")


def build(dtype: torch.dtype = torch.float32) -> cet.EarlyExit:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Sequential(nn.Conv1d(3, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU()),
        nn.Sequential(nn.Conv1d(16, 32, 5, padding=2), nn.ReLU(), nn.Dropout(0.3)),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    heads = {"0": None, "1": cet.HeadSpec(hidden=8, norm=True)}
    return cet.EarlyExit(backbone, heads, (torch.randn(4, 3, 20),)).to(dtype).eval()


@pytest.mark.parametrize(
    ("rows", "dtype"),
    kept(
        product([1, 2, 33], [torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        (1, torch.float32),
        (2, torch.float64),
        (33, torch.bfloat16),
        (33, torch.float16),
    ),
)
def test_both_ways_agree(dtype: torch.dtype, rows: int) -> None:
    model = build(dtype)
    x = torch.randn(rows, 3, 20, dtype=dtype)
    model.check(x)
    for (answer, _), expected in zip(model.exit_answers(x), model.exit_logits(x), strict=True):
        assert answer.dtype == dtype
        torch.testing.assert_close(answer, expected, rtol=0.05, atol=0.05)


def test_rows_that_are_not_finite_are_no_difference() -> None:
    model = build()
    x = torch.randn(6, 3, 20)
    x[1], x[2, 0, 3], x[4] = NAN, INF, -INF
    model.check(x)
    (first, scores), (second, _), (final, _) = model.exit_answers(x)
    assert scores[[1, 2]].isnan().all()
    assert first[[0, 3, 5]].isfinite().all()
    torch.testing.assert_close(final, model.exit_logits(x)[-1], equal_nan=True)
    assert second.shape == (6, 5)


@pytest.mark.parametrize(("astray", "name"), [(0, "0"), (1, "1"), (2, "final")])
@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.bfloat16)])
def test_the_first_exit_that_differs_is_named(
    astray: int, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(dtype)
    exit_answers = cet.EarlyExit.exit_answers

    def drifted(self: cet.EarlyExit, x: Tensor) -> Any:
        answers = list(exit_answers(self, x))
        logits, scores = answers[astray]
        wrong = torch.zeros(len(x), 1, dtype=dtype)
        wrong[3] = 3.0  # one row is enough
        answers[astray] = logits + wrong, scores
        return tuple(answers)

    monkeypatch.setattr(cet.EarlyExit, "exit_answers", drifted)
    with pytest.raises(AnswerMismatchError, match=f"otherwise than the backbone at exit '{name}', by up to 3"):
        model.check(torch.randn(8, 3, 20, dtype=dtype))


def test_an_answer_that_is_not_there_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()

    def empty(self: cet.EarlyExit, x: Tensor) -> Any:
        return ((torch.full((len(x), 5), NAN), torch.zeros(len(x))),) * 3

    monkeypatch.setattr(cet.EarlyExit, "exit_answers", empty)
    with pytest.raises(AnswerMismatchError, match="at exit '0'"):
        model.check(torch.randn(2, 3, 20))
