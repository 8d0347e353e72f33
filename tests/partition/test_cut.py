"""Which backbones and exits can be cut into stages, and what is said of those that cannot."""

import pytest
import torch
from torch import Tensor, nn

import cet

R = torch.randn
K = 3


class Net(nn.Module):
    """Two linear layers and what each test does between and behind them, given as a function of the module and x."""

    def __init__(self, run):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)
        self.identity = nn.Identity()
        self.dropout = nn.Dropout()
        self.unused = nn.Linear(4, 4)
        self.gru = nn.GRU(4, 4)
        self.pair = Pair()
        self.top = nn.Linear(4, K)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, h):
        return {"first": h, "second": (self.inner(h), None)}


def assert_rows_answer_as_alone(model, x):
    """Half of the rows leave at each exit in turn; every row's logits are those of its exit."""
    model.eval()
    with torch.no_grad():
        every_exit = model.exit_logits(x.clone())
        for k in range(model.num_exits - 1):
            scores = cet.ops.exit_score(every_exit[k]).sort().values
            half = float(scores[len(x) // 2 - 1 : len(x) // 2 + 1].mean())
            model.policy = cet.ExitPolicy(thresholds=[half if j == k else None for j in range(model.num_exits - 1)])
            got = model.predict(x)
            leaves = got.exit_index == k
            assert leaves.sum() == len(x) // 2
            expected = torch.where(leaves[:, None], every_exit[k], every_exit[-1])
            torch.testing.assert_close(got.logits, expected, rtol=1e-4, atol=1e-5)


def inplace_add(m, x):
    h = m.a(x)
    g = m.b(h)
    h.add_(g)
    return m.top(h * g)


def time_first_across(m, x):
    steps = m.a(x).transpose(0, 1).contiguous()
    h = m.b(x)
    return m.top(m.gru(steps)[0][-1] + h.mean(1))


def made_for_the_batch(m, x):
    h = m.a(x)
    rows = x.shape[0]
    ramp = torch.arange(2 * rows).view(rows, 2) * 0 + torch.ones(rows, 1)
    return m.top(h) * ramp[:, :1] + torch.zeros(rows, K)


def tuple_of_old_and_new(m, x):
    out = m.pair(m.a(x))
    return m.top(out["first"] + out["second"][0])


WORKS = {
    "plain": (["a", "b"], lambda m, x: m.top(m.b(m.a(x)))),
    "nothing but activations between": (["a", "relu"], lambda m, x: m.top(m.relu(m.a(x)))),
    "identity behind a computation": (["a", "identity"], lambda m, x: m.top(m.identity(torch.tanh(m.a(x))))),
    "identity on the input": (["identity"], lambda m, x: m.top(m.a(m.identity(x)))),
    "nested": (["pair.inner", "b"], lambda m, x: m.top(m.b(m.pair(x)["second"][0]))),
    "skip over both exits": (["a", "b"], lambda m, x: m.top(m.b(m.a(x)) + x)),
    "input used only behind the exit": (["a"], lambda m, x: m.top(m.a(x[:, [0]].expand(-1, 4)) * x)),
    "written in place behind the exit": (["a"], lambda m, x: m.top(m.relu(m.a(x)))),
    "written in place behind a later exit": (["a", "b"], inplace_add),
    "tensors made for the batch": (["a"], made_for_the_batch),
    "tuple of an old and a new value": (["a", "pair"], tuple_of_old_and_new),
    "tuple whose first is the input": (["pair"], lambda m, x: m.top(m.pair(x)["second"][0] + x)),
    "last exit before the logits' scaling": (["a", "b"], lambda m, x: m.top(m.b(m.a(x))) / 3),
}


@pytest.mark.parametrize("name", WORKS)
def test_rows_answer_as_alone(name):
    exits, run = WORKS[name]
    model = cet.EarlyExit(Net(run), exits, (R(3, 4),))
    assert_rows_answer_as_alone(model, R(12, 4))


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_the_batch_in_another_dimension_is_compacted_there(rows, steps):
    spec = cet.HeadSpec(layout="channels_last")
    model = cet.EarlyExit(Net(time_first_across), {"b": spec}, (R(rows, steps, 4),))
    assert_rows_answer_as_alone(model, R(12, steps, 4))
    assert 1 in model.stages_for(R(12, steps, 4)).stages[0].row_dims


def merged(m, x):
    flat = m.a(x).reshape(-1, 4)
    h = m.b(x)
    return m.top((torch.relu(flat).reshape(x.shape) + h).mean(1))


def feature_time_first(m, x):
    return m.top(m.gru(m.a(x).transpose(0, 1))[0][-1])


def data_dependent(m, x):
    h = m.a(x)
    return m.top(h * 2 if h.sum() > 0 else h)


def centred(h):
    return h - h.mean(0)


def view_clamped_behind_the_exit(bound):
    def run(m, x):
        h = m.a(x)
        view = h[:, :2]
        g = m.b(h)
        view.clamp_(max=bound)
        return m.top(h + g)

    return run


REFUSED = {
    "out of order": (["b", "a"], lambda m, x: m.top(m.b(m.a(x))), "exit 'a' is computed before exit 'b'; name exits"),
    "same place": (
        ["b", "identity"],
        lambda m, x: m.top(m.identity(m.b(x))),
        "exit 'identity' gives what exit 'b' gives, with nothing computed between them; keep one of the two",
    ),
    "same place, dropout": (
        ["b", "dropout"],
        lambda m, x: m.top(m.dropout(m.b(x))),
        "exit 'dropout' gives what exit 'b' gives",
    ),
    "called twice": (["a"], lambda m, x: m.top(m.a(torch.relu(m.a(x)))), "exit 'a' is called 2 times in one forward"),
    "never called": (["unused"], lambda m, x: m.top(m.a(x)), "exit 'unused' is not called in the forward pass; name"),
    "nothing behind it": (["top"], lambda m, x: m.top(m.a(x)), "exit 'top'.*(behind|logits|final)"),
    "rows mixed behind the exit": (["a"], lambda m, x: m.top(centred(m.a(x))), "where it mixes rows"),
    "rows mixed before the exit": (["a"], lambda m, x: m.top(m.a(centred(x))), "where it mixes rows"),
    "rows swapped": (["a"], lambda m, x: m.top(m.a(x).flip(0)), "where it mixes rows"),
    "number of rows in the values": (["a"], lambda m, x: m.top(m.a(x)) * x.shape[0], "where it mixes rows"),
    "batch size in the code": (["a"], lambda m, x: m.top(m.a(x).view(3, 4)), "Net takes 3 rows of x only, as its code"),
    "batch size in a constant": (["a"], lambda m, x: m.top(m.a(x) + torch.ones(3, 1)), "Net takes 3 rows of x only"),
    "squeeze": (["a"], lambda m, x: m.top(m.a(x).unsqueeze(2).squeeze()), "Net|one row"),
    "data-dependent control flow": (["a"], data_dependent, r"torch.export cannot trace Net \(.*cet.Stages\("),
    "view written behind the exit": (
        ["b"],
        view_clamped_behind_the_exit(-9.0),
        "in place across an exit|exit 'b'.*in place",
    ),
    "view written, unseen in the example": (["b"], view_clamped_behind_the_exit(99.0), "in place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused(name):
    exits, run, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        cet.EarlyExit(Net(run), exits, (R(3, 4),))


@pytest.mark.parametrize(
    ("run", "path", "message"),
    [
        (merged, "b", r"value '\w+' crosses exit 'b' with shape \(.*, 4\), where no dimension is the batch alone"),
        (feature_time_first, "gru", r"exit 'gru' gives features of shape \(5, B, 4\), where the batch is not first"),
    ],
)
def test_values_that_hold_the_batch_elsewhere_are_refused_by_name(run, path, message):
    with pytest.raises(cet.CutError, match=message):
        cet.EarlyExit(Net(run), {path: cet.HeadSpec(layout="channels_last")}, (R(3, 5, 4),))


WRITES_TO_ITS_INPUT = {
    "scales": lambda m, x: m.top(m.a(x.mul_(2))),
    "rectifies": lambda m, x: m.top(m.a(m.relu(x))),
    "writes one column": lambda m, x: (x[:, 0].zero_(), m.top(m.a(x)))[1],
    "writes behind the exit": lambda m, x: m.top(m.a(x) + x.relu_()),
}


@pytest.mark.parametrize("method", ["__call__", "predict", "exit_logits"])
@pytest.mark.parametrize("name", WRITES_TO_ITS_INPUT)
def test_inputs_stay_as_they_were(name, method):
    # Positive numbers, which clamping leaves as they are: that it writes shows only later.
    model = cet.EarlyExit(Net(WRITES_TO_ITS_INPUT[name]), ["a"], (torch.rand(3, 4) + 1,)).eval()
    x = R(8, 4)
    before = x.clone()
    for threshold in (None, 0.5):
        model.policy = cet.ExitPolicy("confidence", (threshold,))
        with torch.no_grad():
            getattr(model, method)(x)
        assert torch.equal(x, before)
    if method != "exit_logits":
        assert_rows_answer_as_alone(model, x)


@pytest.mark.parametrize("shape", [(3, 4), (3, 5, 4)])
def test_a_feature_written_in_place_behind_its_exit_can_be_trained(shape):
    def run(m, x):
        return m.top(m.relu(m.a(x)).flatten(1, -2).mean(1) if x.ndim == 3 else m.relu(m.a(x)))

    model = cet.EarlyExit(Net(run), {"a": cet.HeadSpec(layout="channels_last")}, (R(shape),))
    x = R(shape)
    sum(logits.sum() for logits in model(x)).backward()
    pooled = model.backbone.a(x).reshape(3, -1, 4).mean(1).sum(0)
    torch.testing.assert_close(model.heads[0].linear.weight.grad, pooled.expand(K, 4))


def test_parameters_stay_those_of_the_backbone():
    backbone = Net(lambda m, x: m.top(m.b(m.a(x))))
    before = {name: id(value) for name, value in backbone.named_parameters()}
    model = cet.EarlyExit(backbone, ["a"], (R(3, 4),))
    assert {name: id(value) for name, value in backbone.named_parameters()} == before
    assert len(list(model.parameters())) == len(before) + 2


def test_the_generated_source_shows_in_tracebacks():
    model = cet.EarlyExit(Net(lambda m, x: m.top(m.b(m.a(x)))), ["a"], (R(3, 4),)).eval()
    model.backbone.top.weight = nn.Parameter(R(K, 7))
    with pytest.raises(RuntimeError) as caught:
        model(R(2, 4))
    assert "linear" in str(caught.traceback[-1].statement).lower()


class CalledWithinAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        with torch.autocast("cpu", enabled=False):
            h = self.b(h.float())
        return self.c(h.relu())


def test_an_exit_that_the_graph_does_not_show_is_refused_with_the_reasons() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(cet.CutError, match=r"no call of exit 'b' .* within torch\.autocast; name a submodule"):
        cet.EarlyExit(CalledWithinAutocast().eval(), ["b"], (x,))
    model = cet.EarlyExit(CalledWithinAutocast().eval(), ["a"], (x,))
    assert model.predict(x).logits.shape == (4, 3)


@pytest.mark.parametrize(
    ("inner", "outer"),
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float64)],
)
def test_logits_finer_than_what_they_are_computed_in(inner: torch.dtype, outer: torch.dtype) -> None:
    """They differ by the rounding of the coarser dtype when a row runs alone."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(8, 256).to(inner), nn.Linear(256, 4).to(inner)
            self.blocks = nn.ModuleList(nn.Linear(256, 256) for _ in range(4)).to(inner)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x.to(inner))
            for block in self.blocks:
                h = h + block(h).relu()
            logits: Tensor = self.head(h)
            return logits.to(outer)

    torch.manual_seed(0)
    x = torch.randn(64, 8)
    model = cet.EarlyExit(Cast().eval(), ["blocks.1"], (x[:2],)).eval()
    assert model.explain(x).reason is None
    assert model.predict(x).logits.dtype == outer
    model.check(x)
