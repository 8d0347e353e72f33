"""Do certified thresholds keep their promise, and how much of the speed do they keep?

Calibration samples are drawn, again and again, from pools of samples whose exits have answered already; the pool is the
distribution, so what a policy loses on new samples is known exactly. Counted is how often that is more than promised:
at most 1 - confidence of the draws may be, within a binomial interval. Writes guarantees.csv (one row per setting,
size, metric and method), guarantees.json (where it was measured) and guarantees.md after every row, and exits with an
error where a promise is broken too often. A run that was stopped goes on with ``--missing``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import track
from scipy import stats

import cet
from benchmarks.harness import provenance
from cet.calibration.budget import Budget, BudgetError
from cet.calibration.certify import Answers, Terms, divide, fitted, search
from cet.calibration.guarantee import Condition, Question, _Replay, _test
from cet.calibration.metrics import Metric, MetricName, metric_on
from cet.calibration.thresholds import search_thresholds, simulate
from cet.files import write_atomically
from cet.ops import exit_score

RESULTS = Path(__file__).parent / "results"
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

POOL = 20_000
GRID = 40
"""How many policies the Bonferroni grid tries; of 5 to 100 those that it saves most with."""

HEAD_COST = 0.02
"""Of an exit head, where a stage costs 1."""


@dataclass(frozen=True)
class Setting:
    """A distribution of samples: evidence for the true class, of a strength of its own for each sample, under noise
    that deeper exits average out.

    Attributes:
        signal, spread: mean and deviation over samples of the strength.
        num_exits: the final one counted.
        num_classes: ``K``.
        prior: of the classes; all alike when not given.
        group_spread: deviation over groups of the strength, where samples come in groups of 8 to 40; 0: no groups.
        sharpness: of the logits of each exit, shallow first, the last for all further ones; one in which all exits are
            alike makes their scores comparable.
    """

    signal: float
    spread: float = 1.5
    num_exits: int = 4
    num_classes: int = 10
    prior: tuple[float, ...] | None = None
    group_spread: float = 0.0
    sharpness: tuple[float, ...] = (2.0,)


SETTINGS = {
    "easy": Setting(5.0),
    "hard": Setting(2.5),
    "rare classes": Setting(3.0, num_classes=4, prior=(0.7, 0.2, 0.07, 0.03)),
    "many exits": Setting(4.0, num_exits=10),
    "uneven exits": Setting(4.0, sharpness=(0.7, 4.0, 1.5, 2.0)),
    "groups": Setting(3.5, spread=0.7, group_spread=1.5),
}


@dataclass(frozen=True)
class Pool:
    """All samples of a distribution, each as likely as the other; with groups, each group is as likely as the other."""

    scores: NDArray[np.float32]
    predictions: Ints
    labels: Ints
    brier: Metric
    starts: Ints | None  # where each group begins, and the end
    costs: cet.ExitCosts
    num_classes: int

    @property
    def correct(self) -> NDArray[np.bool_]:
        """``(n, E)``"""
        return self.predictions == self.labels[:, None]

    def draw(self, num_units: int, rng: np.random.Generator) -> tuple[Ints, Ints | None]:
        """Positions of so many samples, or of the samples of so many groups, with the group of each."""
        if self.starts is None:
            return rng.integers(len(self.labels), size=num_units), None
        chosen = rng.integers(len(self.starts) - 1, size=num_units)
        sizes = self.starts[chosen + 1] - self.starts[chosen]
        rows = np.concatenate(
            [np.arange(a, b) for a, b in zip(self.starts[chosen], self.starts[chosen + 1], strict=True)]
        )
        return rows, np.repeat(np.arange(num_units), sizes)


@cache
def make_pool(name: str) -> Pool:
    """The pool of a setting; always the same."""
    setting, rng = SETTINGS[name], np.random.default_rng(sorted(SETTINGS).index(name))
    labels = rng.choice(setting.num_classes, size=POOL, p=setting.prior)
    starts = None
    strength = setting.signal + setting.spread * rng.normal(size=POOL)
    if setting.group_spread:
        starts = np.append(0, rng.integers(8, 41, size=POOL // 24).cumsum())
        starts = np.append(starts[starts < POOL], POOL)
        group = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        strength += setting.group_spread * rng.normal(size=len(starts) - 1)[group]
    evidence = np.maximum(strength, 0)[:, None] * np.eye(setting.num_classes)[labels]
    noise = np.zeros((POOL, setting.num_classes))
    exit_logits = []
    for k in range(1, setting.num_exits + 1):
        noise += rng.normal(size=noise.shape)
        sharpness = setting.sharpness[min(k, len(setting.sharpness)) - 1]
        seen = evidence * (0.6 + 0.4 * k / setting.num_exits) + noise / math.sqrt(k)
        exit_logits.append(torch.from_numpy(sharpness * seen).float())
    predictions = torch.stack([logits.argmax(dim=1) for logits in exit_logits], dim=1)
    return Pool(
        torch.stack([exit_score(logits, "entropy") for logits in exit_logits[:-1]], dim=1).numpy(),
        predictions.numpy(),
        labels,
        metric_on("brier", None, torch.from_numpy(labels), predictions, exit_logits),
        starts,
        cet.ExitCosts((1.0,) * setting.num_exits, (HEAD_COST,) * (setting.num_exits - 1)),
        setting.num_classes,
    )


@dataclass(frozen=True)
class Trial:
    """What is tried: a promise about samples of a setting.

    Attributes:
        method: ``"exact"``, ``"betting"``, ``"bentkus"``; ``"exact, no split"``; ``"risk control"``, of the
            expectation; ``"Bonferroni"``, exact p-values on a grid of that path, each at its share of the level, also
            with ``"betting"`` or ``"no split"`` behind a comma; ``"fitted"``, the best thresholds on the samples,
            without a guarantee.
        bound: of the loss; ``None``: only the budget is promised.
        budget: of the mean cost, as a fraction of the backbone's; ``None``: none.
    """

    setting: str
    num_units: int
    metric: MetricName = "accuracy"
    bound: float | None = 0.02
    confidence: float = 0.9
    method: str = "exact"
    weighted: bool = False
    budget: float | None = None

    @property
    def name(self) -> str:
        """Of the metric."""
        return ("weighted " if self.weighted else "") + self.metric

    @property
    def class_weights(self) -> Floats | None:
        """``(K,)``, where classes are weighed."""
        return np.linspace(1, 3, SETTINGS[self.setting].num_classes) if self.weighted else None

    @property
    def known(self) -> Trial:
        """What of it the best thresholds depend on."""
        return Trial(self.setting, 0, self.metric, self.bound, weighted=self.weighted, budget=self.budget)

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells its row from others."""
        return self.setting, self.num_units, self.name, self.bound, self.budget, self.confidence, self.method


