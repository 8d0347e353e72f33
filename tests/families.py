"""Small backbones of the families that the exit contract is tested on, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import cet

CLASSES = 5
Inputs = dict[str, Tensor]


class SkipNet(nn.Module):
    """A 1-D conv net whose stem skips across both exits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(6, 16, 5, padding=2), nn.BatchNorm1d(16), nn.ReLU(inplace=True))
        self.block1 = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16))
        self.block2 = nn.Sequential(nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16))
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        h = torch.relu_(self.block1(skip) + skip)
        h = torch.relu_(self.block2(h) + h)
        return self.classifier(torch.cat([h.mean(2), skip.amax(2)], dim=1))


class ConvLSTM(nn.Module):
    """Convolutions, then two LSTM layers; sizes are read from the input and used late."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 12, 5, stride=2)
        self.lstm1 = nn.LSTM(12, 16, batch_first=True)
        self.lstm2 = nn.LSTM(16, 10, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(20, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        h = torch.relu(self.conv(x)).transpose(1, 2)
        h, _ = self.lstm1(h)
        h, _ = self.lstm2(h)
        return self.classifier(h[:, -1].reshape(rows, -1))


class LateFusion(nn.Module):
    """Two inputs; the second is used behind the exit only, and time comes first inside."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = nn.Conv1d(3, 8, 3)
        self.mix = nn.GRU(8, 8)
        self.context = nn.Linear(4, 8)
        self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.wave(x)
        mixed, _ = self.mix(h.permute(2, 0, 1))
        return self.classifier(torch.cat([mixed[-1], self.context(context)], dim=1))


@dataclass(frozen=True)
class Family:
    build: Callable[[], nn.Module]
    exits: Any
    inputs: Callable[[int], Inputs]
    """Keyword inputs with so many rows."""


def _transformers(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(num_labels=CLASSES, **options))
        return model

    return build


def _sensor(rows: int) -> Inputs:
    return {"x": torch.randn(rows, 6, 32)}


def _image(rows: int) -> Inputs:
    return {"pixel_values": torch.randn(rows, 3, 32, 32)}


def _text(rows: int) -> Inputs:
    lengths = torch.randint(3, 13, (rows, 1))
    return {
        "input_ids": torch.randint(0, 59, (rows, 12)),
        "attention_mask": (torch.arange(12) < lengths).long(),
    }


_TRANSFORMER = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}

FAMILIES = {
    "skip": Family(SkipNet, {"stem": cet.HeadSpec(layout="channels_first"), "block1": None}, _sensor),
    "conv-lstm": Family(ConvLSTM, ["conv", "lstm1"], _sensor),
    "late-fusion": Family(
        LateFusion, ["wave"], lambda rows: {"x": torch.randn(rows, 3, 16), "context": torch.randn(rows, 4)}
    ),
    "resnet": Family(
        _transformers(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 12, 16],
            depths=[1, 1, 1],
            layer_type="basic",
        ),
        ["resnet.encoder.stages.0", "resnet.encoder.stages.1"],
        _image,
    ),
    "vit": Family(
        _transformers("ViTForImageClassification", "ViTConfig", image_size=32, patch_size=8, **_TRANSFORMER),
        {"vit.layers.0": cet.HeadSpec(pool="first"), "vit.layers.1": cet.HeadSpec(norm=True, hidden=16)},
        _image,
    ),
    "bert": Family(
        _transformers("BertForSequenceClassification", "BertConfig", vocab_size=60, **_TRANSFORMER),
        ["bert.encoder.layer.0", "bert.encoder.layer.1"],
        _text,
    ),
}
