"""From what all exits say of the calibration samples to thresholds with a certificate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cet.calibration.budget import NO_BUDGET, Budget, BudgetError, Reach, rounded_up
from cet.calibration.cost import ExitCosts
from cet.calibration.guarantee import (
    Condition,
    Outcome,
    Question,
    chance_test,
    cost_question,
    mean_cost,
    num_to_fit,
    questions,
    walk,
    walk_back,
)
from cet.calibration.metrics import Metric, MetricChoice
from cet.calibration.path import lay_path, plain_path
from cet.calibration.report import Certificate, Claim, FrontPoint
from cet.calibration.thresholds import MAX_GROUP, OperatingPoint, search_thresholds, simulate
from cet.runtime.scores import PolicyScore, ScoreFunction, is_low_when_sure
from cet.words import counted, uncertain

NUM_FRONT = 25
"""How many policies of the path a certificate keeps."""

MANY_EXITS = 4
MANY_CLASSES = 50
"""With more early exits, the thresholds without a guarantee, which show its price, are searched in pairs only; with
more classes that are bounded one by one, exit by exit."""

CHANCE_DEVIATIONS = 2.0
"""How far above chance the final exit has to be, so that there is an accuracy to keep."""

RIGHT_OR_WRONG = ("accuracy", "balanced", "per_class")
"""Metrics of which a model at chance has nothing to keep, nor one that saw a single class."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Terms:
    """What is to be guaranteed, checked.

    Attributes:
        metric: what is bounded; no function.
        class_weights: ``(K,)`` or ``None``.
        bound: of the loss; ``None``: none, where there is a budget.
        confidence: ``None`` for an expectation.
        method: ``"exact"``, ``"betting"`` or ``"bentkus"``.
        split: whether some of the samples fit, and the others test.
        seed: of the division of samples, and of their order.
        budget: of the cost.
    """

    metric: MetricChoice
    class_weights: Floats | None
    bound: float | None
    confidence: float | None
    method: str
    split: bool
    seed: int
    budget: Budget = NO_BUDGET

    @property
    def level(self) -> float | None:
        """With what probability the bound may break, and with what the mean budget, where both are asked for."""
        both = self.bound is not None and self.budget.mean is not None
        return None if self.confidence is None else (1 - self.confidence) / (1 + both)

    @property
    def name(self) -> str:
        """Of the metric."""
        return self.metric if isinstance(self.metric, str) else "loss"

    def asked(self, labels: Ints, groups: Ints | None, num_classes: int) -> list[Question]:
        """The questions about some samples."""
        if self.bound is None:
            return []
        return questions(self.metric, self.class_weights, labels, groups, num_classes, self.bound)

    def least_units(self, question: Question) -> int | None:
        """How many of its units could certify."""
        return question.least_units(self.method, self.level)


@dataclass(frozen=True)
class Answers:
    """What all exits say of the calibration samples under one condition.

    Attributes:
        name: ``"clean"`` or the name of the perturbation.
        scores: ``(n, E - 1)`` float32, low where a sample may leave.
        predictions: ``(n, E)`` int64.
        correct: ``(n, E)`` bool.
        metric: on these samples.
    """

    name: str
    scores: NDArray[np.float32]
    predictions: Ints
    correct: NDArray[np.bool_]
    metric: Metric


def divide(terms: Terms, labels: Ints, groups: Ints | None, num_classes: int) -> NDArray[np.bool_]:
    """Which samples fit temperatures and lay the path, ``(n,)``; the others test it.

    A random fifth, or as many as the test can spare. Groups stay together. The recall of classes is asked of samples
    whose labels are given, so each class is divided for itself.
    """
    rng = np.random.default_rng(terms.seed)
    is_fit = np.zeros(len(labels), dtype=bool)
    if not terms.split or not len(labels):
        return is_fit
    probe = terms.asked(labels, groups, num_classes)
    least_of = [terms.least_units(question) or 0 for question in probe]
    least = max(least_of, default=0)
    if groups is not None:
        num_groups = int(groups.max()) + 1
        chosen = rng.permutation(num_groups)[: num_to_fit(num_groups, least)]
        return np.isin(groups, chosen)
    by_class = terms.metric in ("balanced", "per_class")
    for stratum in [np.flatnonzero(labels == c) for c in range(num_classes)] if by_class else [np.arange(len(labels))]:
        if terms.metric == "balanced":  # whose classes need not be equally many
            concerned = [
                n for n, question in zip(least_of, probe, strict=True) if np.isin(stratum, question.rows).any()
            ]
            least = max(concerned, default=0)
        is_fit[rng.permutation(stratum)[: num_to_fit(len(stratum), least)]] = True
    return is_fit


