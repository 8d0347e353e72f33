"""ConsistentExitLoss: how it runs the model, what it refuses. Its value is in test_consistent_exit_loss.py."""

import math
from itertools import count

import pytest
import torch
import torch.distributed
from torch import nn

import cet
from cet.data.batches import split_batch
from cet.ops import consistent_exit_loss


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)
        self.calls = count()

    def forward(self, x, offset=None):
        next(self.calls)
        h = self.body(x)
        if offset is not None:
            h = h + offset
        return self.head(torch.relu(self.norm(h)))


def calls(model):
    """How often the backbone has run, this look counted."""
    return next(model.backbone.calls)


@pytest.fixture
def model():
    return cet.EarlyExit(Net(), ["body"], (torch.randn(3, 4),))


X, Y = torch.linspace(-1, 1, 20).view(5, 4), torch.tensor([0, 2, -100, 1, 0])


def shift(x):
    return x + 0.3


OPTIONS = [
    {},
    {"target": "hard", "teacher": "final", "min_confidence": 0.4},
    {"teacher": "self", "supervise_perturbed": 0.3},
    {"consistency_weight": 0.0, "supervise_perturbed": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_value_is_that_of_the_logits_on_clean_and_perturbed_rows_together(model, options):
    logits = model(torch.cat([X, shift(X)]))
    expected = consistent_exit_loss([z[:5] for z in logits], [z[5:] for z in logits], Y, **options)
    loss, parts = cet.ConsistentExitLoss(shift, **options)(model, X, Y)
    assert torch.equal(loss, expected.loss)
    assert torch.equal(loss, parts.loss)
    assert torch.equal(parts.consistency, expected.consistency)


def test_one_forward_pass(model):
    before = calls(model)
    cet.ConsistentExitLoss(shift)(model, X, Y)
    assert calls(model) == before + 2


def test_the_defaults_are_the_recipe_that_is_documented(model):
    loss, parts = cet.ConsistentExitLoss(shift)(model, X, Y)
    weighted = parts.supervised + parts.supervised_perturbed + parts.consistency
    torch.testing.assert_close(loss.detach(), weighted.mean())
    logits = model(torch.cat([X, shift(X)]))
    assert torch.equal(loss, consistent_exit_loss([z[:5] for z in logits], [z[5:] for z in logits], Y).loss)


def test_without_consistency_it_is_augmentation(model):
    loss, _ = cet.ConsistentExitLoss(shift, consistency_weight=0.0)(model, X, Y)
    logits = model(torch.cat([X, shift(X)]))
    expected = sum(nn.functional.cross_entropy(z[rows], Y) for z in logits for rows in (slice(5), slice(5, None))) / 2
    torch.testing.assert_close(loss, expected)


def test_weights_of_zero_are_joint_training_and_never_perturb(model):
    def perturb(_):
        raise AssertionError("perturb was called")

    loss, parts = cet.ConsistentExitLoss(perturb, consistency_weight=0.0, supervise_perturbed=0.0)(model, X, Y)
    expected = sum(nn.functional.cross_entropy(z, Y) for z in model(X)) / 2
    torch.testing.assert_close(loss, expected)
    assert cet.ConsistentExitLoss(None, consistency_weight=0)(model, X, Y)[0] == loss
    assert parts.consistency.tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize(
    ("example", "x", "perturb"),
    [
        ((torch.randn(3, 4), torch.randn(3, 6)), (X, X[:, :1]), lambda x: (shift(x[0]), x[1])),
        ({"x": torch.randn(3, 4), "offset": torch.randn(3, 6)}, {"x": X, "offset": X[:, :1]}, lambda x: dict(x)),
        ((torch.randn(3, 4), 2.0), (X, 2.0), lambda x: (shift(x[0]), x[1])),
    ],
    ids=["tuple", "dict", "with a constant"],
)
def test_inputs_of_any_structure(example, x, perturb):
    class Broadcast(Net):
        def forward(self, x, offset=None):
            return super().forward(x, offset if not isinstance(offset, torch.Tensor) else offset.mean(1, keepdim=True))

    model = cet.EarlyExit(Broadcast(), ["body"], example)
    loss, _ = cet.ConsistentExitLoss(perturb)(model, x, Y)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_inputs_are_not_changed(model):
    before = X.clone()
    cet.ConsistentExitLoss(shift)(model, X, Y)
    assert torch.equal(X, before)


def test_every_parameter_learns_from_unlabelled_rows_alone(model):
    loss, _ = cet.ConsistentExitLoss(shift)(model, X, torch.full_like(Y, -100))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert model.heads[0].linear.weight.grad.abs().sum() > 0


def test_autocast_keeps_the_loss_in_single_precision(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, parts = cet.ConsistentExitLoss(shift)(model, X, Y)
    loss.backward()
    assert {part.dtype for part in parts} == {torch.float32}
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


class Wrapper(nn.Module):
    """What DistributedDataParallel is to its caller: the model is its attribute `module`."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.passes = 0

    def forward(self, *args, **kwargs):
        self.passes += 1
        return self.module(*args, **kwargs)


def test_a_wrapped_model_is_run_once_and_its_labels_are_checked(model):
    plain, _ = cet.ConsistentExitLoss(shift)(model, X, Y)
    wrapped = Wrapper(model)
    loss, _ = cet.ConsistentExitLoss(shift)(wrapped, X, Y)
    loss.backward()
    assert wrapped.passes == 1
    assert torch.equal(loss, plain)
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match="label 9 for 3 classes"):
        cet.ConsistentExitLoss(shift)(wrapped, X, torch.full((5,), 9))


def test_a_compiled_model_is_the_model(model):
    compiled = torch.compile(model, backend="eager")
    expected, _ = cet.ConsistentExitLoss(shift)(model, X, Y)
    loss, _ = cet.ConsistentExitLoss(shift)(compiled, X, Y)
    torch.testing.assert_close(loss, expected)
    with pytest.raises(ValueError, match="label 9 for 3 classes"):
        cet.ConsistentExitLoss(shift)(compiled, X, torch.full((5,), 9))


BAD_ARGUMENTS = [
    ({"consistency_weight": -1.0}, ValueError, "consistency_weight is -1.0; give a finite number >= 0"),
    ({"consistency_weight": math.nan}, ValueError, "consistency_weight is nan"),
    ({"consistency_weight": math.inf}, ValueError, "consistency_weight is inf"),
    ({"supervise_perturbed": -1.0}, ValueError, "supervise_perturbed is -1.0; give a finite number >= 0"),
    ({"perturb": None}, TypeError, "perturb is None; give a callable"),
    ({"ema_decay": 1.0}, ValueError, r"ema_decay is 1.0; give a number in \[0, 1\)"),
    ({"perturb": 3, "consistency_weight": 0.0}, TypeError, "perturb is 3; give a callable"),
    ({"target": "hard"}, ValueError, "target 'hard' with min_confidence 0 teaches guesses .*; give min_confidence"),
    ({"target": "medium"}, ValueError, "target 'medium' is unknown; choose soft or hard"),
    ({"teacher": "mine"}, ValueError, "teacher 'mine' is unknown; choose mean, self, final or ema"),
    ({"min_confidence": 1.5}, ValueError, r"min_confidence is 1.5; give a probability in \[0, 1\]"),
    ({"min_confidence": math.nan}, ValueError, "min_confidence is nan"),
    ({"exit_weights": (1.0, -1.0)}, ValueError, r"exit_weights\[1\] is -1.0"),
    ({"exit_weights": (math.nan, 1.0)}, ValueError, r"exit_weights\[0\] is nan"),
    ({"exit_weights": (0.0, 0.0)}, ValueError, "exit_weights are all 0, so no exit would learn"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        cet.ConsistentExitLoss(**{"perturb": shift, **arguments})


def test_what_would_train_nothing_is_refused_before_the_model_runs(model):
    none, before = torch.full_like(Y, -100), calls(model)
    with pytest.raises(ValueError, match=r"no row of the batch has a label, .* give labelled rows in each batch"):
        cet.ConsistentExitLoss(shift, consistency_weight=0.0)(model, X, none)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the model is frozen, so no exit can learn"):
        cet.ConsistentExitLoss(shift)(model, X, Y)
    assert calls(model) == before + 1
    with torch.no_grad():
        assert cet.ConsistentExitLoss(shift)(model, X, Y)[0].isfinite()


def test_a_step_in_which_every_exit_that_counts_is_frozen_is_refused(model):
    model.requires_grad_(False).backbone.head.requires_grad_(True)
    for teacher in ("mean", "final", "ema"):
        with pytest.raises(ValueError, match=r"every exit with a weight above 0 is frozen, .* give exit_weights"):
            cet.ConsistentExitLoss(shift, teacher=teacher, exit_weights=(1.0, 0.0))(model, X, Y)
    model.heads.requires_grad_(True)
    model.backbone.head.requires_grad_(False)
    cet.ConsistentExitLoss(shift, teacher="final")(model, X, Y)[0].backward()  # a frozen teacher is none of them
    assert all(weight.grad.any() for weight in model.heads.parameters())


class TestMovingAverage:
    @pytest.mark.parametrize("wrap", [lambda model: model, lambda model: torch.compile(model, backend="eager")])
    def test_it_is_of_one_model_compiled_or_not(self, model, wrap):
        loss_of = cet.ConsistentExitLoss(shift, teacher="ema")
        first = [loss_of(wrapped, X, Y)[0].item() for wrapped in (wrap(model), model)]
        expected = cet.ConsistentExitLoss(shift, teacher="ema")
        assert first == pytest.approx([expected(model, X, Y)[0].item() for _ in range(2)], rel=1e-5)
        other = cet.EarlyExit(Net(), ["body"], (X,))
        with pytest.raises(ValueError, match="teacher 'ema' averages the weights of another model already"):
            loss_of(other, X, Y)
        again = cet.ConsistentExitLoss(shift, teacher="ema")
        again.load_state_dict(model, loss_of.state_dict())
        with pytest.raises(ValueError, match=r"make a cet\.ConsistentExitLoss per model"):
            again(other, X, Y)

    def test_the_first_teacher_is_the_model_and_the_next_lies_between(self, model):
        loss_of = cet.ConsistentExitLoss(shift, teacher="ema", ema_decay=0.75)
        before = {name: value.clone() for name, value in model.named_parameters()}
        loss, parts = loss_of(model, X, Y)
        logits = model(torch.cat([X, shift(X)]))
        taught = consistent_exit_loss(
            model(X), [z[5:] for z in logits], torch.full_like(Y, -100), supervise_perturbed=0.0
        )
        torch.testing.assert_close(parts.consistency, taught.consistency)
        weighted = parts.supervised + parts.supervised_perturbed + parts.consistency
        torch.testing.assert_close(loss.detach(), weighted.mean())
        for moved in range(1, 6):
            with torch.no_grad():
                for value in model.parameters():
                    value.add_(1.0)
            loss_of(model, X, Y)
            state = loss_of.state_dict()["model"]
            lag = [(before[name] + moved - state[name]).mean().item() for name in before]
            # Of the mean of n values that rise by one it is (n - 1) / 2, until the decay forgets the old ones.
            assert lag == pytest.approx([moved / 2 if moved < 4 else lag[0]] * len(lag), abs=1e-4)
        assert lag[0] < moved / 2

    def test_no_gradient_reaches_it_and_a_compiled_model_has_one(self, model):
        loss_of = cet.ConsistentExitLoss(shift, teacher="ema")
        loss, _ = loss_of(torch.compile(model, backend="eager"), X, Y)
        loss.backward()
        expected = cet.ConsistentExitLoss(shift, teacher="ema")(model, X, Y)[0]
        torch.testing.assert_close(loss, expected)
        assert all(p.grad is not None for p in model.parameters())
        assert not any(p.requires_grad for p in loss_of._average.model.parameters())

    def test_the_others_keep_nothing(self, model):
        assert cet.ConsistentExitLoss(shift).state_dict() == {}


BAD_LABELS = [
    (torch.tensor([0, 1, 2, 3, 0]), ValueError, r"y holds the label 3 for 3 classes; give labels in \[0, 3\), or -100"),
    (torch.tensor([0, 1, -1, 2, 0]), ValueError, "y holds the label -1 for 3 classes"),
    (torch.tensor([0, 1, 2]), ValueError, r"y has shape \(3,\) for 5 rows of x"),
    (torch.zeros(5, 1, dtype=torch.int64), ValueError, r"y has shape \(5, 1\) for 5 rows"),
    (torch.zeros(5), TypeError, r"y is torch.float32; give class indices by y\.long\(\)"),
    (torch.full((5, 3), 1 / 3), TypeError, "y holds soft labels"),
    ([0, 1, 2, 0, 0], TypeError, "y is list"),
]


@pytest.mark.parametrize(("labels", "error", "message"), BAD_LABELS)
def test_bad_labels_are_refused_before_the_model_runs(model, labels, error, message):
    before = calls(model)
    with pytest.raises(error, match=message):
        cet.ConsistentExitLoss(shift)(model, X, labels)
    assert calls(model) == before + 1


@pytest.mark.parametrize(
    "labels",
    [torch.tensor([0, 2, 0, 1, 0]).int(), nn.functional.one_hot(torch.tensor([0, 2, 0, 1, 0]), 3).float()],
    ids=["int32", "one-hot"],
)
def test_labels_are_made_class_indices(model, labels):
    expected, _ = cet.ConsistentExitLoss(shift)(model, X, torch.tensor([0, 2, 0, 1, 0]))
    loss, _ = cet.ConsistentExitLoss(shift)(model, X, labels)
    assert torch.equal(loss, expected)


def test_any_batch_of_a_loader_can_be_given(model):
    expected, _ = cet.ConsistentExitLoss(shift)(model, X, Y)
    loss, _ = cet.ConsistentExitLoss(cet.perturb.On("x", Shift()))(model, *split_batch({"x": X, "labels": Y}))
    assert torch.equal(loss, expected)


def test_keys_that_the_backbone_does_not_take_change_nothing(model):
    expected, _ = cet.ConsistentExitLoss(shift)(model, X, Y)
    x = {"x": X, "row": torch.arange(5), "name": ["a", "b", "c", "d", "e"]}
    with pytest.warns(UserWarning, match="forward takes no 'row', 'name', which is ignored"):
        loss, _ = cet.ConsistentExitLoss(cet.perturb.On("x", Shift()))(model, x, Y)
    assert torch.equal(loss, expected)


def test_optional_inputs_that_the_example_had_may_be_left_out():
    torch.manual_seed(0)
    model = cet.EarlyExit(Net(), ["body"], {"x": torch.randn(3, 4), "offset": torch.randn(3, 6)})
    assert cet.ConsistentExitLoss(cet.perturb.On("x", Shift()))(model, {"x": X}, Y)[0].isfinite()


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_a_single_logit_learns_from_the_labels_of_binary_cross_entropy(shape):
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
    model = cet.EarlyExit(net, ["1"], (X[:3],)).train()
    y = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])
    loss, parts = cet.ConsistentExitLoss(None, 0.0)(model, X, y.view(shape))
    expected = nn.functional.binary_cross_entropy_with_logits(net(X).squeeze(1), y)
    torch.testing.assert_close(parts.supervised[-1], expected.detach())
    loss.backward()
    assert net[2].weight.grad.abs().sum() > 0


class Shift(cet.perturb.Perturbation):
    def __call__(self, x, *, generator=None):
        return shift(x)

    def with_severity(self, severity):
        return self


class Graph(nn.Module):
    """Rows are mixed along dimension 1 by a matrix that all samples share."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, adjacency, x, *, position=None):
        h = self.body(adjacency @ x)
        if position is not None:
            h = h + position
        return self.head(torch.relu(h).mean(1))


def graph_call(nodes, rows):
    draw = torch.Generator().manual_seed(nodes + rows)
    adjacency, x, position = (torch.randn(*s, generator=draw) for s in ((nodes, nodes), (rows, nodes, 6), (nodes, 8)))
    return {"adjacency": adjacency, "x": x, "position": position}


@pytest.mark.parametrize("nodes", [7, 5, 10], ids=["other size", "as many as rows", "as many as clean and perturbed"])
def test_shared_inputs_are_given_once(nodes):
    """Whether the adjacency matrix happens to have as many rows as the batch does not matter."""

    class Batched(Graph):
        def forward(self, x, adjacency, *, position=None):
            return super().forward(adjacency, x, position=position)

    model = cet.EarlyExit(Batched(), {"body": cet.HeadSpec(layout="channels_last")}, graph_call(nodes, 3))
    call = graph_call(nodes, 5)
    noisy = {**call, "x": call["x"] + 0.3}
    doubled = {**call, "x": torch.cat([call["x"], noisy["x"]])}
    logits = model(**doubled)
    expected = consistent_exit_loss([z[:5] for z in logits], [z[5:] for z in logits], Y)
    for x in (call, dict(reversed(call.items()))):
        loss, _ = cet.ConsistentExitLoss(lambda x: {**x, "x": x["x"] + 0.3})(model, x, Y)
        assert torch.equal(loss, expected.loss)


def test_a_perturbation_of_a_shared_input_is_refused():
    class Batched(Graph):
        def forward(self, x, adjacency, *, position=None):
            return super().forward(adjacency, x, position=position)

    call = graph_call(7, 5)
    model = cet.EarlyExit(Batched(), {"body": cet.HeadSpec(layout="channels_last")}, graph_call(7, 3))
    with pytest.raises(ValueError, match="perturb changes adjacency, which all rows share; leave it as it is"):
        cet.ConsistentExitLoss(lambda x: {**x, "adjacency": x["adjacency"] + 1.0})(model, call, Y)
    call["position"][0, 0] = math.nan
    copied, _ = cet.ConsistentExitLoss(lambda x: {key: value.clone() for key, value in x.items()})(model, call, Y)
    assert copied.isnan()


class ManyExits(nn.Module):
    """A multi-exit model that is no EarlyExit, and so does not tell which inputs are batched."""

    def __init__(self):
        super().__init__()
        self.graph, self.first = Graph(), nn.Linear(6, 3)

    def forward(self, adjacency, x):
        return self.first(x.mean(1)), self.graph(adjacency, x)


def test_of_other_models_those_inputs_are_batched_that_have_as_many_rows_as_labels():
    call, model = graph_call(7, 5), ManyExits()
    logits = model(call["adjacency"], torch.cat([call["x"], call["x"] + 0.3]))
    expected = consistent_exit_loss([z[:5] for z in logits], [z[5:] for z in logits], Y)
    loss, _ = cet.ConsistentExitLoss(lambda x: (x[0], x[1] + 0.3))(model, (call["adjacency"], call["x"]), Y)
    assert torch.equal(loss, expected.loss)
    with pytest.raises(ValueError, match=r"perturb changes input 0, which all rows share"):
        cet.ConsistentExitLoss(lambda x: (x[0] + 1, x[1]))(model, (call["adjacency"], call["x"]), Y)


def test_as_many_answers_as_rows():
    class Short(ManyExits):
        def forward(self, adjacency, x):
            return tuple(z[1:] for z in super().forward(adjacency, x))

    call = graph_call(7, 5)
    with pytest.raises(ValueError, match=r"model gives logits for 9 rows of 10; .*one row of logits per sample"):
        cet.ConsistentExitLoss(lambda x: x)(Short(), (call["adjacency"], call["x"]), Y)


class StochasticDepth(nn.Module):
    """A layer of one's own that does something else in train mode."""

    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return x * (torch.rand(len(x), 1) >= self.drop_prob) if self.training else x


LAYERS = {
    "batch norm": nn.BatchNorm1d(6),
    "dropout": nn.Dropout(0.5),
    "lstm": nn.LSTM(6, 6, 2, dropout=0.1),
    "attention": nn.MultiheadAttention(6, 2, dropout=0.1),
    "own": StochasticDepth(0.1),
}
SAME_LAYERS = {
    "linear": nn.Linear(6, 6),
    "layer norm": nn.LayerNorm(6),
    "batch norm without statistics": nn.BatchNorm1d(6, track_running_stats=False),
    "dropout of nothing": nn.Dropout(0.0),
    "lstm": nn.LSTM(6, 6),
    "attention": nn.MultiheadAttention(6, 2),
    "own": StochasticDepth(0.0),
}


class Layered(ManyExits):
    def __init__(self, layer):
        super().__init__()
        self.block = nn.Sequential(layer)

    def forward(self, x):
        return x[:, :3], self.first(torch.cat([x, x[:, :2]], 1))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_model_partly_in_eval_mode_is_refused_unless_that_is_meant(layer):
    model = Layered(layer)
    model.block[0].eval()
    name = type(layer).__name__
    with pytest.raises(ValueError, match=rf"block\.0 \({name}\) is in eval mode.*model\.train\(\).*allow_eval=True"):
        cet.ConsistentExitLoss(shift)(Wrapper(model), X, Y)
    assert cet.ConsistentExitLoss(shift, allow_eval=True)(model, X, Y)[0].isfinite()
    assert cet.ConsistentExitLoss(shift)(model.train(), X, Y)[0].isfinite()


@pytest.mark.parametrize("layer", SAME_LAYERS.values(), ids=SAME_LAYERS)
def test_layers_that_do_the_same_in_both_modes_may_be_in_either(layer):
    model = Layered(layer)
    model.block.eval()
    assert cet.ConsistentExitLoss(shift)(model, X, Y)[0].isfinite()


def test_a_part_that_is_frozen_altogether_may_be_in_eval_mode(model):
    model.backbone.eval().requires_grad_(False)
    assert cet.ConsistentExitLoss(shift)(model, X, Y)[0].isfinite()
    model.backbone.norm.requires_grad_(True)
    with pytest.raises(ValueError, match=r"backbone\.norm \(BatchNorm1d\) is in eval mode"):
        cet.ConsistentExitLoss(shift)(model, X, Y)


BAD_PERTURBATIONS = [
    (lambda x: x[:, :2], r"perturb turns \(5, 4\) torch.float32 into \(5, 2\) torch.float32; keep shape and dtype"),
    (lambda x: x[:2], r"into \(2, 4\) torch.float32"),
    (lambda x: x.double(), r"into \(5, 4\) torch.float64"),
    (lambda x: None, "perturb changes the structure|into NoneType"),
    (lambda x: (x, x), "perturb changes the structure"),
    (lambda x: {"x": x}, "perturb changes the structure"),
]


@pytest.mark.parametrize(("perturb", "message"), BAD_PERTURBATIONS)
def test_perturbations_that_change_the_kind_of_input_are_refused(model, perturb, message):
    before = calls(model)
    with pytest.raises(ValueError, match=message):
        cet.ConsistentExitLoss(perturb)(model, X, Y)
    assert calls(model) == before + 1


def test_other_misuse_is_refused_before_the_model_runs(model):
    objective = cet.ConsistentExitLoss(shift)
    before = calls(model)
    with pytest.raises(ValueError, match=r"model is in eval mode.*call model.train\(\) first"):
        objective(model.eval(), X, Y)
    with pytest.raises(TypeError, match="x is tuple without a tensor"):
        objective(model.train(), (1.0,), Y)
    assert calls(model) == before + 1


def test_a_wrong_number_of_exit_weights_is_refused_before_the_model_runs(model):
    before = calls(model)
    with pytest.raises(ValueError, match="exit_weights has 3 entries but the model has 2 exits"):
        cet.ConsistentExitLoss(shift, exit_weights=(1, 1, 1))(model, X, Y)
    assert calls(model) == before + 1


def test_a_model_that_is_no_multi_exit_model_is_refused():
    with pytest.raises(TypeError, match=r"wrap it in cet.EarlyExit"):
        cet.ConsistentExitLoss(shift)(nn.Linear(4, 3), X, Y)


def test_a_perturbation_in_place_is_refused(model):
    with pytest.raises(ValueError, match="perturb changes its input in place"):
        cet.ConsistentExitLoss(lambda x: x.mul_(2.0))(model, X.clone(), Y)


def test_an_empty_batch_has_no_loss(model):
    loss, parts = cet.ConsistentExitLoss(shift)(model, X[:0], Y[:0])
    assert loss.item() == 0.0
    assert all(part.isfinite().all() for part in parts)
