"""How a backbone may be called: by position, by name, with constants, with values common to all rows."""

import pytest
import torch
from torch import nn

import cet

R = torch.randn


class Net(nn.Module):
    """Inputs of every kind: batched, common to all rows, optional, constant, keyword-only."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x, mask=None, scale=1.0, *, negate=False, shift=None, sign="plus"):
        h = self.body(x) * scale
        if mask is not None:
            h = h * mask[:, None]
        if shift is not None:
            h = h + shift
        return self.head(-h if negate or sign == "minus" else h)


class Dicts(Net):
    def forward(self, batch, **more):
        return super().forward(batch["x"], batch["mask"]) + more["a"] - more["b"]


class Variadic(Net):
    def forward(self, *tensors):
        return super().forward(*tensors)


def both_answer(model, *calls):
    """All calls mean the same; the model gives what the backbone gives, whichever way rows leave."""
    (args, kwargs), *_ = calls
    with torch.no_grad():
        expected = model.backbone(*args, **kwargs)
        for args, kwargs in calls:
            model.policy = cet.ExitPolicy.closed(2)
            assert torch.equal(model(*args, **kwargs), expected)
            every_exit = model.exit_logits(*args, **kwargs)
            middle = cet.ops.exit_score(every_exit[0], "margin").median().item()
            model.policy = cet.ExitPolicy("margin", (middle,))
            got = model.predict(*args, **kwargs)
            assert 0 < got.exit_index.sum() < len(expected)
            wanted = torch.where(got.exit_index[:, None] == 0, *every_exit)
            torch.testing.assert_close(got.logits, wanted, rtol=1e-4, atol=1e-5)


X, MASK, SHIFT = R(9, 4), torch.rand(9), R(4)

CALLS = {
    "one tensor": (R(3, 4), [((X,), {}), ((), {"x": X}), ((X, None), {}), ((X,), {"scale": 1.0})]),
    "list": ([R(3, 4), R(3)], [((X, MASK), {}), ((X,), {"mask": MASK}), ((), {"mask": MASK, "x": X})]),
    "dict": ({"mask": R(3), "x": R(3, 4)}, [((X, MASK), {}), ((), {"x": X, "mask": MASK})]),
    "constant by position": ((R(3, 4), None, 2.0), [((X, None, 2.0), {}), ((X,), {"scale": 2.0})]),
    "constant by name": ({"x": R(3, 4), "scale": 2.0}, [((X,), {"scale": 2.0}), ((X, None, 2.0), {})]),
    "keyword-only": ({"x": R(3, 4), "negate": True}, [((X,), {"negate": True})]),
    "gap before a tensor": ({"x": R(3, 4), "shift": R(3, 4)}, [((X,), {"shift": X})]),
    "common to all rows": ({"x": R(3, 4), "shift": R(4)}, [((X,), {"shift": SHIFT})]),
    "common, with a row of its own": ({"x": R(3, 4), "shift": R(1, 4)}, [((X,), {"shift": SHIFT[None]})]),
    "scalar tensor": ({"x": R(3, 4), "scale": torch.tensor(2.0)}, [((X,), {"scale": torch.tensor(-3.0)})]),
    "constant that is no number": ({"x": R(3, 4), "sign": "minus"}, [((X,), {"sign": "minus"})]),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_same_call_in_any_form(name):
    example, calls = CALLS[name]
    both_answer(cet.EarlyExit(Net(), ["body"], example).eval(), *calls)


def test_the_order_of_dict_keys_means_nothing():
    model = cet.EarlyExit(Dicts(), ["body"], {"batch": {"x": R(3, 4), "mask": R(3)}, "a": R(3, 1), "b": R(3, 1)}).eval()
    a, b = R(9, 1), R(9, 1)
    both_answer(
        model,
        (({"x": X, "mask": MASK},), {"a": a, "b": b}),
        (({"mask": MASK, "x": X},), {"a": a, "b": b}),
        (({"x": X, "mask": MASK},), {"b": b, "a": a}),
    )


def test_variadic_inputs():
    both_answer(cet.EarlyExit(Variadic(), ["body"], (R(3, 4), R(3))).eval(), ((X, MASK), {}))


def test_one_tensor_given_twice_may_be_two_later():
    class Sum(Net):
        def forward(self, x, y):
            return super().forward(x) + y[:, :3]

    x = R(3, 4)
    both_answer(cet.EarlyExit(Sum(), ["body"], (x, x)).eval(), ((X, R(9, 4)), {}))


REFUSED_LATER = [
    ((), {}, TypeError, "do not fit the backbone's forward.*missing a required argument: 'x'"),
    ((X, MASK, 2.0, 1), {}, TypeError, "do not fit the backbone's forward.*too many positional arguments"),
    ((X, MASK, 2.0), {"colour": 1}, TypeError, "do not fit the backbone's forward.*unexpected keyword argument"),
    ((X, MASK[:4], 2.0), {}, ValueError, "mask has 4 rows where other inputs have 9; give every input one row"),
    ((X, MASK[:1], 2.0), {}, ValueError, "mask has 1 rows where other inputs have 9"),
    ((X[0], MASK, 2.0), {}, TypeError, r"x has shape \(4,\) but had shape \(3, 4\) in example_inputs"),
    (([[1.0]], MASK, 2.0), {}, TypeError, "called with x=list, mask=tensor.* but example_inputs had x=tensor"),
    ((X, MASK, 3.0), {}, ValueError, "scale is 3.0 but was 2.0 in example_inputs.*make another cet.EarlyExit"),
    (({"x": X, "mask": MASK},), {}, TypeError, r"called with x=dict .*; give the entries of a dict by name"),
    (({"x": X}, MASK, 2.0), {}, TypeError, r"give the entries of a dict by name, as in model\(\*\*batch\)"),
    ((X, MASK, torch.tensor(2.0)), {}, ValueError, r"scale is tensor\(2.\) but was 2.0"),
]


@pytest.mark.parametrize(("args", "kwargs"), [((X,), {}), ((X, MASK, 2.0), {"shift": SHIFT}), ((X,), {"scale": 2.0})])
def test_optional_inputs_may_be_left_out_or_added(args, kwargs):
    both_answer(cet.EarlyExit(Net(), ["body"], (R(3, 4), R(3), 2.0)).eval(), (args, kwargs))


@pytest.fixture(scope="module")
def model():
    return cet.EarlyExit(Net(), ["body"], (R(3, 4), R(3), 2.0)).eval()


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), REFUSED_LATER)
def test_another_call_is_refused(model, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        model(*args, **kwargs)


REFUSED_EXAMPLES = [
    ((), TypeError, "missing a required argument: 'x'"),
    ((R(3, 4), R(3), 1.0, 2), TypeError, "too many positional arguments"),
    ({"y": R(3, 4)}, TypeError, "do not fit the backbone's forward"),
    (3, TypeError, "example_inputs is int; give a tuple of positional inputs or a dict of keyword inputs"),
    ((torch.tensor(1.0),), TypeError, "example_inputs holds no batch; its first tensor must have one row per sample"),
    ((1.0,), TypeError, "example_inputs holds no batch"),
    ((R(1, 4),), ValueError, "example_inputs has 1 rows; give at least 2"),
    ((R(0, 4),), ValueError, "example_inputs has 0 rows; give at least 2"),
]


@pytest.mark.parametrize(("example", "error", "message"), REFUSED_EXAMPLES)
def test_a_useless_example_is_refused(example, error, message):
    with pytest.raises(error, match=message):
        cet.EarlyExit(Net(), ["body"], example)


def test_an_example_that_the_backbone_cannot_take_is_refused_by_name():
    # Four rows and a width of four: `shift` is taken for batched and cut to as few rows as `x`.
    with pytest.raises(ValueError, match=r"example_inputs.*shift"):
        cet.EarlyExit(Net(), ["body"], {"x": R(4, 4), "shift": R(4)})


def test_a_constant_of_optional_inputs_is_told_from_where_it_was_taken():
    model = cet.EarlyExit(Net(), ["body"], (R(3, 4), R(3))).eval()
    model(X, MASK, 2.0)
    with pytest.raises(ValueError, match=r"scale is 3\.0 but was 2\.0 in the first call with such inputs"):
        model(X, MASK, 3.0)


def test_one_dict_for_one_tensor_is_refused_with_the_way_out():
    model = cet.EarlyExit(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), ["0"], (R(3, 4),)).eval()
    with pytest.raises(TypeError, match="give the entries of a dict by name"):
        model({"input": X})