@dataclass(frozen=True)
class Search:
    """What was tested, and how far it came.

    Attributes:
        path: thresholds of policies from safe to bold; empty where none was looked at.
        asked: what had to be kept by the samples that tested.
        outcome: of the test; ``None`` where none was looked at.
        reason: why nothing is certified, or ``None``.
        first: the safest policy that is within the mean budget; 0 without one.
        cost_p_value: of "it costs more than that"; ``None`` where it cannot.
        chosen: the policy that was chosen, by its place in the path: the boldest certified one, or with a mean budget
            the safest; ``None`` where none is certified.
    """

    path: list[tuple[float, ...]]
    asked: list[Question]
    outcome: Outcome | None
    reason: str | None
    first: int = 0
    cost_p_value: float | None = None
    chosen: int | None = None

    @property
    def certified(self) -> range:
        """Which policies of the path are certified."""
        return range(self.first, 0 if self.outcome is None else self.outcome.steps)

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """Of the chosen policy."""
        return None if self.chosen is None else self.path[self.chosen]


def search(
    terms: Terms,
    answers: Sequence[Answers],
    labels: Ints,
    groups: Ints | None,
    is_fit: NDArray[np.bool_],
    costs: ExitCosts,
    score: PolicyScore,
    num_classes: int,
) -> Search:
    """Lay the path and test it. Arguments and errors are those of :func:`certify`."""
    tested = np.random.default_rng([terms.seed, 1]).permutation(np.flatnonzero(~is_fit))  # an order drawn at random
    asked = terms.asked(labels[tested], None if groups is None else groups[tested], num_classes)
    reason = _hopeless(terms, answers[0], labels, asked, num_classes, "samples" if groups is None else "groups")
    if reason is not None:
        if not terms.budget.keeps(costs.full, costs.full):
            raise BudgetError(f"{terms.budget.text(costs.unit)} cannot be kept with all exits closed, and {reason}")
        return Search([], asked, None, reason)
    trial = _try(terms, answers, tested, asked, groups, is_fit, costs, score, num_classes)
    if terms.budget and trial.chosen is None:
        raise BudgetError(_too_dear(terms, trial, answers, tested, asked, groups, is_fit, costs, score, num_classes))
    path, first = trial.path, trial.first
    is_known = trial.spending is None or first in (0, len(trial.spending.path))
    return Search(
        [trial.reach.expand(thresholds) for thresholds in path],
        asked,
        trial.outcome,
        None if trial.outcome.steps else _refused(terms, trial.outcome, score, bool(is_fit.any())),
        first,
        None if is_known or trial.spending is None else trial.spending.at(first)[1],
        trial.chosen,
    )


@dataclass(frozen=True)
class _Trial:
    """A path and how far its test came.

    Attributes:
        reach: the exits that the path uses, and that its thresholds are of.
        path, outcome, first: of :class:`Search`.
        spending: of its policies; ``None`` without a mean budget.
    """

    reach: Reach
    path: list[tuple[float, ...]]
    outcome: Outcome
    first: int
    spending: _Spending | None

    @property
    def chosen(self) -> int | None:
        """Of :class:`Search`."""
        steps = self.outcome.steps
        step = steps - 1 if self.spending is None else self.first
        return step if 0 <= step < steps else None


