"""FLOPs per sample against counts by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cet
from cet.calibration.cost import ExitCosts, exit_costs

NAN = float("nan")


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.rnn = kind(5, 7, batch_first=True, **options)
        self.classifier = nn.Linear(7 * (1 + self.rnn.bidirectional), 3)

    def forward(self, x: Tensor) -> Tensor:
        features, _ = self.rnn(x)
        return self.classifier(features[:, -1])


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(2, (2, -1)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class FirstToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def attended(*blocks: nn.Module) -> nn.Sequential:
    """Blocks on tokens of width 16, then a classifier of the first token."""
    return nn.Sequential(*blocks, FirstToken(), nn.Linear(16, 3))


def test_convolutions_and_linear_layers() -> None:
    backbone = nn.Sequential(
        nn.Conv1d(2, 8, 3, padding=1),
        nn.BatchNorm1d(8),
        nn.ReLU(),
        nn.Conv1d(8, 16, 3, stride=2, padding=1),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    exits = {"2": cet.HeadSpec(layout="channels_first", hidden=6), "3": None}
    costs = exit_costs(cet.EarlyExit(backbone, exits, (torch.randn(3, 2, 10),)))
    assert costs.stage == (2 * 10 * 8 * 2 * 3, 2 * 5 * 16 * 8 * 3, 2 * 16 * 5)
    assert costs.head == (2 * 8 * 6 + 2 * 6 * 5, 2 * 16 * 5)
    assert costs.unit == "FLOPs"
    assert costs.full == 480 * 2 + 1920 * 2 + 160


@pytest.mark.parametrize(
    ("kind", "gates", "directions"), [(nn.LSTM, 4, 1), (nn.LSTM, 4, 2), (nn.GRU, 3, 2), (nn.RNN, 1, 1)]
)
def test_recurrent_layers(kind: type[nn.RNNBase], gates: int, directions: int) -> None:
    model = cet.EarlyExit(Recurrent(kind, bidirectional=directions == 2), ["rnn"], (torch.randn(3, 11, 5),))
    layer = 11 * directions * gates * 2 * 7 * (5 + 7)
    classifier = 2 * 7 * directions * 3
    assert exit_costs(model) == ExitCosts((layer, classifier), (classifier,))


def test_attention() -> None:
    head = cet.HeadSpec(pool="first")
    costs = exit_costs(cet.EarlyExit(attended(Attention()), {"0": head}, (torch.randn(3, 6, 16),)))
    assert costs.stage[0] == 2 * (2 * 6 * 6 * 16)


def test_transformer_encoder() -> None:
    layers = [
        nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first) for norm_first in (False, True)
    ]
    costs = exit_costs(cet.EarlyExit(attended(*layers), {"0": cet.HeadSpec(pool="first")}, (torch.randn(3, 6, 16),)))
    layer = 6 * 2 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * (2 * 6 * 6 * 16)
    assert costs == ExitCosts((layer, layer + 2 * 16 * 3), (2 * 16 * 3,))


def test_one_head_may_serve_two_exits() -> None:
    head = nn.Linear(4, 3)
    backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3))
    costs = exit_costs(cet.EarlyExit(backbone, {"0": head, "1": head}, (torch.randn(3, 4),)))
    assert costs == ExitCosts((32, 32, 24), (24, 24))


def test_model_and_settings_are_left_as_they_were() -> None:
    backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3))
    model = cet.EarlyExit(backbone, ["0"], (torch.randn(3, 4),)).train()
    backbone[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def settings() -> tuple[bool, ...]:
        return (
            torch.backends.mkldnn.enabled,
            torch.backends.cudnn.enabled,
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
        )

    enabled = settings()
    exit_costs(model)
    assert settings() == enabled
    assert model.training
    assert backbone[2].training
    assert not backbone[1].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():  # in which NaN stands for a closed exit
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_backbone_without_countable_work_is_refused() -> None:
    backbone = nn.Sequential(nn.Hardtanh(), nn.AdaptiveAvgPool1d(3))
    model = cet.EarlyExit(backbone, {"0": nn.AdaptiveAvgPool1d(3)}, (torch.randn(3, 6),))
    with pytest.raises(ValueError, match=r"no matrix product or convolution .*; pass costs="):
        exit_costs(model)


def test_cumulative_costs_pay_for_open_heads_only() -> None:
    costs = ExitCosts((1, 10, 100), (0.25, 0.5), unit="ms")
    assert costs.cumulative([False, False]).tolist() == [1, 11, 111]
    assert costs.cumulative([True, False]).tolist() == [1.25, 11.25, 111.25]
    assert costs.cumulative(np.array([True, True])).tolist() == [1.25, 11.75, 111.75]


@pytest.mark.parametrize(
    ("stage", "head", "message"),
    [
        ((1, -1), (0,), r"stage\[1\] is -1.0; give a finite cost >= 0"),
        ((1, 1), (NAN,), r"head\[0\] is nan"),
        ((1, 1), (1, 1), "2 stages and 2 heads; give one stage per exit"),
        ((0, 0), (1,), "stage holds only zeros"),
    ],
)
def test_bad_costs_are_refused(stage: tuple[float, ...], head: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExitCosts(stage, head)
