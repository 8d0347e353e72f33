"""Training: the recipes differ in the objective alone, and a run that was killed goes on to the same weights."""

from __future__ import annotations

import os
import signal
import warnings
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

import cet
from cet.data.smartwatch import Split, Windows
from cet.training import (
    CONSISTENT,
    JOINT,
    RECIPES,
    LabelledShare,
    MultiExitTraining,
    SensorNet,
    build,
    perturbation,
    train,
)
from cet.training.sampling import ShuffledBatches, batches
from thinned import slow
from watchdog import start

TINY = replace(CONSISTENT, epochs=4, batch_size=16)


def tiny_windows(persons: range, rows: int = 80) -> Windows:
    """Two classes that differ in their common frequency."""
    draw = torch.Generator().manual_seed(persons.start)
    y = torch.arange(rows) % 2
    phase = torch.arange(48.0) * (0.2 + 1.3 * y[:, None]) + 6.3 * torch.rand(rows, 1, generator=draw)
    x = phase.sin()[:, None] + 0.2 * torch.randn(rows, 6, 48, generator=draw)
    return Windows(x, y, torch.arange(rows) % len(persons) + persons.start, ("slow", "fast"))


def tiny_split() -> Split:
    return Split(tiny_windows(range(3)), tiny_windows(range(3, 4)), tiny_windows(range(4, 5)))


@pytest.fixture(scope="module")
def split() -> Split:
    return tiny_split()


@pytest.fixture(scope="module")
def trained(split: Split) -> cet.EarlyExit:
    return train(TINY, split, 0)


class StopIn(Callback):
    """Does something in the middle of an epoch."""

    def __init__(self, epoch: int, stop: Any) -> None:
        self.epoch, self.stop = epoch, stop

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == self.epoch and trainer.global_step % trainer.num_training_batches == 2:
            self.stop()


def raise_keyboard_interrupt() -> None:
    raise KeyboardInterrupt


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers; the policy beside them holds NaN for a closed exit, which equals nothing."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    assert tensors_of(a).keys() == tensors_of(b).keys()
    for name, value in tensors_of(a).items():
        assert torch.equal(value, tensors_of(b)[name]), name


def differ(a: nn.Module, b: nn.Module) -> bool:
    return any(not torch.equal(value, tensors_of(b)[name]) for name, value in tensors_of(a).items())


def test_what_lightning_could_not_train_is_refused_when_it_is_given(split: Split) -> None:
    model, loss = build(JOINT, split, 0), cet.ConsistentExitLoss(None, 0.0)
    for wrong, error, message in (
        ((nn.Linear(2, 2), loss), TypeError, "model is Linear; give a cet.EarlyExit"),
        ((model, nn.CrossEntropyLoss()), TypeError, "loss is CrossEntropyLoss; give a cet.ConsistentExitLoss"),
    ):
        with pytest.raises(error, match=message):
            MultiExitTraining(*wrong)
    with pytest.raises(ValueError, match="seed is -1; give a whole number from 0 on"):
        MultiExitTraining(model, loss, seed=-1)


def test_the_recipes_differ_in_the_objective_alone() -> None:
    objective = {"name", "consistency_weight", "supervise_perturbed", "labelled_share"}
    assert list(RECIPES) == ["joint", "augmentation", "consistent", "noisy-labels"]
    for recipe in RECIPES.values():
        for field in fields(recipe):
            if field.name not in objective:
                assert getattr(recipe, field.name) == getattr(CONSISTENT, field.name)
    weights = {name: (r.supervise_perturbed, r.consistency_weight) for name, r in RECIPES.items()}
    assert weights == {"joint": (0, 0), "augmentation": (1, 0), "consistent": (1, 1), "noisy-labels": (1, 3)}


def test_one_seed_gives_all_recipes_the_same_net(split: Split) -> None:
    assert_same_weights(build(JOINT, split, 3), build(CONSISTENT, split, 3))
    assert differ(build(JOINT, split, 3), build(JOINT, split, 4))


