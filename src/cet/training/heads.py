"""Exit heads for a model that is trained already, which stays as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cet.data.batches import BatchFn, read_batches
from cet.model.early_exit import EarlyExit
from cet.training.loss import ConsistentExitLoss


def train_heads(
    model: EarlyExit,
    loader: Iterable[Any],
    *,
    epochs: int = 10,
    loss: ConsistentExitLoss | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    seed: int = 0,
    batch_fn: BatchFn | None = None,
) -> tuple[float, ...]:
    """Train the exit heads of a model on the features of its frozen backbone, with AdamW and a cosine schedule.

    The backbone runs in eval mode and without gradients: its weights and buffers, those of batch normalisation too, and
    so the answers of its final exit, are the same bit for bit afterwards. Modes, ``requires_grad`` and gradients of the
    whole model are put back as they were, also after an error. Training runs where the model is, and draws its random
    numbers from ``seed``.

    Args:
        model: its heads are trained in place; a policy that it has should be calibrated anew.
        loader: yields batches of ``(x, y)``, dicts or longer tuples, see :mod:`cet.data.batches`. It is read once per
            epoch.
        epochs: how often.
        loss: the objective; cross-entropy at every exit when not given. With ``ConsistentExitLoss(perturb,
            teacher="final")`` the heads learn what the backbone answers, from rows without labels (-100) too.
        learning_rate: of the first epoch (Loshchilov & Hutter 2017, arXiv 1608.03983); it falls to zero.
        weight_decay: decoupled weight decay of the heads (Loshchilov & Hutter 2019, arXiv 1711.05101).
        seed: of all random numbers, such as those of perturbations and of a loader that shuffles.
        batch_fn: takes a batch apart, ``batch_fn(batch) -> (x, y)``.

    Returns:
        The mean loss of each epoch.

    Raises:
        TypeError: for a model that is no :class:`cet.EarlyExit`, and a loader or labels of another kind.
        ValueError: for arguments out of range, heads without weights or with weights of the backbone, and a loader that
            yields no batch or cannot be read ``epochs`` times.
        RuntimeError: for a loss that is not finite.
    """
    if not isinstance(model, EarlyExit):
        raise TypeError(f"model is {type(model).__name__}; wrap it in cet.EarlyExit")
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs is {epochs!r}; give a whole number from 1 on")
    if not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}; give a whole number")
    if not (loss is None or callable(loss)):
        raise TypeError(f"loss is {loss!r}; give a cet.ConsistentExitLoss")
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate is {learning_rate}; give a positive number")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay is {weight_decay}; give a number >= 0")
    if epochs > 1 and isinstance(loader, Iterator):
        raise ValueError(f"loader can be read once only, but epochs is {epochs}; give a DataLoader or a list")
    weights = _weights_of_heads(model)
    objective = loss or ConsistentExitLoss(None, consistency_weight=0.0)
    device = weights[0].device
    optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    means: list[float] = []
    with _heads_only(model), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for epoch in range(epochs):
            losses: list[Tensor] = []
            for x, y in read_batches(loader, model.num_classes, batch_fn):
                x, y = pytree.tree_map_only(Tensor, lambda t: t.to(device, non_blocking=True), (x, y))
                value, _ = objective(model, x, y)
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                losses.append(value.detach())
            if not losses:
                raise ValueError(f"loader yields no batch in epoch {epoch}; give one that can be read once per epoch")
            means.append(float(torch.stack(losses).mean()))
            if not means[-1] < float("inf"):
                raise RuntimeError(
                    f"the loss is {means[-1]} in epoch {epoch}; give a lower learning_rate or finite inputs, and train "
                    "float16 models in float32 or bfloat16"
                )
            schedule.step()
    return tuple(means)


def _weights_of_heads(model: EarlyExit) -> list[nn.Parameter]:
    weights: list[nn.Parameter] = []
    of_backbone = {*model.backbone.parameters()}
    for name, head in zip(model.exit_names, model.heads, strict=False):
        own = list(head.parameters())
        if any(weight in of_backbone for weight in own):
            raise ValueError(f"the head of exit {name!r} shares weights with the backbone; give it weights of its own")
        weights.extend(weight for weight in own if weight not in {*weights})
    if not weights:
        raise ValueError("the heads have no weights to train; give heads with parameters, such as cet.HeadSpec()")
    return weights


@contextmanager
def _heads_only(model: EarlyExit) -> Iterator[None]:
    """The heads in train mode with gradients, the backbone in eval mode without; all put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    parameters = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    try:
        model.train()
        model.backbone.eval()
        model.requires_grad_(False)
        model.heads.requires_grad_(True)
        for weight in model.parameters():
            weight.grad = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, requires_grad, grad in parameters:
            weight.requires_grad_(requires_grad)
            weight.grad = grad