def _try(
    terms: Terms,
    answers: Sequence[Answers],
    tested: Ints,
    asked: Sequence[Question],
    groups: Ints | None,
    is_fit: NDArray[np.bool_],
    costs: ExitCosts,
    score: PolicyScore,
    num_classes: int,
) -> _Trial:
    """Lay a path within the worst-case budget and test it on the samples ``tested``."""
    reach = _reach(terms, answers, costs)
    path = _path(terms, answers, is_fit, reach, score, num_classes)
    conditions = [
        Condition(
            given.name,
            reach.columns(given.scores)[tested],
            reach.columns(given.metric.losses(given.correct))[tested],
        )
        for given in answers
    ]
    if terms.budget:
        path = [reach.closed, *path]
    spending, first = None, 0
    if terms.budget.mean is not None:
        last = reach.exits[-1]
        going_on = [
            np.isnan(given.scores[tested, last]) if last < reach.num_early else np.zeros(len(tested), dtype=bool)
            for given in answers
        ]
        of_groups = None if groups is None else groups[tested]
        spending = _Spending.on(path, conditions, going_on, of_groups, reach, costs, terms)
        first = spending.first
        if reach.closed and not any(np.isnan(given.scores[:, reach.exits[0]]).any() for given in answers):
            path = [*path, (math.inf, *path[-1][1:])]  # all leave at once, which costs what it costs
    outcome = walk(path, conditions, asked, terms.method, terms.level, None if spending is None else first)
    return _Trial(reach, path, outcome, first, spending)


@dataclass(frozen=True)
class _Spending:
    """What the policies of a path cost on the samples that test, as fractions of the whole reach.

    Attributes:
        path, conditions, question, level: of :func:`walk_back`.
        full: cost of the whole reach.
        most: what the dearest of these samples costs under the safest policy.
    """

    path: list[tuple[float, ...]]
    conditions: list[Condition]
    question: Question
    level: float | None
    full: float
    most: float

    @classmethod
    def on(
        cls,
        path: list[tuple[float, ...]],
        conditions: Sequence[Condition],
        going_on: Sequence[NDArray[np.bool_]],
        groups: Ints | None,
        reach: Reach,
        costs: ExitCosts,
        terms: Terms,
    ) -> _Spending:
        """Of policies that open no exit but those that are open anywhere along the path. ``going_on`` are the rows of
        each condition that are not finite at the last exit of the reach and so go on, to the end of the model."""
        assert terms.budget.mean is not None
        full = reach.costs.full
        is_open = np.array(path).max(axis=0) > -math.inf
        paid = (reach.costs.cumulative(is_open) / full).astype(np.float32)
        whole = (costs.full + sum(costs.head[k] for k in reach.exits if k < reach.num_early)) / full
        num, most, costing = len(conditions[0].scores), 1.0, []
        for given, goes_on in zip(conditions, going_on, strict=True):
            of_rows = np.tile(paid, (num, 1))
            of_rows[goes_on, -1] = whole
            if goes_on.any():
                most = whole
            costing.append(replace(given, losses=of_rows))
        budget = terms.budget.mean / full
        question = cost_question(num, groups, float(paid.min()), float(max(paid.max(), most, budget)), budget)
        return cls(path, costing, question, terms.level, full, most)

    @property
    def first(self) -> int:
        """The safest policy within the budget; one behind the last of the path for that under which all leave."""
        if Budget(self.question.bound, None).keeps(self.most, self.most):
            return 0
        return 1 + walk_back(self.path[1:], self.conditions, self.question, self.level)

    def at(self, step: int) -> tuple[float, float | None]:
        """The least mean budget that one policy can be shown to keep, and the p-value of more than this one."""
        least, p_value = mean_cost(self.path, self.conditions, self.question, self.level, step)
        return least * self.full, p_value


