"""A Hugging Face model that is trained already: heads for it, thresholds, answers.

A small BERT with random weights stands for your own, so that nothing is downloaded.

python examples/hugging_face.py
"""

import torch
from transformers import BertConfig, BertForSequenceClassification

import cet

CLASSES, WORDS, LENGTH = 3, 90, 24


def tokens(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Stands for what a data collator gives: sentences with words of their class, padded, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    kind = torch.randint(WORDS // CLASSES, (rows, LENGTH), generator=generator)
    length = torch.randint(6, LENGTH + 1, (rows, 1), generator=generator)
    mask = (torch.arange(LENGTH) < length).long()
    ids = (1 + CLASSES * kind + labels[:, None]) * mask  # 0 is padding
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loader(rows: int, seed: int) -> list[dict[str, torch.Tensor]]:
    batch = tokens(rows, seed)
    parts = {name: tensor.split(32) for name, tensor in batch.items()}
    return [dict(zip(parts, rows, strict=True)) for rows in zip(*parts.values(), strict=True)]


torch.manual_seed(0)
config = BertConfig(
    vocab_size=WORDS + 1, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96
)
config.num_labels = CLASSES
backbone = BertForSequenceClassification(config).eval()

example = tokens(2, seed=9)
del example["labels"]
# The mean over positions leaves padding out: the heads find `attention_mask` among the inputs by its name.
model = cet.EarlyExit(backbone, exits=["bert.encoder.layer.0", "bert.encoder.layer.2"], example_inputs=example)
print(model.explain(**example))

losses = cet.train_heads(model, loader(512, seed=0), epochs=5, learning_rate=1e-2)
print(f"mean loss of the exits, first and last epoch: {losses[0]:.3f}, {losses[-1]:.3f}")
calibration = cet.calibrate(model, loader(256, seed=1), max_accuracy_drop=0.01)
model.policy = calibration.policy

batch = tokens(64, seed=2)
labels = batch.pop("labels")
out = model.eval().predict(**batch)
print(f"accuracy {(out.labels == labels).float().mean():.1%}, exits {out.exit_index.bincount(minlength=3).tolist()}")