@dataclass(frozen=True)
class Row:
    """What became of a trial.

    Attributes:
        broken: in how many draws the loss on new samples, or their mean cost, was more than promised.
        allowed: how many may be: the 99.9 % quantile of the binomial distribution at 1 - confidence; for an
            expectation, none are counted.
        mean_loss: on new samples, over draws.
        saved: mean compute saved, of the backbone's.
        of_best: ``saved`` over what the best thresholds for the pool save; NaN with a budget.
        closed: in how many draws nothing was certified.
        seconds: of one draw.
        least_loss: with a budget, what the best thresholds for the pool lose within it; else NaN.
        commit: of the code that was measured.
    """

    setting: str
    num_units: int
    metric: str
    bound: float | None
    confidence: float
    method: str
    draws: int
    broken: int
    allowed: int
    mean_loss: float
    saved: float
    of_best: float
    closed: int
    seconds: float
    budget: float | None = None
    least_loss: float = math.nan
    commit: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """That of its trial."""
        return self.setting, self.num_units, self.metric, self.bound, self.budget, self.confidence, self.method

    @property
    def kept(self) -> bool:
        """Whether the promise was kept as often as it had to be."""
        if self.method == "risk control":
            return (self.bound is None or self.mean_loss <= self.bound) and (
                self.budget is None or 1 - self.saved <= self.budget
            )
        return self.method == "fitted" or self.broken <= self.allowed


