"""An own CNN on own arrays: train with consistent exits, calibrate, answer, save and load.

python examples/own_cnn.py
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cet

CLASSES, CHANNELS, LENGTH = 4, 6, 64


def recordings(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stands for your arrays: x (rows, channels, length) float32, y (rows,) int64."""
    rng = np.random.default_rng(seed)
    y = rng.integers(CLASSES, size=rows)
    wave = np.sin(np.arange(LENGTH) * (y[:, None, None] + 1) / 8)
    return (wave + rng.uniform(0.2, 2, (rows, 1, 1)) * rng.normal(size=(rows, CHANNELS, LENGTH))).astype("float32"), y


def loader(rows: int, seed: int) -> DataLoader:
    return DataLoader(TensorDataset(*map(torch.from_numpy, recordings(rows, seed))), batch_size=32, shuffle=seed == 0)


def block(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv1d(inputs, outputs, 5, 2, 2), nn.BatchNorm1d(outputs), nn.ReLU())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.low, self.middle, self.high = block(CHANNELS, 16), block(16, 32), block(32, 64)
        self.classify = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.high(self.middle(self.low(x))).mean(2))


torch.manual_seed(0)
model = cet.EarlyExit(Net(), exits=["low", "middle"], example_inputs=(torch.zeros(2, CHANNELS, LENGTH),))
loss_of, optimizer = cet.ConsistentExitLoss(cet.perturb.sensor()), torch.optim.AdamW(model.parameters(), 3e-3)
for _ in range(4):
    for x, y in loader(512, seed=0):
        optimizer.zero_grad()
        loss, parts = loss_of(model, x, y)
        loss.backward()
        optimizer.step()

calibration = cet.calibrate(model, loader(2048, seed=1), max_accuracy_drop=0.02)
print(calibration.report)
model.policy = calibration.policy
model.save("own_cnn.safetensors")
model = cet.load("own_cnn.safetensors", Net())
x, y = map(torch.from_numpy, recordings(256, seed=2))
out = model.predict(x)
print(f"accuracy {(out.labels == y).float().mean():.1%}; exits taken: {out.exit_index.bincount(minlength=3).tolist()}")