def certify(
    terms: Terms,
    answers: Sequence[Answers],
    labels: Ints,
    groups: Ints | None,
    is_fit: NDArray[np.bool_],
    costs: ExitCosts,
    score: PolicyScore,
    num_classes: int,
    notes: Sequence[str] = (),
) -> tuple[tuple[float, ...], Certificate]:
    """Thresholds, low scores leaving and ``-inf`` for a closed exit, and what they guarantee.

    Args:
        terms: what is to be guaranteed.
        answers: under each condition, the clean one first.
        labels: ``(n,)``.
        groups: ``(n,)`` from 0, or ``None``.
        is_fit: as :func:`divide` gives it.
        costs: of stages and heads.
        score: of the policy.
        num_classes: ``K``.
        notes: for the certificate.

    Raises:
        BudgetError: when no policy is within the budget, or none that is keeps the bound.
    """
    found = search(terms, answers, labels, groups, is_fit, costs, score, num_classes)
    thresholds = found.thresholds or (-math.inf,) * answers[0].scores.shape[1]
    if terms.metric not in RIGHT_OR_WRONG and (doubt := _no_accuracy(answers[0], labels, num_classes)):
        notes = [*notes, doubt]  # what is promised holds, and is worth little
    fitted_cost = None
    if terms.bound is not None and not terms.budget:
        max_group = 1 if len(found.asked) > MANY_CLASSES else 2 if len(costs.head) > MANY_EXITS else MAX_GROUP
        fitted_cost = fitted(answers, costs, terms.bound, max_group, score).cost
    return thresholds, Certificate(
        method=_method(terms, found.asked),
        metric=terms.name,
        bound=terms.bound,
        confidence=terms.confidence,
        unit="samples" if groups is None else "groups",
        num_fit=int(is_fit.sum()),
        num_tested=int((~is_fit).sum()),
        claims=_claims(terms, answers, found.asked, found.outcome),
        reason=found.reason,
        mean_cost=_mean_cost(thresholds, answers, costs),
        fitted_cost=fitted_cost,
        front=_front(found, answers, costs, score),
        notes=tuple(notes),
        conditions=tuple(given.name for given in answers),
        mean_budget=terms.budget.mean,
        worst_budget=terms.budget.worst,
        cost_p_value=found.cost_p_value,
        cost_unit=costs.unit,
    )


def _method(terms: Terms, asked: Sequence[Question]) -> str:
    """How it was tested, for the certificate."""
    if terms.confidence is None:
        return "risk control"
    methods = {question.method(terms.method) for question in asked} | ({"betting"} if terms.budget.mean else set())
    return " and ".join(sorted(methods, reverse=True)) or terms.method


def mean_loss(given: Answers, exit_index: Ints) -> float:
    """What the metric loses on all samples of one condition."""
    return given.metric.drop(given.correct, exit_index)


def _path(
    terms: Terms,
    answers: Sequence[Answers],
    is_fit: NDArray[np.bool_],
    reach: Reach,
    score: PolicyScore,
    num_classes: int,
) -> list[tuple[float, ...]]:
    if not reach.closed:
        return []
    if score == "patience" or not is_fit.any():
        return plain_path(score, len(reach.closed), num_classes)
    scores, losses = [], []
    for given in answers:
        weight = given.metric.weights[is_fit]
        if terms.metric == "per_class":  # classes alike, whatever their number
            strata = given.metric.strata[is_fit]
            weight = 1.0 / np.bincount(strata)[strata]
        scores.append(reach.columns(given.scores)[is_fit])
        losses.append(reach.columns(given.metric.losses(given.correct))[is_fit] * (weight / weight.mean())[:, None])
    order = np.random.default_rng([terms.seed, 2]).permutation(len(answers) * int(is_fit.sum()))
    return lay_path(
        np.concatenate(scores)[order],
        np.concatenate(losses)[order],
        reach.costs,
        terms.bound or 0.0,
        terms.budget.mean,
    )


def _reach(terms: Terms, answers: Sequence[Answers], costs: ExitCosts) -> Reach:
    """The exits that the worst case allows; where nothing else is asked, the best single one of them."""
    reach = Reach.within(costs, terms.budget)
    if terms.bound is not None or terms.budget.mean is not None:
        return reach
    open_alone = np.where(np.eye(reach.num_early + 1, dtype=bool), math.inf, -math.inf)[:, :-1]
    alone = np.cumsum(costs.stage) + np.append(costs.head, 0.0)
    affordable = [k for k, cost in enumerate(alone) if terms.budget.keeps(0.0, cost)]
    lost = {k: max(mean_loss(given, simulate(open_alone[k], given.scores)) for given in answers) for k in affordable}
    return Reach.of(costs, [min(affordable, key=lambda k: (lost[k], alone[k]))])


