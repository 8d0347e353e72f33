"""What is guaranteed on new samples: the path, the test along it, the certificate, and what cannot be certified."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cet
from cet.calibration import path as paths
from cet.calibration.cost import ExitCosts
from cet.calibration.guarantee import Condition, Question, _Replay, chance_test, questions, walk
from cet.calibration.thresholds import simulate

COSTS = ExitCosts((1.0, 1.0, 1.0), (0.02, 0.02))
CLASSES = 3


def answers(num: int, seed: int = 0, skill: float = 1.5) -> dict[str, Any]:
    """Scores, predictions and labels of an easy problem; deeper exits are right more often."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=num)
    ease = rng.normal(size=(num, 1)) + np.array([0.0, 0.5, 1.0]) + 0.5 * rng.normal(size=(num, 3))
    right = ease + 0.3 * rng.normal(size=ease.shape) > -skill
    predictions = np.where(right, labels[:, None], (labels[:, None] + 1) % CLASSES)
    return {"scores": -ease[:, :2], "predictions": predictions, "labels": labels}


def certified(num: int = 3000, bound: float = 0.02, confidence: float | None = 0.9, **options: Any) -> cet.Calibration:
    given = {**answers(num), **{key: options.pop(key) for key in ("scores", "predictions", "labels") if key in options}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return cet.calibrate_scores(
            given["scores"],
            given["predictions"],
            given["labels"],
            COSTS,
            bound,
            confidence,
            num_classes=CLASSES,
            **options,
        )


def certificate_of(calibration: cet.Calibration) -> cet.Certificate:
    assert calibration.report.certificate is not None
    return calibration.report.certificate


def refused(**options: Any) -> str:
    """The reason of a calibration that certifies nothing, whose exits are all closed."""
    calibration = certified(**options)
    certificate = certificate_of(calibration)
    assert not certificate.certified
    assert calibration.policy.thresholds == (None, None)
    assert calibration.report.mean_cost == COSTS.full == certificate.mean_cost
    assert certificate.promise.startswith("nothing is certified, and all exits are closed: ")
    assert certificate.promise in str(calibration.report)
    assert certificate.reason is not None
    return certificate.reason


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 30), st.integers(2, 5))
def test_paths_and_replays_are_row_by_row_what_policies_do(seed: int, num: int, num_exits: int) -> None:
    rng = np.random.default_rng(seed)
    scores = np.round(rng.normal(size=(num, num_exits - 1)), 1).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = np.nan
    losses = rng.choice([-1.0, 0.0, 1.0], size=(num, num_exits)).astype(np.float32)
    losses[:, -1] = 0
    costs = ExitCosts(tuple(0.1 + rng.random(num_exits)), tuple(0.2 * rng.random(num_exits - 1)))
    rows = np.arange(num)
    for scale in paths._scales(scores, losses.astype(np.float64), costs):
        limits = paths._limits(scale, scores, costs)
        if not len(limits):
            continue
        path = [scale.thresholds(limit) for limit in limits]
        loss, cost = paths._sweep(scale, scores, losses.astype(np.float64), costs, limits)
        replay = _Replay(path, Condition("clean", scores, losses))
        some = rows[rng.random(num) < 0.7]
        lost = replay.counts(losses > 0.5, some)
        for step, thresholds in enumerate(path):
            assert step == 0 or all(a <= b for a, b in zip(path[step - 1], thresholds, strict=True))
            exit_index = simulate(thresholds, scores)
            assert loss[step] == pytest.approx(losses[rows, exit_index].mean(dtype=np.float64), abs=1e-9)
            assert cost[step] == pytest.approx(costs.cumulative(scale.is_open)[exit_index].mean())
            assert np.array_equal(replay.losses(step), losses[rows, exit_index])
            assert lost[step] == (losses[some, exit_index[some]] > 0.5).sum()


