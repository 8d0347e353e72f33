"""One training by Lightning on one device, which can be stopped at any moment and goes on exactly."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from cet.model.early_exit import EarlyExit
from cet.training.lightning import AtomicCheckpointIO, MultiExitTraining

CHECKPOINT = "last"


def fit(
    training: MultiExitTraining,
    train_batches: Iterable[Any],
    validation_batches: Iterable[Any],
    *,
    epochs: int,
    directory: Path | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> EarlyExit:
    """Train a model; the accuracy of every exit on the validation batches is logged after each epoch.

    Args:
        training: the model with its objective, seed and identity.
        train_batches: pairs ``(x, y)``, as many in every epoch.
        validation_batches: likewise.
        epochs: how often the training batches are gone through.
        directory: where a checkpoint is written after each epoch; none is written when not given.
        resume: go on from the checkpoint in ``directory``, if there is one. The result has the same weights, bit for
            bit on the same CPU and number of threads, as that of a run that was never interrupted.
        callbacks: further Lightning callbacks, such as a progress bar.

    Returns:
        The model in eval mode, on the CPU.

    Raises:
        ValueError: when the checkpoint belongs to another run.
    """
    checkpoints: list[Callback] = []
    resumed: Path | None = None
    if directory is not None:
        checkpoints = [
            ModelCheckpoint(directory, CHECKPOINT, save_on_train_epoch_end=True, enable_version_counter=False)
        ]
        written = directory / f"{CHECKPOINT}.ckpt"
        resumed = written if resume and written.is_file() else None
    with _lightning_manners(), torch.random.fork_rng():
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            max_epochs=epochs,
            callbacks=[*checkpoints, *callbacks],
            plugins=[AtomicCheckpointIO()],
            logger=False,
            enable_checkpointing=bool(checkpoints),
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(training, train_batches, validation_batches, ckpt_path=resumed)
    return training.model.cpu().eval()


class Step(Protocol):
    """Shows one stage of a run to the user."""

    def advance(self, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...


class ShowTraining(Callback):
    """Shows how far a training is, and the final exit's accuracy after each epoch."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        per_epoch, epochs = trainer.num_training_batches, trainer.max_epochs or 1
        if per_epoch < float("inf"):  # a loader may not know its length
            self.step.advance(trainer.global_step, int(per_epoch) * epochs)

    def on_validation_end(self, trainer: Trainer, _: LightningModule) -> None:
        accuracy = trainer.callback_metrics["accuracy_final"].item()
        self.step.note(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, accuracy {accuracy:.3f}")


@contextmanager
def _lightning_manners() -> Iterator[None]:
    """Lightning without its advice, none of which applies to data in memory, and with Ctrl-C as usual.

    Lightning turns Ctrl-C into an exit and leaves the signal ignored.
    """
    logger = logging.getLogger("lightning.pytorch")
    level, on_ctrl_c = logger.level, signal.getsignal(signal.SIGINT)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    except SystemExit as exit_:
        if not isinstance(exit_.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, on_ctrl_c)
        raise exit_.__context__ from None
    finally:
        logger.setLevel(level)
