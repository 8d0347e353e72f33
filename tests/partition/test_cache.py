"""Stages stay right when inputs change their sizes or dtypes, and when weights are changed, cast, moved or replaced."""

import copy
import math
import threading
import warnings

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import cet

R = torch.randn
K = 4


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.b = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.top = nn.Linear(6, K)

    def forward(self, x):
        return self.top(self.b(self.a(x)).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(3, 6, batch_first=True)
        self.second = nn.LSTM(6, 6, batch_first=True)
        self.top = nn.Linear(6, K)

    def forward(self, x):
        return self.top(self.second(self.first(x)[0])[0][:, -1])


def build():
    return cet.EarlyExit(Conv(), ["a", "b"], (R(3, 3, 8, 8),)).eval()


def assert_right(model, x):
    """Closed exits give the backbone's logits bit for bit; else each row those of the exit that it took."""
    model.policy = cet.ExitPolicy.closed(model.num_exits)
    with torch.no_grad():
        assert torch.equal(model(x), model.backbone(x))
        every_exit = model.exit_logits(x)
    median = [cet.ops.exit_score(z).median().item() for z in every_exit[:-1]]
    model.policy = cet.ExitPolicy(thresholds=median)
    got = model.predict(x)
    assert len(got.exit_index.unique()) > 1
    expected = torch.stack([every_exit[k][row] for row, k in enumerate(got.exit_index.tolist())])
    tolerance = 0.1 if x.dtype in (torch.bfloat16, torch.float16) else 1e-4
    torch.testing.assert_close(got.logits, expected, rtol=tolerance, atol=tolerance)


def scale_weights(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def optimise(model):
    optimiser = torch.optim.SGD(model.parameters(), 0.5)
    sum(z.square().sum() for z in model.train()(R(8, 3, 8, 8))).backward()
    optimiser.step()
    model.eval()


def replace_parameter(model):
    model.backbone.top.weight = nn.Parameter(R(K, 6))


def replace_submodule(model):
    model.backbone.b[0] = nn.Conv2d(6, 6, 1)


CHANGES = {
    "in place": scale_weights,
    "optimiser and batch statistics": optimise,
    "load_state_dict": lambda model: model.load_state_dict(build().state_dict()),
    "load_state_dict(assign=True)": lambda model: model.load_state_dict(build().state_dict(), assign=True),
    "parameter replaced": replace_parameter,
    "submodule replaced": replace_submodule,
    "submodule of another kind": lambda model: setattr(model.backbone, "b", nn.Conv2d(6, 6, 3)),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "double": lambda model: model.double(),
    "backbone and heads on their own": lambda model: (model.backbone.double(), model.heads.double()),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_weights_shows_in_the_next_call(name):
    model = build()
    x = R(9, 3, 8, 8)
    assert_right(model, x)
    CHANGES[name](model)
    weight = model.backbone.top.weight
    assert_right(model, x.to(weight.dtype))


def test_tied_weights_change_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.top = nn.Linear(4, K)

        def forward(self, x):
            return self.top(self.b(torch.relu(self.a(x))))

    model = cet.EarlyExit(Tied(), ["a"], (R(3, 4),)).eval()
    for change in (lambda: None, lambda: model.backbone.a.weight.data.mul_(2), model.double):
        change()
        assert_right(model, R(9, 4).to(model.backbone.b.weight.dtype))


def test_a_copy_has_stages_of_its_own():
    model = build()
    x = R(9, 3, 8, 8)
    before = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    scale_weights(twin)
    assert_right(twin, x)
    model.policy = cet.ExitPolicy.closed(3)
    assert torch.equal(model(x), before)


def test_images_of_all_sizes_share_one_cut():
    model = build()
    for size in (8, 10, 13, 9, 8):
        assert_right(model, R(9, 3, size, size))
    assert model.explain(R(9, 3, 8, 8)).num_programs == 1


def test_all_lengths_of_a_recurrent_net_share_one_cut():
    model = cet.EarlyExit(Recurrent(), ["first"], (R(3, 5, 3),)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (5, 6, 20, 1):
            assert_right(model, R(9, length, 3))
    assert model.explain(R(9, 6, 3)).num_programs == 1


def test_channels_last_images_stay_channels_last():
    model = build().to(memory_format=torch.channels_last)
    x = R(9, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    assert_right(model, x)
    seen = []
    program = model.stages_for(x)
    stage = program.stages[1]
    object.__setattr__(stage, "run", lambda *v, run=stage.run: (seen.append(v[-1]), run(*v))[1])
    model.policy = cet.ExitPolicy(thresholds=(cet.ops.exit_score(model.exit_logits(x)[0]).median().item(), None))
    model(x)
    assert 0 < len(seen[0]) < 9
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_frozen_backbone_and_backbone_without_weights():
    model = cet.EarlyExit(Conv().requires_grad_(False), ["a"], (R(3, 3, 8, 8),)).eval()
    assert_right(model, R(9, 3, 8, 8))
    model(R(3, 3, 8, 8))

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Tanh()

        def forward(self, x):
            return self.a(x) * 2

    assert_right(cet.EarlyExit(Fixed(), ["a"], (R(3, 4),)).eval(), R(9, 4))


class AsksForAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h * 2 if torch.is_autocast_enabled("cpu") else h)


class LeavesAutocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        with torch.autocast("cpu", enabled=False):
            h = self.b(h.float())
        return self.c(h)


@pytest.mark.parametrize("first_within", [True, False])
@pytest.mark.parametrize("net", [AsksForAutocast, LeavesAutocast])
def test_what_depends_on_autocast_is_answered_by_the_backbone_within_it(net, first_within):
    x = torch.randn(12, 6)
    model = cet.EarlyExit(net(), ["a"], (x[:2],)).eval()
    if not first_within:
        model.predict(x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with pytest.warns(cet.UncutWarning, match=r"within torch\.autocast its stages, .* answer otherwise"):
            assert torch.equal(model.predict(x).logits, model.backbone(x))
        assert "within torch.autocast" in str(model.explain(x))
    with torch.no_grad():
        torch.testing.assert_close(model.predict(x).logits, model.backbone(x))
    assert str(model.explain(x)).startswith("stages up to a, final")


def test_autocast_gives_what_the_backbone_gives_under_autocast():
    model = build()
    for size in (8, 12):  # 12 is cut under autocast
        x = R(9, 3, size, size)
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            model.policy = cet.ExitPolicy.closed(3)
            got, expected = model(x), model.backbone(x)
            assert got.dtype == expected.dtype == torch.bfloat16
            assert torch.equal(got, expected)
            model.policy = cet.ExitPolicy("confidence", (0.0, None))
            torch.testing.assert_close(model(x), model.exit_logits(x)[0])
        assert_right(model, x)


def test_inference_mode_leaves_nothing_behind():
    model = build()
    with torch.inference_mode():
        model(R(3, 3, 10, 10))
    for size in (8, 10):
        assert_right(model, R(9, 3, size, size))
        model.policy = cet.ExitPolicy.closed(3)
        model(R(3, 3, size, size)).sum().backward()
    assert all(p.grad is not None for p in model.backbone.parameters())


def test_threads_may_predict_at_once():
    model = build()
    inputs = [R(4, 3, size, size) for size in (8, 9, 10, 11) * 3]
    got: list = [None] * len(inputs)

    def work(index):
        got[index] = model.predict(inputs[index]).logits

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for logits, x in zip(got, inputs, strict=True):
        assert logits is not None
        assert torch.equal(logits, model.predict(x).logits)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (R(2, 5, 8, 8), "to have 3 channels, but got 5"),
        (R(2, 3, 8, 8).double(), "type"),
    ],
)
def test_inputs_that_the_backbone_cannot_take_are_not_blamed_on_the_export(x, message):
    model = build()
    with pytest.raises(Exception, match=message) as caught:
        model(x)
    assert "torch.export" not in str(caught.value)
    assert_right(model, R(9, 3, 8, 8))


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.top = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = self.a(x)
        return self.top(h - h.mean(0))


@pytest.mark.parametrize("example", [torch.zeros(2, 4), torch.ones(5, 4), torch.full((2, 4), math.nan)])
def test_rows_that_are_alike_in_the_example_do_not_hide_that_they_are_mixed(example):
    with pytest.raises(cet.CutError, match="where it mixes rows"):
        cet.EarlyExit(Mixing(), ["a"], (example,))


def test_pruning_after_the_cut_shows_in_the_next_call():
    model = build()
    x = R(5, 3, 8, 8)
    layer = next(m for m in model.backbone.modules() if isinstance(m, nn.Conv2d))
    torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
    assert_right(model, x)
