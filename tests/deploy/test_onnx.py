"""Exported ONNX files answer as the model does, row by row, in a process with neither cet nor torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import cet
from cet.deploy.check import NEAR
from cet.ops.definitions import ScoreName
from conftest import Built, build_family
from families import FAMILIES, Inputs
from oracle import Answers, answers_of, policy_between_scores
from thinned import kept, slow

SIZES = (1, 2, 7, 64, 333, 593)
"""Numbers of rows of the calls that are compared; 1,000 together."""
SCORE_OF: dict[str, tuple[ScoreName, float]] = {
    "skip": ("entropy", 1.0),
    "conv-lstm": ("confidence", 1.3),
    "late-fusion": ("margin", 0.7),
    "resnet": ("margin", 1.0),
    "vit": ("confidence", 1.0),
    "bert": ("entropy", 1.7),
}


class Exported(NamedTuple):
    model: cet.EarlyExit
    report: cet.ExportReport
    inputs: Inputs
    logits: list[Tensor]
    """Of all exits, for all rows of the inputs."""


@pytest.fixture(scope="module", params=kept(FAMILIES, "skip", "late-fusion", "vit"))
def built(request: pytest.FixtureRequest) -> Built:
    return build_family(request.param)


@pytest.fixture(scope="module")
def exported(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A family's model, exported for any number of rows, and 1,000 rows, about half of which leave at each exit."""
    family, model = built
    torch.manual_seed(2)
    inputs = family.inputs(sum(SIZES))
    score, temperature = SCORE_OF[next(name for name, known in FAMILIES.items() if known is family)]
    few = {name: value[:64] for name, value in inputs.items()}
    temperatures = (temperature,) * model.num_exits
    model.policy = policy_between_scores(model, few, score, [0.5] * (model.num_exits - 1), temperatures)
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    report = cet.export(model, path, {name: value[:4] for name, value in inputs.items()}, thresholds="input")
    with torch.no_grad():
        return Exported(model, report, inputs, list(model.exit_logits(**inputs)))


def near_a_threshold(logits: list[Tensor], policy: cet.ExitPolicy) -> np.ndarray[Any, Any]:
    """Rows a score of which is so near to a threshold that rounding decides."""
    near = np.zeros(len(logits[0]), bool)
    for k, threshold in enumerate(policy.thresholds):
        assert threshold is not None
        scores = cet.ops.exit_score(logits[k], policy.score, policy.temperature(k))
        near |= ((scores - threshold).abs() <= NEAR).numpy()
    return near


WITHOUT_CET = """
import sys
import numpy as np
import onnxruntime

given = np.load(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = [value.name for value in session.get_inputs() if value.name in given]
answers, start = [], 0
for rows in given["sizes"]:
    answers.append(session.run(None, {name: given[name][start : start + rows] for name in names}))
    start += rows
assert not {"torch", "cet"} & sys.modules.keys()
logits, exit_index, score = (np.concatenate(parts) for parts in zip(*answers))
np.savez(sys.argv[3], logits=logits, exit_index=exit_index, score=score)
"""


