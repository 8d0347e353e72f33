"""Which cases of a grid `make test` tries. The others are marked slow, and so tried by `make test-slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def sampled(cases: Iterable[Any], keep: int) -> list[Any]:
    """All cases, marked as slow but for ``keep`` of them, spread evenly from the first to the last.

    A tuple is a case of several arguments.
    """
    given = list(cases)
    steps = max(keep - 1, 1)
    stay = {round(step * (len(given) - 1) / steps) for step in range(keep)}
    return [case if index in stay else _slow(case) for index, case in enumerate(given)]


def kept(cases: Iterable[Any], *stay: Any) -> list[Any]:
    """All cases, marked as slow but for those that are named.

    A tuple is a case of several arguments.
    """
    given = list(cases)
    unknown = [case for case in stay if case not in given]
    assert not unknown, f"{unknown} are no cases"
    return [case if case in stay else _slow(case) for case in given]


def _slow(case: Any) -> Any:
    return slow(*case) if isinstance(case, tuple) else slow(case)