def test_the_walk_ends_before_the_first_policy_that_fails() -> None:
    """A later one that would pass is not reached."""
    scores = np.array([[0.1], [0.2], [0.3], [9.0]] * 100, dtype=np.float32)
    losses = np.zeros((400, 2), dtype=np.float32)
    losses[1::4, 0], losses[2::4, 0] = 1, -1  # the second step loses a quarter, the third wins it back
    every = np.arange(400)
    asked = [Question("accuracy", every, None, None, True, -1.0, 1.0, 0.05)]
    path = [(0.1,), (0.2,), (0.3,)]
    for method in ("exact", "betting"):
        outcome = walk(path, [Condition("clean", scores, losses)], asked, method, 0.05)
        assert outcome.steps == 1
        assert outcome.losses == ((0.0,),)
    both = [Condition("clean", scores, 0 * losses), Condition("noisy", scores, losses)]
    assert walk(path, both[:1], asked, "exact", 0.05).steps == 3
    assert walk(path, both, asked, "exact", 0.05).steps == 1


def test_risk_control_counts_the_worst_so_far_and_one_sample_more() -> None:
    scores = np.arange(10, dtype=np.float32)[:, None]
    losses = np.zeros((10, 2), dtype=np.float32)
    losses[3, 0], losses[5, 0], losses[4, 0] = 1, 1, -1
    asked = [Question("accuracy", np.arange(10), None, None, True, -1.0, 1.0, 0.2)]
    path = [(float(limit),) for limit in range(10)]
    # (1 + 1) / 11 is within 0.2, (2 + 1) / 11 is not; the win at 4 does not count.
    assert walk(path, [Condition("clean", scores, losses)], asked, "exact", None).steps == 5


def test_a_certificate_says_what_was_tested() -> None:
    calibration = certified()
    report, certificate = calibration.report, certificate_of(calibration)
    assert certificate.certified
    assert (certificate.method, certificate.unit, certificate.metric) == ("exact", "samples", "accuracy")
    assert (certificate.num_fit, certificate.num_tested) == (600, 2400)
    [claim] = certificate.claims
    assert claim.p_value is not None
    assert claim.p_value <= 0.1
    assert (claim.name, claim.condition, claim.num_units, claim.least_units) == ("accuracy", "clean", 2400, 114)
    assert certificate.least_units == 114
    assert certificate.mean_cost == pytest.approx(report.mean_cost)
    assert certificate.fitted_cost < certificate.mean_cost < report.full_cost
    [chosen] = [point for point in certificate.front if point.chosen]
    assert chosen.thresholds == calibration.policy.thresholds
    assert chosen.cost == pytest.approx(report.mean_cost)
    assert chosen.loss == pytest.approx(report.metric_drop, abs=1e-6)
    after = [point for point in certificate.front if not point.certified]
    assert all(point.cost < chosen.cost for point in after)
    assert sum(line.startswith(" *") for line in certificate.front_table().splitlines()) == 1
    text = str(report)
    for part in ("with probability 0.9", "within 2 points", "2400 samples (exact)", "groups="):
        assert part in text
    as_json = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert as_json["certificate"]["claims"][0]["p_value"] == claim.p_value


def test_without_a_guarantee_nothing_is_promised() -> None:
    report = certified(guarantee=None).report
    assert report.certificate is None
    assert "nothing is guaranteed" in str(report)
    assert report.mean_cost < certified().report.mean_cost


def test_the_same_seed_gives_the_same_policy_and_another_divides_otherwise() -> None:
    assert certified() == certified()
    assert certified().report.certificate != certified(seed=1).report.certificate


