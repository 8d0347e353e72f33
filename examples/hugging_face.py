"""A Hugging Face model that is trained already: heads for it, thresholds, answers.

A small BERT, trained here for a moment, stands for your own, so that nothing is downloaded.

python examples/hugging_face.py
"""

import torch
from transformers import BertConfig, BertForSequenceClassification

import cet

CLASSES, WORDS, LENGTH = 3, 90, 24


def tokens(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Stands for what a data collator gives: padded sentences in which words of a class are frequent."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (rows,), generator=generator)
    words = torch.randint(WORDS, (rows, LENGTH), generator=generator)
    of_class = torch.rand(rows, LENGTH, generator=generator) < 0.5
    words = torch.where(of_class, words - words % CLASSES + labels[:, None], words)
    length = torch.randint(6, LENGTH + 1, (rows, 1), generator=generator)
    mask = (torch.arange(LENGTH) < length).long()
    return {"input_ids": (1 + words) * mask, "attention_mask": mask, "labels": labels}


def loader(batches: int, seed: int) -> list[dict[str, torch.Tensor]]:
    return [tokens(32, seed + index) for index in range(batches)]


torch.manual_seed(0)
sizes = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96}
config = BertConfig(vocab_size=WORDS + 1, num_labels=CLASSES, **sizes)
backbone = BertForSequenceClassification(config).train()
optimizer = torch.optim.AdamW(backbone.parameters(), 3e-3)
for _ in range(2):
    for batch in loader(32, seed=0):
        optimizer.zero_grad()
        backbone(**batch).loss.backward()
        optimizer.step()
backbone.eval()

# An exit behind every second layer; the means over positions leave padding out, as `attention_mask` tells.
model = cet.EarlyExit.from_transformers(backbone, every=2)
print(model.exit_names)

losses = cet.train_heads(model, loader(32, seed=0), epochs=3, learning_rate=1e-2)
print(f"mean loss of the exits, first and last epoch: {losses[0]:.3f}, {losses[-1]:.3f}")
calibration = cet.calibrate(model, loader(40, seed=100), max_accuracy_drop=0.02)
model.policy = calibration.policy
print(calibration.report)

batch = tokens(64, seed=200)
labels = batch.pop("labels")
out = model.eval().predict(**batch)
print(f"accuracy {(out.labels == labels).float().mean():.1%}, exits {out.exit_index.bincount(minlength=3).tolist()}")
