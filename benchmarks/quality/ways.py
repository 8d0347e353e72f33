"""Ways to train that the recipes are compared with: in phases, two nets at once, with a wearer's own recordings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor, nn

import cet
from cet.data.batches import UNLABELLED
from cet.data.smartwatch import Split, Windows
from cet.training import MultiExitTraining, Recipe, build, perturbation, train
from cet.training.fit import fit
from cet.training.sampling import batches, mixed_seed, shuffled
from cet.training.sensor_net import SensorNet, exits_of

Trained = list[tuple[cet.EarlyExit, Tensor]]
"""Models, and which rows of the test windows each is tried on, a mask."""

RAMP = 0.3  # of the steps


def all_rows(split: Split) -> Tensor:
    return torch.ones(len(split.test), dtype=torch.bool)


def usual(recipe: Recipe, split: Split, seed: int, epochs: int, widths: Sequence[int]) -> Trained:
    """As `cet.training.train` does."""
    return [(train(recipe, split, seed, epochs=epochs, widths=widths), all_rows(split))]


def phase(model: cet.EarlyExit, recipe: Recipe, split: Split, seed: int, epochs: int) -> cet.EarlyExit:
    """Train a model that there is, under a schedule of its own."""
    training = MultiExitTraining(
        model,
        recipe.loss(perturbation(recipe.severity)),
        seed=seed,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )
    order = shuffled(split.train.y, recipe.batch_size, recipe.labelled_share, seed=seed)
    held_out = batches(split.calibration.x, split.calibration.y, torch.arange(len(split.calibration)).split(1024))
    return fit(training, batches(split.train.x, split.train.y, order), held_out, epochs=epochs)


def after_backbone(share: float, freeze: bool) -> Callable[..., Trained]:
    """The backbone alone for a share of the epochs; then the heads on the frozen one, or everything."""

    def way(recipe: Recipe, split: Split, seed: int, epochs: int, widths: Sequence[int]) -> Trained:
        model = build(recipe, split, seed, widths)
        first = max(1, round(share * epochs))
        last_only = (*(0.0,) * (model.num_exits - 1), 1.0)
        model = phase(model, replace(recipe, exit_weights=last_only), split, seed, first).train()
        if freeze:
            model.backbone.eval().requires_grad_(False)
        return [(phase(model, recipe, split, seed + 1000, max(1, epochs - first)), all_rows(split))]

    return way


class ScaledGradient(nn.Module):
    """Passes its input on, and its gradient back, scaled."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + (1 - self.scale) * x.detach() if self.training else x


class EquilibriumNet(SensorNet):
    """Gradients of later exits reach an earlier block scaled, so that the sum does not grow with the number of exits
    (Li et al. 2019, arXiv 1908.06371, section 3.2)."""

    def __init__(self, num_classes: int, widths: Sequence[int]) -> None:
        super().__init__(num_classes, widths=widths)
        last = len(widths)
        self.trunk = nn.ModuleList(ScaledGradient((last - k) / (last - k + 1)) for k in range(1, last))

    def forward(self, x: Tensor) -> Tensor:
        for index in range(self.num_blocks):
            x = getattr(self, f"block{index + 1}")(x)
            if index < len(self.trunk):
                x = self.trunk[index](x)
        logits: Tensor = self.classifier(x.mean(2))
        return logits


class PooledHead(nn.Module):
    """The head that is built for :class:`cet.HeadSpec` of such features, behind a scaled gradient."""

    def __init__(self, width: int, num_classes: int, scale: float) -> None:
        super().__init__()
        self.scaled, self.linear = ScaledGradient(scale), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.scaled(x).mean(2))
        return logits


def equilibrium(recipe: Recipe, split: Split, seed: int, epochs: int, widths: Sequence[int]) -> Trained:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        num_classes, last = len(split.train.classes), len(widths)
        heads = {name: PooledHead(widths[k], num_classes, 1 / (last - k)) for k, name in enumerate(exits_of(widths))}
        model = cet.EarlyExit(EquilibriumNet(num_classes, widths), heads, (split.train.x[:2],))
    return [(phase(model, recipe, split, seed, epochs), all_rows(split))]


class Ramp(Callback):
    """Raises the consistency weight from 0 (Laine & Aila 2017, arXiv 1610.02242, section 2.1)."""

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        at = min(1.0, trainer.global_step / (RAMP * int(trainer.estimated_stepping_batches)))
        module.loss.consistency_weight = self.full * float(torch.tensor(-5 * (1 - at) ** 2).exp())

    def on_train_start(self, _: Any, module: Any) -> None:
        self.full = module.loss.consistency_weight


class KeepBest(Callback):
    """Keeps the weights of the epoch with the best accuracy on the calibration persons, mean of the exits."""

    best = -1.0

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        accuracies = [float(v) for name, v in trainer.callback_metrics.items() if name.startswith("accuracy_")]
        if sum(accuracies) > self.best:
            self.best = sum(accuracies)
            self.weights = {name: value.clone() for name, value in module.model.state_dict().items()}


