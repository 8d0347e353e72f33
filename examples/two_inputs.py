"""Two inputs, one of them padded with a mask: what crosses an exit is compacted along with the features.

python examples/two_inputs.py
"""

import torch
from torch import Tensor, nn

import cet

CLASSES, STEPS, CHANNELS, FACTS = 3, 20, 8, 5


class Net(nn.Module):
    """A padded series, and facts about the person that join it behind the exits."""

    def __init__(self) -> None:
        super().__init__()
        layer = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "dropout": 0.0, "batch_first": True}
        self.embed = nn.Linear(CHANNELS, 32)
        self.first, self.second = nn.TransformerEncoderLayer(**layer), nn.TransformerEncoderLayer(**layer)
        self.classify = nn.Linear(32 + FACTS, CLASSES)

    def forward(self, series: Tensor, facts: Tensor, padding_mask: Tensor) -> Tensor:
        x = self.first(self.embed(series), src_key_padding_mask=padding_mask)
        x = self.second(x, src_key_padding_mask=padding_mask)
        real = (~padding_mask).unsqueeze(2).to(x.dtype)
        return self.classify(torch.cat([(x * real).sum(1) / real.sum(1), facts], dim=1))


def batch(rows: int, seed: int) -> dict[str, Tensor]:
    """Stands for your data; the mask is true at padding."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (rows,), generator=generator)
    length = torch.randint(4, STEPS + 1, (rows, 1), generator=generator)
    series = torch.randn(rows, STEPS, CHANNELS, generator=generator)
    series[:, :, :CLASSES] += nn.functional.one_hot(y, CLASSES)[:, None]
    facts = torch.randn(rows, FACTS, generator=generator)
    return {"series": series, "facts": facts, "padding_mask": torch.arange(STEPS) >= length, "labels": y}


torch.manual_seed(0)
example = batch(2, seed=9)
del example["labels"]
# Each head averages the real positions alone: by `padding_mask`, which it could also have found by itself.
exits = {"first": cet.HeadSpec(layout="channels_last", mask="padding_mask")}
model = cet.EarlyExit(Net(), exits, example_inputs=example)
loss_of = cet.ConsistentExitLoss(cet.perturb.On("facts", cet.perturb.EmbeddingNoise(0.1)), consistency_weight=0.5)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for step in range(40):
    x = batch(64, seed=step)
    y = x.pop("labels")
    loss, parts = loss_of(model, x, y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

model.policy = cet.calibrate(model, [batch(256, seed=100)], max_accuracy_drop=0.02)
x = batch(200, seed=101)
y = x.pop("labels")
out = model.eval().predict(**x)
print(f"accuracy {(out.labels == y).float().mean():.1%}, exits {out.exit_index.bincount(minlength=2).tolist()}")
