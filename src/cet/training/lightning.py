"""Multi-exit training with Lightning that can be stopped at any moment and goes on exactly."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from cet.data.batches import BatchFn, call, class_indices, split_batch
from cet.model.checkpoint import write_atomically
from cet.model.early_exit import EarlyExit
from cet.ops.consistent_exit_loss import UNLABELLED
from cet.training.loss import ConsistentExitLoss, check_finite
from cet.training.sampling import mixed_seed

CHECKPOINT_KEY = "cet_training"
TEACHER_KEY = "cet_teacher"


class MultiExitTraining(LightningModule):
    """Trains all exits of a model at once, with AdamW and a one-cycle learning rate.

    All randomness of a step, of the perturbation and of the model's own layers, comes from torch's global generators,
    which every step starts from a seed of its own: a run that goes on from the checkpoint of any epoch ends with the
    weights of a run that was never interrupted. Processes that train together draw differently. Batches are what
    :mod:`cet.data.batches` tells. Each epoch logs ``train_loss``; validation logs the accuracy of every exit on the
    labelled rows as ``accuracy_<exit>``. What is frozen stays as it is: ``model.backbone.eval().requires_grad_(False)``
    leaves the heads to be trained, as :func:`cet.train_heads` does without Lightning.

    Args:
        model: the model to train.
        loss: its objective.
        seed: with the numbers of epoch and batch, the source of all randomness.
        learning_rate: the peak of the one-cycle schedule (Smith & Topin 2018, arXiv 1708.07120).
        weight_decay: decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101).
        augment: changes the input of every training step, before the loss sees it.
        identity: plain values that tell what is trained; a checkpoint with other ones is refused.
        batch_fn: takes a batch apart, ``batch_fn(batch) -> (x, y)``, see :func:`cet.data.batches.split_batch`.
    """

    def __init__(
        self,
        model: EarlyExit,
        loss: ConsistentExitLoss,
        *,
        seed: int = 0,
        learning_rate: float = 3e-3,
        weight_decay: float = 1e-2,
        augment: Callable[[Any], Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        batch_fn: BatchFn | None = None,
    ) -> None:
        if not isinstance(model, EarlyExit):
            raise TypeError(f"model is {type(model).__name__}; give a cet.EarlyExit")
        if not isinstance(loss, ConsistentExitLoss):
            raise TypeError(f"loss is {type(loss).__name__}; give a cet.ConsistentExitLoss")
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed is {seed!r}; give a whole number from 0 on")
        super().__init__()
        self.model = model
        self.loss = loss
        self.seed = seed
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.augment = augment
        self.identity = dict(identity or {})
        self.batch_fn = batch_fn

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = split_batch(batch, self.batch_fn)
        torch.manual_seed(mixed_seed(self.seed, self.current_epoch, batch_idx) + self.global_rank)
        loss, _ = self.loss(self.model, x if self.augment is None else self.augment(x), y)
        check_finite(loss, x)
        self.log(
            "train_loss", loss.detach(), on_step=False, on_epoch=True, prog_bar=True, batch_size=len(y), sync_dist=True
        )
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = split_batch(batch, self.batch_fn)
        y = class_indices(x, y, self.model.num_classes)
        is_labelled = y != UNLABELLED
        num_labelled = int(is_labelled.sum())
        for name, logits in zip(self.model.exit_names, call(self.model.exit_logits, x), strict=True):
            accuracy = ((logits.argmax(1) == y) & is_labelled).sum() / max(num_labelled, 1)
            self.log(f"accuracy_{name}", accuracy, prog_bar=True, batch_size=num_labelled, sync_dist=True)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), self.learning_rate, weight_decay=self.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CHECKPOINT_KEY] = self.identity
        checkpoint[TEACHER_KEY] = self.loss.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get(CHECKPOINT_KEY, {})
        for name in sorted(self.identity.keys() | saved.keys()):
            if saved.get(name) != self.identity.get(name):
                raise ValueError(
                    f"the checkpoint was trained with {name} {saved.get(name)!r}, not {self.identity.get(name)!r}; "
                    "train into another directory, or start anew without resume"
                )
        self.loss.load_state_dict(self.model, checkpoint.get(TEACHER_KEY, {}))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Reads tensors and plain values only, never a pickled object, and replaces a file at once or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        try:
            checkpoint: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{path} is damaged or holds more than tensors and plain values; start anew without resume"
            ) from error
        return checkpoint
