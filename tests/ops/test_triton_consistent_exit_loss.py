"""The loss on Triton: the tests of every backend, and what only a kernel on a GPU does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_consistent_exit_loss import (  # noqa: F401
    SWITCHES,
    assert_loss_right,
    test_a_class_of_probability_zero_in_float32_adds_nothing,
    test_a_class_that_the_teacher_rules_out_adds_nothing,
    test_a_compiled_call_gives_the_same_loss_and_gradients,
    test_a_term_of_weight_zero_has_no_gradient,
    test_a_term_of_weight_zero_may_be_infinite,
    test_half_precision_under_a_loss_scale,
    test_known_values,
    test_large_logits_do_not_overflow,
    test_loss_and_gradients,
    test_only_wanted_gradients_are_given,
    test_the_mean_of_exits_teaches_all,
    test_ties_teach_their_first_class,
)

from cet import ops
from conftest import triton_backend as backend  # noqa: F401
from thinned import sampled, slow


@given(data=st.data())
def test_any_size(backend: str, data: st.DataObject) -> None:  # noqa: F811
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    rows, classes = data.draw(st.integers(1, 12), label="rows"), data.draw(st.integers(2, 70), label="classes")
    exits = data.draw(st.integers(1, 4), label="exits")
    switches = {**data.draw(st.sampled_from(SWITCHES), label="switches"), "exit_weights": None}
    stacked = [torch.randn(2 * rows, classes) for _ in range(exits)]
    if data.draw(st.booleans(), label="transposed"):
        stacked = [torch.randn(classes, 2 * rows).T for _ in range(exits)]
    labels = torch.randint(0, classes, (rows,))
    labels[torch.rand(rows) < data.draw(st.sampled_from([0.0, 0.5, 1.0]), label="unlabelled")] = -100
    assert_loss_right([x[:rows] for x in stacked], [x[rows:] for x in stacked], labels, **switches)


@pytest.mark.parametrize("switches", sampled(SWITCHES[::5], 2))
@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.bfloat16])
def test_more_classes_than_fit_in_registers(backend: str, dtype: torch.dtype, switches: dict[str, Any]) -> None:  # noqa: F811
    labels = torch.tensor([0, 4999, -100])
    clean, perturbed = ([(2 * torch.randn(3, 5000)).to(dtype) for _ in range(3)] for _ in range(2))
    assert_loss_right(clean, perturbed, labels, **{**switches, "exit_weights": [0.5, 2.0, 0.1]})


def test_the_same_logits_give_the_same_bits(backend: str) -> None:  # noqa: F811
    logits = [torch.randn(60, 20, requires_grad=True) for _ in range(4)]
    labels = torch.randint(0, 20, (60,))
    results = []
    for _ in range(2):
        losses = ops.consistent_exit_loss(logits[:2], logits[2:], labels)
        results.append((*(part.detach() for part in losses), *torch.autograd.grad(losses.loss, logits)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("label", [4, -1, -101, 2**40])
def test_a_label_out_of_range_makes_the_loss_nan(backend: str, label: int) -> None:  # noqa: F811
    clean, perturbed = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    losses = ops.consistent_exit_loss([clean], [perturbed], torch.tensor([0, label, 3]))
    losses.loss.backward()
    assert losses.loss.isnan()
    assert losses.consistency.isfinite().all()
    assert clean.grad is not None
    assert clean.grad.isnan().all(dim=1).tolist() == [False, True, False]


def test_a_graph_that_is_retained_gives_unscaled_gradients_again(backend: str) -> None:  # noqa: F811
    logits = [torch.randn(6, 5, requires_grad=True) for _ in range(2)]
    loss = ops.consistent_exit_loss(logits[:1], logits[1:], torch.tensor([0, 1, 2, 3, 4, -100])).loss
    once = torch.autograd.grad(loss, logits, retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, logits, retain_graph=True)
    for single, triple in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * single, triple)


def test_no_rows_cost_nothing(backend: str) -> None:  # noqa: F811
    logits = [torch.randn(0, 3) for _ in range(4)]
    labels = torch.empty(0, dtype=torch.int64)
    for losses in (
        ops.consistent_exit_loss(logits[:2], logits[2:], labels),
        torch.ops.cet.consistent_exit_loss(logits, labels, 0.5, 0.6, "soft", "mean", 0.3, [0.5, 0.5])[:5],
    ):
        assert [part.tolist() for part in losses] == [0.0, *[[0.0, 0.0]] * 4]


def test_the_custom_operator_keeps_its_promises(backend: str) -> None:  # noqa: F811
    logits = [torch.randn(5, 3, requires_grad=True) for _ in range(4)]
    arguments = (logits, torch.tensor([0, 2, -100, 1, 1]), 0.5, 0.6, "soft", "mean", 0.3, [0.5, 0.5])
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(torch.ops.cet.consistent_exit_loss.default, arguments, test_utils=tests)


def test_transforms_are_refused(backend: str) -> None:  # noqa: F811
    perturbed, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"^consistent_exit_loss: backend 'triton' knows no torch\.func"):
        torch.func.grad(lambda x: ops.consistent_exit_loss([x], [perturbed], labels).loss)(torch.randn(4, 3))


@pytest.mark.parametrize(
    ("target", "teacher", "room"), [("soft", "mean", 0), ("hard", "final", 0), ("soft", "self", 1), ("soft", "self", 3)]
)
def test_rows_of_several_blocks_may_begin_anywhere(
    backend: str,  # noqa: F811
    target: Any,
    teacher: Any,
    room: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of odd length, so that the blocks of each row begin before it; with room between rows; gradients in strides."""
    from cet.kernels import consistent_exit_loss as kernels

    monkeypatch.setattr(kernels, "_CLASS_BLOCK", 16)
    monkeypatch.setattr(kernels, "_TILE", 1)
    monkeypatch.setattr(kernels, "_BLOCK", 4)
    monkeypatch.setattr(kernels, "_SUM_TILE", 32)
    rows, classes = 3, 21
    logits = [torch.randn(rows, classes + room)[:, :classes].requires_grad_() for _ in range(4)]
    labels = torch.tensor([0, 20, -100])

    def run() -> tuple[Any, tuple[torch.Tensor, ...]]:
        losses = ops.consistent_exit_loss(logits[:2], logits[2:], labels, target=target, teacher=teacher)
        return losses, torch.autograd.grad(3.0 * losses.loss, logits)

    got, gradients = run()
    with ops.use_backend("reference"):
        want, expected = run()
    for a, b in zip((*got, *gradients), (*want, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
