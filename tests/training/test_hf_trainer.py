"""The Trainer of Hugging Face trains, evaluates, saves and resumes an EarlyExit as it is."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import cet
from cet.data.batches import split_batch
from thinned import slow

ROWS = 24
POLICY = cet.ExitPolicy("confidence", (0.36, None))
PAD, CLS, MASK = 0, 1, 3


def bert() -> tuple[cet.EarlyExit, list[dict[str, Any]]]:
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
        attn_implementation="eager",
    )
    y = torch.arange(ROWS) % 3
    ids = 4 + torch.randint(0, 36, (ROWS, 10))
    ids[:, 0], ids[:, 1] = CLS, 10 + y  # the second token tells the class
    length = 4 + torch.arange(ROWS) % 6
    mask = (torch.arange(10) < length[:, None]).long()
    ids = ids.masked_fill(mask == 0, PAD)
    rows = [{"input_ids": i, "attention_mask": m, "labels": int(k)} for i, m, k in zip(ids, mask, y, strict=True)]
    example = {"input_ids": ids[:3], "attention_mask": mask[:3]}
    exits = ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    return cet.EarlyExit(transformers.BertForSequenceClassification(config), exits, example), rows


def vit() -> tuple[cet.EarlyExit, list[dict[str, Any]]]:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
        attn_implementation="eager",
    )
    y = torch.arange(ROWS) % 3
    images = 0.1 * torch.randn(ROWS, 3, 8, 8)
    images[torch.arange(ROWS), y] += 1
    rows = [{"pixel_values": image, "labels": int(k)} for image, k in zip(images, y, strict=True)]
    exits = ["vit.layers.0", "vit.layers.1"]
    return cet.EarlyExit(transformers.ViTForImageClassification(config), exits, {"pixel_values": images[:3]}), rows


def trainer_for(model: nn.Module, rows: list[dict[str, Any]], folder: Path, **options: Any) -> transformers.Trainer:
    kind = options.pop("kind", transformers.Trainer)
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "remove_unused_columns": False,  # the signature of an EarlyExit does not name the inputs of its backbone
            "report_to": [],
            "disable_tqdm": True,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "learning_rate": 1e-2,
            "max_steps": 12,
            "save_strategy": "no",
            "logging_strategy": "no",
            **options,
        }
    )
    return kind(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(1) == p.label_ids).mean())},
    )


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers|accelerate|torch")
        yield


@pytest.mark.parametrize("family", [bert, slow(vit)])
def test_it_trains_every_exit_evaluates_the_policy_and_saves_all(family: Any, tmp_path: Path) -> None:
    model, rows = family()
    trainer = trainer_for(model, rows, tmp_path)
    before = {name: value.clone() for name, value in model.named_parameters()}
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    for k in (0, 1):
        assert not torch.equal(model.heads[k].linear.weight, before[f"heads.{k}.linear.weight"])

    x, y = split_batch(transformers.default_data_collator(rows))
    with torch.no_grad():
        confidence = model.eval().exit_logits(**x)[0].softmax(1).amax(1)
    policy = model.policy = cet.ExitPolicy("confidence", (confidence.median().item(), None))
    result = trainer.evaluate()
    assert result["eval_loss"] < first
    answers = model.eval().predict(**x)
    assert len(answers.exit_index.unique()) > 1
    assert result["eval_loss"] == pytest.approx(float(nn.functional.cross_entropy(answers.logits, y)), abs=1e-5)
    assert result["eval_accuracy"] == pytest.approx(float((answers.labels == y).float().mean()))

    trainer.save_model(str(tmp_path / "saved"))
    other, _ = family()
    trainer_for(other, rows, tmp_path)._load_from_checkpoint(str(tmp_path / "saved"))
    assert other.policy == policy
    again = other.eval().predict(**x)
    assert torch.equal(again.exit_index, answers.exit_index)
    torch.testing.assert_close(again.logits, answers.logits)


def test_a_run_goes_on_from_its_checkpoint_with_the_policy(tmp_path: Path) -> None:
    model, rows = vit()
    model.policy = POLICY
    trainer_for(model, rows, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    other, _ = vit()
    trainer_for(other, rows, tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert other.policy == POLICY
    for (name, got), expected in zip(other.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path) -> None:
    weights = []
    for batch_size, steps in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        model, rows = vit()
        trainer_for(
            model,
            rows,
            tmp_path,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
        ).train()
        weights.append(model.heads[0].linear.weight)
    torch.testing.assert_close(weights[0], weights[1])


class ConsistentTrainer(transformers.Trainer):
    """The objective of cet in the place of cross-entropy."""

    loss_of = cet.ConsistentExitLoss(cet.perturb.text(mask_id=MASK, special_ids=(PAD, CLS)))

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss, _ = self.loss_of(model, *split_batch(inputs))
        return loss


def test_a_trainer_with_the_consistent_objective(tmp_path: Path) -> None:
    model, rows = bert()
    x, y = split_batch(transformers.default_data_collator(rows))
    before = ConsistentTrainer.loss_of(model.train(), x, y)[0].detach()
    trainer_for(model, rows, tmp_path, kind=ConsistentTrainer, max_steps=30).train()
    after = ConsistentTrainer.loss_of(model.train(), x, y)[0].detach()
    assert after < 0.7 * before


def test_batches_of_a_collator_go_through_calibration_and_head_training() -> None:
    model, rows = bert()
    loader = torch.utils.data.DataLoader(rows, batch_size=8, collate_fn=transformers.default_data_collator)
    losses = cet.train_heads(model, loader, epochs=5, learning_rate=0.05)
    assert losses[-1] < losses[0]
    assert cet.calibrate(model, loader, max_accuracy_drop=0.2).report.num_samples == ROWS
