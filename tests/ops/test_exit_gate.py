"""The gate and the fused exit head, against double precision, on every backend."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cet import ops
from cet.ops.backend import chosen_backend, kernels
from cet.ops.definitions import SCORE_NAMES, SCORES, ScoreName
from cet.ops.exit_gate.definition import score_definition
from conftest import kernels_only

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
inf, nan = math.inf, math.nan


def true_score(logits: Tensor, score: ScoreName, temperature: float = 1.0) -> Tensor:
    p = torch.softmax(logits.double() / temperature, dim=1)
    if score == "entropy":
        return torch.special.entr(p).sum(dim=1)
    top = p.topk(2, dim=1).values
    return {"confidence": top[:, 0], "margin": top[:, 0] - top[:, 1]}[score]


def always(score: ScoreName) -> float:
    """The threshold that every score passes."""
    return inf if SCORES[score].is_low_when_sure else -inf


def true_logits(features: Tensor, weight: Tensor, bias: Tensor | None, layout: str, pool: str) -> Tensor:
    x = features.double()
    if x.ndim > 2:
        if pool == "first":
            x = x[:, 0]
        else:
            x = x.mean(dim=tuple(range(2, x.ndim)) if layout == "channels_first" else tuple(range(1, x.ndim - 1)))
    logits = x @ weight.double().T
    return logits if bias is None else logits + bias.double()


def assert_as_good_as_reference(got: Tensor, reference: Tensor, truth: Tensor, tolerance: float) -> None:
    error = (got.double() - truth).abs()
    allowed = (reference.double() - truth).abs() + tolerance * (1 + truth.abs())
    assert torch.equal(got.isnan(), truth.isnan())
    # In single precision: a reference that is off by more computes something else.
    if reference.dtype == torch.float32:
        torch.testing.assert_close(reference.double(), truth, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert bool(((error <= allowed) | truth.isnan()).all()), f"error {error.max()} exceeds {allowed.min()}"


@pytest.mark.parametrize(
    ("logits", "entropy", "confidence", "margin"),
    [
        ([0.0, 0.0], math.log(2), 0.5, 0.0),
        ([3.0, 3.0, 3.0, 3.0], math.log(4), 0.25, 0.0),
        ([0.0, -inf, 0.0], math.log(2), 0.5, 0.0),
        ([5.0, -inf, -inf], 0.0, 1.0, 1.0),
        ([0.0, -200.0], 0.0, 1.0, 1.0),
        ([1e30, -1e30], 0.0, 1.0, 1.0),
        ([math.log(3), 0.0], math.log(4) - 0.75 * math.log(3), 0.75, 0.5),
        ([-inf, -inf], nan, nan, nan),
        ([nan, 0.0, 0.0], nan, nan, nan),
        ([0.0, inf], nan, nan, nan),
    ],
)
@pytest.mark.parametrize("score", SCORE_NAMES)
def test_scores_of_known_logits(
    backend: str, logits: list[float], entropy: float, confidence: float, margin: float, score: ScoreName
) -> None:
    expected = {"entropy": entropy, "confidence": confidence, "margin": margin}[score]
    scores, exit_mask = ops.gate(torch.tensor([logits, logits]), score=score, threshold=always(score))
    torch.testing.assert_close(scores, torch.tensor([expected] * 2), rtol=1e-6, atol=1e-6, equal_nan=True)
    assert exit_mask.tolist() == [not math.isnan(expected)] * 2


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_a_score_equal_to_the_threshold_leaves(backend: str, score: ScoreName) -> None:
    logits = torch.randn(50, 9)
    scores, _ = ops.gate(logits, score=score, threshold=0.0)
    for row in range(50):
        at = float(scores[row])
        assert bool(ops.gate(logits, score=score, threshold=at)[1][row])
        beyond = math.nextafter(at, -always(score))
        beyond = at + (beyond - at) * 2**30  # one step of float32
        assert not bool(ops.gate(logits, score=score, threshold=beyond)[1][row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [2, 3, 7, 16, 17, 33, 1000, 1023, 1024, 1025, 2049, 32768])
def test_gate_is_as_exact_as_the_reference(backend: str, dtype: torch.dtype, classes: int) -> None:
    logits = (4 * torch.randn(6, classes)).to(dtype)
    logits[1] -= 1e4
    logits[2, ::2] = -inf
    logits[3, classes // 2] = nan
    logits[4, -1] = inf
    for score in SCORE_NAMES:
        for temperature in (1.0, 0.3, 20.0):
            got, _ = ops.gate(logits, score=score, threshold=0.0, temperature=temperature)
            reference = score_definition(logits, score, temperature)
            assert_as_good_as_reference(got, reference, true_score(logits, score, temperature), 2e-6)


@kernels_only
@pytest.mark.parametrize("bits", [torch.bfloat16, torch.float16])
def test_every_half_value_is_read_and_written_exactly(backend: str, bits: torch.dtype) -> None:
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(bits)
    logits, _, _ = ops.exit_gate(values[:, None], torch.ones(2, 1, dtype=bits), threshold=0.0)
    assert torch.equal(logits[:, 0].nan_to_num(0), values.nan_to_num(0))
    assert torch.equal(logits[:, 1].isnan(), values.isnan())


LAYOUTS: dict[str, Any] = {
    "channels_first": lambda b, c, p: (torch.randn(b, c, *p), "channels_first"),
    "channels_last": lambda b, c, p: (torch.randn(b, *p, c), "channels_last"),
    "images in channels_last memory": lambda b, c, p: (torch.randn(b, *p, c).movedim(-1, 1), "channels_first"),
    "every second position": lambda b, c, p: (torch.randn(b, c, *p[:-1], 2 * p[-1])[..., ::2], "channels_first"),
    "every second channel": lambda b, c, p: (torch.randn(b, *p, 2 * c)[..., ::2], "channels_last"),
    "batch last": lambda b, c, p: (torch.randn(c, *p, b).movedim(-1, 0), "channels_first"),
    "expanded positions": lambda b, c, p: (torch.randn(b, c, *[1] * len(p)).expand(b, c, *p), "channels_first"),
    "rows apart": lambda b, c, p: (torch.randn(2 * b, c, *p)[::2], "channels_first"),
}


def assert_exit_gate_right(features: Tensor, classes: int, layout: Any, pool: Any, bias: bool) -> None:
    channels = features.shape[-1 if layout == "channels_last" else 1]
    weight = torch.randn(classes, channels).to(features.dtype)
    offset = torch.randn(classes).to(features.dtype) if bias else None
    before = features.clone()
    logits, scores, exit_mask = ops.exit_gate(features, weight, offset, layout=layout, pool=pool, threshold=0.9)
    assert torch.equal(features, before)
    assert logits.dtype == features.dtype
    assert logits.shape == (features.shape[0], classes)
    with ops.use_backend("reference"):
        reference, _, _ = ops.exit_gate(features, weight, offset, layout=layout, pool=pool, threshold=0.9)
    truth = true_logits(features, weight, offset, layout, pool)
    # Half an ulp for the one rounding that every result in that dtype has.
    tolerance = max(5e-6, torch.finfo(features.dtype).eps * 0.5001)
    assert_as_good_as_reference(logits, reference, truth, tolerance * channels**0.5 / 4 + tolerance)
    assert_as_good_as_reference(scores, score_definition(logits, "entropy", 1.0), true_score(logits, "entropy"), 2e-6)
    assert torch.equal(exit_mask, scores <= 0.9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_exit_gate_reads_every_layout(backend: str, dtype: torch.dtype, name: str) -> None:
    for rows, channels, positions, classes in [(1, 5, (7,), 2), (6, 33, (4, 9), 7), (19, 130, (65,), 12)]:
        features, layout = LAYOUTS[name](rows, channels, positions)
        moved = features.to(dtype)
        strided = (
            torch.empty_strided(features.shape, features.stride(), dtype=dtype) if 0 not in features.stride() else moved
        )
        features = strided.copy_(moved) if strided is not moved else moved
        assert_exit_gate_right(features, classes, layout, "mean", bias=True)


@given(data=st.data())
def test_exit_gate_on_any_shape(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    rows = data.draw(st.integers(1, 20), label="rows")
    channels = data.draw(st.integers(1, 70), label="channels")
    positions = data.draw(st.lists(st.integers(1, 9), max_size=3), label="positions")
    classes = data.draw(st.integers(2, 40), label="classes")
    layout = data.draw(st.sampled_from(["channels_first", "channels_last"]), label="layout")
    shape = [rows, channels, *positions] if layout == "channels_first" else [rows, *positions, channels]
    order = data.draw(st.permutations(range(len(shape))), label="memory order")
    steps = data.draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)), label="steps")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    base = torch.randn([shape[d] * steps[d] for d in order]).to(dtype)
    features = base.permute([order.index(d) for d in range(len(shape))])
    for d, step in enumerate(steps):
        features = features[(slice(None),) * d + (slice(None, None, step),)]
    pool = "first" if layout == "channels_last" and len(shape) == 3 and data.draw(st.booleans()) else "mean"
    assert_exit_gate_right(features, classes, layout, pool, bias=data.draw(st.booleans(), label="bias"))


def test_many_classes_and_rows_go_through_the_matrix_product(backend: str) -> None:
    assert_exit_gate_right(torch.randn(40, 100, 9), 500, "channels_first", "mean", bias=True)
    assert_exit_gate_right(torch.randn(40, 100), 500, "channels_first", "mean", bias=False)


@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_a_poisoned_row_stays_and_touches_no_other(backend: str, poison: float) -> None:
    features, weight = torch.randn(9, 20, 11), torch.randn(5, 20)
    clean = ops.exit_gate(features, weight, threshold=inf)
    features[4, 3, 2] = poison
    logits, scores, exit_mask = ops.exit_gate(features, weight, threshold=inf)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert scores[4].isnan()
    assert exit_mask.tolist() == [True] * 4 + [False] + [True] * 4
    assert torch.equal(logits[others], clean[0][others])
    assert torch.equal(scores[others], clean[1][others])


def test_no_rows(backend: str) -> None:
    for features in (torch.randn(0, 4, 8), torch.randn(0, 4)):
        logits, scores, exit_mask = ops.exit_gate(features, torch.randn(3, 4), threshold=0.0)
        assert (logits.shape, scores.shape, exit_mask.shape) == ((0, 3), (0,), (0,))
    assert ops.gate(torch.randn(0, 3), threshold=0.0)[0].shape == (0,)


@kernels_only
def test_only_the_outputs_are_written(backend: str) -> None:
    guard, logits = 7, torch.randn(5, 4)
    scores = torch.full((5 + guard,), -1.0)
    exit_mask = torch.zeros(5 + guard, dtype=torch.bool)
    import_module("cet.ops.backend").kernels().gate(
        logits.data_ptr(), 0, logits.shape, logits.stride(), 0, inf, 1.0, scores.data_ptr(), exit_mask.data_ptr(), 2
    )
    assert scores[5:].tolist() == [-1.0] * guard
    assert exit_mask.tolist() == [True] * 5 + [False] * guard


def test_gradients_flow_through_the_logits_alone(backend: str) -> None:
    features = torch.randn(6, 5, 8, requires_grad=True)
    weight = torch.randn(3, 5, requires_grad=True)
    logits, scores, _ = ops.exit_gate(features, weight, threshold=0.5)
    assert not scores.requires_grad
    logits.square().sum().backward()
    copies = features.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    (copies[0].mean(2) @ copies[1].T).square().sum().backward()
    torch.testing.assert_close(features.grad, copies[0].grad)
    torch.testing.assert_close(weight.grad, copies[1].grad)


@pytest.mark.parametrize("rows", [4, 3000])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_exit_step_is_gate_then_compaction(backend: str, rows: int, memory_format: torch.memory_format) -> None:
    features = torch.randn(rows, 8, 4, 5).contiguous(memory_format=memory_format)
    weight, mask = torch.randn(3, 8), torch.randn(5, rows)
    _, scores, _ = ops.exit_gate(features, weight, threshold=0.0)
    for threshold in (-1.0, float(scores.median()), 9.0):
        logits, scores, exit_mask = ops.exit_gate(features, weight, threshold=threshold)
        got = ops.exit_step(features, weight, None, [mask, features], [1, 0], threshold=threshold)
        expected = ops.compact(exit_mask, [mask, features], [1, 0])
        assert torch.equal(got[0], logits)
        assert torch.equal(got[1], scores)
        assert torch.equal(got[2].kept_indices, expected.kept_indices)
        assert torch.equal(got[2].exited_indices, expected.exited_indices)
        for a, b in zip(got[2].tensors, expected.tensors, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()


BAD_GATES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"threshold": nan}, ValueError, "threshold is NaN"),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; give a positive, finite"),
    ({"temperature": inf}, ValueError, "temperature is inf"),
    ({"score": "energy"}, ValueError, "score 'energy' is unknown; choose one of entropy"),
    ({"logits": torch.zeros(3)}, ValueError, r"logits have shape \(3,\); give \(B, K\)"),
    ({"logits": torch.zeros(3, 1)}, ValueError, "at least 2 classes"),
    ({"logits": torch.zeros(1, 2).expand(2**30 + 1, 2)}, ValueError, "at most 2.30 rows"),
    ({"logits": torch.zeros(3, 2, dtype=torch.int64)}, TypeError, "logits are torch.int64; give a floating"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD_GATES)
def test_gate_refuses(backend: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^gate: .*{message}"):
        ops.gate(**{"logits": torch.zeros(3, 4), "threshold": 0.0, **wrong})


X = torch.zeros(3, 4, 5)
BAD_HEADS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"features": torch.zeros(4)}, ValueError, r"features have shape \(4,\)"),
    ({"features": X.long()}, TypeError, "features are torch.int64; give a floating dtype"),
    ({"features": X.half()}, TypeError, "weight is torch.float32 but features are torch.float16; cast"),
    ({"weight": torch.zeros(2, 5)}, ValueError, r"weight has shape \(2, 5\) for features of 4 channels"),
    ({"weight": torch.zeros(1, 4)}, ValueError, "at least 2 classes"),
    ({"weight": torch.zeros(2, 4, device="meta")}, ValueError, "weight is on meta but features on cpu"),
    ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\) for 2 classes; give \(2,\)"),
    ({"layout": "last"}, ValueError, "layout 'last' is unknown"),
    ({"pool": "max"}, ValueError, "pool 'max' is unknown"),
    ({"pool": "first"}, ValueError, "pool 'first' takes the first token"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD_HEADS)
def test_exit_gate_refuses(backend: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^exit_gate: .*{message}"):
        ops.exit_gate(**{"features": X, "weight": torch.zeros(2, 4), "threshold": 0.0, **wrong})


def test_the_custom_operators_keep_their_promises(backend: str) -> None:
    for logits in (torch.randn(5, 3), torch.randn(3, 5).T):
        torch.library.opcheck(torch.ops.cet.gate.default, (logits, "entropy", 0.5, 1.0))
    head = (torch.randn(4, 6), torch.randn(4))
    for features in (torch.randn(5, 6, 7), torch.randn(5, 6)):
        arguments = (features, *head, "channels_first", "mean", "margin", 0.5, 2.0)
        torch.library.opcheck(torch.ops.cet.exit_gate.default, arguments)


def test_compiled_calls_give_the_same(backend: str) -> None:
    weight, bias = torch.randn(4, 6), torch.randn(4)

    def both(x: Tensor) -> tuple[Tensor, ...]:
        logits, scores, exit_mask = ops.exit_gate(x, weight, bias, threshold=1.0)
        return logits, scores, exit_mask, *ops.gate(logits, score="margin", threshold=0.5)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for rows in (3, 8):
        x = torch.randn(rows, 6, 7)
        for got, expected in zip(compiled(x), both(x), strict=True):
            torch.testing.assert_close(got, expected)


def test_a_choice_can_be_used_again_and_hides_no_error() -> None:
    chosen = ops.use_backend("reference")
    for _ in range(2):
        with chosen:
            assert chosen_backend() == "reference"
        assert chosen_backend() is None
    with pytest.raises(KeyError), chosen:
        raise KeyError
    with chosen, ops.use_backend(None):
        assert chosen_backend() is None
    with chosen, ThreadPoolExecutor(1) as pool:
        assert pool.submit(chosen_backend).result() is None


def test_triton_cannot_be_told_to_interpret_once_it_is_imported() -> None:
    script = """
        import os, triton, cet.ops
        os.environ["TRITON_INTERPRET"] = "1"
        cet.ops.use_backend("triton")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    if not torch.cuda.is_available():
        assert "start Python with TRITON_INTERPRET=1 in the environment" in done.stderr


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_logits_that_overflow_when_divided_by_the_temperature(backend: str, score: ScoreName) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, 3e38, 3e38], [2.0, 1.0, 0.0], [2.0, math.inf, 0.0]])
    expected = {"entropy": [0.0, math.log(2), 0.0, math.nan], "margin": [1.0, 0.0, 1.0, math.nan]}
    scores, exit_mask = ops.gate(logits, score=score, threshold=0.75, temperature=1e-3)
    torch.testing.assert_close(
        scores, torch.tensor(expected.get(score, [1.0, 0.5, 1.0, math.nan])), equal_nan=True, atol=1e-6, rtol=1e-6
    )
    assert exit_mask.tolist() == [True, SCORES[score].is_low_when_sure, True, False]


