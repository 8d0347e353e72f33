"""Scores that the operations do not know, patience and functions, against every row alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import cet
from cet.calibration.thresholds import simulate
from cet.runtime.eager import choose_answers
from cet.runtime.scores import Scorer, is_low_when_sure, require_kernel
from oracle import CONTRACT, answers_of

CLASSES, EARLY = 3, 4


def gini(logits: Tensor) -> Tensor:
    return 1 - logits.softmax(1).square().sum(1)


GINI = cet.ScoreFunction(gini, is_low_when_sure=True, name="gini")
LARGEST = cet.ScoreFunction(lambda logits: logits.amax(1), name="largest logit")


@pytest.fixture(scope="module")
def model() -> cet.EarlyExit:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6) if k % 2 == 0 else nn.Tanh() for k in range(2 * EARLY)]
    backbone = nn.Sequential(*layers, nn.Linear(6, CLASSES)).eval()
    heads: dict[str, Any] = {str(2 * k + 1): None for k in range(EARLY)}
    heads["3"] = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))  # one that no kernel runs
    return cet.EarlyExit(backbone, heads, (torch.randn(2, 6),)).eval()


@pytest.fixture
def own_policy(model: cet.EarlyExit) -> Any:
    yield model
    model.policy = cet.ExitPolicy.closed(EARLY + 1)


@given(data=st.data())
@CONTRACT
def test_rows_leave_as_each_does_alone(model: cet.EarlyExit, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    x = 3 * torch.randn(data.draw(st.sampled_from([1, 2, 7, 33])), 6)
    if data.draw(st.booleans()):
        x[0] = data.draw(st.sampled_from([math.nan, math.inf]))
    score = data.draw(st.sampled_from(["patience", GINI, LARGEST]))
    levels = [None, 0.0, 1.0, 2.0] if score == "patience" else [None, -math.inf, math.inf, 0.31, 0.62]
    thresholds = data.draw(st.lists(st.sampled_from(levels), min_size=EARLY, max_size=EARLY))
    temperatures = data.draw(st.none() | st.just((0.5, 1.0, 2.0, 1.5, 1.0)))
    policy = cet.ExitPolicy(score, tuple(thresholds), temperatures)
    model.policy = policy
    out = model.predict(x)
    with torch.no_grad():
        alone = [model.exit_logits(row[None]) for row in x]
    expected = answers_of([torch.cat(parts) for parts in zip(*alone, strict=True)], policy)
    assert torch.equal(out.exit_index, expected.exit_index)
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(out.score, expected.score.float(), rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    "policy",
    [
        cet.ExitPolicy("patience", (0, None, 2, 1)),
        cet.ExitPolicy("patience", (2, 1, None, 1)),
        cet.ExitPolicy(GINI, (0.3, None, 0.5, 0.6)),
        cet.ExitPolicy(LARGEST, (None,) * EARLY),
    ],
)
def test_a_batch_that_ran_uncut_is_answered_alike(model: cet.EarlyExit, policy: cet.ExitPolicy) -> None:
    torch.manual_seed(2)
    with torch.no_grad():
        exit_logits = [*model.exit_logits(3 * torch.randn(60, 6))]
    exit_logits[1][0] = math.nan
    expected = answers_of(exit_logits, policy)
    logits, exit_index, score = choose_answers(exit_logits, policy, with_scores=True)
    assert exit_index is not None
    assert torch.equal(exit_index, expected.exit_index)
    assert torch.equal(logits, expected.logits)
    torch.testing.assert_close(score, expected.score.float())


def test_patience_counts_open_exits_that_agree_without_a_break() -> None:
    scorer = Scorer("patience")
    named = [[0, 1, 2], [0, 1, 1], [0, 2, 1], [0, 2, 1]]
    counts = [scorer(torch.eye(CLASSES)[row], 1.0).tolist() for row in named]
    assert counts == [[0, 0, 0], [1, 1, 0], [2, 0, 1], [3, 1, 2]]
    kept = scorer.compact(torch.tensor([False, True, False]), [torch.arange(3)], [0])
    assert kept.tensors[0].tolist() == [0, 2]
    assert scorer(torch.eye(CLASSES)[[0, 0]], 1.0).tolist() == [4, 0]


def rows(num: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (num,), generator=generator)
    ease = torch.rand(num, 1, generator=generator)
    return torch.randn(num, 6, generator=generator) + 4 * torch.eye(6)[y] * ease, y


@pytest.fixture(scope="module")
def trained(model: cet.EarlyExit) -> cet.EarlyExit:
    model = copy.deepcopy(model).train()
    x, y = rows(2000, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(80):
        optimizer.zero_grad()
        sum(nn.functional.cross_entropy(logits, y) for logits in model(x)).backward()  # type: ignore[union-attr]
        optimizer.step()
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*lose")
@pytest.mark.parametrize("guarantee", ["auto", None])
@pytest.mark.parametrize("score", ["patience", GINI, LARGEST])
def test_calibration_chooses_their_thresholds(trained: cet.EarlyExit, score: Any, guarantee: Any) -> None:
    x, y = rows(4000, 2)
    calibration = cet.calibrate(trained, [(x, y)], 0.03, 0.9, score=score, guarantee=guarantee)
    policy, report = calibration.policy, calibration.report
    trained.policy = policy
    out = trained.predict(x)
    # What calibration foretells is what the runner does.
    leaving = out.exit_index.bincount(minlength=EARLY + 1) / len(x)
    assert [row.fraction for row in report.exits] == pytest.approx(leaving.tolist(), abs=1e-3)
    assert report.accuracy == pytest.approx((out.labels == y).double().mean().item(), abs=1e-3)
    assert report.mean_cost < report.full_cost
    assert report.score == ("patience" if score == "patience" else score.name)
    if score == "patience":
        assert len(set(policy.thresholds)) == 1
        assert policy.thresholds[0] in range(EARLY)
    if guarantee is None:
        assert report.drop <= 0.03
        return
    certificate = report.certificate
    assert certificate is not None
    assert certificate.certified
    assert certificate.num_fit == (0 if score == "patience" else 800)
    x, y = rows(20_000, 3)
    early, full = trained.predict(x).labels, trained.exit_logits(x)[-1].argmax(1)
    assert (full == y).double().mean() - (early == y).double().mean() <= 0.03


@pytest.mark.filterwarnings("ignore:.*lose")
def test_the_patience_of_a_fitted_policy_is_the_cheapest_that_keeps_the_bound(trained: cet.EarlyExit) -> None:
    x, y = rows(500, 4)
    policy = cet.calibrate(trained, [(x, y)], 0.02, score="patience", guarantee=None).policy
    costs = cet.exit_costs(trained)
    with torch.no_grad():
        exit_logits = trained.exit_logits(x)
    scorer = Scorer("patience")
    counts = torch.stack([scorer(logits, 1.0) for logits in exit_logits[:-1]], 1).numpy()
    right = torch.stack([logits.argmax(1) == y for logits in exit_logits], 1).numpy()
    kept = {}
    for count in range(EARLY):
        exits = simulate([-count] * EARLY, -counts)
        if right[:, -1].mean() - right[np.arange(500), exits].mean() <= 0.02:
            kept[count] = costs.cumulative([True] * EARLY)[exits].mean()
    assert policy.thresholds == (min(kept, key=lambda count: kept[count]),) * EARLY


def test_a_saved_model_keeps_patience_and_refuses_functions(own_policy: cet.EarlyExit, tmp_path: Path) -> None:
    model, file = own_policy, tmp_path / "m.safetensors"
    model.policy = cet.ExitPolicy("patience", (1, None, 2, math.inf))
    model.save(file)
    backbone = copy.deepcopy(model.backbone)
    assert cet.ExitPolicy(**model.policy.to_dict()) == model.policy
    state = model.state_dict()
    other = copy.deepcopy(model)
    other.policy = cet.ExitPolicy.closed(EARLY + 1)
    other.load_state_dict(state)
    assert other.policy == model.policy
    assert backbone is not model.backbone
    model.policy = cet.ExitPolicy(GINI, (0.3, None, 0.2, 0.1))
    with pytest.raises(ValueError, match="score 'gini' is a function, which a file cannot hold; save a policy with an"):
        model.save(file)
    state = model.state_dict()
    with pytest.raises(ValueError, match="has a function as its score, which it cannot hold; set a policy with that"):
        other.load_state_dict(state)
    other.policy = cet.ExitPolicy(GINI, (None,) * EARLY)
    other.load_state_dict(state)
    assert other.policy == model.policy


def test_other_runners_and_formats_refuse_them(own_policy: cet.EarlyExit, tmp_path: Path) -> None:
    for score, threshold, named in ((GINI, 0.5, "gini"), ("patience", 1, "patience")):
        own_policy.policy = cet.ExitPolicy(score, (threshold,) * EARLY)
        for name in ("m.stages", "m.pt2", "m.pte", "m.tflite"):
            with pytest.raises(ValueError, match=f"cannot have the score '{named}'; export to one .onnx file, or set"):
                cet.export(own_policy, tmp_path / name)
    with pytest.raises(ValueError, match="needs all of them open and its thresholds baked"):
        cet.export(own_policy, tmp_path / "m.onnx", thresholds="input")
    own_policy.policy = cet.ExitPolicy("patience", (None, *(1,) * (EARLY - 1)))
    with pytest.raises(ValueError, match="needs all of them open and its thresholds baked"):
        cet.export(own_policy, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="the runner 'graphs' cannot have the score 'gini'"):
        require_kernel(GINI, "the runner 'graphs'")
    assert require_kernel("margin", "anything") == "margin"
    assert [is_low_when_sure(score) for score in ("entropy", "margin", "patience", GINI, LARGEST)] == [
        True, False, False, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda logits: logits, ValueError, r"gives shape \(8, 3\) for logits \(8, 3\); return one score per row"),
        (lambda logits: 0.5, TypeError, "gives float; return a tensor of real scores"),
        (lambda logits: logits[:, 0] - logits[:, 0].mean(), ValueError, "another score alone than among others"),
    ],
)
def test_bad_functions_are_refused(
    trained: cet.EarlyExit, function: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cet.calibrate(trained, [rows(200, 1)], score=cet.ScoreFunction(function))


def test_a_function_that_mixes_rows_is_refused_at_its_first_batch_wherever_the_policy_is_from(
    trained: cet.EarlyExit,
) -> None:
    x, _ = rows(20, 1)
    calls: list[int] = []

    def mixing(logits: Tensor) -> Tensor:
        calls.append(len(logits))
        return logits.amax(1) - logits.mean()

    before = trained.policy
    try:
        trained.policy = cet.ExitPolicy(cet.ScoreFunction(mixing), (0.0,) * (trained.num_exits - 1))
        trained.predict(x[:1])  # a single row cannot be mixed with others
        for _ in range(2):
            with pytest.raises(ValueError, match="another score alone than among others"):
                trained.predict(x)
        own = cet.ScoreFunction(lambda logits: (calls.append(len(logits)), logits.amax(1))[1])
        trained.policy = cet.ExitPolicy(own, (1e9,) * (trained.num_exits - 1))
        x[0] = float("nan")
        trained.predict(x)
        calls.clear()
        trained.predict(x)
        assert calls == [20] * trained.num_exits  # checked once
    finally:
        trained.policy = before


def test_bad_scores_are_refused(trained: cet.EarlyExit) -> None:
    with pytest.raises(TypeError, match="function is 3; give a function of logits"):
        cet.ScoreFunction(3)  # type: ignore[arg-type]
    for options, message in (
        ({"score": GINI, "split": False}, "split is False, .* and that of 'gini' is unknown; leave it out"),
        ({"score": "patience", "mean_budget": 1.0}, "a budget chooses exits, and patience counts all of them"),
        ({"score": gini}, "is unknown; choose one of entropy, confidence, margin, patience, or give a cet.ScoreFunct"),
    ):
        with pytest.raises(ValueError, match=message):
            cet.calibrate(trained, [], **options)  # type: ignore[arg-type]
