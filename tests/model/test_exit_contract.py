"""The exit contract, against a reference that runs every row alone through the eager backbone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cet
from cet.ops.definitions import SCORE_NAMES
from conftest import Built
from oracle import (
    CONTRACT,
    all_leave,
    answer_each_row_alone,
    assert_same_answers,
    poisoned_row,
    policy_between_scores,
)


@given(data=st.data())
@CONTRACT
def test_every_row_gets_the_answer_that_it_gets_alone(built: Built, data: st.DataObject) -> None:
    family, model = built
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    inputs = family.inputs(data.draw(st.sampled_from([1, 2, 3, 7, 16]), label="rows"))
    score = data.draw(st.sampled_from(SCORE_NAMES), label="score")
    early = model.num_exits - 1
    quantile = st.none() | st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0])
    quantiles = data.draw(st.lists(quantile, min_size=early, max_size=early), label="quantiles")
    temperature = st.none() | st.tuples(*[st.sampled_from([0.5, 1.0, 3.0])] * model.num_exits)
    temperatures = data.draw(temperature, label="temperatures")
    model.policy = policy_between_scores(model, inputs, score, quantiles, temperatures)
    before = {name: value.clone() for name, value in inputs.items()}

    got = model.predict(**inputs)

    assert_same_answers(got, answer_each_row_alone(model, inputs, model.policy))
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    with torch.no_grad():
        assert torch.equal(model(**inputs), got.logits)


def test_closed_exits_give_the_backbones_output_bit_for_bit(built: Built) -> None:
    family, model = built
    model.policy = cet.ExitPolicy.closed(model.num_exits)
    for rows in (1, 2, 9):
        inputs = family.inputs(rows)
        with torch.no_grad():
            output = model.backbone(**inputs)
            expected = output if isinstance(output, Tensor) else output.logits
            assert torch.equal(model(**inputs), expected)
        assert model.predict(**inputs).exit_index.tolist() == [model.num_exits - 1] * rows


def test_an_empty_batch_gives_empty_answers(built: Built) -> None:
    family, model = built
    for policy in (cet.ExitPolicy.closed(model.num_exits), all_leave(model)):
        model.policy = policy
        got = model.predict(**family.inputs(0))
        assert got.logits.shape == (0, model.num_classes)
        assert got.exit_index.shape == got.score.shape == got.labels.shape == (0,)


def test_all_rows_can_leave_at_the_first_exit(built: Built) -> None:
    family, model = built
    model.policy = all_leave(model)
    inputs = family.inputs(6)
    got = model.predict(**inputs)
    assert got.exit_index.tolist() == [0] * 6
    with torch.no_grad():
        torch.testing.assert_close(got.logits, model.exit_logits(**inputs)[0])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_poisoned_row_never_leaves_early_and_touches_no_other(built: Built, poison: float) -> None:
    family, model = built
    inputs = family.inputs(7)
    model.policy = all_leave(model)
    with poisoned_row(model, inputs, 3, poison) as poisoned:
        clean = model.predict(**inputs)
        got = model.predict(**poisoned)
    others = [0, 1, 2, 4, 5, 6]
    assert got.exit_index[3] == model.num_exits - 1
    assert torch.equal(got.exit_index[others], clean.exit_index[others])
    assert torch.equal(got.logits[others], clean.logits[others])


def test_answers_do_not_depend_on_batch_mates(built: Built) -> None:
    family, model = built
    inputs = family.inputs(12)
    model.policy = policy_between_scores(model, inputs, "entropy", [0.4] * (model.num_exits - 1))
    whole = model.predict(**inputs)
    order = torch.randperm(12)
    shuffled = model.predict(**{name: value[order] for name, value in inputs.items()})
    assert torch.equal(shuffled.exit_index, whole.exit_index[order])
    torch.testing.assert_close(shuffled.logits, whole.logits[order], rtol=1e-4, atol=1e-4)


def test_gradients_flow_through_the_exit_that_each_row_took(built: Built) -> None:
    family, model = built
    inputs = family.inputs(8)
    model.policy = policy_between_scores(model, inputs, "entropy", [0.5] * (model.num_exits - 1))
    exits = model.predict(**inputs).exit_index
    weight = model.heads[0].linear.weight
    weight.grad = None
    model(**inputs)[:, 0].sum().backward()
    expected = torch.autograd.grad(model.exit_logits(**inputs)[0][exits == 0, 0].sum(), weight)[0]
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)
    model.zero_grad()
