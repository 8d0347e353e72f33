"""The loss and its gradients, against double precision and autograd, on every backend."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cet import ops
from cet.ops.consistent_exit_loss import ExitLosses
from conftest import kernels_only
from thinned import kept


def true_losses(clean: list[Tensor], perturbed: list[Tensor], labels: Tensor, **switches: Any) -> ExitLosses:
    """By the formula, on the dtype of the logits."""
    exits = len(clean)
    weights = switches.get("exit_weights") or [1 / exits] * exits
    labelled = [row for row, label in enumerate(labels.tolist()) if label != -100]
    loss, parts = torch.zeros((), dtype=clean[0].dtype), []
    for k in range(exits):
        teachers = {"self": clean[k : k + 1], "final": clean[-1:], "mean": clean}[switches.get("teacher", "mean")]
        teacher = torch.stack([x.detach().log_softmax(1) for x in teachers]).logsumexp(0) - math.log(len(teachers))
        student = perturbed[k].log_softmax(1)
        if switches.get("target") == "hard":
            divergence = -student[range(len(student)), teacher.argmax(1)]
        else:
            divergence = (teacher.exp() * (teacher - student)).sum(1)
        mask = (teacher.amax(1).exp() >= switches.get("min_confidence", 0.0)).to(divergence.dtype)
        supervised, supervised_perturbed = (
            -x.log_softmax(1)[labelled, labels[labelled]].sum() / max(1, len(labelled))
            for x in (clean[k], perturbed[k])
        )
        consistency = (mask * divergence).mean()
        loss = loss + weights[k] * supervised
        loss = loss + weights[k] * switches.get("supervise_perturbed", 1.0) * supervised_perturbed
        loss = loss + weights[k] * switches.get("consistency_weight", 1.0) * consistency
        parts.append((supervised.detach(), consistency.detach(), mask.mean(), supervised_perturbed.detach()))
    return ExitLosses(loss, *(torch.stack(part) for part in zip(*parts, strict=True)))


def assert_loss_right(clean: list[Tensor], perturbed: list[Tensor], labels: Tensor, **switches: Any) -> None:
    given_logits = [x.detach().requires_grad_() for x in (*clean, *perturbed)]
    losses = ops.consistent_exit_loss(given_logits[: len(clean)], given_logits[len(clean) :], labels, **switches)
    (3 * losses.loss).backward()
    doubles = [x.detach().double().requires_grad_() for x in (*clean, *perturbed)]
    truth = true_losses(doubles[: len(clean)], doubles[len(clean) :], labels, **switches)
    (3 * truth.loss).backward()
    assert losses.loss.dtype == torch.float32
    for name, got, expected in zip(ExitLosses._fields, losses, truth, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert got.requires_grad == (name == "loss")
    dtype = torch.finfo(clean[0].dtype)
    # Gradients are differences of probabilities, each right to a few units in its last place, times these factors.
    labelled = max(1, int((labels != -100).sum()))
    factor = max(1.0, switches.get("supervise_perturbed", 1.0)) / labelled
    factor += switches.get("consistency_weight", 1.0) / len(labels)
    factor *= 3 * max(switches.get("exit_weights") or [1 / len(clean)])
    for x, double in zip(given_logits, doubles, strict=True):
        assert x.grad is not None
        expected_grad = torch.zeros_like(double) if double.grad is None else double.grad
        error = (x.grad.double() - expected_grad).abs()
        assert bool(
            (error <= 2 * dtype.eps * expected_grad.abs() + 5e-7 * factor + 3 * dtype.smallest_normal * dtype.eps).all()
        ), float(error.max())


SWITCHES = [
    {"target": target, "teacher": teacher, "min_confidence": confidence, "exit_weights": weights, **supervise}
    for (target, confidence, teacher), weights, supervise in zip(
        itertools.product(("soft", "hard"), (0.0, 0.4), ("mean", "self", "final")),
        itertools.cycle([None, (0.5, 2.0, 0.0)]),
        itertools.cycle([{}, {}, {"supervise_perturbed": 0.0}, {"supervise_perturbed": 0.6}]),
        strict=False,
    )
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("switches", SWITCHES)
def test_loss_and_gradients(backend: str, dtype: torch.dtype, switches: dict[str, Any]) -> None:
    labels = torch.randint(0, 7, (33,))
    labels[::3] = -100
    clean, perturbed = ([(2 * torch.randn(33, 7)).to(dtype) for _ in range(3)] for _ in range(2))
    assert_loss_right(clean, perturbed, labels, consistency_weight=0.7, **switches)


@given(data=st.data())
def test_any_size(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    rows, classes = data.draw(st.integers(1, 70), label="rows"), data.draw(st.integers(2, 300), label="classes")
    exits = data.draw(st.integers(1, 4), label="exits")
    switches = {**data.draw(st.sampled_from(SWITCHES), label="switches"), "exit_weights": None}
    stacked = [torch.randn(2 * rows, classes) for _ in range(exits)]
    if data.draw(st.booleans(), label="transposed"):
        stacked = [torch.randn(classes, 2 * rows).T for _ in range(exits)]
    labels = torch.randint(0, classes, (rows,))
    labels[torch.rand(rows) < data.draw(st.sampled_from([0.0, 0.5, 1.0]), label="unlabelled")] = -100
    assert_loss_right([x[:rows] for x in stacked], [x[rows:] for x in stacked], labels, **switches)


def test_known_values(backend: str) -> None:
    clean, perturbed = torch.tensor([[math.log(3), 0.0]]), torch.tensor([[0.0, 0.0]])
    losses = ops.consistent_exit_loss(
        [clean], [perturbed], torch.tensor([1]), consistency_weight=2.0, supervise_perturbed=3.0
    )
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    torch.testing.assert_close(losses.supervised, torch.tensor([math.log(4)]))
    torch.testing.assert_close(losses.supervised_perturbed, torch.tensor([math.log(2)]))
    torch.testing.assert_close(losses.consistency, torch.tensor([divergence]))
    torch.testing.assert_close(losses.loss, torch.tensor(math.log(4) + 3 * math.log(2) + 2 * divergence))
    hard = ops.consistent_exit_loss([clean], [perturbed], torch.tensor([-100]), target="hard", min_confidence=0.75)
    torch.testing.assert_close(hard.loss, torch.tensor(math.log(2)))
    assert hard.confident.tolist() == [1.0]
    assert ops.consistent_exit_loss([clean], [perturbed], torch.tensor([-100]), min_confidence=0.76).loss == 0


def test_the_mean_of_exits_teaches_all(backend: str) -> None:
    """Each exit is sure of another class; together they are not."""
    clean = [torch.tensor([[math.log(9), 0.0]]), torch.tensor([[0.0, math.log(3)]])]
    perturbed, none = [torch.zeros(1, 2, requires_grad=True) for _ in range(2)], torch.tensor([-100])
    losses = ops.consistent_exit_loss(clean, perturbed, none, exit_weights=(1.0, 1.0))
    p = torch.tensor([0.575, 0.425])
    torch.testing.assert_close(losses.consistency, (p * (2 * p).log()).sum().expand(2))
    for gradient in torch.autograd.grad(losses.loss, perturbed):
        torch.testing.assert_close(gradient, (0.5 - p)[None])
    assert ops.consistent_exit_loss(clean, perturbed, none, min_confidence=0.57).confident.tolist() == [1.0, 1.0]
    assert ops.consistent_exit_loss(clean, perturbed, none, min_confidence=0.58).confident.tolist() == [0.0, 0.0]


def test_a_term_of_weight_zero_may_be_infinite(backend: str) -> None:
    clean = torch.zeros(2, 3)
    perturbed = torch.tensor([[-math.inf, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    losses = ops.consistent_exit_loss(
        [clean], [perturbed], torch.tensor([0, 1]), consistency_weight=0.0, supervise_perturbed=0.0
    )
    torch.testing.assert_close(losses.loss, torch.tensor(math.log(3)))
    assert losses.consistency.isposinf().all()
    assert losses.supervised_perturbed.isposinf().all()


@pytest.mark.parametrize("target", ["soft", "hard"])
@pytest.mark.parametrize("teacher", ["mean", "self", "final"])
def test_a_term_of_weight_zero_has_no_gradient(backend: str, teacher: Any, target: Any) -> None:
    """Whatever its teacher or its student is."""
    clean = [torch.tensor([[math.nan, 1.0, 0.0], [0.0, 2.0, 1.0]]), torch.tensor([[-math.inf] * 3, [1.0, 0.0, 0.0]])]
    perturbed = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    labels = torch.tensor([-100, 1])
    options: dict[str, Any] = {"consistency_weight": 0.0, "target": target, "teacher": teacher}
    loss = ops.consistent_exit_loss(clean, perturbed, labels, **options).loss
    for gradient, x in zip(torch.autograd.grad(loss, perturbed), perturbed, strict=True):
        expected = 0.5 * (x.detach().softmax(1) - F.one_hot(labels.clamp(min=0), 3))
        torch.testing.assert_close(gradient, expected * torch.tensor([[0.0], [1.0]]))

    learns = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    perturbed[1] = torch.full((2, 3), math.nan, requires_grad=True)
    loss = ops.consistent_exit_loss(learns, perturbed, labels, **options, supervise_perturbed=0.0).loss
    for one in torch.autograd.grad(loss, perturbed, allow_unused=True):
        assert one is None or one.count_nonzero() == 0


def test_ties_teach_their_first_class(backend: str) -> None:
    clean, perturbed = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[3.0, 0.0, 0.0]])
    losses = ops.consistent_exit_loss([clean], [perturbed], torch.tensor([-100]), target="hard")
    torch.testing.assert_close(losses.loss, F.cross_entropy(perturbed, torch.tensor([0])))


@pytest.mark.parametrize("teacher", ["mean", "self", "final"])
def test_a_class_that_the_teacher_rules_out_adds_nothing(backend: str, teacher: Any) -> None:
    clean, perturbed = ([torch.randn(5, 6, requires_grad=True) for _ in range(2)] for _ in range(2))
    masked = torch.zeros(6).index_fill_(0, torch.tensor([1, 4]), -math.inf)
    labels = torch.tensor([0, 2, 3, 5, -100])
    kept = torch.tensor([0, 2, 3, 5])
    got = ops.consistent_exit_loss(
        [x + masked for x in clean], [x + masked for x in perturbed], labels, teacher=teacher
    )
    without = torch.tensor([0, 1, 2, 3, -100])
    expected = ops.consistent_exit_loss(
        [x[:, kept] for x in clean], [x[:, kept] for x in perturbed], without, teacher=teacher
    )
    torch.testing.assert_close(got.loss, expected.loss)
    gradients = [torch.autograd.grad(losses.loss, [*clean, *perturbed]) for losses in (got, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
    open_to_the_student = ops.consistent_exit_loss([x + masked for x in clean], perturbed, labels, teacher=teacher)
    assert open_to_the_student.loss.isfinite()
    unlabelled = torch.full_like(labels, -100)
    closed_to_the_student = ops.consistent_exit_loss(
        clean, [x + masked for x in perturbed], unlabelled, teacher=teacher
    )
    assert closed_to_the_student.consistency.isposinf().all()


def test_a_class_of_probability_zero_in_float32_adds_nothing(backend: str) -> None:
    """The teacher's logit is finite, but its probability is not told from zero; the student rules the class out."""
    clean, perturbed = torch.tensor([[200.0, 0.0, 199.0]]), torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    got = ops.consistent_exit_loss([clean], [perturbed], torch.tensor([-100]))
    teacher, student = clean[:, [0, 2]].log_softmax(1), perturbed.detach()[:, [0, 2]].log_softmax(1)
    torch.testing.assert_close(got.loss, (teacher.exp() * (teacher - student)).sum())
    (gradient,) = torch.autograd.grad(got.loss, perturbed)
    torch.testing.assert_close(gradient[:, [0, 2]], student.exp() - teacher.exp())
    assert gradient[0, 1] == 0


