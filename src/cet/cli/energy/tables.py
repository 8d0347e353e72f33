"""Results as text for people, made from the document alone."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cet.energy import report
from cet.energy.figures import PlainFigure as Figure
from cet.energy.figures import si_prefix

UNKNOWN = "–"


class Scale:
    """One unit for several figures, such that the largest has one to three digits before the point.

    Decimals are as many as show the median error with two digits, but the largest value with four at most; without
    errors, with three.
    """

    def __init__(self, figures: Sequence[Figure]) -> None:
        largest = max((abs(figure["value"]) for figure in figures if figure["value"] is not None), default=0.0)
        self._power, prefix = si_prefix(largest)
        self.unit = prefix + figures[0]["unit"] if figures else ""
        errors = [half for figure in figures if (half := _half(figure))]
        last_digit = max(_order(median(errors)) - 1, _order(largest) - 3) if errors else _order(largest) - 2
        self._decimals = max(self._power - last_digit, 0)

    def __call__(self, figure: Figure) -> str:
        """The value with the half width of its interval, without the unit."""
        if figure["value"] is None:
            return UNKNOWN
        half = _half(figure)
        return self._text(figure["value"]) + (f" ±{self._text(half)}" if half is not None else "")

    def _text(self, value: float) -> str:
        return f"{value / 10**self._power:.{self._decimals}f}"


def one(figure: Figure) -> str:
    """A figure with its own unit."""
    if figure["value"] is None:
        return UNKNOWN
    scale = Scale([figure])
    return f"{scale(figure)} {scale.unit}"


def interval(ratio: Figure, decimals: int) -> str:
    """A ratio with its interval, which is not symmetric."""
    if ratio["value"] is None:
        return UNKNOWN
    value, low, high = (
        None if ratio[key] is None else f"{ratio[key]:.{decimals}f}" for key in ("value", "low", "high")
    )
    return f"{value}" if low is None else f"{value} [{low}, {high}]"


def percent(figure: Figure) -> str:
    """A fraction."""
    return UNKNOWN if figure["value"] is None else f"{figure['value']:.1%}"


def columns(content: Mapping[str, Sequence[str | Figure]]) -> Table:
    """A table of columns by their titles: the first of names, the others of texts, or of figures in one unit."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    cells: list[list[str]] = []
    for title, column in content.items():
        figures = [cell for cell in column if not isinstance(cell, str)]
        scale = Scale(figures) if figures else None
        unit = f", {scale.unit}" if scale and scale.unit else ""
        made.add_column(
            title + unit, justify="right" if cells else "left", vertical="bottom", no_wrap=not cells, overflow="fold"
        )
        cells.append(
            [
                cell if isinstance(cell, str) else Scale([cell])(cell) if scale is None else scale(cell)
                for cell in column
            ]
        )
    for row in zip_longest(*cells, fillvalue=""):
        made.add_row(*(Text(cell) for cell in row))
    return made


def show(document: Mapping[str, Any], form: str, text: Iterable[Table | str], *, to_stderr: bool = False) -> None:
    """Print a document in one of the formats.

    Args:
        document: the document.
        form: ``"table"``, ``"json"`` or ``"csv"``.
        text: the tables and paragraphs of the format ``"table"``; empty ones are left out.
        to_stderr: whether stdout belongs to somebody else.
    """
    if form != "table":
        content = report.to_json(document) if form == "json" else report.to_csv(document)
        click.echo(content, nl=False, err=to_stderr)
        return
    console = Console(file=sys.stderr if to_stderr else sys.stdout, highlight=False)
    for index, each in enumerate(filter(None, text)):
        if index:
            console.print()
        console.print(each, markup=False)


def _half(figure: Figure) -> float | None:
    """Half the width of an interval."""
    return None if figure["low"] is None else (figure["high"] - figure["low"]) / 2


def _order(value: float) -> int:
    """The power of ten of the first digit."""
    return math.floor(math.log10(value)) if value else 0