@pytest.mark.parametrize(
    "options",
    [
        {"guarantee": "betting"},
        {"guarantee": "bentkus"},
        {"split": False},
        {"confidence": None},
        {"metric": "balanced", "bound": 0.03},
        {"metric": "per_class", "bound": 0.05},
        {"metric": "disagreement", "bound": 0.1},
        {"class_weights": [1.0, 2.0, 3.0]},
        {"groups": np.arange(3000) // 5, "bound": 0.04},
        {"groups": np.arange(3000) // 5, "bound": 0.1, "metric": "per_class"},
        {"groups": np.arange(3000) // 5, "bound": 0.06, "metric": "balanced"},
        {"groups": np.arange(3000) // 5, "bound": 0.04, "class_weights": [1.0, 2.0, 3.0]},
        {"score": "confidence", "scores": -answers(3000)["scores"]},
    ],
)
def test_every_method_and_metric_certifies_something(options: dict[str, Any]) -> None:
    calibration = certified(**options)
    certificate = certificate_of(calibration)
    assert certificate.certified, certificate.reason
    assert calibration.report.mean_cost < calibration.report.full_cost
    level = 0.1
    for claim in certificate.claims:
        assert claim.loss is not None
        assert claim.loss <= certificate.bound
        assert claim.p_value is None if options.get("confidence", 0.9) is None else (claim.p_value or 0) <= level
    if "split" in options:
        assert certificate.num_fit == 0
        assert calibration.policy.thresholds[0] == calibration.policy.thresholds[1]


def test_units_are_those_of_the_metric() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    loss = np.array([1.0, 0, 0, 0, 1, 0, -1, 1], dtype=np.float32)
    [mean_recall] = questions("balanced", None, labels, None, 3, 0.1)
    assert mean_recall.num_units == 2  # as many as the rarest class has
    assert mean_recall.of_units(loss).mean() == pytest.approx((1 / 4 + 1 / 2 + 0) / 3)
    recalls = questions("per_class", None, labels, None, 3, 0.1)
    assert [question.of_units(loss).tolist() for question in recalls] == [[1, 0, 0, 0], [1, 0], [-1, 1]]
    groups = np.array([0, 0, 1, 1, 1, 0, 2, 2])
    [by_group] = questions("accuracy", None, labels, groups, 3, 0.1)
    assert by_group.of_units(loss).tolist() == pytest.approx([1 / 3, 1 / 3, 0])
    [weighted] = questions("accuracy", np.array([1.0, 2.0, 4.0]), labels, None, 3, 0.1)
    # The weighted drop is within the bound where this mean is at most 0.
    weights = np.array([1.0, 1, 1, 1, 2, 2, 4, 4])
    drop = (weights * loss).sum() / weights.sum()
    assert weighted.of_units(loss).sum() * 4 == pytest.approx((drop - 0.1) * weights.sum(), rel=1e-5)
    [within] = questions("balanced", None, labels, groups, 3, 0.1)
    assert within.of_units(loss).tolist() == pytest.approx([(1 / 2 + 0) / 2, (0 + 1) / 2, 0])


@pytest.mark.parametrize("weights", [None, np.array([1.0, 2.0, 0.0, 3.0, 1.0])])
def test_the_mean_recall_of_unlike_classes_is_asked_in_parts_that_share_the_bound(weights: Any) -> None:
    labels = np.repeat([0, 1, 2, 3, 4], [1200, 30, 200, 600, 200])
    asked = questions("balanced", weights, labels, None, 5, 0.04)
    shares = np.ones(5) / 5 if weights is None else weights / weights.sum()
    loss = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=len(labels)).astype(np.float32)
    of_classes = np.array([loss[labels == label].mean() for label in range(5)])
    parts = [(1,), (2, 4), (3, 0)] if weights is None else [(1,), (4,), (3, 0)]
    allowed = lost = 0.0
    for question, part in zip(asked, parts, strict=True):
        share = shares[list(part)]
        mean = (share * of_classes[list(part)]).sum() / share.sum()
        assert question.of_units(loss).mean() == pytest.approx(mean, abs=1e-6)
        assert set(labels[question.rows]) == set(part)
        assert question.paired == (len(part) == 1)
        assert question.method("exact") == ("exact" if len(part) == 1 else "betting")
        allowed += share.sum() * question.bound
        lost += share.sum() * mean
    # Parts that each keep their share keep the bound of the mean together.
    assert allowed == pytest.approx(0.04)
    assert lost == pytest.approx((shares * of_classes).sum(), abs=1e-6)
    assert asked[0].bound > asked[-1].bound


def test_chance_is_told_by_the_permutation_distribution() -> None:
    rng = np.random.default_rng(0)
    labels, predictions = rng.choice(3, size=60, p=[0.6, 0.3, 0.1]), rng.choice(3, size=60, p=[0.2, 0.3, 0.5])
    shuffled = np.array([(rng.permutation(labels) == predictions).sum() for _ in range(20_000)])
    expected = ((labels == predictions).sum() - shuffled.mean()) / shuffled.std()
    assert chance_test(labels, predictions, 3) == pytest.approx(expected, abs=0.05)
    assert chance_test(labels, labels, 3) > 6
    assert chance_test(np.zeros(9, dtype=int), np.zeros(9, dtype=int), 3) == 0


def test_what_is_one_is_not_called_many() -> None:
    one = {key: values[:1] for key, values in answers(3000).items()}
    lonely = {**answers(3000), "labels": np.minimum(answers(3000)["labels"], 1)}
    lonely["labels"][:] = np.arange(3000) % 2
    lonely["labels"][:2] = 2
    lonely["predictions"] = lonely["predictions"].copy()
    lonely["predictions"][:2, :2] = 0
    calibrations = [
        certified(**one),
        certified(**one, metric="disagreement"),
        certified(**one, guarantee=None),
        certified(bound=0.01),
        certified(bound=0.01, metric="disagreement"),
        certified(groups=np.zeros(3000)),
        certified(groups=np.arange(3000) % 2, bound=0.01),
        certified(metric="per_class", **lonely),
        certified(bound=0.01, metric="balanced", **lonely),
        certified(bound=0.6, confidence=0.1, metric="per_class", split=False),
    ]
    for calibration in calibrations:
        text = str(calibration.report)
        wrong = re.search(
            r"(?<![\d.])1 (\w+ )?(samples|groups|classes|points|hundredths|others|units|labels|have|are)\b", text
        )
        assert wrong is None, f"{wrong}: {text}"
    assert "within 1 point of" in certified(bound=0.01).report.certificate.promise  # type: ignore[union-attr]
    assert "accuracy has 1 group to test on" in str(certified(groups=np.zeros(3000)).report)
    with pytest.raises(ValueError, match=r"groups has 1 entry for 2 rows"):
        certified(**{key: values[:2] for key, values in answers(3000).items()}, groups=[0])


def test_what_cannot_be_certified_closes_all_exits_and_says_why() -> None:
    few = answers(80)
    reason = refused(**few)
    assert "accuracy has 80 samples to test on, and even without any loss at least 114 are needed" in reason
    one_class = answers(3000)
    one_class["labels"] = np.full(3000, 2)
    assert refused(**one_class) == "all 3000 labelled samples are of class 2; give samples of every class"
    chance = answers(3000)
    chance["predictions"] = np.random.default_rng(0).integers(CLASSES, size=(3000, 3))
    assert "no more than chance would have it" in refused(**chance)
    rare = answers(3000)
    is_rare = rare["labels"] == 2
    rare["labels"][is_rare] = np.where(np.arange(is_rare.sum()) < 3, 2, 0)
    assert "recall of class 2 has 3 samples to test on" in refused(**rare, metric="per_class")
    assert "recall of class 2 has 3 samples to test on" in refused(**rare, metric="balanced")
    alike = answers(60)
    assert "mean recall has" in refused(**alike, metric="balanced")
    assert "samples of the rarest class to test on" in refused(**alike, metric="balanced")
    absent = answers(3000)
    absent["labels"] %= 2
    assert "recall of class 2 has 0 samples" in refused(**absent, metric="per_class")
    assert "accuracy has 20 groups to test on" in refused(groups=np.arange(3000) // 150)
    assert "cannot be shown by any number of samples" in refused(metric="disagreement", bound=0.0)
    assert "the safest policy that was tried loses" in refused(bound=0.0)
    nan = answers(3000)
    nan["scores"] = np.full((3000, 2), np.nan)
    assert "no sample that lays the path has a finite score" in refused(**nan)
    assert certificate_of(certified(**few)).least_units == 114


def test_a_few_samples_more_than_the_least_are_used_for_the_test() -> None:
    given = answers(130)
    given["predictions"][:] = given["labels"][:, None]  # no exit is ever wrong
    certificate = certificate_of(certified(**given))
    assert certificate.num_tested == 114
    assert certificate.certified
    stratified = answers(3 * 60)
    stratified["predictions"][:] = stratified["labels"][:, None]
    per_class = certificate_of(certified(**stratified, metric="per_class", bound=0.05))
    assert min(claim.num_units for claim in per_class.claims) >= 45


def test_groups_are_kept_together_and_noted() -> None:
    groups = np.random.default_rng(0).permutation(3000) % 500
    certificate = certificate_of(certified(groups=groups, bound=0.05))
    assert certificate.unit == "groups"
    [claim] = certificate.claims
    assert claim.num_units == 400  # of 500; a fifth lay the path
    assert "3000 samples are in 500 groups" in certificate.notes[0]
    alone = certificate_of(certified(groups=np.arange(3000)))
    assert "every group holds a single row" in alone.notes[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"guarantee": "hope"}, ValueError, "guarantee 'hope' is unknown; choose one of auto, exact, betting, bentkus"),
        ({"guarantee": None, "groups": np.zeros(3000)}, ValueError, "groups are for a guarantee"),
        (
            {"guarantee": "exact", "groups": np.zeros(3000)},
            ValueError,
            "guarantee is 'exact', which is for right-or-wro",
        ),
        ({"guarantee": "exact", "metric": "balanced"}, ValueError, "give 'betting', or leave out groups"),
        ({"metric": "brier"}, ValueError, "metric is 'brier', which needs logits; give a model"),
        ({"groups": np.zeros(7)}, ValueError, "groups has 7 entries for 3000 rows"),
        ({"groups": np.full(3000, np.nan)}, ValueError, "groups holds a missing value"),
        ({"groups": np.zeros((3000, 2))}, ValueError, r"groups has shape \(3000, 2\)"),
        ({"seed": -1}, ValueError, "seed is -1; give a whole number"),
        ({"confidence": 1.5}, ValueError, "confidence is 1.5; give a level"),
        ({"labels": np.full(3000, 7)}, ValueError, r"labels holds classes from 7 to 7; give indices in \[0, 3\)"),
        ({"labels": np.zeros(3000)}, TypeError, "labels is float64; give class indices"),
        ({"scores": np.zeros((3000, 3))}, ValueError, r"scores has shape \(3000, 3\); for 3000 labels"),
        ({**answers(0)}, ValueError, "labels is empty; give held-out samples"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        certified(**options)


def rows(num: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (num,), generator=generator)
    return torch.randn(num, 8, generator=generator) + 3 * torch.eye(8)[y] * torch.rand(num, 1, generator=generator), y


@pytest.fixture(scope="module")
def model() -> cet.EarlyExit:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, CLASSES))
    x, y = rows(1024, 1)
    model = cet.EarlyExit(backbone, ["1", "3"], (x[:2],)).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        sum(nn.functional.cross_entropy(logits, y) for logits in model(x)).backward()  # type: ignore[union-attr]
        optimizer.step()
    return model.eval()


def loader(num: int = 3000, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    x, y = rows(num, seed)
    return list(zip(x.split(500), y.split(500), strict=True))


@pytest.mark.filterwarnings("ignore:.*lose")
def test_a_model_keeps_its_promise_on_new_samples_and_perturbed_ones(model: cet.EarlyExit) -> None:
    def noise(x: Tensor) -> Tensor:
        return x + 0.5 * torch.randn_like(x)

    state = torch.random.get_rng_state()
    calibration = cet.calibrate(model, loader(), 0.03, 0.9, perturb={"noise": noise})
    assert torch.equal(torch.random.get_rng_state(), state)
    assert calibration == cet.calibrate(model, loader(), 0.03, 0.9, perturb={"noise": noise})
    certificate = certificate_of(calibration)
    assert certificate.certified
    assert [claim.condition for claim in certificate.claims] == ["clean", "noise"]
    assert "clean as well as noise" in certificate.promise
    served = model.policy
    model.policy = calibration.policy
    x, y = rows(20_000, 3)
    for inputs in (x, noise(x)):
        out, final = model.predict(inputs), model.exit_logits(inputs)[-1].argmax(1)
        assert (final == y).double().mean() - (out.labels == y).double().mean() <= 0.03
        assert (out.exit_index < 2).double().mean() > 0.2
    model.policy = served


@pytest.mark.filterwarnings("ignore:.*lose")
@pytest.mark.parametrize("metric", ["brier", cet.BoundedLoss(lambda logits, y: (logits.argmax(1) != y).float())])
def test_losses_from_logits_are_certified(model: cet.EarlyExit, metric: Any) -> None:
    bound = 0.02
    calibration = cet.calibrate(model, loader(6000), bound, 0.9, metric=metric)
    certificate = certificate_of(calibration)
    assert certificate.certified
    assert certificate.method == "betting"
    x, y = (torch.cat(parts) for parts in zip(*loader(6000), strict=True))
    served = model.policy
    model.policy = calibration.policy
    out, final = model.predict(x).logits, model.exit_logits(x)[-1]
    model.policy = served
    if metric == "brier":
        one_hot = torch.eye(CLASSES)[y]
        losses = [(logits.softmax(1) - one_hot).square().sum(1).mean().item() for logits in (out, final)]
    else:
        losses = [metric.of(logits, y).mean() for logits in (out, final)]
    assert calibration.report.metric_drop == pytest.approx(losses[0] - losses[1], abs=1e-5)
    fitted = cet.calibrate(model, loader(6000), bound, metric=metric, guarantee=None).report
    assert fitted.metric_drop <= bound + 1e-6
    assert fitted.mean_cost < calibration.report.mean_cost


@pytest.mark.filterwarnings("ignore:.*lose")
def test_groups_of_a_loader(model: cet.EarlyExit) -> None:
    x, y = rows(3000, 2)
    person = torch.arange(3000) // 6
    listed = cet.calibrate(model, loader(), 0.05, 0.9, groups=person)
    batches = [
        {"input": a, "labels": b, "person": c} for a, b, c in zip(*(t.split(500) for t in (x, y, person)), strict=True)
    ]
    told = cet.calibrate(
        model,
        batches,
        0.05,
        0.9,
        groups=lambda batch: batch["person"],
        batch_fn=lambda batch: (batch["input"], batch["labels"]),
    )
    assert told == listed
    some = y.where(torch.arange(3000) % 2 == 0, -100)
    halved = cet.calibrate(model, [(x, some)], 0.05, 0.9, groups=person.tolist())
    assert halved.report.num_samples == 1500
    dataset = TensorDataset(x, y)
    with pytest.raises(ValueError, match="groups are listed, but the loader shuffles"):
        cet.calibrate(model, DataLoader(dataset, batch_size=500, shuffle=True), groups=person)
    in_order = DataLoader(dataset, batch_size=500)
    assert cet.calibrate(model, in_order, 0.05, 0.9, groups=person) == listed
    dataset.groups = person  # type: ignore[attr-defined]
    untold = cet.calibrate(model, in_order, 0.05, 0.9)
    assert "the loader's dataset has groups, which were not given" in certificate_of(untold).notes[0]


def test_models_without_finite_logits_are_refused(model: cet.EarlyExit) -> None:
    x, y = rows(300, 2)
    x[:] = math.nan
    with pytest.raises(ValueError, match="no clean sample has finite logits at the final exit"):
        cet.calibrate(model, [(x, y)])
    x, y = rows(3000, 2)
    x[:10] = math.nan
    notes = certificate_of(cet.calibrate(model, [(x, y)], 0.05)).notes
    assert any("10 of 3000 clean samples have logits that are not finite" in note for note in notes)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"metric": lambda y, p: 0.0}, ValueError, "metric is a function of all samples together"),
        ({"perturb": 3}, TypeError, r"perturb\['perturbed'\] is 3; give a function"),
        ({"perturb": {"clean": abs}}, ValueError, "names a perturbation 'clean'"),
        (
            {"perturb": abs, "metric": lambda y, p: 0.0, "guarantee": None},
            ValueError,
            "perturb is for metrics of single",
        ),
        ({"groups": "person"}, TypeError, "groups is 'person'; give one entry per row"),
    ],
)
def test_bad_arguments_are_refused_before_any_batch(
    model: cet.EarlyExit, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    def unread() -> Iterable[Any]:
        raise AssertionError("the loader was read")
        yield

    with pytest.raises(error, match=message):
        cet.calibrate(model, unread(), **options)


@pytest.mark.parametrize(
    ("low", "high", "function", "message"),
    [
        (0.0, 1.0, lambda logits, y: logits[:, 0] + 50, "metric gives a loss of"),
        (0.0, 1.0, lambda logits, y: logits, r"metric gives shape \(5, 3\) for 5 samples"),
        (1.0, 1.0, lambda logits, y: y, "between 1.0 and 1.0; give finite numbers, low < high"),
    ],
)
def test_losses_out_of_bounds_are_refused(low: float, high: float, function: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cet.BoundedLoss(function, low, high).of(torch.rand(5, 3), torch.zeros(5, dtype=torch.int64))


def test_a_note_names_the_exit_at_which_logits_are_not_finite(model: cet.EarlyExit) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(broken.heads[0].parameters()).fill_(float("nan"))
    calibration = cet.calibrate(broken, loader(), 0.1, 0.9)
    (note,) = [note for note in certificate_of(calibration).notes if "finite" in note]
    assert note == (
        f"3000 of 3000 clean samples have logits that are not finite at an exit ({broken.exit_names[0]}); such do not "
        "leave there"
    )
    assert calibration.policy.thresholds[0] is None


def test_perturbations_get_copies_and_return_every_row(model: cet.EarlyExit) -> None:
    batches = loader()
    before = [x.clone() for x, _ in batches]

    def in_place(x: Tensor) -> Tensor:
        return x.mul_(0.0)

    both = cet.calibrate(model, batches, 0.1, 0.9, perturb={"in place": in_place, "none": lambda x: x})
    assert all(torch.equal(x, old) for (x, _), old in zip(batches, before, strict=True))
    losses = {claim.condition: claim.loss for claim in certificate_of(both).claims}
    assert losses["none"] == losses["clean"]
    with pytest.raises(ValueError, match=r"perturb\['perturbed'\] makes 10 rows of \d+; return every row of the batch"):
        cet.calibrate(model, batches, perturb=lambda x: x[:10])
    with pytest.raises(TypeError, match=r"perturb\['perturbed'\] returns nothing; return the perturbed inputs"):
        cet.calibrate(model, batches, perturb=lambda x: None)  # type: ignore[arg-type, return-value]


def test_a_promise_that_holds_and_is_worth_little_says_so() -> None:
    chance = np.random.default_rng(5).integers(CLASSES, size=3000)
    kept = certified(bound=0.05, metric="disagreement", labels=chance)
    assert "no more than chance would have it" in certificate_of(kept).notes[-1]
    one = certified(bound=0.05, metric="disagreement", labels=np.ones(3000, dtype=np.int64))
    assert certificate_of(one).notes[-1] == "all 3000 labelled samples are of class 1; give samples of every class"
    assert len(certificate_of(certified(bound=0.05, metric="disagreement")).notes) == 1


def test_no_confidence_is_written_as_certainty() -> None:
    assert "with probability 0.9999999 over" in certificate_of(certified(bound=0.1, confidence=0.9999999)).promise


def test_no_threshold_is_a_negative_zero() -> None:
    scores = -np.abs(answers(3000)["scores"]).clip(0, 1)
    policy = certified(bound=0.9, confidence=0.1, scores=-scores, score="margin", split=False).policy
    assert policy.thresholds[0] == 0
    assert math.copysign(1.0, policy.thresholds[0]) == 1.0


@pytest.mark.parametrize("guarantee", ["exact", "betting", "bentkus"])
@pytest.mark.parametrize("confidence", [0.9, None])
@pytest.mark.parametrize("grouped", [False, True])
def test_the_least_bound_that_few_could_show_is_one_for_which_they_are_enough(
    guarantee: Any, confidence: float | None, grouped: bool
) -> None:
    options: dict[str, Any] = {"confidence": confidence}
    if grouped:
        options |= {"groups": np.arange(3000) // 300, "guarantee": "auto" if guarantee == "exact" else guarantee}
    else:
        options |= {key: values[:30] for key, values in answers(3000).items()} | {"guarantee": guarantee}
    told = re.search(r"give more, or allow (\S+) at least$", refused(bound=0.01, **options))
    assert told is not None
    least = float(told[1])
    assert "are needed to show" in refused(bound=0.9 * least, **options)
    enough = certificate_of(certified(bound=least, **options))
    assert enough.certified or "the safest policy that was tried loses" in str(enough.reason)


def test_what_so_few_cannot_show_at_any_bound_is_not_offered() -> None:
    assert refused(groups=np.arange(3000) // 1500, confidence=0.95).endswith("a few more to lay the path; give more")
    assert refused(metric="per_class", confidence=0.99, bound=0.005).endswith("give more, or allow more")


def test_a_function_whose_range_is_unknown_needs_samples_that_lay_its_path() -> None:
    own = cet.ScoreFunction(lambda logits: logits.amax(1), name="largest")
    few = {key: values[:45] for key, values in answers(3000).items()}
    assert refused(bound=0.05, score=own, **few) == (
        "all samples are needed to test, and none is left to lay a path for the score 'largest'; give more"
    )


def test_a_front_of_nothing_says_so() -> None:
    few = certificate_of(certified(**{key: values[:5] for key, values in answers(3000).items()}))
    assert few.front_table() == "   no policy was tried"


def test_empty_lists_are_refused_in_a_sentence() -> None:
    with pytest.raises(ValueError, match="labels is empty; give held-out samples"):
        cet.calibrate_scores([], [], [], COSTS, num_classes=3)