@pytest.mark.parametrize(
    ("target", "dtype", "compiled"),
    kept(
        itertools.product(["soft", "hard"], [torch.bfloat16, torch.float16], [False, True]),
        ("soft", torch.bfloat16, False),
        ("hard", torch.float16, False),
        ("soft", torch.float16, True),
    ),
)
def test_half_precision_under_a_loss_scale(backend: str, compiled: bool, dtype: torch.dtype, target: Any) -> None:
    """A scale beyond the range of float16, and gradients that are below it before they are scaled."""
    torch.compiler.reset()
    rows, weights, scale = 300, (2e-4, 1e-3), 2.0**20
    labels = torch.randint(0, 5, (rows,))
    labels[::3] = -100
    logits = [(2 * torch.randn(rows, 5)).to(dtype).requires_grad_() for _ in range(4)]

    def scaled(logits: list[Tensor]) -> Tensor:
        losses = ops.consistent_exit_loss(logits[:2], logits[2:], labels, target=target, exit_weights=weights)
        return scale * losses.loss

    run = torch.compile(scaled, fullgraph=True, backend="aot_eager") if compiled else scaled
    gradients = torch.autograd.grad(run(logits), logits)
    doubles = [x.detach().double().requires_grad_() for x in logits]
    truth = scale * true_losses(doubles[:2], doubles[2:], labels, target=target, exit_weights=weights).loss
    for got, expected in zip(gradients, torch.autograd.grad(truth, doubles), strict=True):
        error = (got.double() - expected).abs()
        assert bool((error <= 2 * torch.finfo(dtype).eps * expected.abs() + 1e-6).all()), float(error.max())