def trials() -> Iterator[Trial]:
    """All that is tried."""
    singles = [name for name, setting in SETTINGS.items() if not setting.group_spread]
    for method in ("exact", "exact, no split", "Bonferroni", "Bonferroni, no split"):
        yield from (Trial(setting, 1500, method=method) for setting in singles)
    for method in ("betting", "bentkus", "risk control", "fitted"):
        yield from (Trial(setting, 1500, method=method) for setting in ("easy", "hard", "uneven exits"))
    for method in ("betting", "Bonferroni, betting"):
        yield Trial("groups", 150, bound=0.03, method=method)
        yield Trial("groups", 1000, bound=0.03, method=method)
    yield Trial("groups", 400, bound=0.03, method="risk control")
    for setting in ("hard", "rare classes"):
        for method in ("exact", "Bonferroni"):
            yield Trial(setting, 3000, "balanced", bound=0.03, method=method)
            yield Trial(setting, 1500, "balanced", bound=0.05, method=method)
            yield Trial(setting, 3000, "per_class", bound=0.05, method=method)
            yield Trial(setting, 3000, "disagreement", bound=0.05, method=method)
        for method in ("betting", "Bonferroni, betting"):
            yield Trial(setting, 3000, "brier", bound=0.03, method=method)
            yield Trial(setting, 3000, method=method, weighted=True)
    for method in ("exact", "Bonferroni"):
        yield from (Trial(setting, 200, method=method) for setting in singles)
        for setting in ("easy", "hard", "rare classes"):
            yield Trial(setting, 5000, bound=0.01, confidence=0.95, method=method)
            yield Trial(setting, 20_000, method=method)
    yield Trial("rare classes", 3000, "per_class", bound=0.05, method="risk control")
    for setting in ("easy", "hard", "uneven exits"):
        yield Trial(setting, 1500, bound=None, budget=0.5)
        yield Trial(setting, 1500, bound=0.05, budget=0.65)
    yield Trial("groups", 150, bound=None, method="betting", budget=0.5)
    yield Trial("hard", 1500, bound=None, method="risk control", budget=0.5)


def run(trial: Trial, draws: int, seed: int = 0, *, compare: bool = True) -> Row:
    """One row: calibrate on so many draws, and look up in the pool what the policies lose on new samples; ``compare``
    with the best thresholds, which takes a search of the pool."""
    pool = make_pool(trial.setting)
    weights = trial.class_weights
    losses, saved, is_open = np.zeros(draws), np.zeros(draws), np.zeros(draws, dtype=bool)
    truth = _Truth(pool, trial, weights)
    rng = np.random.default_rng(seed)
    start = time.perf_counter()
    for draw in range(draws):
        thresholds = _calibrate(pool, trial, weights, draw, rng)
        if thresholds is not None:
            is_open[draw] = True
            losses[draw], saved[draw] = truth(thresholds)
    # A loss on the bound itself is within it, whatever its rounding.
    is_broken = losses > (math.inf if trial.bound is None else trial.bound) + 1e-9
    if trial.budget is not None:
        is_broken |= is_open & (1 - saved > trial.budget + 1e-9)
    broken = int(is_broken.sum())
    may = 0 if trial.method == "risk control" else int(stats.binom.ppf(0.999, draws, 1 - trial.confidence))
    return Row(
        trial.setting,
        trial.num_units,
        trial.name,
        trial.bound,
        trial.confidence,
        trial.method,
        draws,
        broken,
        may,
        float(losses.mean()),
        float(saved.mean()),
        float(saved.mean() / _best(trial.known)) if compare and trial.budget is None else math.nan,
        int((~is_open).sum()),
        (time.perf_counter() - start) / draws,
        trial.budget,
        _best(trial.known) if compare and trial.budget is not None else math.nan,
    )


def _metric(pool: Pool, trial: Trial, weights: Floats | None, rows: Ints) -> Metric:
    """The metric of a trial on some samples of the pool."""
    if trial.metric == "brier":
        assert pool.brier.gain is not None
        ones = np.ones(len(rows))
        return Metric(ones, np.zeros_like(rows), gain=pool.brier.gain[rows], unit=pool.brier.unit)
    class_weights = None if weights is None else torch.from_numpy(weights)
    labels, predictions = torch.from_numpy(pool.labels[rows]), torch.from_numpy(pool.predictions[rows])
    return metric_on(trial.metric, class_weights, labels, predictions)


