"""`predict` compared with `exit_logits`, exit by exit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cet
from cet.model.check import check_answers, runtime_logits

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_both_ways_agree(dtype: torch.dtype, rows: int) -> None:
    model = build(dtype)
    x = torch.randn(rows, 3, 20, dtype=dtype)
    check_answers(model, (x,), {})
    for answer, expected in zip(runtime_logits(model, (x,), {}), model.exit_logits(x), strict=True):
        assert answer.dtype == dtype
        torch.testing.assert_close(answer, expected, rtol=0.05, atol=0.05)


def test_rows_that_are_not_finite_are_no_difference() -> None:
    model = build()
    x = torch.randn(6, 3, 20)
    x[1], x[2, 0, 3], x[4] = NAN, INF, -INF
    check_answers(model, (x,), {})
    first, second, final = runtime_logits(model, (x,), {})
    assert first[[1, 2, 4]].isnan().all()
    assert first[[0, 3, 5]].isfinite().all()
    torch.testing.assert_close(final, model.exit_logits(x)[-1], equal_nan=True)
    assert second.shape == (6, 5)


def test_policy_modes_and_batch_statistics_stay() -> None:
    model = build().train()
    model.heads.eval()
    policy = model.policy
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_answers(model, (), {"input": torch.randn(5, 3, 20)})
    assert model.policy is policy
    assert model.training
    assert model.backbone.training
    assert not model.heads.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("astray", "name"), [(0, "0"), (1, "1"), (2, "final")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_exit_that_differs_is_named(
    astray: int, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(dtype)
    predict = cet.EarlyExit.predict

    def drifted(self: cet.EarlyExit, *args: Any) -> cet.ExitOutput:
        output = predict(self, *args)
        wrong = output.exit_index >= astray
        wrong[1:] = False  # one row is enough
        return dataclasses.replace(output, logits=output.logits + 0.3 * wrong[:, None].to(dtype))

    monkeypatch.setattr(cet.EarlyExit, "predict", drifted)
    message = f"^predict and exit_logits differ at exit '{name}', by up to 0.3.* where logits reach "
    with pytest.raises(RuntimeError, match=message):
        check_answers(model, (torch.randn(8, 3, 20, dtype=dtype),), {})


def test_an_answer_that_is_not_there_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()

    def empty(self: cet.EarlyExit, x: Tensor) -> cet.ExitOutput:
        return cet.ExitOutput(torch.full((len(x), 5), NAN), torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x)))

    monkeypatch.setattr(cet.EarlyExit, "predict", empty)
    with pytest.raises(RuntimeError, match="differ at exit '0', by up to nan"):
        check_answers(model, (torch.randn(2, 3, 20),), {})