def test_the_only_memory_taken_is_for_the_gradients(backend: str) -> None:
    """Of the kernels; the reference holds a dozen tensors of the size of the logits."""
    logits = [torch.randn(64, 1000, requires_grad=True) for _ in range(8)]
    labels = torch.randint(0, 1000, (64,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        ops.consistent_exit_loss(logits[:4], logits[4:], labels).loss.backward()
    taken = sum(max(0, event.self_cpu_memory_usage) for event in profiler.events())
    gradients = sum(x.numel() * x.element_size() for x in logits)
    if backend == "cpp":
        assert gradients <= taken <= 1.001 * gradients
    else:
        assert taken > gradients


def test_large_logits_do_not_overflow(backend: str) -> None:
    clean, perturbed = torch.tensor([[1e4, 0.0], [-1e4, 1e4]]), torch.tensor([[1e4, 9e3], [-1e4, 1e4]])
    assert_loss_right([clean - 1e4], [perturbed - 1e4], torch.tensor([0, 1]))
    assert ops.consistent_exit_loss([clean], [perturbed], torch.tensor([0, 1])).loss == 0


def test_thread_counts_give_the_same_bits(backend: str) -> None:
    logits = [torch.randn(500, 100, requires_grad=True) for _ in range(4)]
    labels = torch.randint(0, 100, (500,))
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        losses = ops.consistent_exit_loss(logits[:2], logits[2:], labels)
        results.append((losses.loss.detach(), *torch.autograd.grad(losses.loss, logits)))
    if backend == "cpp":
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.testing.assert_close(*results)


def test_only_wanted_gradients_are_given(backend: str) -> None:
    clean, perturbed = torch.randn(4, 3), torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([0, 1, 2, -100])
    loss = ops.consistent_exit_loss([clean], [perturbed], labels).loss
    for _ in range(2):
        perturbed.grad = None
        loss.backward(retain_graph=True)
        assert perturbed.grad is not None
        supervised = (perturbed.softmax(1) - F.one_hot(labels.clamp(min=0), 3)) * (labels >= 0)[:, None] / 3
        consistency = (perturbed.softmax(1) - clean.softmax(1)) / 4
        torch.testing.assert_close(perturbed.grad, (supervised + consistency).detach())
    with torch.no_grad():
        assert not ops.consistent_exit_loss([clean], [perturbed], labels).loss.requires_grad


Z = torch.zeros(3, 4)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"consistency_weight": -1.0}, ValueError, "consistency_weight is -1.0; give a finite number"),
    ({"supervise_perturbed": math.inf}, ValueError, "supervise_perturbed is inf; give a finite number"),
    ({"target": "warm"}, ValueError, "target 'warm' is unknown"),
    ({"teacher": "other"}, ValueError, "teacher 'other' is unknown; choose mean, self or final"),
    ({"min_confidence": 1.5}, ValueError, "min_confidence is 1.5"),
    ({"exit_weights": [math.nan]}, ValueError, r"exit_weights\[0\] is nan"),
    ({"exit_weights": [1.0, 1.0]}, ValueError, "2 exit_weights for 1 exits"),
    ({"clean": []}, ValueError, "0 clean and 1 perturbed logits"),
    ({"perturbed": [Z[:2]]}, ValueError, r"logits are \(3, 4\) .* at one exit, \(2, 4\)"),
    ({"perturbed": [Z.half()]}, ValueError, "torch.float16 on cpu at another"),
    ({"clean": [Z[:, :1]], "perturbed": [Z[:, :1]]}, ValueError, r"logits have shape \(3, 1\)"),
    ({"clean": [Z.long()], "perturbed": [Z.long()]}, TypeError, "logits are torch.int64"),
    ({"labels": torch.zeros(3)}, TypeError, "labels are torch.float32; give class indices"),
    ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels are \(2,\) on cpu; give \(3,\)"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_bad_input_is_refused(backend: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.consistent_exit_loss(**{"clean": [Z], "perturbed": [Z], "labels": torch.zeros(3).long(), **wrong})


