"""Calibration on a small trained model, and its statistics against their definitions."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

import cet
from cet.calibration import drop_interval, fit_temperature
from cet.calibration.cost import ExitCosts, exit_costs
from cet.calibration.thresholds import simulate
from cet.ops.definitions import ScoreName
from thinned import sampled

CLASSES = 4
calibrate = partial(cet.calibrate, guarantee=None)
"""Fitted on the samples that it is given; what is guaranteed on others is the subject of test_guarantee.py."""

Batches = list[tuple[Any, Tensor]]


def waves(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sine waves of one frequency per class, some of them drowned in noise."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (rows,), generator=generator)
    phase = 6.3 * torch.rand(rows, 1, 1, generator=generator)
    noise = 2 * torch.rand(rows, 1, 1, generator=generator) * torch.randn(rows, 2, 32, generator=generator)
    return torch.sin((y[:, None, None] + 1) * torch.arange(32) / 4 + phase) + noise, y


@pytest.fixture(scope="module")
def model() -> cet.EarlyExit:
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Sequential(nn.Conv1d(2, 8, 7, stride=2, padding=3), nn.ReLU()),
        nn.Sequential(nn.Conv1d(8, 16, 5, stride=2, padding=2), nn.ReLU()),
        nn.Sequential(nn.Conv1d(16, 32, 3, padding=1), nn.ReLU(), nn.Dropout(0.2)),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )
    x, y = waves(1024, seed=1)
    model = cet.EarlyExit(backbone, ["0", "1"], (x[:4],)).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(200):
        rows = slice(128 * (step % 8), 128 * (step % 8 + 1))
        loss = sum(nn.functional.cross_entropy(logits, y[rows]) for logits in model(x[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def held_out() -> Batches:
    x, y = waves(600, seed=2)
    return list(zip(x.split(128), y.split(128), strict=True))


@pytest.mark.parametrize("score", ["entropy", "confidence", "margin"])
@pytest.mark.parametrize("temperature", [True, False])
def test_policy_does_what_the_report_says(
    model: cet.EarlyExit, held_out: Batches, score: ScoreName, temperature: bool
) -> None:
    calibration = calibrate(model, held_out, 0.01, score=score, temperature=temperature)
    report = calibration.report
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    model.policy = calibration.policy
    output = model.predict(x)

    assert report.num_samples == len(y) == 600
    assert (calibration.policy.temperatures is not None) == temperature
    exits = torch.bincount(output.exit_index, minlength=3) / len(y)
    assert exits[:2].sum() > 0.3
    assert [row.fraction for row in report.exits] == pytest.approx(exits.tolist())
    accuracy = (output.labels == y).double().mean().item()
    final = (model.exit_logits(x)[-1].argmax(1) == y).double().mean().item()
    assert accuracy >= final - 0.01
    assert (report.accuracy, report.final_accuracy) == (pytest.approx(accuracy), pytest.approx(final))
    assert report.drop == pytest.approx(final - accuracy)
    assert report.interval[0] < report.drop < report.interval[1]

    costs = exit_costs(model)
    paths = torch.tensor(costs.cumulative([t is not None for t in calibration.policy.thresholds]))
    assert report.mean_cost == pytest.approx(paths[output.exit_index].mean().item())
    assert report.mean_cost < 0.8 * report.full_cost
    assert report.full_cost == costs.full
    assert [row.cost for row in report.exits] == pytest.approx(paths.tolist())


@pytest.mark.parametrize("score", ["entropy", "confidence", "margin"])
def test_rows_leave_where_the_definition_says(model: cet.EarlyExit, held_out: Batches, score: ScoreName) -> None:
    policy = calibrate(model, held_out, 0.02, score=score).policy
    sign = 1 if score == "entropy" else -1
    x, _ = waves(300, seed=3)
    scores = torch.stack(
        [cet.ops.exit_score(model.exit_logits(x)[k], score, policy.temperature(k)) for k in range(2)], dim=1
    ).detach()
    thresholds = [-np.inf if t is None else sign * t for t in policy.thresholds]
    model.policy = policy
    # A score on the threshold up to rounding may fall on either side.
    clear = ((sign * scores - torch.tensor(thresholds)).abs() > 1e-5).all(dim=1)
    assert clear.sum() > 250
    expected = simulate(thresholds, sign * scores.numpy())
    assert torch.equal(model.predict(x).exit_index[clear], torch.from_numpy(expected)[clear])


def test_policy_and_modes_of_the_model_stay(model: cet.EarlyExit, held_out: Batches) -> None:
    policy = model.policy
    model.train()
    model.heads.eval()
    try:
        first = calibrate(model, held_out)
        assert model.training
        assert not model.heads.training
        assert model.policy is policy
    finally:
        model.eval()
    assert calibrate(model, held_out) == first
    assert all(parameter.grad_fn is None for parameter in model.parameters())


def test_a_larger_drop_costs_less(model: cet.EarlyExit, held_out: Batches) -> None:
    reports = [calibrate(model, held_out, drop).report for drop in (0.0, 0.01, 0.05)]
    costs = [report.mean_cost for report in reports]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1]
    assert all(report.drop <= report.max_drop for report in reports)


def test_unlabelled_rows_are_ignored(model: cet.EarlyExit, held_out: Batches) -> None:
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    unlabelled = torch.arange(len(y)) % 3 == 0
    mixed = [(x, y.where(~unlabelled, -100)), (x[:5], torch.full((5,), -100)), (x[:0], y[:0])]
    assert calibrate(model, mixed) == calibrate(model, [(x[~unlabelled], y[~unlabelled])])


def test_inputs_may_be_tuples_and_dicts(model: cet.EarlyExit, held_out: Batches) -> None:
    expected = calibrate(model, held_out)
    assert calibrate(model, [((x,), y) for x, y in held_out]) == expected
    assert calibrate(model, [({"input": x}, y) for x, y in held_out]) == expected
    assert calibrate(model, [{"input": x, "labels": y} for x, y in held_out]) == expected
    in_other_order = [{"target": y, "series": x} for x, y in held_out]
    assert calibrate(model, in_other_order, batch_fn=lambda batch: (batch["series"], batch["target"])) == expected


def test_rows_that_are_not_finite_never_leave_early(model: cet.EarlyExit, held_out: Batches) -> None:
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    x[:60] = float("nan")
    calibration = calibrate(model, [(x, y)])
    model.policy = calibration.policy
    output = model.predict(x)
    assert (output.exit_index[:60] == 2).all()
    assert calibration.report.exits[2].fraction == pytest.approx((output.exit_index == 2).double().mean().item())
    assert calibration.report.accuracy == pytest.approx((output.labels == y).double().mean().item())
    assert all(np.isfinite(row.temperature) for row in calibration.report.exits)


def test_own_costs_decide(model: cet.EarlyExit, held_out: Batches) -> None:
    dear_heads = ExitCosts((1.0, 1.0, 1.0), (5.0, 5.0), unit="ms")
    calibration = calibrate(model, held_out, costs=dear_heads)
    assert calibration.policy.thresholds == (None, None)
    assert calibration.report.mean_cost == calibration.report.full_cost == 3.0
    cheap_heads = ExitCosts((1.0, 1.0, 1.0), (0.0, 0.0), unit="ms")
    assert calibrate(model, held_out, costs=cheap_heads).report.mean_cost < 2.5


def test_report_is_json_and_readable(model: cet.EarlyExit, held_out: Batches) -> None:
    report = calibrate(model, held_out, costs=ExitCosts((1, 1, 1), (0, 9), unit="ms")).report
    as_json = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [row["name"] for row in as_json["exits"]] == ["0", "1", "final"]
    assert as_json["exits"][1]["threshold"] is None
    assert as_json["interval"] == list(report.interval)
    assert [row["label"] for row in as_json["classes"]] == [0, 1, 2, 3]
    header, first, second, final, summary, cost, guarantee, by_class, *classes = str(report).splitlines()
    assert guarantee == "fitted on these samples: nothing is guaranteed on others"
    assert header.split() == ["exit", "accuracy", "temperature", "threshold", "leaving", "ms"]
    assert (first.split()[0], second.split()[3], final.split()[0]) == ("0", "-", "final")
    assert len({len(line) for line in (header, first, second, final)}) == 1
    assert "on 600 samples" in summary
    assert f"{report.mean_cost:.4g} ms" in cost
    assert by_class.split()[:4] == ["class", "samples", "recall", "of"]
    worst = max(report.classes, key=lambda row: row.drop)
    assert classes[0].split()[:3] == [str(worst.label), str(worst.num_samples), f"{worst.recall:.1%}"]
    assert len({len(line) for line in [by_class, *classes[:4]]}) == 1
    assert classes[4:] == [f"warning: {report.warning}"]


def test_report_tells_what_becomes_of_each_class(model: cet.EarlyExit, held_out: Batches) -> None:
    calibration = calibrate(model, held_out, 0.02)
    x, y = (torch.cat(parts) for parts in zip(*held_out, strict=True))
    model.policy = calibration.policy
    output, final = model.predict(x), model.exit_logits(x)[-1].argmax(1)
    for row in calibration.report.classes:
        of_class = y == row.label
        assert row.num_samples == of_class.sum() == sum(row.num_leaving)
        assert row.num_leaving == tuple(torch.bincount(output.exit_index[of_class], minlength=3).tolist())
        assert row.exit_shares == pytest.approx([count / row.num_samples for count in row.num_leaving])
        assert row.recall == pytest.approx((output.labels == y)[of_class].double().mean().item())
        assert row.final_recall == pytest.approx((final == y)[of_class].double().mean().item())
    assert [row.label for row in calibration.report.classes] == [0, 1, 2, 3]


def test_a_class_that_loses_more_than_the_bound_is_warned_about(model: cet.EarlyExit, held_out: Batches) -> None:
    with pytest.warns(
        UserWarning, match=r"^\d class(es)? loses? more recall than 5 points, most of all class 1, "
    ) as w:
        report = calibrate(model, held_out, 0.05).report
    assert [str(warning.message) for warning in w] == [report.warning]
    assert str(report).splitlines()[-1] == f"warning: {report.warning}"
    assert report.to_dict()["warning"] == report.warning
    assert w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = calibrate(model, held_out, 0.05, metric="per_class").report
    assert report.warning is None
    assert "warning" not in str(report)


def recall_of_class_1(labels: Tensor, predictions: Tensor) -> Tensor:
    return (predictions == labels)[labels == 1].double().mean()


@pytest.mark.parametrize("max_drop", [0.0, 0.01, 0.05])
def test_metrics_are_bounded_and_reported(model: cet.EarlyExit, held_out: Batches, max_drop: float) -> None:
    def check(metric: Any, class_weights: Any = None) -> tuple[Any, float]:
        report = calibrate(model, held_out, max_drop, metric=metric, class_weights=class_weights).report
        assert report.metric_drop <= max_drop + 1e-12
        return report, report.metric_drop

    report, drop = check("accuracy")
    assert (report.metric, drop) == ("accuracy", pytest.approx(report.drop))
    report, drop = check("balanced")
    assert report.metric == "balanced"
    assert drop == pytest.approx(np.mean([row.drop for row in report.classes]))
    report, drop = check("balanced", [0, 0, 3.5, 0])
    assert drop == pytest.approx(report.classes[2].drop)
    report, drop = check("accuracy", torch.tensor([0.0, 2.0, 1.0, 0.0]))
    one, two = report.classes[1:3]
    weights = np.array([2 * one.num_samples, two.num_samples])
    assert drop == pytest.approx(np.average([one.drop, two.drop], weights=weights))
    report, drop = check("per_class")
    assert drop == pytest.approx(max(row.drop for row in report.classes))
    assert f"per_class drops by {100 * drop:.2f} points; accuracy" in str(report)
    report, drop = check(recall_of_class_1)
    assert report.metric == "recall_of_class_1"
    assert drop == pytest.approx(report.classes[1].drop)
    assert report.mean_cost < report.full_cost


@pytest.mark.parametrize(
    ("score", "dtype"),
    sampled(product(["entropy", "confidence", "margin"], [torch.bfloat16, torch.float16, torch.float64]), 4),
)
def test_no_row_leaves_elsewhere_than_calibrated(
    model: cet.EarlyExit, held_out: Batches, dtype: torch.dtype, score: ScoreName
) -> None:
    """Every sample, also those of one score with many others, as coarse dtypes have them."""
    model = copy.deepcopy(model).to(dtype)
    batches = [(x.to(dtype), y) for x, y in held_out]
    calibration = calibrate(model, batches, 0.02, score=score)
    model.policy = calibration.policy
    outputs = [model.predict(x) for x, _ in batches]
    leaving = torch.cat([output.exit_index for output in outputs]).bincount(minlength=3).tolist()
    per_exit = np.sum([row.num_leaving for row in calibration.report.classes], axis=0)
    assert leaving == per_exit.tolist()
    right = sum((output.labels == y).sum().item() for output, (_, y) in zip(outputs, batches, strict=True))
    assert calibration.report.accuracy == pytest.approx(right / 600)
    assert min(leaving[:2]) > 0


def test_predict_is_compared_with_the_backbone_on_the_first_batch(
    held_out: Batches, model: cet.EarlyExit, monkeypatch: pytest.MonkeyPatch
) -> None:
    exit_answers = cet.EarlyExit.exit_answers

    def astray(self: cet.EarlyExit, x: Tensor) -> Any:
        first, (logits, scores), final = exit_answers(self, x)
        return first, (logits + 1, scores), final

    monkeypatch.setattr(cet.EarlyExit, "exit_answers", astray)
    seen = []

    def loader() -> Iterable[Any]:
        for batch in held_out:
            seen.append(batch)
            yield batch

    with pytest.raises(RuntimeError, match="otherwise than the backbone at exit '1', by up to 1"):
        calibrate(model, loader())
    assert len(seen) == 1


def test_wrapped_models_are_unwrapped(model: cet.EarlyExit, held_out: Batches) -> None:
    expected = calibrate(model, held_out)
    assert calibrate(nn.DataParallel(model), held_out) == expected
    assert calibrate(torch.compile(model), held_out) == expected  # type: ignore[arg-type]


def test_models_of_another_kind_are_refused(held_out: Batches) -> None:
    net = nn.Linear(3, 2)
    recordings = [
        torch.jit.trace(net, torch.zeros(2, 3)),
        torch.export.export(net, (torch.zeros(2, 3),)),
        torch.export.export(net, (torch.zeros(2, 3),)).module(),
    ]
    for recording in recordings:
        with pytest.raises(TypeError, match=r"is \w+, a recording; give the cet.EarlyExit that it was made from"):
            calibrate(recording, held_out)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model is Linear, which is no cet.EarlyExit; wrap it first: cet.EarlyExit"):
        calibrate(net, held_out)
    with pytest.raises(TypeError, match=r"model is function, which is no cet.EarlyExit"):
        calibrate(waves, held_out)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loader": None}, r"loader is None; give an iterable of batches, such as a torch.utils"),
        ({"loader": torch.zeros(3)}, "loader is a Tensor"),
        ({"max_accuracy_drop": "1%"}, "max_accuracy_drop is '1%'; give a number as a fraction, 0.01 for 1 %"),
        ({"max_accuracy_drop": None}, "max_accuracy_drop is None"),
        ({"max_accuracy_drop": True}, "max_accuracy_drop is True"),
        ({"confidence": "95%"}, "confidence is '95%'"),
    ],
)
def test_arguments_of_a_wrong_type_are_refused(model: cet.EarlyExit, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        calibrate(model, **{"loader": [], **options})


def test_temperature_minimises_cross_entropy() -> None:
    for scale in (0.3, 1.0, 4.0):
        logits = scale * torch.randn(400, 5)
        labels = torch.distributions.Categorical(logits=torch.randn(400, 5) + logits / scale).sample()

        def loss(log_temperature: float, logits: Tensor = logits, labels: Tensor = labels) -> float:
            scaled = logits.double() / np.exp(log_temperature)
            return nn.functional.cross_entropy(scaled, labels, label_smoothing=1 / 402).item()

        best = minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-8})
        assert fit_temperature(logits, labels) == pytest.approx(np.exp(best.x), rel=1e-4)


def test_temperature_of_calibrated_logits_is_recovered() -> None:
    logits = 2 * torch.randn(40_000, 6)
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert fit_temperature(2.5 * logits, labels) == pytest.approx(2.5, rel=0.03)


def test_temperature_of_separable_samples_admits_an_unseen_error() -> None:
    labels = torch.arange(998) % 2
    logits = nn.functional.one_hot(labels).float()
    sure = torch.softmax(logits / fit_temperature(logits, labels), dim=1).amax(dim=1)
    assert sure == pytest.approx(1 - 1 / 2000, abs=1e-6)


def test_temperature_is_bounded() -> None:
    labels = torch.arange(12) % 3
    separable = nn.functional.one_hot(labels).float()
    assert fit_temperature(1e-3 * separable, labels) == pytest.approx(1 / 20)
    assert fit_temperature(1e38 * separable, labels) == pytest.approx(20)
    assert fit_temperature(-separable, labels) == pytest.approx(20)


def test_temperature_leaves_out_rows_that_are_not_finite() -> None:
    logits, labels = torch.randn(50, 3), torch.randint(3, (50,))
    broken = torch.cat([logits, torch.full((2, 3), float("nan")), torch.tensor([[float("-inf"), 0.0, 1.0]])])
    assert fit_temperature(broken, torch.cat([labels, labels[:3]])) == fit_temperature(logits, labels)
    assert fit_temperature(broken[50:], labels[:3]) == 1.0


def test_interval_by_hand() -> None:
    # Proportions 10/100 and 5/100; 1.959964 * sqrt((0.15 - 0.05**2) / 100) is 0.075274.
    assert drop_interval(9, 4, 98, 0.95) == pytest.approx((0.05 - 0.075274, 0.05 + 0.075274), abs=1e-5)
    assert drop_interval(4, 9, 98, 0.95) == pytest.approx((-0.05 - 0.075274, -0.05 + 0.075274), abs=1e-5)
    low, high = drop_interval(1, 0, 1, 0.999)
    assert -1 <= low < high <= 1


@pytest.mark.parametrize(("lost", "won", "num_samples"), [(0.05, 0.02, 100), (0.01, 0.01, 300), (0.3, 0.1, 50)])
def test_interval_covers_the_truth(lost: float, won: float, num_samples: int) -> None:
    rng = np.random.default_rng(0)
    draws = rng.multinomial(num_samples, [lost, won, 1 - lost - won], size=4000)
    intervals = np.array([drop_interval(int(a), int(b), num_samples, 0.9) for a, b, _ in draws])
    covered = (intervals[:, 0] <= lost - won) & (lost - won <= intervals[:, 1])
    assert 0.89 <= covered.mean() <= 0.97


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "loader yields no labelled rows"),
        ([(zeros(3, 2, 32), -100 * ones(3))], ValueError, "loader yields no labelled rows"),
        ([zeros(3, 2, 32)], TypeError, r"a batch is Tensor without labels; make the loader yield \(x, y\)"),
        ([(zeros(3, 2, 32),)], TypeError, "a batch is tuple of 1 without labels"),
        ([("x", ones(3))], TypeError, "the loader's x is str without a tensor"),
        ([(zeros(3, 2, 32), [1, 1, 1])], TypeError, "the loader's y is list; give class indices as an int64"),
        ([(zeros(3, 2, 32), zeros(3))], TypeError, "the loader's y is torch.float32"),
        ([(zeros(3, 2, 32), ones(3, 1))], ValueError, r"y has shape \(3, 1\) for 3 rows of x; give shape \(3,\)"),
        ([(zeros(3, 2, 32), ones(4))], ValueError, r"y has shape \(4,\) for 3 rows"),
        ([(zeros(3, 2, 32), 4 * ones(3))], ValueError, r"label 4 for 4 classes; give labels in \[0, 4\), or -100"),
        ([(zeros(3, 2, 32), -1 * ones(3))], ValueError, "label -1 for 4 classes"),
    ],
)
def test_bad_loaders_are_refused(
    model: cet.EarlyExit, loader: Iterable[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        calibrate(model, loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_accuracy_drop": 1.0}, r"max_accuracy_drop is 1.0; give a fraction in \[0, 1\)"),
        ({"max_accuracy_drop": -0.1}, "max_accuracy_drop is -0.1"),
        ({"max_accuracy_drop": float("nan")}, "max_accuracy_drop is nan"),
        ({"confidence": 1.0}, r"confidence is 1.0; give a level in \(0, 1\)"),
        ({"confidence": 95}, "confidence is 95"),
        ({"score": "energy"}, "score 'energy' is unknown; choose one of entropy, confidence, margin"),
        ({"metric": "f1"}, "metric 'f1' is unknown"),
        ({"class_weights": [1.0]}, r"class_weights is \[1.0\]; give 4"),
        ({"costs": ExitCosts((1, 1), (0,))}, "costs has 2 stages but the model has 3 exits"),
    ],
)
def test_bad_arguments_are_refused_before_any_batch(
    model: cet.EarlyExit, options: dict[str, Any], message: str
) -> None:
    def loader() -> Iterable[Any]:
        raise AssertionError("the loader was read")
        yield

    with pytest.raises(ValueError, match=message):
        calibrate(model, loader(), **options)
