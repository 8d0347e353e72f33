"""What benchmarks.quality compares the recipes with, against loops over rows, and its ways to train."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality import objectives, sets
from benchmarks.quality.conditions import METHODS
from benchmarks.quality.runs import Job, run, split_of
from benchmarks.quality.ways import WAYS, EquilibriumNet, KeepBest, Ramp, ScaledGradient
from cet.ops import consistent_exit_loss
from cet.training import SensorNet

EXITS, ROWS, CLASSES = 2, 3, 4


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(EXITS, ROWS, CLASSES, dtype=torch.float64, requires_grad=True)


Y = torch.tensor([0, 3, 1])


@pytest.mark.parametrize("name", ["label smoothing", "bootstrapping", "GCE"])
def test_remedies_are_their_formulas(name: str, logits: torch.Tensor) -> None:
    total = 0.0
    for exit_ in logits.detach().softmax(-1).tolist():
        for p, label in zip(exit_, Y.tolist(), strict=True):
            likeliest = max(range(CLASSES), key=p.__getitem__)
            total += {
                "label smoothing": -0.9 * math.log(p[label]) - 0.1 * sum(map(math.log, p)) / CLASSES,
                "bootstrapping": -0.8 * math.log(p[label]) - 0.2 * math.log(p[likeliest]),
                "GCE": (1 - p[label] ** 0.7) / 0.7,
            }[name]
    assert objectives.SUPERVISED[name](logits, Y).item() == pytest.approx(total / (EXITS * ROWS))


@pytest.mark.parametrize("name", ["late to early", "exit ensemble"])
def test_distillation_is_of_the_same_copy_and_no_gradient_reaches_the_teacher(name: str, logits: torch.Tensor) -> None:
    other = torch.randn_like(logits)
    total = 0.0
    for copy in (logits.detach(), other):
        p = copy.softmax(-1)
        teacher = p[-1] if name == "late to early" else p.mean(0)
        total += sum((teacher * (teacher / q).log()).sum().item() for q in p) / (EXITS * ROWS) / 2
    loss = objectives.TERMS[name](logits, other)
    assert loss.item() == pytest.approx(total)
    loss.backward()
    assert logits.grad is not None
    # Of KL with a teacher that is held: the probabilities less the teacher's.
    p = logits.detach().softmax(-1)
    teacher = p[-1] if name == "late to early" else p.mean(0)
    torch.testing.assert_close(logits.grad, (p - teacher) / (EXITS * ROWS) / 2)


def test_decisions_compare_entropies(logits: torch.Tensor) -> None:
    other = torch.randn_like(logits)
    entropies = [torch.distributions.Categorical(logits=x.detach()).entropy() for x in (logits, other)]
    assert objectives.same_decision(logits, other).item() == pytest.approx(
        (entropies[0] - entropies[1]).square().mean().item()
    )


def test_gradients_of_later_exits_are_scaled_and_answers_are_not() -> None:
    x = torch.randn(3, requires_grad=True)
    scaled = ScaledGradient(0.25)
    torch.testing.assert_close(scaled(x), x)
    scaled(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.25] * 3
    net, plain = EquilibriumNet(3, (4, 5, 6)), SensorNet(3, widths=(4, 5, 6))
    plain.load_state_dict(net.state_dict())
    x = torch.randn(2, 6, 16)
    torch.testing.assert_close(net(x), plain(x))
    assert [module.scale for module in net.trunk] == pytest.approx([2 / 3, 1 / 2])


def test_the_ramp_ends_at_the_full_weight() -> None:
    module = SimpleNamespace(loss=SimpleNamespace(consistency_weight=3.0))
    ramp, trainer, weights = Ramp(), SimpleNamespace(estimated_stepping_batches=100), []
    ramp.on_train_start(trainer, module)
    for trainer.global_step in (0, 15, 30, 99):
        ramp.on_train_batch_start(trainer, module)
        weights.append(module.loss.consistency_weight)
    assert weights == pytest.approx([3 * math.exp(-5), 3 * math.exp(-1.25), 3.0, 3.0])


def test_the_best_epoch_is_kept() -> None:
    module, best = SimpleNamespace(model=torch.nn.Linear(1, 1, bias=False)), KeepBest()
    for epoch, accuracy in enumerate([0.5, 0.9, 0.7]):
        torch.nn.init.constant_(module.model.weight, float(epoch))
        metrics = {"accuracy_a": torch.tensor(accuracy), "train_loss": torch.tensor(9.0 * epoch)}
        best.on_validation_end(SimpleNamespace(callback_metrics=metrics), module)
    assert best.weights["weight"].item() == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]("full").way in WAYS])
def test_each_method_trains(name: str) -> None:
    result = run(Job("40 % wrong windows", name, 10, 0), every=16, epochs=2)
    assert len(result.y) == len(split_of(10, 16).test)
    assert torch.from_numpy(result.logits).isfinite().all()


def test_sets_are_whole_and_split_into_tenths() -> None:
    every = sets.tenths("digits")
    assert every.x.shape == (1797, 8, 8)
    assert every.y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert every.person.bincount().tolist() == [180] * 7 + [179] * 3


def test_the_recipes_term_is_that_of_the_product(logits: torch.Tensor) -> None:
    perturbed = torch.randn_like(logits)
    expected = consistent_exit_loss(list(logits.float()), list(perturbed.float()), Y).consistency.mean()
    assert objectives.TERMS["GCE and consistency"](logits, perturbed).item() == pytest.approx(expected.item(), rel=1e-5)