@pytest.mark.parametrize("length", [1, 31, 128])
def test_the_net_takes_any_length(length: int) -> None:
    net = SensorNet(5).eval()
    x = torch.randn(3, 6, length)
    lengths = []
    for block in (net.block1, net.block2, net.block3, net.block4):
        x = block(x)
        lengths.append(x.shape[2])
    assert lengths == [-(-length // 2**k) for k in (1, 2, 3, 4)]
    assert net(torch.randn(3, 6, length)).shape == (3, 5)


def test_severity_zero_changes_nothing_and_a_seed_repeats_the_draw() -> None:
    x = torch.randn(4, 6, 64)
    assert torch.equal(perturbation(0.0)(x), x)
    one, same, other = (perturbation(1.0)(x, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_training_learns(split: Split, trained: cet.EarlyExit) -> None:
    assert not trained.training
    with torch.no_grad():
        for logits in trained.exit_logits(split.test.x):
            assert (logits.argmax(1) == split.test.y).float().mean() > 0.9


def test_a_run_repeats_bit_for_bit_and_depends_on_its_seed(split: Split, trained: cet.EarlyExit) -> None:
    torch.rand(7)  # the state of the global generator does not matter
    assert_same_weights(train(TINY, split, 0), trained)
    assert differ(train(TINY, split, 1), trained)


def test_training_leaves_the_global_generator_and_the_folder_alone(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    train(TINY, split, 0, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(tmp_path.iterdir()) == []


def train_and_be_killed(epoch: int, threads: int, folder: Path) -> None:
    torch.set_num_threads(threads)
    kill = StopIn(epoch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(TINY, tiny_split(), 0, directory=folder, callbacks=[kill])


@pytest.mark.parametrize("epoch", [slow(0), 2])
def test_a_killed_run_goes_on_to_the_same_weights(
    split: Split, trained: cet.EarlyExit, tmp_path: Path, epoch: int
) -> None:
    killed = start(train_and_be_killed, (epoch, torch.get_num_threads(), tmp_path), 100, tmp_path.with_suffix(".log"))
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == (epoch > 0)
    first_epochs = []

    class Watch(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            first_epochs.append(trainer.current_epoch)

    assert_same_weights(train(TINY, split, 0, directory=tmp_path, resume=True, callbacks=[Watch()]), trained)
    assert first_epochs == list(range(epoch, TINY.epochs))


def test_ctrl_c_arrives_as_usual_and_loses_at_most_one_epoch(
    split: Split, trained: cet.EarlyExit, tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(TINY, split, 0, directory=tmp_path, callbacks=[StopIn(1, raise_keyboard_interrupt)])
    assert signal.getsignal(signal.SIGINT) is handler
    assert_same_weights(train(TINY, split, 0, directory=tmp_path, resume=True), trained)


def test_a_finished_run_resumes_to_itself(split: Split, trained: cet.EarlyExit, tmp_path: Path) -> None:
    train(TINY, split, 0, directory=tmp_path)
    assert_same_weights(train(TINY, split, 0, directory=tmp_path, resume=True), trained)


def test_without_resume_a_run_starts_anew(split: Split, tmp_path: Path) -> None:
    short = replace(TINY, epochs=1)
    train(short, split, 5, directory=tmp_path)
    assert_same_weights(train(short, split, 0, directory=tmp_path), train(short, split, 0))


def test_a_checkpoint_holds_tensors_and_plain_values_only(split: Split, tmp_path: Path) -> None:
    train(TINY, split, 0, directory=tmp_path, epochs=1)
    [path] = tmp_path.iterdir()
    saved = torch.load(path, weights_only=True)["cet_training"]
    assert saved == {"persons": [0, 1, 2], "seed": 0, **asdict(TINY), "epochs": 1}


@pytest.mark.parametrize(
    ("recipe", "seed", "named"),
    [
        (replace(TINY, severity=0.5), 0, f"severity {TINY.severity}, not 0.5"),
        slow(replace(TINY, consistency_weight=0.0), 0, f"consistency_weight {TINY.consistency_weight}, not 0.0"),
        (TINY, 1, "seed 0, not 1"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(
    split: Split, tmp_path: Path, recipe: Any, seed: int, named: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(TINY, split, 0, directory=tmp_path, callbacks=[StopIn(1, raise_keyboard_interrupt)])
    with pytest.raises(ValueError, match=f"the checkpoint was trained with {named}"):
        train(recipe, split, seed, directory=tmp_path, resume=True)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "object"])
def test_a_damaged_or_pickled_checkpoint_is_refused(split: Split, tmp_path: Path, content: Any) -> None:
    path = tmp_path / "last.ckpt"
    if content == "object":
        torch.save({"state_dict": StopIn(0, print)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged or holds more than tensors.*start anew"):
        train(TINY, split, 0, directory=tmp_path, resume=True)


def test_every_epoch_sees_the_rows_in_another_order() -> None:
    batches = ShuffledBatches(10, 4, seed=0)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        drawn = list(batches)
        assert [len(batch) for batch in drawn] == [4, 4]
        orders.append(torch.cat(drawn))
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    assert len(set(orders[0].tolist())) == 8


def test_the_accuracy_of_every_exit_is_logged(split: Split) -> None:
    logged: dict[str, float] = {}

    class Watch(Callback):
        def on_train_end(self, trainer: Any, module: MultiExitTraining) -> None:
            logged.update({name: float(value) for name, value in trainer.callback_metrics.items()})

    model = train(TINY, split, 0, callbacks=[Watch()])
    with torch.no_grad():
        for name, logits in zip(model.exit_names, model.exit_logits(split.calibration.x), strict=True):
            accuracy = (logits.argmax(1) == split.calibration.y).float().mean()
            assert logged[f"accuracy_{name}"] == pytest.approx(float(accuracy))
    assert logged["train_loss"] > 0


@pytest.mark.parametrize("kind", ["dict", slow("triple"), "batch_fn"])
def test_any_kind_of_batch_trains_the_same_model(split: Split, kind: str) -> None:
    """Rows without a label count in no accuracy, whatever the batches they come in."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = SensorNet(2)

        def forward(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.net(x * gain[:, None, None])
            return logits

    def make(x: torch.Tensor, y: torch.Tensor) -> Any:
        gain = torch.linspace(0.5, 2.0, len(x))
        kinds = {"pair": ((x, gain), y), "triple": (x, gain, y), "dict": {"x": x, "gain": gain, "labels": y}}
        return kinds.get(kind, {"recording": (x, gain), "exercise": y})

    def fit(kind_of_batch: Any, batch_fn: Any) -> tuple[cet.EarlyExit, dict[str, float]]:
        torch.manual_seed(0)
        head = cet.HeadSpec(layout="channels_first")
        model = cet.EarlyExit(Gated(), {"net.block1": head}, (split.train.x[:3], torch.ones(3)))
        training = MultiExitTraining(model, cet.ConsistentExitLoss(None, 0.0), batch_fn=batch_fn)
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        y = torch.where(torch.arange(len(split.calibration)) % 3 == 0, -100, split.calibration.y)
        loaders = (
            DataLoader([kind_of_batch(*rows) for rows in zip(x.split(16), y.split(16), strict=True)], batch_size=None)
            for x, y in ((split.train.x, split.train.y), (split.calibration.x, y))
        )
        trainer.fit(training, *loaders)
        return model, {name: float(value) for name, value in trainer.callback_metrics.items()}

    batch_fn = (lambda batch: (batch["recording"], batch["exercise"])) if kind == "batch_fn" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, logged = fit(make, batch_fn)
        expected, _ = fit(lambda x, y: ((x, torch.linspace(0.5, 2.0, len(x))), y), None)
    assert_same_weights(model, expected)
    y = torch.where(torch.arange(len(split.calibration)) % 3 == 0, -100, split.calibration.y)
    gain = torch.cat([torch.linspace(0.5, 2.0, 16)] * (len(y) // 16))
    with torch.no_grad():
        for name, logits in zip(model.exit_names, model.eval().exit_logits(split.calibration.x, gain), strict=True):
            right = (logits.argmax(1) == y)[y != -100].float().mean()
            assert logged[f"accuracy_{name}"] == pytest.approx(float(right))


class TestLabelledShare:
    def labels(self, rows: int, labelled: int) -> torch.Tensor:
        y = torch.full((rows,), -100)
        y[torch.randperm(rows)[:labelled]] = 1
        return y

    @pytest.mark.parametrize(("share", "expected"), [(0.5, 4), (0.25, 2), (0.01, 1), (1.0, 8)])
    def test_every_batch_has_its_share_and_rows_of_a_kind_come_round_equally_often(
        self, share: float, expected: int
    ) -> None:
        y = self.labels(100, 10)
        sampler = LabelledShare(y, 8, share, seed=1)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 12
        assert all(len(batch) == 8 and int((y[batch] != -100).sum()) == expected for batch in batches)
        counts = torch.cat(batches).bincount(minlength=100)
        for kind in (y == -100, y != -100):
            assert int(counts[kind].max() - counts[kind].min()) <= 1

    def test_the_order_is_that_of_the_seed_and_the_epoch(self) -> None:
        y = self.labels(60, 20)
        first, same, other = (LabelledShare(y, 8, 0.5, seed=s) for s in (0, 0, 1))
        orders = [torch.stack(list(sampler)) for sampler in (first, same, other)]
        first.set_epoch(1)
        assert torch.equal(orders[0], orders[1])
        assert not torch.equal(orders[0], orders[2])
        assert not torch.equal(orders[0], torch.stack(list(first)))

    def test_all_rows_serve_where_all_have_labels(self) -> None:
        assert torch.cat(list(LabelledShare(torch.zeros(32).long(), 8, 0.5))).sort().values.tolist() == list(range(32))

    @pytest.mark.parametrize(
        ("y", "batch_size", "share", "message"),
        [
            ([-100, -100], 1, 0.5, "no row of y has a label"),
            ([0, -100], 0, 0.5, "batch_size is 0; give at least 1"),
            ([0, -100], 1, 0.0, r"share is 0.0; give a number in \(0, 1\]"),
            ([0, -100], 1, 1.1, "share is 1.1"),
        ],
    )
    def test_what_cannot_be_drawn_is_refused(self, y: list[int], batch_size: int, share: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            LabelledShare(torch.tensor(y), batch_size, share)


def test_few_labels_train_with_the_rows_that_have_none(split: Split) -> None:
    y = split.train.y.clone()
    y[8:] = -100
    few = replace(split, train=replace(split.train, y=y))
    model = train(TINY, few, 0, epochs=6)
    with torch.no_grad():
        assert (model.exit_logits(split.test.x)[-1].argmax(1) == split.test.y).float().mean() > 0.8


@pytest.mark.parametrize("cause", ["input", "learning rate"])
def test_a_loss_that_is_not_finite_stops_training_before_the_step(split: Split, cause: str) -> None:
    x = split.train.x.clone()
    if cause == "input":
        x[3] = torch.nan
    model = build(TINY, split, 0).train()
    training = MultiExitTraining(model, TINY.loss(perturbation(1.0)))
    if cause == "learning rate":
        with torch.no_grad():
            model.backbone.classifier.weight.fill_(torch.inf)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    message = "1 of 80 rows of the batch are not finite, first row 3" if cause == "input" else "lower learning_rate"
    with warnings.catch_warnings(action="ignore"), pytest.raises(RuntimeError, match=message):
        trainer.fit(training, batches(x, split.train.y, [torch.arange(80)]))
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name])


def test_a_run_with_a_moving_average_goes_on_to_the_same_weights(split: Split, tmp_path: Path) -> None:
    ema = replace(TINY, teacher="ema", epochs=2)
    whole = train(ema, split, 0)
    with pytest.raises(KeyboardInterrupt):
        train(ema, split, 0, directory=tmp_path, callbacks=[StopIn(1, raise_keyboard_interrupt)])
    assert_same_weights(train(ema, split, 0, directory=tmp_path, resume=True), whole)
    assert differ(train(replace(TINY, epochs=2), split, 0), whole)
