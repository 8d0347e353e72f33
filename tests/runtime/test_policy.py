"""What an exit policy accepts, refuses and writes."""

import json
import math

import numpy as np
import pytest
import torch

from cet import ExitPolicy

BAD = [
    (
        {"score": "certainty"},
        ValueError,
        "choose one of entropy, confidence, margin, patience, or give a cet.Score",
    ),
    ({"score": "patience", "thresholds": (1.5,)}, ValueError, r"thresholds\[0\] is 1.5, but patience counts exits"),
    ({"thresholds": (0.1, math.nan)}, ValueError, r"thresholds\[1\] is NaN; give a number or None to close the exit"),
    ({"thresholds": ("often",)}, TypeError, r"thresholds\[0\] is 'often'; give a number"),
    ({"thresholds": ([0.1],)}, TypeError, r"thresholds\[0\] is \[0.1\]"),
    ({"thresholds": 0.3}, TypeError, "thresholds is 0.3; give a sequence"),
    ({"thresholds": "0.3"}, TypeError, "thresholds is '0.3'; give a sequence"),
    ({"thresholds": (1,), "temperatures": (1.0,)}, ValueError, "temperatures has 1 entries for 1 thresholds; give 2"),
    ({"thresholds": (1,), "temperatures": (1.0, 0.0)}, ValueError, r"temperatures\[1\] is 0.0; give a positive"),
    ({"thresholds": (1,), "temperatures": (-1.0, 1.0)}, ValueError, r"temperatures\[0\] is -1.0; give a positive"),
    ({"thresholds": (1,), "temperatures": (math.inf, 1)}, ValueError, r"temperatures\[0\] is inf; give a positive"),
    ({"thresholds": (1,), "temperatures": (math.nan, 1)}, ValueError, r"temperatures\[0\] is NaN; give a number"),
    ({"thresholds": (1,), "temperatures": (None, 1)}, TypeError, r"temperatures\[0\] is None; give a number"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ExitPolicy(**arguments)


@pytest.mark.parametrize("thresholds", [[0.5, None], np.array([0.5, 1]), torch.tensor([0.5, 1]), (0.5, np.float32(1))])
def test_any_sequence_of_numbers_becomes_a_tuple_of_floats(thresholds):
    policy = ExitPolicy(thresholds=thresholds)
    assert policy.thresholds in ((0.5, None), (0.5, 1.0))
    assert all(t is None or type(t) is float for t in policy.thresholds)
    assert hash(policy) == hash(ExitPolicy(thresholds=policy.thresholds))


@pytest.mark.parametrize(
    "policy",
    [
        ExitPolicy(),
        ExitPolicy.closed(4),
        ExitPolicy("margin", (0.25, None), (0.5, 2.0, 1.0)),
        ExitPolicy("entropy", (math.inf, -math.inf, 0.1 + 0.2)),
    ],
)
def test_strict_json_holds_any_policy(policy):
    written = json.dumps(policy.to_dict(), allow_nan=False)
    assert ExitPolicy(**json.loads(written)) == policy


def test_closed_and_temperatures():
    policy = ExitPolicy.closed(3)
    assert policy.thresholds == (None, None)
    assert [policy.temperature(k) for k in range(3)] == [1.0] * 3
    assert [ExitPolicy(thresholds=(1,), temperatures=(2, 3)).temperature(k) for k in (0, 1)] == [2.0, 3.0]


@pytest.mark.parametrize("thresholds", [(), (0.1,), (0.1, 0.2, 0.3)])
def test_another_number_of_exits_is_refused(thresholds):
    ExitPolicy(thresholds=(0.1, None)).check_num_exits(3)
    with pytest.raises(ValueError, match=f"policy has {len(thresholds)} thresholds? but the model has 2 early exits"):
        ExitPolicy(thresholds=thresholds).check_num_exits(3)