def _calibrate(
    pool: Pool, trial: Trial, weights: Floats | None, draw: int, rng: np.random.Generator
) -> tuple[float, ...] | None:
    """The thresholds that the library chooses on one draw; ``None`` when all exits stay closed."""
    rows, groups = pool.draw(trial.num_units, rng)
    labels, predictions = pool.labels[rows], pool.predictions[rows]
    metric = _metric(pool, trial, weights, rows)
    answers = [Answers("clean", pool.scores[rows], predictions, predictions == labels[:, None], metric)]
    if trial.method == "fitted":
        assert trial.bound is not None
        return fitted(answers, pool.costs, trial.bound).thresholds
    confidence = None if trial.method == "risk control" else trial.confidence
    method = next((name for name in ("betting", "bentkus") if name in trial.method), "exact")
    budget = Budget(None if trial.budget is None else trial.budget * pool.costs.full, None)
    terms = Terms(trial.metric, weights, trial.bound, confidence, method, "no split" not in trial.method, draw, budget)
    is_fit = divide(terms, labels, groups, pool.num_classes)
    try:
        found = search(terms, answers, labels, groups, is_fit, pool.costs, "entropy", pool.num_classes)
    except BudgetError:
        return None
    if not trial.method.startswith("Bonferroni"):
        return found.thresholds
    given, tested = answers[0], np.flatnonzero(~is_fit)
    asked = terms.asked(labels[tested], None if groups is None else groups[tested], pool.num_classes)
    condition = Condition("clean", given.scores[tested], metric.losses(given.correct)[tested])
    return _bonferroni(found.path, condition, asked, method, 1 - trial.confidence)


def _bonferroni(
    path: list[tuple[float, ...]], tested: Condition, asked: Sequence[Question], method: str, level: float
) -> tuple[float, ...] | None:
    """The boldest policy of an even grid along the path of which every p-value is within its share of the level."""
    grid = [path[step] for step in np.unique(np.linspace(0, len(path) - 1, GRID).round().astype(int))] if path else []
    replay, share = _Replay(grid, tested), level / max(len(grid), 1)
    tests = [_test(replay, question, method, share) for question in asked]
    return next((grid[step] for step in reversed(range(len(grid))) if all(test(step) for test in tests)), None)


class _Truth:
    """What a policy loses on new samples, and what it saves: on the whole pool."""

    def __init__(self, pool: Pool, trial: Trial, weights: Floats | None) -> None:
        self.pool, self.trial, self.weights = pool, trial, weights
        gain = pool.brier.losses(pool.correct) if trial.metric == "brier" else None
        if gain is None:
            said = pool.predictions[:, -1:] if trial.metric == "disagreement" else pool.labels[:, None]
            right = (pool.predictions == said).astype(np.float32)
            gain = right[:, -1:] - right
        self.losses = gain

    def __call__(self, thresholds: tuple[float, ...]) -> tuple[float, float]:
        pool, n = self.pool, len(self.pool.labels)
        exit_index = simulate(thresholds, pool.scores)
        loss = self.losses[np.arange(n), exit_index].astype(np.float64)
        paid = pool.costs.cumulative(np.array(thresholds) > -np.inf)[exit_index]
        return self._mean(loss), float(1 - self._mean(paid, of_cost=True) / pool.costs.full)

    def _mean(self, loss: Floats, of_cost: bool = False) -> float:
        """Over new samples or groups, as the metric has it; of the cost, the plain one."""
        pool, classes = self.pool, np.arange(self.pool.num_classes)
        if of_cost and pool.starts is None:
            return float(loss.mean())
        if pool.starts is not None:
            group = np.repeat(np.arange(len(pool.starts) - 1), np.diff(pool.starts))
            if self.trial.metric == "per_class" and not of_cost:  # a new group that has the class
                means = []
                for label in classes:
                    of_class = pool.labels == label
                    counts = np.bincount(group[of_class], minlength=len(pool.starts) - 1)
                    sums = np.bincount(group[of_class], loss[of_class], len(counts))
                    means.append((sums[counts > 0] / counts[counts > 0]).mean())
                return float(max(means))
            return float((np.bincount(group, loss) / np.bincount(group)).mean())
        recalls = np.array([loss[pool.labels == label].mean() for label in classes])
        if self.trial.metric == "per_class":
            return float(recalls.max())
        if self.trial.metric == "balanced":
            return float(recalls.mean())
        if self.weights is not None:
            return float(np.average(loss, weights=self.weights[pool.labels]))
        return float(loss.mean())