@pytest.mark.parametrize("mask", [torch.finfo(torch.float32).min, -1e30, -math.inf])
@pytest.mark.parametrize("temperature", [1.0, 1e-9])
@pytest.mark.parametrize("score", SCORE_NAMES)
def test_classes_masked_by_a_large_number_count_nothing(
    backend: str, score: ScoreName, temperature: float, mask: float
) -> None:
    """Whole blocks of them, as many as are summed up before they are joined to others."""
    logits = torch.randn(3, 12000)
    logits[0, 3000:], logits[1, :9000] = mask, mask
    kept = logits[0, :3000], logits[1, 9000:], logits[2]
    with ops.use_backend("reference"):
        expected = torch.cat([ops.exit_score(row[None].double(), score, temperature) for row in kept])
    scores, _ = ops.gate(logits, score=score, threshold=0.5, temperature=temperature)
    torch.testing.assert_close(scores, expected.float(), atol=1e-4, rtol=1e-4)


def test_what_is_no_tensor_is_refused_by_name() -> None:
    x, flags = torch.zeros(2, 3), torch.zeros(2, dtype=torch.bool)
    for call, message in (
        (lambda: ops.gate([[1.0, 2.0]], threshold=1.0), "gate: logits is a list; give a tensor"),
        (lambda: ops.exit_gate(x.numpy(), x, threshold=1.0), "exit_gate: features is a ndarray; give a tensor"),
        (lambda: ops.exit_gate(x, x, [0.0, 0.0], threshold=1.0), "exit_gate: bias is a list; give a tensor"),
        (lambda: ops.exit_step(x, None, None, [x], threshold=1.0), "exit_gate: weight is a NoneType; give a tensor"),
        (lambda: ops.compact([True, False], [x]), "compact: exit_mask is a list; give a tensor"),
        (lambda: ops.compact(flags, [x, [1, 2]]), r"compact: tensors\[1\] is a list; give a tensor"),
        (lambda: ops.scatter_rows(x, x, [0, 1]), "scatter_rows: index is a list; give a tensor"),
        (
            lambda: ops.consistent_exit_loss([x], [x], [0, 1], consistency_weight=1.0),
            "consistent_exit_loss: labels is a list; give a tensor",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_a_chosen_backend_that_cannot_run_raises() -> None:
    with pytest.raises(ValueError, match="backend 'gpu' is unknown; choose one of reference, cpp"):
        ops.use_backend("gpu")  # type: ignore[arg-type]
    if kernels() is None:
        with pytest.raises(RuntimeError, match="backend 'cpp' cannot run: cet was installed without"):
            ops.use_backend("cpp")
        return
    with ops.use_backend("cpp"):
        with pytest.raises(
            ValueError,
            match=r"gate: backend 'cpp' cannot take a torch.float64 Tensor on cpu .*; give strided CPU tensors of "
            r"torch.float32, torch.bfloat16, torch.float16, all on one device",
        ):
            ops.gate(torch.zeros(2, 2, dtype=torch.float64), threshold=0.0)
        with ops.use_backend("reference"):
            assert ops.gate(torch.zeros(2, 2, dtype=torch.float64), threshold=1.0)[1].all()
    ops.gate(torch.zeros(2, 2, dtype=torch.float64), threshold=0.0)
