"""Paired differences with intervals over people, and the tables, plot and files of results."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import stats

from benchmarks.quality.conditions import KINDS, LABELS, METHODS, SEEN, SEVERITIES
from benchmarks.quality.figures import VALUES, Figures

Inputs = tuple[tuple[str, float], ...]

CLEAN: Inputs = ((SEEN, 0.0),)
PERTURBED: Inputs = ((SEEN, 1.0),)
UNSEEN: Inputs = tuple((kind, 1.0) for kind in KINDS if kind != SEEN)
BASELINE = "augmentation"

COLUMNS: dict[str, tuple[str, Inputs]] = {
    "clean": ("accuracy", CLEAN),
    "clean, first exit": ("first", CLEAN),
    "clean, final exit": ("final", CLEAN),
    "perturbed": ("accuracy", PERTURBED),
    "perturbed, macro-F1": ("macro_f1", PERTURBED),
    "unseen": ("accuracy", UNSEEN),
    "perturbed, area": ("area", PERTURBED),
    "perturbed, policy": ("policy", PERTURBED),
    "its cost": ("cost", PERTURBED),
    "perturbed, calibration error": ("scaled_ece", PERTURBED),
    "flips": ("flips", PERTURBED),
}
"""What the tables tell: a value of Figures, the mean over inputs."""

PRIMARY = "perturbed"


@dataclass(frozen=True)
class Difference:
    """A method less the baseline, in points.

    Attributes:
        mean: over people.
        half_width: of the 95 % interval, Student's t over people, each the mean of its seeds.
        corrected: the same at ``0.95`` for all primary comparisons together (Bonferroni); NaN for secondary figures.
        people: how many.
        trainings: of the method.
    """

    labels: str
    method: str
    column: str
    mean: float
    half_width: float
    corrected: float
    people: int
    trainings: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.half_width:.1f}"


class Table:
    """Figures by who they are of."""

    def __init__(self, figures: Iterable[Figures]) -> None:
        self.figures = list(figures)
        self.value: dict[tuple[Any, ...], Figures] = {}
        self.runs: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)
        for f in self.figures:
            self.value[f.labels, f.method, f.person, f.seed, f.input, f.severity] = f
            self.runs[f.labels, f.method].add((f.split, f.seed))

    def present(self) -> list[tuple[str, str]]:
        """Labels and methods, in the order in which they are defined."""
        return [(labels, method) for labels in LABELS for method in METHODS if (labels, method) in self.runs]

    def by_person(self, labels: str, method: str, value: str, inputs: Inputs) -> dict[tuple[int, int], float]:
        """By person and seed, the mean over the inputs."""
        kind, severity = inputs[0]
        who = [
            (f.person, f.seed)
            for f in self.figures
            if (f.labels, f.method, f.input, f.severity) == (labels, method, kind, severity)
        ]
        return {w: float(np.mean([getattr(self.value[labels, method, *w, *i], value) for i in inputs])) for w in who}

    def difference(
        self, labels: str, method: str, column: str, inputs: Inputs | None = None, baseline: str = BASELINE
    ) -> Difference | None:
        """On the people and seeds that both have; ``None`` where those are of fewer than two people."""
        value, usual = COLUMNS[column]
        ours, theirs = (self.by_person(labels, name, value, inputs or usual) for name in (method, baseline))
        pairs: dict[int, list[float]] = defaultdict(list)
        for who in sorted(ours.keys() & theirs.keys()):
            pairs[who[0]].append(ours[who] - theirs[who])
        gains = np.array([np.mean(of_person) for of_person in pairs.values()])
        if len(gains) < 2:
            return None
        is_primary = (method, column, inputs) == ("consistent", PRIMARY, None)
        return Difference(
            *(labels, method, column, float(gains.mean()), half_width(gains, 0.05)),
            half_width(gains, 0.05 / len(LABELS)) if is_primary else float("nan"),
            len(gains),
            len(self.runs[labels, method]),
        )


def half_width(gains: NDArray[np.float64], level: float) -> float:
    """Of Student's interval of the mean."""
    return float(stats.t.ppf(1 - level / 2, len(gains) - 1) * stats.sem(gains))


