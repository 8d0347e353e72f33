"""A window slides over a recording: one answer per hop, early where sure, from an exported file and without torch.

python examples/stream.py
"""

import subprocess
import sys

import numpy as np

import cet

CLASSES, CHANNELS, WINDOW, HOP = 3, 3, 64, 16


def recording(seconds: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stands for a sensor: samples (channels, n) float32 at 64 Hz and the class of each; it changes every 8 seconds."""
    rng = np.random.default_rng(seed)
    y = np.repeat(rng.integers(CLASSES, size=-(-seconds // 8)), 8 * 64)[: seconds * 64]
    wave = np.sin(np.cumsum((y + 1) / 6)) * np.repeat(rng.uniform(0.4, 2, len(y) // 64), 64)
    return (wave + rng.normal(size=(CHANNELS, len(y)))).astype("float32"), y


def train_and_export() -> None:
    """On the machine that has torch."""
    import torch
    from torch import nn

    def batches(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        x, y = map(torch.from_numpy, recording(1200, seed))
        order = torch.randperm((x.shape[1] - WINDOW) // HOP + 1)
        windows, labels = x.unfold(1, WINDOW, HOP).permute(1, 0, 2), y[WINDOW - 1 :: HOP]
        return list(zip(windows[order].split(64), labels[order].split(64), strict=True))

    torch.manual_seed(0)
    widths = ((CHANNELS, 16), (16, 32), (32, 32))
    blocks = [nn.Sequential(nn.Conv1d(*pair, 5, 2, 2), nn.ReLU()) for pair in widths]
    backbone = nn.Sequential(*blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, CLASSES))
    model = cet.EarlyExit(backbone, ["0", "1"], (torch.zeros(2, CHANNELS, WINDOW),))
    loss_of, optimizer = cet.ConsistentExitLoss(None, consistency_weight=0), torch.optim.AdamW(model.parameters(), 5e-3)
    for x, y in batches(0) * 4:
        optimizer.zero_grad()
        loss_of(model, x, y)[0].backward()
        optimizer.step()
    model.policy = cet.calibrate(model.eval(), batches(1), max_accuracy_drop=0.02).policy
    cet.export(model, "stream.onnx", batch=1)


if sys.argv[1:] == ["train"]:
    train_and_export()
else:
    subprocess.run([sys.executable, __file__, "train"], check=True)  # this process never imports torch
    model, (x, y) = cet.load_exported("stream.onnx", threads=1), recording(120, seed=2)
    ends = range(WINDOW, x.shape[1] + 1, HOP)
    answers = [model.predict(x[None, :, end - WINDOW : end]) for end in ends]
    right = [out.labels[0] == y[end - 1] for out, end in zip(answers, ends, strict=True)]
    exits = np.bincount([out.exit_index[0] for out in answers], minlength=3)
    print(f"accuracy {np.mean(right):.1%}, exits {exits.tolist()}")
