"""What thresholds may be, in a policy and in an exported file alike. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any


def as_numbers(name: str, values: Any, *, optional: bool) -> tuple[float | None, ...]:
    """Several numbers as floats.

    Args:
        name: of the argument, for errors.
        values: a sequence.
        optional: whether None may stand among them.

    Raises:
        TypeError, ValueError: for what is no sequence of numbers, and for NaN.
    """
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} is {values!r}; give a sequence of numbers")
    found: list[float | None] = []
    for index, value in enumerate(values):
        if value is None and optional:
            found.append(None)
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{name}[{index}] is {value!r}; give a number") from None
        if math.isnan(number):
            raise ValueError(f"{name}[{index}] is NaN; give a number" + (" or None to close the exit" * optional))
        found.append(number)
    return tuple(found)


def check_thresholds(score: str, thresholds: Sequence[float | None]) -> None:
    """Refuse thresholds that a score of this name never reaches by the way that it is counted.

    Raises:
        ValueError: for a patience that is no whole number, and for a confidence or margin in percent.
    """
    for index, threshold in enumerate(thresholds):
        if threshold is None or not math.isfinite(threshold):
            continue
        if score == "patience" and threshold != int(threshold):
            raise ValueError(f"thresholds[{index}] is {threshold}, but patience counts exits; give a whole number")
        if score in ("confidence", "margin") and abs(threshold) > 2:
            raise ValueError(
                f"thresholds[{index}] is {threshold}, but {score} is at most 1; give a fraction, "
                f"{threshold / 100:g} for {threshold:g} %"
            )