def _too_dear(
    terms: Terms,
    trial: _Trial,
    answers: Sequence[Answers],
    tested: Ints,
    asked: Sequence[Question],
    groups: Ints | None,
    is_fit: NDArray[np.bool_],
    costs: ExitCosts,
    score: PolicyScore,
    num_classes: int,
) -> str:
    """That no policy within the budget keeps the bound, and the least budget with which one does."""
    if trial.outcome.steps and trial.spending is not None:
        dear, _ = trial.spending.at(trial.outcome.steps - 1)
        least = f"mean_budget={rounded_up(min(dear, trial.spending.most * trial.reach.costs.full))}"
    else:
        for worst in sorted(np.cumsum(costs.stage) + np.append(costs.head, 0.0)):
            alike = replace(terms, budget=replace(terms.budget, worst=worst))
            if not terms.budget.keeps(0.0, worst) and (
                _try(alike, answers, tested, asked, groups, is_fit, costs, score, num_classes).outcome.steps
            ):
                break
        least = f"worst_budget={rounded_up(worst)}"
    lead = f"no policy within {terms.budget.text(costs.unit)} can be shown to"
    fix = f"the least budget that these samples allow is {least}; give that"
    if terms.bound is None:
        return f"{lead} keep it; {fix}"
    return (
        f"{lead} lose at most {terms.bound:.4g}; {fix}, or a larger loss, or max_accuracy_drop=None for the best "
        "within the budget, whatever it loses"
    )


def _no_accuracy(clean: Answers, labels: Ints, num_classes: int) -> str | None:
    """Why these samples show no accuracy that could be kept."""
    present = np.unique(labels)
    if len(present) == 1:
        every = "the only labelled sample is" if len(labels) == 1 else f"all {len(labels)} labelled samples are"
        return f"{every} of class {present[0]}; give samples of every class"
    if chance_test(labels, clean.predictions[:, -1], num_classes) < CHANCE_DEVIATIONS:
        right = f"{clean.correct[:, -1].mean():.1%} of {counted(len(labels), 'sample')}"
        return (
            f"the final exit is right on {right}, which is no more than chance would have it, so there is no accuracy "
            "to keep; train the model, or give more samples"
        )
    return None


def _hopeless(
    terms: Terms, clean: Answers, labels: Ints, asked: Sequence[Question], num_classes: int, unit: str
) -> str | None:
    """Why nothing can be certified, before any policy is looked at."""
    if terms.metric in RIGHT_OR_WRONG and (reason := _no_accuracy(clean, labels, num_classes)):
        return reason
    short: list[tuple[int, Question]] = []
    for question in asked:
        least = terms.least_units(question)
        if least is None and question.low >= 0:
            return "a loss of 0 cannot be shown by any number of samples; allow a larger one"
        if least is not None and question.num_units < least:
            short.append((least, question))
    if not short:
        return None
    least, worst = min(short, key=lambda pair: pair[1].num_units)
    rarest = " of the rarest class" if worst.name.startswith("mean recall") and unit == "samples" else ""
    has = counted(worst.num_units, unit.removesuffix("s"), unit) + rarest
    others = f", and {counted(len(short) - 1, 'more has', 'more have')} too few" if len(short) > 1 else ""
    needed = counted(least, "is", "are")
    level = "in expectation" if terms.confidence is None else f"at confidence {uncertain(terms.confidence)}"
    to_fit = ", and a few more to lay the path" if terms.split else ""
    allow = ", or allow more"
    if len(asked) == 1 and not worst.base:  # else the bound is not that of the loss alone
        could = worst.least_bound(terms.method, terms.level)
        allow = f", or allow {rounded_up(could, 2)} at least" if could is not None and could < 1 else ""
    return (
        f"{worst.name} has {has} to test on{others}, and even without any loss at least {needed} "
        f"needed to show a loss within {worst.bound:.4g} {level}{to_fit}; give more{allow}"
    )