@pytest.mark.parametrize("label", [4, -1, -101, 2**40])
def test_labels_out_of_range_are_refused(backend: str, label: int) -> None:
    with pytest.raises((ValueError, IndexError), match=f"{label}"):
        ops.consistent_exit_loss([Z], [Z], torch.tensor([0, label, 0]))


@kernels_only
def test_the_custom_operator_keeps_its_promises(backend: str) -> None:
    logits = [torch.randn(5, 3, requires_grad=True) for _ in range(4)]
    arguments = (logits, torch.tensor([0, 2, -100, 1, 1]), 0.5, 0.6, "soft", "mean", 0.3, [0.5, 0.5])
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(torch.ops.cet.consistent_exit_loss.default, arguments, test_utils=tests)


def test_a_compiled_call_gives_the_same_loss_and_gradients(backend: str) -> None:
    def loss(clean: Tensor, perturbed: Tensor, labels: Tensor) -> Tensor:
        return ops.consistent_exit_loss([clean], [perturbed], labels, min_confidence=0.4).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    logits = [torch.randn(6, 4, requires_grad=True) for _ in range(2)]
    labels = torch.tensor([0, 1, 2, 3, -100, 0])
    results = [
        (value.detach(), *torch.autograd.grad(value, logits))
        for value in (compiled(*logits, labels), loss(*logits, labels))
    ]
    torch.testing.assert_close(*results)


def test_labels_of_any_strides(backend: str) -> None:
    clean, perturbed, labels = torch.randn(64, 3), torch.randn(64, 3), torch.randint(0, 3, (64, 2))
    for column in labels.unbind(dim=1):
        got = ops.consistent_exit_loss([clean], [perturbed], column)
        torch.testing.assert_close(got.loss, ops.consistent_exit_loss([clean], [perturbed], column.clone()).loss)


@kernels_only
def test_a_second_derivative_is_refused(backend: str) -> None:
    logits = [torch.randn(4, 3, requires_grad=True) for _ in range(2)]
    loss = ops.consistent_exit_loss(logits[:1], logits[1:], torch.tensor([0, 1, 2, 0])).loss
    with pytest.raises(RuntimeError, match="gradients have no gradient of their own"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_transforms_run_in_plain_pytorch() -> None:
    clean, perturbed, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])

    def loss(clean: Tensor) -> Tensor:
        return ops.consistent_exit_loss([clean], [perturbed], labels).loss

    leaf = clean.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(clean), leaf.grad)
