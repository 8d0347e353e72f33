"""A policy whose loss stays within a bound on new samples, with a stated probability over the calibration samples.

Learn-then-Test with fixed-sequence testing (Angelopoulos et al. 2021, arXiv 2110.01052; along the cost-accuracy front
as in Laufer-Goldshtein et al. 2023, arXiv 2210.07913): a part of the samples lays a path of policies from safe to bold,
the others test it, one policy after another at the full level, until one cannot be shown to keep the bound. The one
before is taken. All exits are tested together, as the policy that they are. To show that several things keep the bound,
such as the recall of every class, clean samples and perturbed ones, each must be shown at the full level: the claim to
be refuted is that any of them does not.

Where an expectation is enough, the path is walked by conformal risk control instead (Angelopoulos et al. 2022, arXiv
2208.02814), with losses made monotone along it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cet.calibration import bounds
from cet.calibration.metrics import BRIER, BoundedLoss, MetricChoice

Guarantee = Literal["auto", "exact", "betting", "bentkus"]
"""How p-values are computed, see :mod:`cet.calibration.bounds`; ``"auto"``: exactly where that is possible, else by
betting."""

GUARANTEES: tuple[str, ...] = get_args(Guarantee)

FIT_SHARE = 0.2
"""The fraction of samples that fit temperatures and lay the path, where the others are enough to test it."""

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Scores = NDArray[np.float32]
Losses = NDArray[np.float32]


@dataclass(frozen=True)
class Question:
    """What must not lose more than the bound, on which of the samples.

    Attributes:
        name: for reports.
        rows: positions of its samples.
        unit: of each of them, the independent unit it belongs to, such as a person, from 0; ``None``: each is its own.
        weight: of each in the mean of its unit.
        paired: whether a sample loses 1, nothing or -1.
        low, high: between which the loss of a unit stays.
        bound: of the mean loss over units.
        base: is taken off every loss before it is weighed.
    """

    name: str
    rows: Ints
    unit: Ints | None
    weight: Floats | None
    paired: bool
    low: float
    high: float
    bound: float
    base: float = 0.0

    @property
    def num_units(self) -> int:
        """How many are independent of each other."""
        return len(self.rows) if self.unit is None else int(self.unit.max(initial=-1)) + 1

    def of_units(self, losses: NDArray[np.floating]) -> NDArray[np.floating]:
        """The loss of each unit, from the losses ``(n,)`` of all samples."""
        of_rows: NDArray[np.floating] = losses[self.rows] - np.float32(self.base)
        if self.weight is not None:
            of_rows = of_rows * self.weight
        if self.unit is None:
            return of_rows
        return np.bincount(self.unit, of_rows, self.num_units).astype(np.float64)  # without rows: integers

    def method(self, wanted: str) -> str:
        """How it is tested: exactly where that is wanted and possible, else by betting."""
        return "betting" if wanted == "exact" and not self.paired else wanted

    def p_value(self, wanted: str, of_units: NDArray[np.floating], level: float) -> float:
        """Of "more than the bound is lost"."""
        method, count = self.method(wanted), len(of_units)
        if not count:
            return 1.0
        if method == "exact" and self.low < 0:
            return bounds.paired(*_lost_and_won(of_units), count, self.bound)
        if method == "exact":
            return bounds.binomial(_lost_and_won(of_units)[0], count, self.bound)
        if method == "betting":
            return bounds.betting(of_units, self.low, self.high, self.bound, level)
        # Losses without the wins are no smaller in the mean, and their range is half as wide.
        low = max(self.low, 0.0) if self.bound > 0 else self.low
        mean, span = float(of_units.clip(low).mean(dtype=np.float64)), self.high - low
        return bounds.bentkus((mean - low) / span, count, (self.bound - low) / span)

    def least_units(self, method: str, level: float | None) -> int | None:
        """How many units show that the bound is kept if none loses anything; ``None`` when no number of them does."""
        if self.bound + self.base <= 0:
            return None
        if level is None:
            return math.ceil((self.high - self.bound) / (self.bound + self.base) - 1e-9)
        return _least_units(self.method(method), self.low, self.high, self.bound, self.base, level)

    def least_bound(self, method: str, level: float | None) -> float | None:
        """The least bound, to a thousandth, that its units could show if none of them lost anything; ``None`` when they
        cannot show any below ``high``."""
        count = self.num_units
        if level is None:
            return self.high / (count + 1) if count else None
        lost_nothing, low, high = np.zeros(count), 0.0, 1.0
        for _ in range(10):
            middle = (low + high) / 2
            asked = replace(self, bound=middle * self.high)
            low, high = (low, middle) if asked.p_value(method, lost_nothing, level) <= level else (middle, high)
        return high * self.high if high < 1 else None


@lru_cache(1024)
def _least_units(method: str, low: float, high: float, bound: float, base: float, level: float) -> int:
    probe = Question("", np.empty(0, dtype=np.int64), None, None, method == "exact", low, high, bound, base)

    def refutes(count: int) -> bool:
        return probe.p_value(method, np.full(count, -base), level) <= level

    # Exactly, it is nearly always the number of which the chance of no loss, (1 - bound) ** number, is the level.
    enough = max(1, math.ceil(math.log(level) / math.log1p(-bound) - 1e-9)) if method == "exact" else 1
    if enough > 1 and refutes(enough) and not refutes(enough - 1):
        return enough
    while not refutes(enough):
        enough *= 2
    return bisect_left(range(enough), True, key=refutes)


def _lost_and_won(of_units: NDArray[np.floating]) -> tuple[int, int]:
    return int((of_units > 0.5).sum()), int((of_units < -0.5).sum())


@dataclass(frozen=True)
class Condition:
    """The tested samples as they are, or perturbed.

    Attributes:
        name: ``"clean"`` or the name of the perturbation.
        scores: ``(n, E - 1)``, low where a sample may leave.
        losses: ``(n, E)``, what leaving at each exit loses against the final one.
    """

    name: str
    scores: Scores
    losses: Losses


@dataclass(frozen=True)
class Outcome:
    """How far along the path the guarantee reaches.

    Attributes:
        steps: how many policies of the path keep the bound, from the first; 0 when none does.
        p_values: of the last of them, or of the first when none does: one per condition and question, ``None`` each
            where an expectation was controlled.
        losses: likewise, the mean loss of its units.
    """

    steps: int
    p_values: tuple[tuple[float | None, ...], ...]
    losses: tuple[tuple[float, ...], ...]


def questions(
    metric: MetricChoice,
    class_weights: Floats | None,
    labels: Ints,
    groups: Ints | None,
    num_classes: int,
    bound: float,
) -> list[Question]:
    """What a metric asks of the tested samples.

    Without groups samples are independent. The mean recall is then asked of parts of the classes, see :func:`_parts`.
    With groups the loss of a group is that of the metric within it, and groups count alike.

    Args:
        metric: not a function.
        class_weights: ``(K,)`` or ``None``.
        labels: ``(n,)``.
        groups: ``(n,)`` group of each sample, from 0, or ``None``.
        num_classes: ``K``.
        bound: of the loss.
    """
    every = np.arange(len(labels))
    low, high, paired = -1.0, 1.0, True
    if isinstance(metric, BoundedLoss) or metric == "brier":
        loss = metric if isinstance(metric, BoundedLoss) else BRIER
        low, high, paired = loss.low - loss.high, loss.high - loss.low, False
    elif metric == "disagreement":
        low = 0.0

    def question(name: str, rows: Ints, weight: Floats | None = None) -> Question:
        return _question(name, rows, groups, weight, paired, low, high, bound)

    if metric == "per_class":
        return [question(f"recall of class {label}", every[labels == label]) for label in range(num_classes)]
    if metric == "balanced":
        weights = np.ones(num_classes) if class_weights is None else class_weights
        if groups is not None:
            pairs = groups * num_classes + labels
            of_pair = np.bincount(pairs, minlength=pairs.max(initial=0) + 1)[pairs]
            return [question("mean recall", every, weights[labels] / of_pair)]
        return _parts(labels, weights, bound)
    if metric == "accuracy" and class_weights is not None:
        if groups is not None:
            return [question("accuracy", every, class_weights[labels])]
        # The mean of weighted losses over that of the weights is within the bound where the mean of weight times
        # (loss - bound) is at most 0.
        weight = class_weights[labels] / class_weights.max()
        return [Question("accuracy", every, None, weight, False, -1.0 - bound, 1.0 - bound, 0.0, bound)]
    names = {"disagreement": "disagreement", "brier": "Brier score", "accuracy": "accuracy"}
    return [question(names[metric] if isinstance(metric, str) else "loss", every)]


def _question(
    name: str,
    rows: Ints,
    groups: Ints | None,
    weight: Floats | None,
    paired: bool,
    low: float,
    high: float,
    bound: float,
) -> Question:
    """About the weighted mean over rows, or within each group."""
    if groups is None:
        return Question(name, rows, None, weight, paired and weight is None, low, high, bound)
    weight = np.ones(len(rows)) if weight is None else weight
    rows, weight = rows[weight > 0], weight[weight > 0]
    _, unit = np.unique(groups[rows], return_inverse=True)
    share = weight / np.bincount(unit, weight)[unit]
    alone = paired and len(unit) == int(unit.max(initial=-1)) + 1
    return Question(name, rows, unit, share, alone, low, high, bound)


def cost_question(num_samples: int, groups: Ints | None, low: float, high: float, budget: float) -> Question:
    """About the mean of costs between ``low`` and ``high``, over samples or groups."""
    return _question("mean cost", np.arange(num_samples), groups, None, False, low, high, budget)


def walk(
    path: Sequence[Sequence[float]],
    conditions: Sequence[Condition],
    asked: Sequence[Question],
    method: str,
    level: float | None,
    wanted: int | None = None,
) -> Outcome:
    """Test the policies of a path in their order, up to the first that cannot be shown to keep every bound.

    Args:
        path: thresholds of the policies, ``-inf`` for closed exits; none falls from one policy to the next.
        conditions: of the same tested samples.
        asked: what must keep its bound under each condition.
        method: ``"exact"``, ``"betting"`` or ``"bentkus"``.
        level: with what probability the bound may break; ``None`` controls the expectation.
        wanted: the policy of which p-values are wanted, if it keeps every bound; the last that does when not given.
    """
    replays = [_Replay(path, condition) for condition in conditions]
    tests = [_test(replay, question, method, level) for replay in replays for question in asked]
    steps = 0
    while steps < len(path) and all(test(steps) for test in tests):
        steps += 1
    if not path:
        return Outcome(0, (), ())
    at = max(min(steps - 1, steps if wanted is None else wanted), 0)
    of_units = [[question.of_units(replay.losses(at)) for question in asked] for replay in replays]
    return Outcome(
        steps,
        tuple(
            tuple(
                None if level is None else question.p_value(method, values, level)
                for question, values in zip(asked, row, strict=True)
            )
            for row in of_units
        ),
        tuple(
            tuple(float(values.mean(dtype=np.float64)) if len(values) else 0.0 for values in row) for row in of_units
        ),
    )


def walk_back(
    path: Sequence[Sequence[float]], conditions: Sequence[Condition], question: Question, level: float | None
) -> int:
    """Test the policies from the boldest back, up to the first that cannot be shown to keep the bound, here of a cost.

    Args:
        path, conditions, level: as for :func:`walk`; losses are what samples cost.
        question: about the mean cost.

    Returns:
        The safest of the policies that do; the length of the path when none does.
    """
    tests = [_test(_Replay(path, condition), question, "betting", level) for condition in conditions]
    first = len(path)
    while first > 0 and all(test(first - 1) for test in tests):
        first -= 1
    return first


def mean_cost(
    path: Sequence[Sequence[float]],
    conditions: Sequence[Condition],
    question: Question,
    level: float | None,
    step: int,
) -> tuple[float, float | None]:
    """Of one policy of a path, the p-value of "it costs more than the budget" and the least budget for which it were
    within the level; arguments are those of :func:`walk_back`."""
    if question.low == question.high:
        return question.high, None  # whatever the samples do
    of_units = [question.of_units(_Replay(path, condition).losses(step)) for condition in conditions]

    def p_value(budget: float) -> float:
        asked = replace(question, bound=budget)
        return max(asked.p_value("betting", values, level or 0.5) for values in of_units)

    if level is None:
        least = max((values.sum() + question.high) / (len(values) + 1) for values in of_units)
        return float(least), None
    low, high = max(float(values.mean()) for values in of_units), question.high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if p_value(middle) <= level else (middle, high)
    return high, p_value(question.bound)


class _Replay:
    """Where the samples of one condition leave under each policy of a path.

    As thresholds do not fall along the path, a sample may leave at an exit from some step on. Its ``since``, ``(E - 1,
    n)``, is the first step at which it has left by that exit.
    """

    def __init__(self, path: Sequence[Sequence[float]], condition: Condition) -> None:
        self.condition, self.length = condition, len(path)
        thresholds = np.asarray(path, dtype=np.float32).reshape(len(path), condition.scores.shape[1])
        first = [
            np.where(
                np.isnan(scores), len(path), np.maximum(np.searchsorted(limits, scores), (limits == -np.inf).sum())
            )
            for limits, scores in zip(thresholds.T, condition.scores.T, strict=True)
        ]
        shape = (len(first), len(condition.scores))
        self.since: Ints = np.minimum.accumulate(np.array(first, dtype=np.int64).reshape(shape), axis=0)

    def losses(self, step: int) -> Losses:
        """Of all samples under one policy, ``(n,)``."""
        exit_index = (self.since > step).sum(axis=0)
        losses: Losses = np.take_along_axis(self.condition.losses, exit_index[:, None], axis=1)[:, 0]
        return losses

    def counts(self, is_counted: NDArray[np.bool_], rows: Ints) -> Ints:
        """How many of ``rows`` are counted where they leave, ``(n, E)``, under each policy: ``(steps,)``."""
        total = np.full(self.length + 1, is_counted[rows, -1].sum())
        for k, since in enumerate(self.since[:, rows]):
            change = is_counted[rows, k].astype(np.float64) - is_counted[rows, k + 1]
            total = total + np.bincount(since, change, self.length + 1).cumsum().astype(np.int64)
        return total[:-1]


def _test(replay: _Replay, question: Question, method: str, level: float | None) -> Callable[[int], bool]:
    """Whether one policy after another, by its step, can be shown to keep the bound."""
    if level is None:
        control = _Monotone(question)
        return lambda step: control.keeps(question.of_units(replay.losses(step)))
    if question.method(method) != "exact":
        return lambda step: question.p_value(method, question.of_units(replay.losses(step)), level) <= level
    lost, won = (
        replay.counts(is_counted, question.rows)
        for is_counted in (replay.condition.losses > 0.5, replay.condition.losses < -0.5)
    )
    if question.low >= 0:
        return lambda step: bounds.binomial(int(lost[step]), question.num_units, question.bound) <= level
    test = bounds.paired_test(question.num_units, question.bound)
    statistics = test.statistics(lost, won).tolist()
    return lambda step: test.rejects(statistics[step], level)


def num_to_fit(num_samples: int, least: int) -> int:
    """How many of the samples fit; the others are enough to test, where that is possible at all."""
    return min(round(FIT_SHARE * num_samples), max(num_samples - least, 0))


def chance_test(labels: Ints, predictions: Ints, num_classes: int) -> float:
    """By how many of its deviations the number of right answers is more than chance would give them, were the labels
    shuffled (the permutation distribution of agreement; Hoeffding 1951, Ann. Math. Stat. 22, 558-566). 0 for one class.
    """
    n = len(labels)
    truth, said = (np.bincount(values, minlength=num_classes) / n for values in (labels, predictions))
    expected = truth @ said
    variance = n**2 / max(n - 1, 1) * (expected - truth @ said**2 - said @ truth**2 + expected**2)
    if variance <= 1e-12 * n:
        return 0.0
    return float(((labels == predictions).sum() - n * expected) / math.sqrt(variance))


class _Monotone:
    """Conformal risk control along a path: the loss of each unit is the largest that it has met so far, and never a
    win, so that it only grows; its mean, with one unit more that loses all, must keep the bound."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.worst = question.of_units(np.zeros(question.rows.max(initial=-1) + 1))

    def keeps(self, of_units: NDArray[np.floating]) -> bool:
        self.worst = np.maximum(self.worst, of_units)
        question, count = self.question, len(of_units)
        return float(self.worst.sum() + question.high) <= question.bound * (count + 1) + 1e-12