@cache
def _best(trial: Trial) -> float:
    """What the best thresholds save that are within the bound on the whole pool; with a budget, what they lose."""
    pool, weights = make_pool(trial.setting), trial.class_weights
    metric = _metric(pool, trial, weights, np.arange(POOL))
    if pool.starts is not None:
        sizes = np.diff(pool.starts)
        metric = replace(metric, weights=1.0 / np.repeat(sizes, sizes))
    truth, max_group = _Truth(pool, trial, weights), 3 if len(pool.costs.head) < 5 else 2

    def outcome(bound: float) -> tuple[float, float]:
        return truth(
            search_thresholds(pool.scores, pool.correct, pool.costs, bound, metric, max_group=max_group).thresholds
        )

    if trial.budget is None:
        assert trial.bound is not None
        return outcome(trial.bound)[1]
    low, high, bound, least = 0.0, 0.2, 0.0, math.nan
    while high - low > 1e-3:  # the least bound within which something is within the budget
        loss, saved = outcome(bound)
        low, high, least = (low, bound, loss) if 1 - saved <= trial.budget else (bound, high, least)
        bound = (low + high) / 2
    return least


@dataclass(frozen=True)
class Large:
    """How long a large calibration takes, from cached scores, and how much memory the process has had by then."""

    num_exits: int
    num_samples: int
    num_classes: int
    metric: str
    seconds: float
    peak_gib: float


def large(num_exits: int = 10, num_samples: int = 50_000, num_classes: int = 1000) -> list[Large]:
    """Calibrate on many samples of many classes; accuracy, then the recall of every class."""
    rng = np.random.default_rng(0)
    labels = rng.integers(num_classes, size=num_samples)
    skill = rng.normal(size=(num_samples, 1)) + np.linspace(-0.5, 1, num_exits)
    skill = skill + 0.7 * rng.normal(size=skill.shape)
    is_right = skill + 0.5 * rng.normal(size=skill.shape) > -0.8
    predictions = np.where(is_right, labels[:, None], rng.integers(num_classes, size=skill.shape))
    costs = cet.ExitCosts((1.0,) * num_exits, (HEAD_COST,) * (num_exits - 1))
    rows = []
    metrics: tuple[MetricName, ...] = ("accuracy", "per_class")
    for metric in metrics:
        start = time.perf_counter()
        bound = 0.01 if metric == "accuracy" else 0.3
        report = cet.calibrate_scores(
            -skill[:, :-1], predictions, labels, costs, bound, num_classes=num_classes, metric=metric
        ).report
        assert report.certificate is not None
        assert report.certificate.certified
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append(Large(num_exits, num_samples, num_classes, metric, seconds, peak))
    return rows


