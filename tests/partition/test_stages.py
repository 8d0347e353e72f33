"""Backbones that are given as stages."""

import pytest
import torch
from torch import nn

import cet
from cet.partition.stages import evaluating, first_tensor, logits_of

R = torch.randn
K = 3


class Masked(nn.Module):
    """Control flow that no exporter can follow, and a mask that goes along."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, mask):
        h = self.linear(x) * mask
        return (h * 2 if h.isnan().any() else torch.relu(h)), mask


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, K)

    def forward(self, x, mask):
        return self.linear(x) * mask


def masked():
    return cet.Stages(first=Masked(), second=Masked(), last=Last())


def test_rows_answer_as_alone():
    model = cet.EarlyExit(masked(), ["first", "second"], (R(3, 4), torch.rand(3, 1))).eval()
    x, mask = R(12, 4), torch.rand(12, 1)
    with torch.no_grad():
        every_exit = model.exit_logits(x, mask)
    scores = [cet.ops.exit_score(z).median().item() for z in every_exit[:2]]
    model.policy = cet.ExitPolicy(thresholds=scores)
    got = model.predict(x, mask)
    assert set(got.exit_index.tolist()) == {0, 1, 2}
    for row, k in enumerate(got.exit_index.tolist()):
        alone = model.predict(x[[row]], mask[[row]])
        assert alone.exit_index.item() == k
        torch.testing.assert_close(got.logits[row], every_exit[k][row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.logits[0], every_exit[k][row], rtol=1e-4, atol=1e-5)


def test_closed_exits_and_empty_batches():
    model = cet.EarlyExit(masked(), ["second"], (R(3, 4), torch.rand(3, 1))).eval()
    x, mask = R(5, 4), torch.rand(5, 1)
    assert torch.equal(model(x, mask), model.backbone(x, mask))
    assert model(x[:0], mask[:0]).shape == (0, K)


def test_inputs_of_another_length():
    tail = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, K))
    model = cet.EarlyExit(cet.Stages(stem=nn.Conv1d(3, 6, 3), tail=tail), ["stem"], (R(3, 3, 8),)).eval()
    for length in (8, 9, 20):
        x = R(5, 3, length)
        assert torch.equal(model(x), model.backbone(x))


def test_training_gives_all_exits():
    model = cet.EarlyExit(masked(), ["first", "second"], (R(3, 4), torch.rand(3, 1)))
    sum(z.sum() for z in model(R(3, 4), torch.rand(3, 1))).backward()
    assert all(p.grad is not None for p in model.parameters())


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value(x)


REFUSED = [
    (["last"], lambda x: x, "exit 'last' is no stage before the last; name one of first, middle"),
    (["first.value"], lambda x: x, "exit 'first.value' is no submodule of Stages"),
    (["middle", "first"], lambda x: x, "exits middle, first are not in the order of execution, first, middle, last"),
    (
        ["first"],
        lambda x: (x, torch.zeros(7)),
        r"output 1 of stage 'first' has shape \(7,\) for 3 rows; return tensors",
    ),
    (["first"], lambda x: (x, 1), "output 1 of stage 'first' has type int for 3 rows"),
    (["first"], lambda x: [x], "output 0 of stage 'first' has type list for 3 rows"),
    (["first"], lambda x: (x, x.sum()), r"output 1 of stage 'first' has shape \(\) for 3 rows"),
]


@pytest.mark.parametrize(("exits", "value", "message"), REFUSED)
def test_unusable_stages_are_refused(exits, value, message):
    last = Returns(lambda x: (x[0] if isinstance(x, list) else x).cumsum(1))
    last.forward = lambda *values: last.value(values[0])
    backbone = cet.Stages(first=Returns(value), middle=Returns(lambda *v: v[0]), last=last)
    backbone.middle.forward = lambda *values: values[0]
    with pytest.raises(ValueError, match=message):
        cet.EarlyExit(backbone, exits, (R(3, 4),))


def test_stages_that_mix_rows_are_refused():
    backbone = cet.Stages(first=nn.Linear(4, 4), last=Returns(lambda x: x - x.mean(0)))
    with pytest.raises(cet.CutError, match="where it mixes rows"):
        cet.EarlyExit(backbone, ["first"], (R(3, 4),))


def test_one_stage_is_refused():
    with pytest.raises(ValueError, match="Stages got 1 stages; give at least two"):
        cet.Stages(only=nn.Linear(4, 4))


def test_evaluating_gives_every_module_its_own_mode_back():
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    net[1][1].eval()
    before = [m.training for m in net.modules()]
    with evaluating(net):
        assert not any(m.training for m in net.modules())
    assert [m.training for m in net.modules()] == before


def test_what_holds_logits_and_features():
    x = R(2, 3)

    class Output:
        logits = x

    assert logits_of(x) is x
    assert logits_of(Output()) is x
    assert first_tensor({"a": None, "b": [1, (x,)]}) is x
    for nothing in (None, (x,), {"logits": x}):
        with pytest.raises(TypeError, match=f"returns {type(nothing).__name__}; it must return logits"):
            logits_of(nothing)
    with pytest.raises(TypeError, match="returned str without a tensor"):
        first_tensor("text")