def _parts(labels: Ints, weights: Floats, bound: float) -> list[Question]:
    """The mean recall, by parts of the classes that each may lose a share of the bound, which was fixed before.

    If every part keeps its share the mean keeps the bound, so the claim to be refuted is again that any of them does
    not, and each is tested at the full level. Classes of like numbers are one part, asked in blocks. Were all classes
    in one, there would be as few blocks as samples of the rarest, each of which could lose everything for all that the
    test knows.

    The shares are as the losses that a part's number of samples can tell from none: of the order of the root of the
    number, and for few of the number itself.
    """
    asked = np.flatnonzero(weights > 0)
    counts = np.bincount(labels, minlength=len(weights))
    in_order = asked[np.argsort(counts[asked], kind="stable")]
    parts: list[list[int]] = []
    for label in in_order.tolist():
        if parts and counts[label] <= ALIKE * counts[parts[-1][0]]:
            parts[-1].append(label)
        else:
            parts.append([label])
    weight = weights / weights[asked].sum()
    told = np.array(
        [
            math.hypot(*(weight[part] / np.sqrt(np.maximum(counts[part], 1))))
            + weight[part].sum() * FEW / max(counts[part[0]], 1)
            for part in parts
        ]
    )
    allowed = bound * told / told.sum()
    return [
        _blocks(labels, part, weight, float(share / weight[part].sum()), len(parts) == 1)
        for part, share in zip(parts, allowed, strict=True)
    ]