def ramped(recipe: Recipe, split: Split, seed: int, epochs: int, widths: Sequence[int]) -> Trained:
    return [(train(recipe, split, seed, epochs=epochs, widths=widths, callbacks=[Ramp()]), all_rows(split))]


def stopped_early(recipe: Recipe, split: Split, seed: int, epochs: int, widths: Sequence[int]) -> Trained:
    best = KeepBest()
    model = train(recipe, split, seed, epochs=epochs, widths=widths, callbacks=[best])
    model.load_state_dict(best.weights)
    return [(model, all_rows(split))]


def with_neighbours(recipe: Recipe, split: Split, seed: int, epochs: int, widths: Sequence[int]) -> Trained:
    """Each training window beside the next of its recording; the last beside itself."""
    recording = split.train.recording
    assert recording is not None
    following = torch.arange(len(split.train)) + 1
    following[-1] -= 1
    following = torch.where(recording[following] == recording, following, following - 1)
    pairs = replace(split.train, x=torch.cat([split.train.x, split.train.x[following]], dim=1))
    model = build(recipe, split, seed, widths)
    return [(phase(model, recipe, replace(split, train=pairs), seed, epochs), all_rows(split))]


def of_wearer(recipe: Recipe, split: Split, seed: int, epochs: int, widths: Sequence[int]) -> Trained:
    """Half of a test person's recordings join the training windows without their labels, and the model is tried on the
    other half; then the other way round."""
    test = split.test
    assert test.recording is not None
    half = torch.zeros(len(test), dtype=torch.bool)
    for key in torch.stack([test.person, test.y]).unique(dim=1).T:
        rows = (test.person == key[0]) & (test.y == key[1])
        half |= rows & torch.isin(test.recording, test.recording[rows].unique()[::2])
    trained = []
    for joins in (half, ~half):
        own = test.rows(joins)
        more = Windows(
            torch.cat([split.train.x, own.x]),
            torch.cat([split.train.y, torch.full_like(own.y, UNLABELLED)]),
            torch.cat([split.train.person, own.person]),
            split.train.classes,
        )
        # As many steps as without them.
        fewer = max(1, round(epochs * len(split.train) / len(more)))
        trained.append((train(recipe, replace(split, train=more), seed, epochs=fewer, widths=widths), ~joins))
    return trained


def co_teaching(forgotten: float) -> Callable[..., Trained]:
    """Two nets, each taught the rows of small loss that the other names (Han et al. 2018, arXiv 1804.06872); for half
    as many epochs, as it is two. What is forgotten grows to the share of wrong labels, which it is told, in the first
    third."""

    def way(recipe: Recipe, split: Split, seed: int, epochs: int, widths: Sequence[int]) -> Trained:
        models = [build(recipe, split, s, widths).train() for s in (seed, seed + 1000)]
        perturb, order = perturbation(recipe.severity), shuffled(split.train.y, recipe.batch_size, 1.0, seed=seed)
        epochs = max(1, epochs // 2)
        steps, done = epochs * len(order), 0
        optimizers = [torch.optim.AdamW(m.parameters(), weight_decay=recipe.weight_decay) for m in models]
        schedules = [torch.optim.lr_scheduler.OneCycleLR(o, recipe.learning_rate, steps) for o in optimizers]
        with torch.random.fork_rng():
            for epoch in range(epochs):
                order.set_epoch(epoch)
                for rows in order:
                    torch.manual_seed(mixed_seed(seed, done))
                    x, y = split.train.x[rows], split.train.y[rows]
                    both = torch.cat([x, torch.as_tensor(perturb(x))])
                    losses = []
                    for model in models:
                        exits = torch.stack(model(both))
                        ce = F.cross_entropy(exits.flatten(0, 1), y.repeat(2 * len(exits)), reduction="none")
                        losses.append(ce.view(len(exits), 2, len(y)).mean(0).sum(0))
                    keep = round((1 - forgotten * min(1.0, 3 * done / steps)) * len(y))
                    chosen = [loss.detach().argsort()[:keep] for loss in losses]
                    for loss, others, optimizer, schedule in zip(
                        losses, reversed(chosen), optimizers, schedules, strict=True
                    ):
                        optimizer.zero_grad()
                        loss[others].mean().backward()  # type: ignore[no-untyped-call]
                        optimizer.step()
                        schedule.step()
                    done += 1
        return [(models[0].eval(), all_rows(split))]

    return way


WAYS: dict[str, Callable[..., Trained]] = {
    "usual": usual,
    "backbone, then heads": after_backbone(2 / 3, freeze=True),
    "backbone, then all": after_backbone(1 / 2, freeze=False),
    "gradient equilibrium": equilibrium,
    "ramp": ramped,
    "early stopping": stopped_early,
    "neighbours": with_neighbours,
    "wearer": of_wearer,
    "co-teaching, 20 %": co_teaching(0.2),
    "co-teaching, 40 %": co_teaching(0.4),
}