def test_answers_are_those_of_the_model_in_a_process_without_torch(exported: Exported, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", sizes=np.array(SIZES), **{k: v.numpy() for k, v in exported.inputs.items()})
    command = [sys.executable, "-c", WITHOUT_CET, exported.report.path, tmp_path / "in.npz", tmp_path / "out.npz"]
    subprocess.run(command, check=True, timeout=120)
    got = np.load(tmp_path / "out.npz")
    expected = answers_of(exported.logits, exported.model.policy)
    assert (got["exit_index"].dtype, got["score"].dtype) == (np.int64, np.float32)
    sure = ~near_a_threshold(exported.logits, exported.model.policy)
    assert sure.mean() > 0.97
    assert len(expected.exit_index.unique()) == exported.model.num_exits
    np.testing.assert_array_equal(got["exit_index"][sure], expected.exit_index.numpy()[sure])
    np.testing.assert_allclose(got["logits"][sure], expected.logits.numpy()[sure], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got["score"][sure], expected.score.numpy()[sure], rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(got["logits"][sure].argmax(1), expected.logits.numpy()[sure].argmax(1))


def test_edges(exported: Exported) -> None:
    """All leave at one exit, or none; no row; the loader takes arrays by name and tensors by position."""
    loaded = cet.load_exported(exported.report.path, threads=1)
    last = exported.model.num_exits - 1
    always = np.inf if loaded.description.score == "entropy" else -np.inf
    few = {name: value[:9] for name, value in exported.inputs.items()}
    for k in range(last + 1):
        loaded.thresholds = tuple(float(always) if index == k else None for index in range(last))
        out = loaded.predict(**{name: value.numpy() for name, value in few.items()})
        assert out.exit_index.tolist() == [k] * 9
        np.testing.assert_allclose(out.logits, exported.logits[k][:9].numpy(), rtol=1e-4, atol=1e-4)
    out = loaded.predict(*few.values())
    assert isinstance(out.labels, Tensor)
    assert torch.equal(out.labels, exported.logits[-1][:9].argmax(1))
    empty = loaded.predict(**{name: value[:0].numpy() for name, value in few.items()})
    assert (empty.logits.shape, empty.exit_index.shape) == ((0, exported.model.num_classes), (0,))
    assert (empty.exit_index.dtype, empty.score.dtype) == (np.int64, np.float32)


def test_a_nan_touches_no_other_row(exported: Exported) -> None:
    """That a NaN score never leaves early is shown in test_onnx_scores; ONNX Runtime's Relu makes a number of a NaN."""
    name, value = next(iter(exported.inputs.items()))
    if not value.is_floating_point():
        return  # tokens hold no NaN
    loaded = cet.load_exported(exported.report.path, threads=1)
    inputs = {name: rows[:7].numpy() for name, rows in exported.inputs.items()}
    expected = loaded.predict(**inputs)
    poisoned = loaded.predict(**{**inputs, name: value[:7].index_fill(0, torch.tensor(3), torch.nan).numpy()})
    others = np.arange(7) != 3
    np.testing.assert_array_equal(poisoned.exit_index[others], expected.exit_index[others])
    np.testing.assert_allclose(poisoned.logits[others], expected.logits[others], rtol=1e-5, atol=1e-6)


def test_the_file_is_plain_onnx_that_holds_each_weight_once(exported: Exported) -> None:
    model = onnx.load(exported.report.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version >= 18) for opset in model.opset_import] == [("", True)]
    names = [value.name for value in model.graph.initializer]
    assert len(names) == len(set(names))
    weights = sum(value.nbytes for value in exported.model.state_dict().values())
    graph = sum(len(node.SerializeToString()) for node in model.graph.node)
    assert Path(exported.report.path).stat().st_size <= 1.05 * weights + graph + 20_000
    assert not any(node.metadata_props or node.doc_string for node in nodes_of(model.graph))
    assert str(Path(cet.__file__).parent).encode() not in Path(exported.report.path).read_bytes()
    rearranged, weights_alone = {"Concat", "Gather", "Transpose", "Unsqueeze"}, {*names} - {"thresholds"}
    assert not [n for n in nodes_of(model.graph) if n.op_type in rearranged and set(n.input) <= weights_alone]


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_of(attribute.g)


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if branches within branches cost too much of ONNX Runtime's memory."""
    monkeypatch.setattr("cet.deploy.onnx_writer._MOST_COPIED", -1)


def test_with_its_branches_one_behind_the_other_a_file_is_as_good(
    chain: None, exported: Exported, tmp_path: Path
) -> None:
    few = {name: value[:4] for name, value in exported.inputs.items()}
    report = cet.export(exported.model, tmp_path / "chain.onnx", few, thresholds="input")
    chained = exported._replace(report=report)
    check_is_chain(report.path, exported.model.num_exits)
    test_answers_are_those_of_the_model_in_a_process_without_torch(chained, tmp_path)
    test_edges(chained)
    test_a_nan_touches_no_other_row(chained)
    test_the_file_is_plain_onnx_that_holds_each_weight_once(chained)
    cet.export(exported.model, tmp_path / "row.onnx", few, batch=1)
    check_is_chain(tmp_path / "row.onnx", exported.model.num_exits)
    loaded = cet.load_exported(tmp_path / "row.onnx")
    expected = answers_of(exported.logits, exported.model.policy)
    for row in np.flatnonzero(~near_a_threshold(exported.logits, exported.model.policy))[:40]:
        out = loaded.predict(**{name: value[row : row + 1] for name, value in exported.inputs.items()})
        assert int(out.exit_index) == expected.exit_index[row]
        torch.testing.assert_close(out.logits[0], expected.logits[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.score[0], expected.score[row], rtol=1e-3, atol=1e-4)


def branches_of(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    return [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]


def check_is_chain(path: Any, num_exits: int) -> None:
    graph = onnx.load(path).graph
    branches = branches_of(graph)
    assert len(branches) == 2 * (num_exits - 1)
    assert not [node for branch in branches for node in branch.node if node.op_type == "If"]
    assert not [weight for branch in branches for weight in branch.initializer if len(weight.raw_data) > 64]


class SharedWeight(nn.Module):
    """All its layers use one matrix, which is computed from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.classifier = nn.Linear(8, 8), nn.Linear(8, 3)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](x)
        for norm in self.norms[1:]:
            x = norm(nn.functional.linear(x, torch.softmax(self.matrix.weight, 1)).relu())
        answer: Tensor = self.classifier(x)
        return answer


@pytest.mark.parametrize("batch", ["dynamic", 1])
@pytest.mark.parametrize("int8", [False, True])
def test_what_several_stages_compute_from_weights_stands_around_a_chain(
    chain: None, batch: Any, int8: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    model = cet.EarlyExit(SharedWeight().eval(), ["norms.0", "norms.1", "norms.2"], (x,)).eval()
    model.policy = cet.ExitPolicy("entropy", (0.9, 0.95, 1.0))
    labelled = [(x, torch.full((32,), -100))]
    cet.export(model, tmp_path / "m.onnx", batch=batch, quantize=labelled if int8 else None)
    check_is_chain(tmp_path / "m.onnx", 4)
    loaded, expected = cet.load_exported(tmp_path / "m.onnx"), model.predict(x)
    got = torch.cat([loaded.predict(rows).exit_index for rows in ([x] if batch == "dynamic" else x.split(1))])
    assert (got == expected.exit_index).float().mean() >= (0.7 if int8 else 1)


class WidePlanes(nn.Module):
    """Little to compute on much."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 4, 28, stride=28), nn.Conv2d(3, 32, 1)
        self.layers = nn.ModuleList(nn.ReLU() for _ in range(8))
        self.classifier = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.wide(x) + self.stem(x).mean((1, 2, 3), keepdim=True)
        for layer in self.layers:
            h = layer(h)
        answer: Tensor = self.classifier(h.mean((2, 3)))
        return answer


def test_who_has_left_passes_a_chain_without_large_tensors(chain: None, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 112, 112)
    exits = ["stem", *(f"layers.{index}" for index in range(7))]
    model = cet.EarlyExit(WidePlanes().eval(), exits, (x,)).eval()
    model.policy = cet.ExitPolicy("entropy", (9.0,) * 8)
    cet.export(model, tmp_path / "m.onnx", batch=1)
    graph = onnx.load(tmp_path / "m.onnx").graph
    made = [node for node in nodes_of(graph) if node.op_type == "ConstantOfShape"]
    held = [weight for branch in branches_of(graph) for weight in branch.initializer] + [*graph.initializer]
    sizes = {weight.name: onnx.numpy_helper.to_array(weight) for weight in held}
    assert len(made) == 7
    assert all(np.prod(sizes[node.input[0]]) == 1 for node in made)


@pytest.mark.parametrize("batch", ["dynamic", 1])
@pytest.mark.parametrize("size", [8, 9])
def test_where_the_runtime_is_wrong_at_other_sizes_a_file_takes_those_of_the_example(
    batch: Any, size: int, tmp_path: Path
) -> None:
    """Adaptive pooling to several positions has in ONNX a form that is right for their multiples alone."""
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Conv2d(3, 8, 1))
    backbone = nn.Sequential(pool, nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 3)).eval()
    x = torch.randn(4, 3, size, size)
    model = cet.EarlyExit(backbone, ["0"], (x,), policy=cet.ExitPolicy("entropy", (1.05,))).eval()
    cet.export(model, tmp_path / "m.onnx", batch=batch)
    loaded = cet.load_exported(tmp_path / "m.onnx")
    assert not loaded.description.ranges
    for row in x.split(1):
        torch.testing.assert_close(loaded.predict(row).logits, model.predict(row).logits)
    with pytest.raises(ValueError, match=r"input has shape \(1, 3, 7, 7\) but the file takes"):
        loaded.predict(torch.randn(1, 3, 7, 7))


@pytest.mark.parametrize("layers", [3, 9])
def test_large_nets_of_many_exits_have_their_branches_one_behind_the_other(layers: int, tmp_path: Path) -> None:
    """In branches within branches ONNX Runtime would hold the last stage's weights once for each exit before it."""
    backbone = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(layers)), nn.Linear(1024, 3)).eval()
    exits = [str(index) for index in range(layers - 1)]
    model = cet.EarlyExit(backbone, exits, (torch.randn(2, 1024),)).eval()
    model.policy = cet.ExitPolicy("entropy", (0.5,) * len(exits))
    cet.export(model, tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    assert [node.op_type for node in graph.node].count("If") == (1 if layers == 3 else layers - 1)


def test_what_the_file_says_of_itself(exported: Exported) -> None:
    metadata = {prop.key: prop.value for prop in onnx.load(exported.report.path).metadata_props}
    description = json.loads(metadata["cet"])
    assert description["exits"] == list(exported.model.exit_names)
    assert description["thresholds"] == list(exported.model.policy.thresholds)
    assert description["score"] == exported.model.policy.score
    assert [given["name"] for given in description["inputs"]] == list(exported.inputs)
    assert description["versions"]["torch"] == torch.__version__


def test_sizes_that_vary(built: Built, exported: Exported) -> None:
    """Where the model takes other lengths, so does the file; where it does not, it says so."""
    loaded = cet.load_exported(exported.report.path, threads=1)
    ranges = loaded.description.ranges
    assert bool(ranges) == (built[0] is not FAMILIES["vit"])
    for name, limits in ranges.items():
        given = {
            tensor.name: exported.inputs[tensor.name][:5].narrow(dim, 0, exported.inputs[tensor.name].shape[dim] - 3)
            for tensor in loaded.description.inputs
            for dim, size in enumerate(tensor.shape)
            if size == name
        }
        inputs = {key: value[:5] for key, value in exported.inputs.items()} | given
        with torch.no_grad():
            expected: Answers = answers_of(list(exported.model.exit_logits(**inputs)), exported.model.policy)
        out = loaded.predict(**{key: value.numpy() for key, value in inputs.items()})
        np.testing.assert_array_equal(out.exit_index, expected.exit_index.numpy())
        np.testing.assert_allclose(out.logits, expected.logits.numpy(), rtol=1e-4, atol=1e-4)
        if limits.largest is not None:
            first = next(iter(given))
            longer = np.zeros((1, limits.largest + 1), np.int64)
            with pytest.raises(ValueError, match=f"size {name} is {limits.largest + 1}"):
                loaded.predict(**dict.fromkeys(given, longer), **{k: v for k, v in inputs.items() if k not in given})
            assert first in name


def test_importing_the_loader_imports_no_torch() -> None:
    code = "import cet.deploy.onnx, cet.deploy.stages, cet, sys; cet.load_exported; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


@pytest.mark.parametrize("batch", ["dynamic", 1])
@pytest.mark.parametrize("most_copied", [64_000_000, -1])
def test_patience_is_counted_in_the_file_row_by_row(
    tmp_path: Path, batch: Any, most_copied: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With branches within branches, and with branches one behind the other."""
    monkeypatch.setattr("cet.deploy.onnx_writer._MOST_COPIED", most_copied)
    torch.manual_seed(3)
    layers = [layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.ReLU())]
    backbone = nn.Sequential(*layers, nn.Linear(6, 3)).eval()
    with torch.no_grad():  # so that exits name different classes
        for layer in layers[::2]:
            layer.weight.mul_(3)
    x = torch.randn(400, 6)[: 400 if batch == "dynamic" else 60]
    model = cet.EarlyExit(backbone, exits=["1", "3", "5"], example_inputs=(x[:4],)).eval()
    with torch.no_grad():
        logits = list(model.exit_logits(x))
    left = set()
    policies = cet.ExitPolicy("patience", (1, 1, 1)), cet.ExitPolicy("patience", (math.inf, 3, 2))
    for policy in policies[: 2 if batch == "dynamic" else 1]:
        model.policy = policy
        path = tmp_path / "patient.onnx"
        report = cet.export(model, path, batch=batch)
        assert report.comparison.rows > 20
        loaded = cet.load_exported(path)
        assert loaded.description.score == "patience"
        expected = answers_of(logits, policy)
        got = [loaded.predict(rows) for rows in ([x] if batch == "dynamic" else x.split(1))]
        assert torch.equal(torch.cat([answer.exit_index for answer in got]), expected.exit_index)
        assert torch.equal(torch.cat([answer.score for answer in got]), expected.score)
        assert torch.allclose(torch.cat([answer.logits for answer in got]), expected.logits, atol=1e-5)
        left |= set(expected.exit_index.tolist())
    assert left == {1, 2, 3}


def test_an_exit_whose_logits_are_not_finite_names_no_class_in_a_file(tmp_path: Path) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :1] > 0, torch.cat([x[:, :2], x[:, :1] / 0], dim=1), x)  # +Inf in such a row

    class Mended(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clamp(max=3.0)

    backbone = nn.Sequential(nn.Identity(), Broken(), Mended(), nn.Hardtanh(-9, 9)).eval()
    x = torch.randn(64, 3)
    model = cet.EarlyExit(backbone, exits={k: nn.Identity() for k in "012"}, example_inputs=(x[:4],)).eval()
    model.policy = cet.ExitPolicy("patience", (5, 1, 1))
    cet.export(model, tmp_path / "m.onnx")
    got, own = cet.load_exported(tmp_path / "m.onnx").predict(x), model.predict(x)
    is_broken = x[:, 0] > 0
    assert own.exit_index[~is_broken].unique().tolist() == [1]
    assert own.exit_index[is_broken].unique().tolist() == [3]  # the break lets nobody leave at the exit behind it
    assert torch.equal(got.exit_index, own.exit_index)
    assert torch.equal(got.score, own.score)


@pytest.mark.parametrize(("batch", "is_low"), [("dynamic", True), slow(1, False)])
def test_a_function_of_the_logits_is_in_the_file(tmp_path: Path, batch: Any, is_low: bool) -> None:
    torch.manual_seed(4)
    backbone = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x = torch.randn(300, 6)
    model = cet.EarlyExit(backbone, exits=["1", "3"], example_inputs=(x[:4],)).eval()
    weights = torch.tensor([1.0, 2.0, 0.5])

    def weighed(logits: Tensor) -> Tensor:
        score = (logits.softmax(1) * weights).square().sum(1)
        return -score if is_low else score

    score = cet.ScoreFunction(weighed, is_low_when_sure=is_low, name="weighed")
    model.policy = cet.ExitPolicy(score, (0.0, 0.0), (1.5, 1.0, 0.7))
    middle = [scores.median().item() for _, scores in model.exit_answers(x)[:-1]]
    model.policy = cet.ExitPolicy(score, tuple(middle), (1.5, 1.0, 0.7))
    cet.export(model, tmp_path / "own.onnx", batch=batch, thresholds="input" if batch == 1 else "baked")
    loaded = cet.load_exported(tmp_path / "own.onnx")
    assert (loaded.description.score, loaded.description.is_low_when_sure) == ("weighed", is_low)
    x[0] = float("nan")
    given = [x] if batch == "dynamic" else list(x.split(1))
    got = [loaded.predict(rows) for rows in given]
    exits, scores = (torch.cat([getattr(answer, name) for answer in got]) for name in ("exit_index", "score"))
    sure = torch.tensor(
        [
            all(abs(s[row] - t) > NEAR for (_, s), t in zip(model.exit_answers(x), middle, strict=False))
            for row in range(len(x))
        ]
    )
    sure[0] = True
    own = model.predict(x)
    assert sure.sum() > 290
    assert len(own.exit_index.unique()) == 3
    assert torch.equal(exits[sure], own.exit_index[sure])
    assert torch.allclose(scores[sure], own.score[sure], atol=1e-5, equal_nan=True)


def test_a_function_without_a_form_in_onnx_is_refused_by_its_name(tmp_path: Path) -> None:
    backbone = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    model = cet.EarlyExit(backbone, exits=["1"], example_inputs=(torch.randn(4, 6),)).eval()
    odd = cet.ScoreFunction(lambda logits: torch.tensor([float(row.max()) for row in logits]), name="odd")
    model.policy = cet.ExitPolicy(odd, (0.0,))
    with pytest.raises(cet.ExportError, match="the score 'odd' has no form in ONNX"):
        cet.export(model, tmp_path / "m.onnx")