ALIKE = 2.0
"""Classes are one part if none has so many times the samples of the rarest."""

FEW = 10.0
"""How many samples a class has when the share of the bound that it needs begins to be as their number, not its root."""


def _blocks(labels: Ints, part: list[int], weights: Floats, bound: float, is_whole: bool) -> Question:
    """The weighted mean recall of some classes, ascending by number: of one class, of its samples; else of as many
    blocks as the rarest has samples, within which each class has the mean of its samples there."""
    if len(part) == 1:
        rows = np.flatnonzero(labels == part[0])
        return Question(f"recall of class {part[0]}", rows, None, None, True, -1.0, 1.0, bound)
    counts = np.bincount(labels, minlength=len(weights))
    num_blocks = int(counts[part[0]])
    rows = np.flatnonzero(np.isin(labels, part)) if num_blocks else np.empty(0, dtype=np.int64)
    unit, weight = np.empty(len(rows), dtype=np.int64), np.empty(len(rows))
    for label in part if num_blocks else ():
        of_class = labels[rows] == label
        unit[of_class] = np.arange(counts[label]) % num_blocks
        weight[of_class] = weights[label] / weights[part].sum() / np.bincount(unit[of_class])[unit[of_class]]
    name = "mean recall" if is_whole else f"mean recall of classes {', '.join(map(str, sorted(part)))}"
    return Question(name, rows, unit, weight, False, -1.0, 1.0, bound)