def tables(table: Table) -> str:
    """All that was found, in Markdown."""
    lines = [
        "# Recipes under one evaluator",
        "",
        "Accuracy in percent on people not seen in training, mean of the four exits unless told otherwise; differences",
        "in points, paired by person and seed, with their 95 % interval over the people. `perturbed`: the kinds of",
        "perturbation trained on, at their severity; `unseen`: five other kinds. Made by",
        "`python -m benchmarks.quality`, which tells what was fixed before the runs.",
        "",
        "## Primary: consistent less augmentation, perturbed",
        "",
        "| labels | difference | corrected for all rows | trainings | people |",
        "|---|---|---|---|---|",
    ]
    for labels in LABELS:
        if found := table.difference(labels, "consistent", PRIMARY):
            interval = f"{found.mean - found.corrected:+.1f} to {found.mean + found.corrected:+.1f}"
            lines.append(f"| {labels} | **{found}** | {interval} | {found.trainings} | {found.people} |")
    lines += ["", "## Against augmentation on the same steps and rows", ""]
    lines += _rows(table, lambda labels, method, column: str(table.difference(labels, method, column) or ""), skip=True)
    lines += [
        "",
        "## Against the recipe",
        "",
        "Perturbed; a win or a loss is an interval clear of 0, not corrected for the number of rows.",
        "",
        "| labels | method | trainings | less augmentation | less consistent | verdict | clean, less consistent |",
        "|---|---|---|---|---|---|---|",
    ]
    for labels, method in table.present():
        if method in (BASELINE, "consistent") or (labels, "consistent") not in table.runs:
            continue
        over, recipe, clean = (
            table.difference(labels, method, column, baseline=base)
            for column, base in ((PRIMARY, BASELINE), (PRIMARY, "consistent"), ("clean", "consistent"))
        )
        cells = (str(over or ""), str(recipe or ""), verdict(recipe), str(clean or ""))
        lines.append(f"| {labels} | {method} | {len(table.runs[labels, method])} | " + " | ".join(cells) + " |")
    lines += ["", "## Each method", ""]
    lines += _rows(table, lambda labels, method, column: f"{level(table, labels, method, column):.1f}")
    lines += ["", "## By kind and severity: consistent less augmentation", ""]
    lines += [
        "| labels | input | " + " | ".join(f"{s:g}" for s in SEVERITIES) + " |",
        "|---" * (len(SEVERITIES) + 2) + "|",
    ]
    for labels in LABELS:
        for kind in KINDS if ("consistent" in dict.fromkeys(m for k, m in table.present() if k == labels)) else ():
            cells = [table.difference(labels, "consistent", "perturbed", ((kind, s),)) for s in SEVERITIES]
            lines.append(f"| {labels} | {kind} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def verdict(found: Difference | None) -> str:
    """Whether the interval is clear of 0."""
    if found is None:
        return ""
    return "tie" if abs(found.mean) <= found.half_width else "win" if found.mean > 0 else "loss"


def level(table: Table, labels: str, method: str, column: str) -> float:
    """The mean over people of their mean over seeds; everyone counts the same."""
    value, inputs = COLUMNS[column]
    of: dict[int, list[float]] = defaultdict(list)
    for (person, _), number in table.by_person(labels, method, value, inputs).items():
        of[person].append(number)
    return float(np.mean([np.mean(numbers) for numbers in of.values()]))


def _rows(table: Table, cell: Any, skip: bool = False) -> list[str]:
    lines = ["| labels | method | trainings | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    for labels, method in table.present():
        if skip and method == BASELINE:
            continue
        cells = [cell(labels, method, column) for column in COLUMNS]
        lines.append(f"| {labels} | {method} | {len(table.runs[labels, method])} | " + " | ".join(cells) + " |")
    return lines


def differences(table: Table) -> list[dict[str, Any]]:
    """All differences against the baseline."""
    found = [
        table.difference(labels, method, column)
        for labels, method in table.present()
        for column in COLUMNS
        if method != BASELINE
    ]
    return [
        {key: round(v, 4) if isinstance(v, float) else v for key, v in asdict(one).items() if v == v}
        for one in found
        if one
    ]


def as_csv(figures: Sequence[Figures]) -> bytes:
    """One row per training, person and input."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(Figures)]
    writer.writerow(names)
    writer.writerows([f"{v:.5g}" if n in VALUES else v for n, v in asdict(one).items()] for one in figures)
    return text.getvalue().encode()


def read_csv(text: str) -> list[Figures]:
    """What :func:`as_csv` wrote."""
    kinds = {"split": int, "seed": int, "person": int, "severity": float, **dict.fromkeys(VALUES, float)}
    return [
        Figures(**{name: kinds.get(name, str)(value) for name, value in line.items()})
        for line in csv.DictReader(io.StringIO(text))
    ]


def plot(table: Table) -> Figure:
    """Accuracy against the severity of the kinds trained on, for each kind of labels."""
    kinds = [labels for labels in LABELS if any(labels == other for other, _ in table.present())]
    figure = Figure(figsize=(3.2 * len(kinds), 3.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(kinds), sharey=True))
    for ax, labels in zip(axes, kinds, strict=True):
        for method in ("augmentation", "consistent", "static", "joint"):
            if (labels, method) in table.runs:
                severities = (0.0, *SEVERITIES)
                means = [
                    np.mean([*table.by_person(labels, method, "accuracy", ((SEEN, s),)).values()]) for s in severities
                ]
                ax.plot(severities, means, "o-", label=method, markersize=3)
        ax.set_title(labels, fontsize=9)
        ax.set_xlabel("severity")
        ax.axvline(1.0, color="0.8", linewidth=1, zorder=0)
    axes[0].set_ylabel("accuracy, mean of exits, %")
    axes[0].legend(fontsize=7)
    return figure
