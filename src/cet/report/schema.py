"""What `report.json` holds, and what can be read from it."""

from __future__ import annotations

from typing import Any, Literal, TypedDict

from cet.report.evaluation import AtSeverity, CurvePoint
from cet.report.timing import Speed

SCHEMA_VERSION = 2

Condition = Literal["clean", "perturbed"]

CONDITIONS: dict[Condition, float] = {"clean": 0.0, "perturbed": 1.0}
"""The severities that stand for clean and perturbed input, in training and in the report."""

Speeds = dict[str, dict[Condition, Speed]]
"""By name of the recipe."""


class Data(TypedDict):
    """The recordings, and for each part of the split its persons and how many of their windows were used.

    ``length`` is that of a window; ``persons`` are empty lists where it is not known whose the windows are.
    """

    sha256: str
    classes: list[str]
    length: int
    persons: dict[str, list[Any]]
    windows: dict[str, int]


class Cost(TypedDict):
    """FLOPs of one sample: through the full network, and up to each exit with the head of that exit alone."""

    full: float
    exits: list[float]


class RecipeReport(TypedDict):
    """One trained model; ``recipe``, ``policy`` and ``calibration`` are the library's own, as JSON.

    ``certificate`` is what could be guaranteed; where it is that nothing can, the policy may be a fitted one. It
    is empty where no guarantee was asked for.
    """

    recipe: dict[str, Any]
    policy: dict[str, Any]
    calibration: dict[str, Any]
    certificate: dict[str, Any]
    flops: Cost
    severities: list[AtSeverity]
    curves: dict[Condition, list[CurvePoint]]


class Joules(TypedDict):
    """Energy of early exit against the full network, in joules per sample of clean input; ``None`` where it is unknown.

    ``ratio`` is early exit's over the full network's, ``low`` and ``high`` are the ends of its 95 % interval, ``flags``
    names what makes it less than it seems, and ``reason`` is why it is unknown.
    """

    recipe: str
    batch_size: int
    full: float | None
    early: float | None
    ratio: float | None
    low: float | None
    high: float | None
    source: str | None
    flags: str | None
    reason: str | None


class Timing(TypedDict):
    """All that differs from run to run: when and where it ran, and everything that was read from a clock or counter.

    ``stages`` are the seconds of each stage in the process that finished the run.
    """

    created: str
    host: dict[str, str | int]
    stages: dict[str, float]
    throughput: Speeds
    latency: Speeds
    joules: Joules


class Report(TypedDict):
    """Everything; but for ``timing``, the same settings and versions give the same report on the same machine."""

    schema_version: int
    title: str
    scope: str
    settings: dict[str, Any]
    versions: dict[str, str]
    exits: list[str]
    conditions: dict[Condition, float]
    data: Data
    recipes: dict[str, RecipeReport]
    timing: Timing


def at(recipe: RecipeReport, severity: float) -> AtSeverity:
    """The figures of one severity."""
    return next(row for row in recipe["severities"] if row["severity"] == severity)


def verdict(speed: Speed) -> Literal["faster", "no clear difference", "slower"]:
    """Whether early exit pays, by the interval of its speed-up."""
    if speed["speedup"]["low"] > 1:
        return "faster"
    return "slower" if speed["speedup"]["high"] < 1 else "no clear difference"
