"""The objective on logits, against the formula written out in double precision, row by row."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cet.ops import consistent_exit_loss


def log_softmax(row):
    top = max(row)
    normaliser = top + math.log(sum(math.exp(v - top) for v in row))
    return [v - normaliser for v in row]


def loss_by_formula(clean, perturbed, labels, consistency_weight, supervise, target, teacher, min_confidence, weights):
    """L = sum_k w_k [mean over labelled of CE + a CE~, + lambda * mean over all rows of m * D], and the parts alone."""
    clean, perturbed, labels = [c.tolist() for c in clean], [p.tolist() for p in perturbed], labels.tolist()
    rows, labelled = len(labels), sum(y != -100 for y in labels)
    teachers = {"self": lambda k: [clean[k]], "final": lambda k: clean[-1:], "mean": lambda k: clean}[teacher]
    total, supervised, consistency, confident, supervised_perturbed = 0.0, [], [], [], []
    for k, weight in enumerate(weights):
        ce = ce_perturbed = d = m = 0.0
        for b, y in enumerate(labels):
            log_q = log_softmax(perturbed[k][b])
            if y != -100:
                ce -= log_softmax(clean[k][b])[y]
                ce_perturbed -= log_q[y]
            probabilities = [[math.exp(v) for v in log_softmax(exit_[b])] for exit_ in teachers(k)]
            p = [sum(column) / len(column) for column in zip(*probabilities, strict=True)]
            log_p = [math.log(v) for v in p]
            if max(p) < min_confidence:
                continue
            m += 1
            if target == "soft":
                d += sum(pi * (lp - lq) for pi, lp, lq in zip(p, log_p, log_q, strict=True) if pi > 0)
            else:
                d -= log_q[p.index(max(p))]
        supervised.append(ce / max(labelled, 1))
        consistency.append(d / rows)
        confident.append(m / rows)
        supervised_perturbed.append(ce_perturbed / max(labelled, 1))
        total += weight * (supervised[-1] + supervise * supervised_perturbed[-1] + consistency_weight * consistency[-1])
    return total, supervised, consistency, confident, supervised_perturbed


def draw(rows, exits, classes, dtype=torch.float32):
    clean, perturbed = (tuple((2 * torch.randn(rows, classes)).to(dtype) for _ in range(exits)) for _ in range(2))
    labels = torch.randint(0, classes, (rows,))
    labels[torch.rand(rows) < 0.3] = -100
    return clean, perturbed, labels


TEACHERS = ["mean", "self", "final"]
SWITCHES = list(
    itertools.product([(0.0, 0.4), (0.7, 0.0), (0.7, 0.4)], ["soft", "hard"], TEACHERS, [0.0, 0.6], [None, (3, 0, 1)])
)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_for_all_switches(switches, dtype):
    (consistency_weight, supervise), target, teacher, min_confidence, weights = switches
    clean, perturbed, labels = draw(9, 3, 5, dtype)
    got = consistent_exit_loss(
        clean,
        perturbed,
        labels,
        consistency_weight=consistency_weight,
        supervise_perturbed=supervise,
        target=target,
        teacher=teacher,
        min_confidence=min_confidence,
        exit_weights=weights,
    )
    weights = weights or (1 / 3,) * 3
    expected = loss_by_formula(clean, perturbed, labels, *switches[0], *switches[1:-1], weights)
    for value, wanted in zip(got, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, torch.tensor(wanted), rtol=1e-5, atol=1e-6)


@given(rows=st.integers(1, 6), exits=st.integers(1, 4), classes=st.integers(2, 7), seed=st.integers(0, 2**20))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_value_for_any_size(rows, exits, classes, seed):
    torch.manual_seed(seed)
    clean, perturbed, labels = draw(rows, exits, classes)
    got = consistent_exit_loss(clean, perturbed, labels).loss
    expected = loss_by_formula(clean, perturbed, labels, 1.0, 1.0, "soft", "mean", 0.0, [1 / exits] * exits)[0]
    assert got.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("target", ["soft", "hard"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_no_gradient_reaches_the_teacher(target, teacher):
    clean, perturbed, labels = draw(6, 3, 4)
    clean, perturbed = ([t.requires_grad_() for t in ts] for ts in (clean, perturbed))
    loss = consistent_exit_loss(clean, perturbed, torch.full_like(labels, -100), target=target, teacher=teacher).loss
    loss.backward()
    assert all(c.grad is None or not c.grad.any() for c in clean)
    assert all(p.grad.any(dim=1).all() for p in perturbed)


def test_gradients_match_autograd_of_the_formula_in_double_precision():
    clean, perturbed, labels = draw(7, 2, 5)
    leaves = [t.requires_grad_() for t in (*clean, *perturbed)]
    switches = {"consistency_weight": 0.5, "supervise_perturbed": 0.2}
    got = torch.autograd.grad(consistent_exit_loss(clean, perturbed, labels, **switches).loss, leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    truth, seen = 0.0, labels != -100
    teacher = torch.stack([c.detach().softmax(1) for c in doubles[:2]]).mean(0)
    for c, p in zip(doubles[:2], doubles[2:], strict=True):
        truth = truth - c.log_softmax(1)[seen, labels[seen]].mean() / 2
        truth = truth - 0.2 * p.log_softmax(1)[seen, labels[seen]].mean() / 2
        truth = truth + 0.5 * (teacher * (teacher.log() - p.log_softmax(1))).sum(1).mean() / 2
    for value, wanted in zip(got, torch.autograd.grad(truth, doubles), strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-7)


def test_parts_carry_no_gradient():
    clean, perturbed, labels = draw(4, 2, 3)
    parts = consistent_exit_loss([c.requires_grad_() for c in clean], perturbed, labels)
    assert parts.loss.requires_grad
    assert not any(part.requires_grad for part in parts[1:])


@pytest.mark.parametrize("target", ["soft", "hard"])
def test_equal_logits_are_consistent_and_confident_ones_are_masked_in(target):
    logits = torch.tensor([[0.0, 0.0], [0.0, 20.0]])
    got = consistent_exit_loss([logits], [logits], torch.tensor([-100, -100]), target=target, min_confidence=0.9)
    assert got.consistency.item() == pytest.approx(0.0, abs=1e-6)
    assert got.confident.tolist() == [0.5]
    assert got.supervised.tolist() == [0.0]


def test_a_batch_without_labels_has_a_finite_loss():
    clean, perturbed, labels = draw(4, 2, 3)
    got = consistent_exit_loss(clean, perturbed, torch.full_like(labels, -100))
    assert got.loss.isfinite()
    assert got.supervised.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_logits_in_half_precision_stay_finite(dtype):
    logits = torch.tensor([[3e4, -3e4, 0.0]], dtype=dtype)
    got = consistent_exit_loss([logits.requires_grad_()], [-logits.detach().requires_grad_()], torch.tensor([0]))
    assert got.loss.isfinite()
    assert got.supervised.item() == 0.0


def test_a_number_of_weights_other_than_the_exits_is_refused():
    clean, perturbed, labels = draw(4, 3, 3)
    with pytest.raises(ValueError, match=r"exit_weights|argument 3 is shorter"):
        consistent_exit_loss(clean, perturbed, labels, exit_weights=(1.0, 1.0))
