"""Policies within a budget: what is chosen, what is promised of it, and what is refused."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from test_guarantee import COSTS, answers, certificate_of, certified

import cet
from cet.calibration.budget import Budget, BudgetError, Reach, rounded_up
from cet.calibration.cost import ExitCosts
from cet.calibration.guarantee import Condition, cost_question, walk_back

DEAR = ExitCosts((1.0, 1.0, 1.0, 1.0), (0.5, 0.1, 0.2))


def paid(calibration: cet.Calibration, num: int = 20_000, seed: int = 9) -> tuple[float, float, float]:
    """The mean cost, the largest one and the drop of accuracy on new samples."""
    given = answers(num, seed)
    thresholds = [-math.inf if t is None else t for t in calibration.policy.thresholds]
    exits = np.column_stack([given["scores"] <= thresholds, np.ones(num, dtype=bool)]).argmax(axis=1)
    cost = COSTS.cumulative([t is not None for t in calibration.policy.thresholds])[exits]
    right = given["predictions"] == given["labels"][:, None]
    return cost.mean(), cost.max(), right[:, -1].mean() - right[np.arange(num), exits].mean()


@pytest.mark.parametrize("confidence", [0.9, None])
@pytest.mark.parametrize("budget", [1.2, 1.5, 2.5])
def test_the_best_within_a_mean_budget_is_within_it_on_new_samples(budget: float, confidence: float | None) -> None:
    calibration = certified(bound=None, confidence=confidence, mean_budget=budget)
    mean, _, _ = paid(calibration)
    assert 0.95 * budget < mean < 1.02 * budget
    certificate = certificate_of(calibration)
    assert f"the mean cost on new samples of the same kind is within {budget:g} FLOPs" in certificate.promise
    assert certificate.promise.endswith("what is lost is not bounded")
    assert certificate.fitted_cost is None
    assert certificate.claims == ()
    assert certificate.method == ("risk control" if confidence is None else "betting")
    if confidence is not None:
        assert certificate.cost_p_value is not None
        assert certificate.cost_p_value <= 0.1
    [chosen] = [point for point in certificate.front if point.chosen]
    assert chosen.certified
    assert not any(point.certified for point in certificate.front if point.cost > chosen.cost)
    assert certificate.plot_front().axes[0].get_xlabel().endswith("FLOPs")


def test_both_budget_and_bound_are_promised_each_at_half_the_level() -> None:
    calibration = certified(bound=0.02, mean_budget=1.3)
    certificate = certificate_of(calibration)
    assert "is within 2 points of the full model's and the mean cost is within 1.3 FLOPs" in certificate.promise
    [claim] = certificate.claims
    for p_value in (claim.p_value, certificate.cost_p_value):
        assert p_value is not None
        assert p_value <= 0.05
    mean, _, drop = paid(calibration)
    assert mean <= 1.3
    assert drop <= 0.02
    least_cost = certified(bound=0.02)
    assert least_cost.report.mean_cost < calibration.report.mean_cost  # what is left of the budget keeps accuracy
    assert least_cost.report.metric_drop > calibration.report.metric_drop


def test_a_worst_case_budget_is_the_last_exit_that_anybody_reaches() -> None:
    calibration = certified(bound=0.1, worst_budget=2.1)
    assert calibration.policy.thresholds[1] == math.inf
    mean, worst, drop = paid(calibration)
    assert worst <= 2.1
    assert mean < worst
    assert drop <= 0.1
    certificate = certificate_of(calibration)
    assert "within 10 points" in certificate.promise
    assert "every sample costs at most 2.1 FLOPs, unless its logits are not finite" in certificate.promise
    as_json = json.loads(json.dumps(calibration.report.to_dict(), allow_nan=False))
    assert as_json["exits"][1]["threshold"] == "inf"
    assert " all " in str(calibration.report)
    both = certified(bound=0.1, worst_budget=2.1, mean_budget=1.6)
    assert paid(both)[0] <= 1.6
    assert paid(both)[1] <= 2.1
    best = certified(bound=None, worst_budget=2.1)
    assert best.policy.thresholds == (None, math.inf)
    assert "tested on" not in str(best.report)
    assert certificate_of(best).promise.startswith("certain: every sample costs at most 2.1 FLOPs")
    sure = 1 / (1 + np.exp(answers(3000)["scores"]))
    confidence = certified(bound=0.1, worst_budget=2.1, score="confidence", scores=sure)
    assert confidence.policy.thresholds[1] == -math.inf


def test_a_budget_for_all_closes_all_exits_and_one_for_none_leaves_at_the_first() -> None:
    assert certified(bound=None, mean_budget=3.0).policy.thresholds == (None, None)
    assert certified(bound=None, worst_budget=3.0).policy.thresholds == (None, None)
    at_once = certified(bound=None, mean_budget=1.02)
    assert at_once.policy.thresholds[0] == math.inf
    assert at_once.report.mean_cost == pytest.approx(1.02)
    assert certificate_of(at_once).cost_p_value is None  # it costs what it costs


def test_a_budget_that_nothing_meets_is_refused_with_the_least_that_something_does() -> None:
    for name in ("mean_budget", "worst_budget"):
        with pytest.raises(BudgetError, match=f"{name} is 0.9 FLOPs, and no exit costs less than 1.02; give at least"):
            certified(bound=None, **{name: 0.9})
    with pytest.raises(BudgetError, match=r"no policy within a mean cost of 1\.05 FLOPs can be shown") as caught:
        certified(bound=0.02, mean_budget=1.05)
    least = float(str(caught.value).split("mean_budget=")[1].split(";")[0])
    assert 1.05 < least < 1.3
    assert certificate_of(certified(bound=0.02, mean_budget=least)).certified
    with pytest.raises(BudgetError, match=r"a worst-case cost of 1\.5 FLOPs .* is worst_budget=2\.02; give"):
        certified(bound=0.05, worst_budget=1.5)
    assert certificate_of(certified(bound=0.05, worst_budget=2.02)).certified
    with pytest.raises(
        BudgetError, match="a mean cost of 2 FLOPs cannot be kept with all exits closed, and accuracy has"
    ):
        certified(**answers(80), mean_budget=2.0)


@pytest.mark.parametrize("worst", [None, 2.1])
def test_rows_that_are_not_finite_are_paid_for_to_the_end(worst: float | None) -> None:
    scores = answers(3000)["scores"].copy()
    scores[::3] = np.nan  # at every early exit
    with pytest.raises(BudgetError, match=r"within a mean cost of 1\.1 FLOPs.* can be shown to keep it; the") as caught:
        certified(bound=None, scores=scores, mean_budget=1.1, worst_budget=worst)
    least = float(str(caught.value).split("mean_budget=")[1].split(";")[0])
    calibration = certified(bound=None, scores=scores, mean_budget=least, worst_budget=worst)
    thresholds = [-math.inf if t is None else t for t in calibration.policy.thresholds]
    exits = np.column_stack([scores <= thresholds, np.ones(3000, dtype=bool)]).argmax(axis=1)
    mean = COSTS.cumulative(np.array(thresholds) > -math.inf)[exits].mean()
    assert mean < least < 1.1 * mean
    p_value = certificate_of(calibration).cost_p_value
    assert p_value is not None
    assert p_value <= 0.1


def test_a_mean_budget_below_the_only_exit_within_the_worst_case_is_refused() -> None:
    costs = ExitCosts((1.0, 1.0), (0.5,))
    given = answers(500)
    with pytest.raises(
        BudgetError, match=r"worst-case cost of 2 FLOPs can be shown to keep it; .* mean_budget=2; give"
    ):
        cet.calibrate_scores(
            given["scores"][:, :1],
            given["predictions"][:, [0, 2]],
            given["labels"],
            costs,
            None,
            0.9,
            num_classes=int(given["labels"].max()) + 1,
            mean_budget=1.6,
            worst_budget=2.0,
        )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mean_budget": -1.0}, ValueError, "mean_budget is -1.0; give a positive number in the unit of the costs"),
        ({"worst_budget": math.nan}, ValueError, "worst_budget is nan; give a positive number"),
        ({"mean_budget": "1 ms"}, TypeError, "mean_budget is '1 ms'; give a number"),
        ({"mean_budget": 2.0, "guarantee": None}, ValueError, "budgets are for a guarantee, and guarantee is None"),
        ({"bound": None}, TypeError, "max_accuracy_drop is None, and there is no budget; give one of them"),
    ],
)
def test_bad_budgets_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        certified(**options)


@pytest.mark.parametrize(
    ("budget", "exits"),
    [
        (Budget(None, None), (0, 1, 2, 3)),
        (Budget(None, 5.0), (0, 1, 2, 3)),
        (Budget(None, 4.0), (3,)),
        (Budget(None, 4.2), (2, 3)),  # the deeper head first
        (Budget(None, 4.1), (1, 3)),
        (Budget(None, 3.2), (2,)),
        (Budget(None, 3.3), (1, 2)),
        (Budget(None, 1.5), (0,)),
        (Budget(2.0, None), (0, 1, 2, 3)),
    ],
)
def test_exits_within_the_worst_case(budget: Budget, exits: tuple[int, ...]) -> None:
    reach = Reach.within(DEAR, budget)
    assert reach.exits == exits
    thresholds = reach.expand([0.5] * (len(exits) - 1))
    cost = DEAR.cumulative(np.array(thresholds) > -math.inf)
    assert max(cost[list(exits)]) <= (budget.worst or math.inf) + 1e-9
    of_reach = reach.costs.cumulative([True] * (len(exits) - 1))
    assert of_reach == pytest.approx(cost[list(exits)])


def test_an_exit_that_costs_more_than_a_later_one_is_left_out_of_a_budget() -> None:
    costs = ExitCosts((1.0, 0.1, 1.0), (0.5, 0.0))
    assert Reach.within(costs, Budget(1.2, None)).exits == (1, 2)
    with pytest.raises(BudgetError, match=r"no exit costs less than 1\.1;"):
        Reach.within(costs, Budget(1.05, None))


def test_a_least_budget_is_enough_when_it_is_given() -> None:
    for cost in (1.1, 1234567.8, 3.0, 0.00123456789, 9.999999):
        assert cost <= float(rounded_up(cost)) <= cost * (1 + 1e-5)


def test_the_walk_back_ends_before_the_first_policy_that_costs_too_much() -> None:
    """From the boldest; a safer one that would pass by chance is not reached."""
    scores = np.repeat([0.0, 1.0, 2.0, 3.0], 100)[:, None].astype(np.float32)
    cost = np.tile(np.array([0.2, 1.0], dtype=np.float32), (400, 1))
    path = [(-math.inf,), (0.0,), (1.0,), (2.0,), (3.0,)]
    question = cost_question(400, None, 0.2, 1.0, 0.7)
    # The mean costs are 1, 0.8, 0.6, 0.4 and 0.2.
    assert walk_back(path, [Condition("clean", scores, cost)], question, 0.1) == 2
    assert (
        walk_back(path, [Condition("clean", scores, cost), Condition("hot", 0 * scores + 9, cost)], question, 0.1) == 5
    )
