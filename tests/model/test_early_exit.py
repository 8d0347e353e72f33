"""The exit contract is in test_exit_contract.py; here is the module's interface."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cet

R = torch.randn
K = 4


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU())
        self.block = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Dropout())
        self.classifier = nn.Linear(8, K)
        self.alias = self.classifier

    def forward(self, x):
        return self.classifier(self.block(self.stem(x)).mean(2))


def build(exits=("stem", "block"), **options):
    return cet.EarlyExit(Net(), exits if isinstance(exits, dict) else list(exits), (R(2, 3, 16),), **options)


def test_exits_are_a_list_of_paths():
    for exits in (None, 5):
        with pytest.raises(TypeError, match="give a list of submodule paths"):
            cet.EarlyExit(Net(), exits, (R(2, 3, 16),))


def test_modes_give_all_exits_or_one_answer():
    backbone = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 14, 4))
    model = cet.EarlyExit(backbone, ["0"], example_inputs=(R(2, 3, 16),))
    x = R(5, 3, 16)
    assert [tuple(logits.shape) for logits in model.train()(x)] == [(5, 4), (5, 4)]
    assert torch.equal(model.eval()(x), backbone(x))


def test_names_and_numbers():
    model = build()
    assert model.exit_names == ("stem", "block", "final")
    assert (model.num_exits, model.num_classes) == (3, K)
    assert model.policy == cet.ExitPolicy.closed(3)
    assert "stem" in repr(model)


def test_predict_answers_with_exit_and_score_and_no_gradients():
    model = build().eval()
    got = model.predict(R(5, 3, 16))
    assert got.exit_index.tolist() == [2] * 5
    assert torch.equal(got.score, cet.ops.exit_score(got.logits))
    assert torch.equal(got.labels, got.logits.argmax(1))
    assert not got.logits.requires_grad
    assert model(R(5, 3, 16)).requires_grad


def test_exit_logits_in_either_mode_and_own_heads():
    head = nn.Sequential(nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(8, K))
    model = build({"stem": head, "block": cet.HeadSpec(hidden=3)}).eval()
    x = R(5, 3, 16)
    stem = model.backbone.stem(x)
    for logits, expected in zip(
        model.exit_logits(x), (head(stem), model.heads[1](model.backbone.block(stem)), model(x)), strict=True
    ):
        torch.testing.assert_close(logits, expected)
    assert len(model.train().exit_logits(x)) == 3


def test_policy_is_checked_when_assigned():
    model = build()
    with pytest.raises(ValueError, match="policy has 1 threshold but the model has 2 early exits"):
        model.policy = cet.ExitPolicy(thresholds=(0.1,))
    with pytest.raises(ValueError, match="policy has 3 thresholds"):
        build(policy=cet.ExitPolicy(thresholds=(0.1, 0.1, 0.1)))
    for no_policy in ((0.1, 0.2), None, {"thresholds": (0.1, 0.2)}):
        with pytest.raises(TypeError, match=r"give a cet.ExitPolicy"):
            model.policy = no_policy
    assert model.policy == cet.ExitPolicy.closed(3)


REFUSED = [
    (["blok"], ValueError, "exit 'blok' is no submodule of Net; did you mean 'block'"),
    (["stem", "zzz"], ValueError, "exit 'zzz' is no submodule of Net; did you mean 'stem'"),
    ([""], ValueError, "exit '' is no submodule of Net"),
    (["stem", "stem"], ValueError, "exit 'stem' is repeated; name each submodule once"),
    ([], ValueError, "exits is empty; name at least one submodule"),
    ("stem", TypeError, "exits is the string 'stem'; give a list of submodule paths"),
    ([3], TypeError, "exits holds 3; give submodule paths as strings"),
    ({"stem": "mean"}, TypeError, r"exit 'stem' has the head 'mean'; give an nn.Module, a cet.HeadSpec or None"),
    ({"stem": cet.HeadSpec}, TypeError, "exit 'stem' has the head <class"),
    ({"stem": nn.Linear(14, K)}, ValueError, r"head of exit 'stem' gives shape \(2, 8, 4\).* of shape \(2, 4\)"),
    ({"stem": nn.Linear(3, K)}, ValueError, r"head of exit 'stem' fails on its features of shape \(2, 8, 14\)"),
    ({"stem": nn.LSTM(14, K)}, ValueError, "head of exit 'stem' gives tuple; it must give logits"),
    ({"stem": nn.Bilinear(14, 14, K)}, ValueError, "head of exit 'stem' fails on its features"),
]


@pytest.mark.parametrize(("exits", "error", "message"), REFUSED)
def test_bad_exits_are_refused(exits, error, message):
    with pytest.raises(error, match=message):
        build(exits) if isinstance(exits, list | dict) else cet.EarlyExit(Net(), exits, (R(2, 3, 16),))


@pytest.mark.parametrize(
    ("run", "error", "message"),
    [
        (lambda x: {"logits": x[:, :, 0]}, TypeError, "the backbone returns dict; it must return logits"),
        (lambda x: x, ValueError, r"returns logits of shape \(2, 3, 16\) for 2 rows; it must return \(B, K\)"),
        (lambda x: x[:, :0, 0], ValueError, r"returns logits of shape \(2, 0\) for 2 rows.*at least two classes"),
        (lambda x: x[:1, :, 0], ValueError, r"returns logits of shape \(1, 3\) for 2 rows"),
    ],
)
def test_backbones_without_logits_are_refused(run, error, message):
    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv1d(3, 3, 1)

        def forward(self, x):
            return run(self.stem(x))

    with pytest.raises(error, match=message):
        cet.EarlyExit(Backbone(), ["stem"], (R(2, 3, 16),))


def test_predict_in_train_mode_is_refused():
    with pytest.raises(RuntimeError, match=r"model is in train mode; call model.eval\(\) before predict"):
        build().predict(R(2, 3, 16))


def test_an_exit_that_a_pass_skips_is_named():
    model = build().train()
    model.backbone.forward = lambda x: model.backbone.classifier(model.backbone.stem(x).mean(2))
    with pytest.raises(RuntimeError, match="exit 'block' was not reached in this forward pass"):
        model(R(2, 3, 16))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_is_left_behind():
    backbone = Net()
    model = cet.EarlyExit(backbone, ["stem"], (R(2, 3, 16),))
    assert hooks(model) == 0
    model(R(2, 3, 16))
    with pytest.raises(RuntimeError):
        model(R(2, 5, 16))
    with pytest.raises(ValueError, match="head of exit"):
        cet.EarlyExit(backbone, {"stem": nn.Linear(3, K)}, (R(2, 3, 16),))
    assert hooks(model) == 0


def test_modes_and_statistics_of_the_backbone_are_left_alone():
    backbone = Net().train()
    backbone.stem.eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    modes = [m.training for m in backbone.modules()]
    model = cet.EarlyExit(backbone, ["stem", "block"], (R(2, 3, 16),))
    assert [m.training for m in backbone.modules()] == modes
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_state_dict_goes_into_another_model():
    model, other = build().eval(), build().eval()
    other.load_state_dict(model.state_dict())
    x = R(5, 3, 16)
    for got, expected in zip(other.exit_logits(x), model.exit_logits(x), strict=True):
        assert torch.equal(got, expected)


def test_the_example_follows_the_weights():
    model = build().double()
    (x,), kwargs = model.example_inputs
    assert x.dtype == torch.float64
    assert kwargs == {}
    assert model.eval()(x).dtype == torch.float64


def _small() -> tuple[cet.EarlyExit, Tensor]:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    return cet.EarlyExit(net, ["1"], (torch.randn(6, 8),)), torch.randn(6, 8)


RECORDERS: dict[str, tuple[Callable[[cet.EarlyExit, Tensor], Any], str]] = {
    "trace": (lambda model, x: torch.jit.trace(model, (x,)), "torch.jit.trace would record"),
    "vmap": (lambda model, x: torch.func.vmap(model)(x[:, None]), "cannot leave inside of torch.func.vmap"),
    "vmap of grad": (
        lambda model, x: torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(x[:, None]),
        "cannot leave inside of torch.func.vmap",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RECORDERS)
def test_what_cannot_see_where_samples_leave_is_refused(name: str) -> None:
    model, x = _small()
    record, message = RECORDERS[name]
    with pytest.raises(RuntimeError, match=message):
        record(model, x)
    assert len(model.predict(x).labels) == 6


def test_transforms_that_keep_the_batch_work() -> None:
    model, x = _small()
    expected = torch.autograd.grad(model(x.requires_grad_()).sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda rows: model(rows).sum())(x.detach()), expected)
    logits = torch.func.vmap(lambda rows: model.exit_logits(rows)[0])(x[:, None])
    torch.testing.assert_close(logits[:, 0], model.exit_logits(x)[0])
