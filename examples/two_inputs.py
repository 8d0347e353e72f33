"""Two inputs, one of them padded: what crosses an exit is compacted along with the features. Run it as it is."""

import torch
from torch import Tensor, nn

import cet

CLASSES, STEPS, CHANNELS, FACTS = 3, 20, 8, 5
LAYER = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "dropout": 0.0, "batch_first": True}


class Net(nn.Module):
    """A padded series, and facts that join it behind the exit."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, 32)
        self.first, self.second = nn.TransformerEncoderLayer(**LAYER), nn.TransformerEncoderLayer(**LAYER)
        self.classify = nn.Linear(32 + FACTS, CLASSES)

    def forward(self, series: Tensor, facts: Tensor, padding_mask: Tensor) -> Tensor:
        x = self.first(self.embed(series), src_key_padding_mask=padding_mask)
        x = self.second(x, src_key_padding_mask=padding_mask)
        return self.classify(torch.cat([x[:, 0], facts], dim=1))  # the first step is never padding


def batch(rows: int, seed: int) -> dict[str, Tensor]:
    """Stands for your data; the mask is true at padding."""
    torch.manual_seed(seed)
    y, length = torch.randint(CLASSES, (rows,)), torch.randint(4, STEPS, (rows, 1))
    series, facts = torch.randn(rows, STEPS, CHANNELS), torch.randn(rows, FACTS)
    series[:, :, :CLASSES] += 0.6 * nn.functional.one_hot(y, CLASSES)[:, None]
    return {"series": series, "facts": facts, "padding_mask": torch.arange(STEPS) >= length, "labels": y}


def noisy_facts(x: dict[str, Tensor]) -> dict[str, Tensor]:
    """A perturbation: any function that changes the inputs in a way that keeps the label."""
    return {**x, "facts": x["facts"] + 0.1 * torch.randn_like(x["facts"])}


torch.manual_seed(0)
example = batch(2, seed=102)
del example["labels"]
# The head averages real positions alone; it would have found an input of this name by itself.
exits = {"first": cet.HeadSpec(layout="channels_last", mask="padding_mask")}
model = cet.EarlyExit(Net(), exits, example_inputs=example)
loss_of = cet.ConsistentExitLoss(noisy_facts, consistency_weight=0.5)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for step in range(40):
    x = batch(64, seed=step)
    optimizer.zero_grad()
    loss, parts = loss_of(model, x, x.pop("labels"))
    loss.backward()
    optimizer.step()

model.policy = cet.calibrate(model, [batch(2048, seed=100)], max_accuracy_drop=0.02)
x = batch(200, seed=101)
labels, out = x.pop("labels"), model.eval().predict(**x)
print(f"accuracy {(out.labels == labels).float().mean():.1%}, exits {out.exit_index.bincount(minlength=2).tolist()}")