def _refused(terms: Terms, outcome: Outcome, score: PolicyScore, is_laid: bool) -> str:
    """Why not even the first policy of the path was certified; ``is_laid`` where samples laid the path."""
    if not outcome.losses and isinstance(score, ScoreFunction) and not is_laid:
        return f"all samples are needed to test, and none is left to lay a path for the score {score.name!r}; give more"
    if not outcome.losses:
        return "no sample that lays the path has a finite score at an early exit, so none could leave there"
    losses = [loss for row in outcome.losses for loss in row]
    p_values = [p for row in outcome.p_values for p in row if p is not None]
    shown = f" (p = {max(p_values):.3g}, where {terms.level:.4g} is needed)" if p_values and terms.level else ""
    return (
        f"the safest policy that was tried loses {max(losses):.4g} on the samples that test it{shown}; give more "
        "samples, allow a larger loss, or train the early exits"
    )


def _claims(
    terms: Terms, answers: Sequence[Answers], asked: Sequence[Question], outcome: Outcome | None
) -> tuple[Claim, ...]:
    tried = outcome is not None and bool(outcome.losses)
    return tuple(
        Claim(
            question.name,
            given.name,
            question.num_units,
            outcome.losses[i][j] if outcome is not None and tried else None,
            outcome.p_values[i][j] if outcome is not None and tried else None,
            terms.least_units(question),
        )
        for i, given in enumerate(answers)
        for j, question in enumerate(asked)
    )


def fitted(
    answers: Sequence[Answers],
    costs: ExitCosts,
    bound: float,
    max_group: int = MAX_GROUP,
    score: PolicyScore = "entropy",
) -> OperatingPoint:
    """The policy that is best on these samples, with no guarantee for others. Of patience, one number for all exits:
    what it counts depends on which are open."""
    together = pooled(answers)
    if score == "patience":
        num_early = together.scores.shape[1]
        points = []
        for limits in [(-math.inf,) * num_early, *plain_path(score, num_early, 0)]:
            exit_index = simulate(limits, together.scores)
            if together.metric.drop(together.correct, exit_index) <= bound + 1e-12:
                accuracy = together.correct[np.arange(len(exit_index)), exit_index].mean()
                cost = costs.cumulative(np.isfinite(limits))[exit_index].mean()
                points.append(OperatingPoint(limits, float(accuracy), float(cost)))
        return min(points, key=lambda point: point.cost)
    return search_thresholds(together.scores, together.correct, costs, bound, together.metric, max_group)


def pooled(answers: Sequence[Answers]) -> Answers:
    """The samples of several conditions as those of one."""
    if len(answers) == 1:
        return answers[0]
    metrics = [given.metric for given in answers]
    gain = None if metrics[0].gain is None else np.concatenate([metric.gain for metric in metrics])
    weights, strata = (np.concatenate([getattr(metric, name) for metric in metrics]) for name in ("weights", "strata"))
    scores, predictions, correct = (
        np.concatenate([getattr(given, name) for given in answers]) for name in ("scores", "predictions", "correct")
    )
    return Answers("pooled", scores, predictions, correct, Metric(weights, strata, None, gain, metrics[0].unit))


def _mean_cost(thresholds: Sequence[float], answers: Sequence[Answers], costs: ExitCosts) -> float:
    cost = costs.cumulative(np.array(thresholds) > -np.inf)
    return float(np.mean([cost[simulate(thresholds, given.scores)].mean() for given in answers]))


def _front(found: Search, answers: Sequence[Answers], costs: ExitCosts, score: PolicyScore) -> tuple[FrontPoint, ...]:
    """Some policies of the path, the chosen one among them."""
    path = found.path
    shown = set(np.rint(np.linspace(0, len(path) - 1, NUM_FRONT)).astype(int).tolist()) if path else set()
    shown |= set() if found.chosen is None else {found.chosen}
    sign = 1.0 if is_low_when_sure(score) else -1.0
    return tuple(
        FrontPoint(
            thresholds=tuple(None if t == -math.inf else sign * t for t in path[step]),
            cost=_mean_cost(path[step], answers, costs),
            loss=max(mean_loss(given, simulate(path[step], given.scores)) for given in answers),
            certified=step in found.certified,
            chosen=step == found.chosen,
        )
        for step in sorted(shown)
    )
