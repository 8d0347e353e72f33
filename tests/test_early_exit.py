"""The exit contract is in test_exit_contract.py; here is the module's interface."""

import torch
from torch import nn

import cet


def test_modes_give_all_exits_or_one_answer() -> None:
    backbone = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14, 4))
    model = cet.EarlyExit(backbone, ["0"], example_inputs=(torch.randn(2, 3, 16),))
    x = torch.randn(5, 3, 16)
    assert [tuple(logits.shape) for logits in model.train()(x)] == [(5, 4), (5, 4)]
    assert torch.equal(model.eval()(x), backbone(x))
