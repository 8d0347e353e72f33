"""How programs find the places of their rows is right in every order, and no rule of it can be left out."""

from __future__ import annotations

import pytest
from placing_model import RULES, FaultError, Model


@pytest.mark.parametrize(
    ("kept", "slices", "resident"),
    [
        ((1, 0, 1), 1, 99),
        ((1, 0, 1), 1, 1),  # one at a time, in any order
        ((0, 0, 1, 1), 1, 2),
        ((1, 0), 2, 2),
        ((0, 1), 2, 3),
        ((1,), 3, 3),
    ],
)
def test_every_order_comes_to_the_right_end(kept: tuple[int, ...], slices: int, resident: int) -> None:
    assert Model(kept, slices, resident).explore() > 20


FAULTS = {
    "turns": ((1, 0, 1), 1, 1, "all wait for ever"),
    "release": ((1,), 2, 2, "a part is not seen"),
    "acquire": ((1,), 2, 2, "a part is not seen"),
    "done": ((1, 0, 1), 1, 99, "all wait for ever|not clear|wrong place"),
}


@pytest.mark.parametrize("without", RULES)
def test_no_rule_can_be_left_out(without: str) -> None:
    kept, slices, resident, message = FAULTS[without]
    with pytest.raises(FaultError, match=message):
        Model(kept, slices, resident, without).explore()


def test_a_device_that_runs_fewer_programs_than_share_a_row_would_hang() -> None:
    with pytest.raises(FaultError, match="all wait for ever"):
        Model((1,), slices=2, resident=1).explore()
