"""A window slides over a recording: one answer per hop by the loop of a firmware, early where sure.

python examples/microcontroller/stream.py
"""

from pathlib import Path

import numpy as np
import torch
from host import Firmware
from torch import nn

import cet

CLASSES, CHANNELS, WINDOW, HOP = 3, 3, 64, 16


def recording(seconds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stands for a sensor: samples (n, channels) float32 at 64 Hz and the class of each; it changes every 8 seconds."""
    rng = np.random.default_rng(seed)
    y = np.repeat(rng.integers(CLASSES, size=-(-seconds // 8)), 8 * 64)[: seconds * 64]
    wave = np.sin(np.cumsum((y + 1) / 6)) * np.repeat(rng.uniform(0.4, 2, len(y) // 64), 64)
    return (wave[:, None] + rng.normal(size=(len(y), CHANNELS))).astype("float32"), y


def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Windows in random order."""
    x, y = map(torch.from_numpy, recording(1200, seed))
    windows, labels = x.unfold(0, WINDOW, HOP), y[WINDOW - 1 :: HOP]
    order = torch.randperm(len(windows))
    return list(zip(windows[order].split(64), labels[order].split(64), strict=True))


torch.manual_seed(0)
blocks = [nn.Sequential(nn.Conv1d(*pair, 5, 2, 2), nn.ReLU()) for pair in ((CHANNELS, 16), (16, 32), (32, 32))]
backbone = nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, CLASSES))
model = cet.EarlyExit(backbone, ["0", "1"], (torch.zeros(2, CHANNELS, WINDOW),))
loss_of, optimizer = cet.ConsistentExitLoss(None, consistency_weight=0), torch.optim.AdamW(model.parameters(), 5e-3)
for x, y in batches(0) * 4:
    optimizer.zero_grad()
    loss_of(model, x, y)[0].backward()
    optimizer.step()
model.policy = cet.calibrate(model.eval(), batches(1), max_accuracy_drop=0.02).policy
cet.export(model, "stream.tflm", batch=1)

firmware, (samples, y) = Firmware(Path("stream.tflm"), Path("stream.so")), recording(120, seed=2)
window = np.zeros((CHANNELS, WINDOW), np.float32)
right, exits = [], [0] * model.num_exits
for start in range(0, len(samples), HOP):  # as they come
    window[:, :-HOP], window[:, -HOP:] = window[:, HOP:].copy(), samples[start : start + HOP].T
    if start + HOP >= WINDOW:
        answer = firmware.predict(window)
        right.append(answer.label == y[start + HOP - 1])
        exits[answer.exit_index] += 1
print(f"accuracy {np.mean(right):.1%}, exits {exits}")