def to_markdown(rows: list[Row], big: list[Large]) -> str:
    """The summary."""
    lines = [
        "# Certified thresholds",
        "",
        "`python -m benchmarks.guarantees` measures all of it anew, an hour on one thread; with `--missing` only the "
        "rows that are not here, or of fewer draws, and the others stay. Every row stands for that many draws of "
        "calibration samples. *broken*: draws whose loss on new samples is more than promised, of how many there may "
        "be (99.9 % binomial limit). *of best*: compute saved, of what the best thresholds with knowledge of the "
        f"distribution save. *Bonferroni*: the same p-values on {GRID} policies of the same path, each at its share of "
        "the level. *fitted* is `guarantee=None`, and promises nothing; *risk control* promises the mean loss. "
        "*budget*: of the mean cost, as a share of the backbone's; then the safest policy within it is chosen, "
        "*broken* counts it as well, and *least loss* is that of the best thresholds within it with knowledge of the "
        "distribution.",
        "",
        "| setting | samples | metric | bound | budget | confidence | method | draws | broken | may be | mean loss "
        "| saved | of best | least loss | closed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        promised = row.method not in ("fitted", "risk control")
        of_best = "-" if math.isnan(row.of_best) else f"{row.of_best:.1%}"
        least_loss = "-" if math.isnan(row.least_loss) else f"{row.least_loss:.4f}"
        cells = [
            row.setting,
            str(row.num_units),
            row.metric,
            *("-" if limit is None else f"{limit:g}" for limit in (row.bound, row.budget)),
            f"{row.confidence:g}" if promised else "-",
            row.method,
            str(row.draws),
            str(row.broken),
            str(row.allowed) if promised else "-",
            f"{row.mean_loss:.4f}",
            f"{row.saved:.1%}",
            of_best,
            least_loss,
            str(row.closed),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "A large calibration from cached scores, on one thread:", ""]
    lines += ["| exits | samples | classes | metric | seconds | peak GiB |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {r.num_exits} | {r.num_samples} | {r.num_classes} | {r.metric} | {r.seconds:.1f} | {r.peak_gib:.2f} |"
        for r in big
    ]
    return "\n".join(lines) + "\n"


def write(folder: Path, rows: list[Row], big: list[Large]) -> None:
    """All three files."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    facts: dict[str, Any] = {**provenance(torch.device("cpu"), "guarantees"), "large": [asdict(row) for row in big]}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "guarantees.csv", text.getvalue().encode())
    write_atomically(folder / "guarantees.json", (json.dumps(facts, indent=2) + "\n").encode())
    write_atomically(folder / "guarantees.md", to_markdown(rows, big).encode())


def read(folder: Path) -> tuple[list[Row], list[Large]]:
    """What :func:`write` wrote; nothing where there is nothing."""
    if not (folder / "guarantees.csv").exists():
        return [], []
    rows = []
    with (folder / "guarantees.csv").open(newline="") as file:
        for cells in csv.DictReader(file):
            texts = {name: cells.pop(name) for name in ("setting", "metric", "method", "commit")}
            numbers = {name: None if cell == "" else float(cell) for name, cell in cells.items()}
            whole = {
                name: int(numbers.pop(name) or 0) for name in ("num_units", "draws", "broken", "allowed", "closed")
            }
            rows.append(Row(**texts, **numbers, **whole))  # type: ignore[arg-type]
    big = json.loads((folder / "guarantees.json").read_text())["large"]
    return rows, [Large(**row) for row in big]


@click.command()
@click.option("--draws", type=click.IntRange(min=1), default=1000, show_default=True, help="Of each trial.")
@click.option("--settings", help="Only these, comma-separated.")
@click.option("--metrics", help="Only these, comma-separated, such as balanced,brier.")
@click.option("--missing", is_flag=True, help="Only what the results do not hold with so many draws; the others stay.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, show_default=True)
def main(draws: int, settings: str | None, metrics: str | None, missing: bool, output: Path) -> None:
    """Measure coverage and power of certified thresholds."""
    torch.set_num_threads(1)
    before, big = read(output) if missing else ([], [])
    order = {trial.key: index for index, trial in enumerate(trials())}
    rows = {row.key: row for row in before if row.key in order}
    chosen = [
        trial
        for trial in trials()
        if (settings is None or trial.setting in settings.split(","))
        and (metrics is None or trial.name in metrics.split(","))
        and not (trial.key in rows and rows[trial.key].draws >= draws)
    ]
    big = big or large()
    commit = provenance(torch.device("cpu"), "guarantees")["commit"]
    for trial in track(chosen, description="draws"):
        rows[trial.key] = replace(run(trial, draws), commit=commit)
        write(output, sorted(rows.values(), key=lambda row: order[row.key]), big)
    broken = [row for row in rows.values() if not row.kept]
    for row in broken:
        click.echo(f"broken too often: {row}", err=True)
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
