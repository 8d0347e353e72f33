"""Which kernel runs a call, and why not a faster one; and what all rooms of an operation must agree on."""

from __future__ import annotations

import ast
import copy
import inspect
import logging
import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from cet import ops
from cet.ops.backend import _why_no_triton, kernels, preferring_triton, why_no_triton
from cet.ops.consistent_exit_loss.definition import HALF_GRADIENT_SCALE, UNLABELLED
from cet.ops.definitions import SCORE_NAMES, SCORES
from cet.ops.padded import gather_and_scatter_rows, padded_exit_step, padded_gate
from cet.runtime.scores import POLICY_SCORES
from conftest import kernels_only

ROOT = Path(__file__).parents[2]
X, W, FLAGS = torch.randn(4, 3, 5), torch.randn(2, 3), torch.tensor([True, False, True, False])
LOGITS, INDEX, LABELS = torch.randn(4, 2), torch.tensor([0, 2]), torch.tensor([0, 1, 1, -100])

CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "gate": (ops.gate, (LOGITS,), {"threshold": 0.5}),
    "exit_score": (ops.exit_score, (LOGITS,), {}),
    "exit_gate": (ops.exit_gate, (X, W), {"threshold": 0.5}),
    "exit_step": (ops.exit_step, (X, W, None, [X]), {"threshold": 0.5}),
    "compact": (ops.compact, (FLAGS, [X]), {}),
    "scatter_rows": (ops.scatter_rows, (torch.zeros(4, 2), LOGITS, INDEX), {}),
    "consistent_exit_loss": (ops.consistent_exit_loss, ([LOGITS], [LOGITS], LABELS), {}),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_operation_is_explained_and_nothing_is_computed(backend: str, name: str) -> None:
    op, args, kwargs = CALLS[name]
    before = torch.zeros(4, 2)
    choice = ops.explain(op, *args, **kwargs)
    assert choice.backend == backend
    assert choice.reasons == ()
    if name == "scatter_rows":
        assert torch.equal(args[0], before)


LARGE = torch.randn(20, 1100, 2), torch.randn(4000, 1100)
GRAD = W.clone().requires_grad_()

REASONS: list[tuple[Callable[[], ops.Choice], str, str, str]] = [
    (
        lambda: ops.explain(ops.gate, LOGITS.double(), threshold=0.5),
        "reference",
        "definition",
        r"backend 'cpp' cannot take a torch\.float64 Tensor on cpu",
    ),
    (lambda: ops.explain(ops.exit_gate, X, GRAD, threshold=0.5), "cpp", "then the gate's kernel", "gradient is needed"),
    (lambda: ops.explain(ops.exit_step, X, GRAD, None, [X], threshold=0.5), "cpp", "exit_gate, then", "gradient"),
    (lambda: ops.explain(ops.exit_gate, *LARGE, threshold=0.5), "cpp", "PyTorch's matrix product", "weight is large"),
    (
        lambda: ops.explain(ops.exit_step, *LARGE, None, [LARGE[0]], threshold=0.5),
        "cpp",
        "exit_gate, then",
        "weight is large",
    ),
    (
        lambda: ops.explain(ops.exit_gate, X, W, threshold=0.5, mask=torch.ones(4, 5)),
        "cpp",
        "kernel",
        "masked pooling runs as a masked mean in PyTorch, then the gate's kernel",
    ),
    (
        lambda: ops.explain(ops.scatter_rows, torch.zeros(2, 4).T, LOGITS, INDEX),
        "reference",
        "definition",
        "a tensor is not contiguous",
    ),
    (
        lambda: ops.explain(ops.scatter_rows, torch.zeros(4, 2), LOGITS.half(), INDEX),
        "reference",
        "definition",
        "rows are torch.float16 and output is torch.float32",
    ),
    (
        lambda: ops.explain(ops.consistent_exit_loss, [LOGITS[:0]], [LOGITS[:0]], LABELS[:0]),
        "reference",
        "definition",
        "there are no rows",
    ),
    (
        lambda: ops.explain(padded_gate, LOGITS, W, INDEX[0], INDEX[0], score="margin"),
        "reference",
        "definition",
        "backend 'cpp' has no kernel for it",
    ),
]


@pytest.mark.parametrize(("explain", "backend", "way", "reason"), REASONS)
def test_what_is_not_the_fastest_has_a_reason(
    explain: Callable[[], ops.Choice], backend: str, way: str, reason: str
) -> None:
    choice = explain()
    assert (choice.backend, way in choice.way) == (backend if kernels() else "reference", True)
    assert re.search(reason, str(choice)), choice


def test_autocast_is_a_reason() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast is on" in str(ops.explain(ops.exit_gate, X, W, threshold=0.5))


@kernels_only
def test_the_answer_is_what_runs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call goes to the code that explain names."""
    launched: list[str] = []
    from cet.ops.compact import COMPACT, SCATTER_ROWS
    from cet.ops.consistent_exit_loss import LOSS
    from cet.ops.exit_gate import EXIT_GATE, GATE
    from cet.ops.exit_step import EXIT_STEP

    for operation in (COMPACT, SCATTER_ROWS, LOSS, EXIT_GATE, GATE, EXIT_STEP):
        for name, run in operation.run.items():

            def noted(*args: Any, name: str = name, run: Any = run, **kwargs: Any) -> Any:
                launched.append(name)
                return run(*args, **kwargs)

            monkeypatch.setitem(operation.run, name, noted)
    for chosen in ("cpp", "reference", None):
        for op, args, kwargs in copy.deepcopy(CALLS).values():
            launched.clear()
            with ops.use_backend(chosen):  # type: ignore[arg-type]
                expected = ops.explain(op, *args, **kwargs).backend
                op(*args, **kwargs)
            assert set(launched) == {expected}


@kernels_only
def test_a_chosen_backend_that_cannot_run_raises_from_explain_too(backend: str) -> None:
    with pytest.raises(ValueError, match=r"^gate: backend 'cpp' cannot take a torch.float64"):
        ops.explain(ops.gate, LOGITS.double(), threshold=0.5)
    with pytest.raises(ValueError, match=r"^padded_gate: backend 'cpp' has no kernel for it; use use_backend"):
        padded_gate(LOGITS, W, INDEX[0], INDEX[0], score="margin")


@pytest.mark.parametrize(
    ("has_triton", "capability", "launch", "reason"),
    [
        (False, (9, 0), lambda *_: None, "the package triton is not installed"),
        (True, (7, 5), lambda *_: None, "is older than compute capability 8.0"),
        (True, (9, 0), lambda *_: [][0], r"cannot be launched on cuda:0 \(IndexError: list index out of range\)"),
        (True, (8, 0), lambda *_: None, None),
    ],
)
def test_graphs_prefer_triton_where_it_works(
    monkeypatch: pytest.MonkeyPatch, has_triton: bool, capability: tuple[int, int], launch: Any, reason: str | None
) -> None:
    monkeypatch.setattr("cet.ops.backend.has_triton", lambda: has_triton)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("cet.ops.backend._launch_on", launch)
    _why_no_triton.cache_clear()
    try:
        cuda = torch.device("cuda", 0)
        warned = pytest.warns(RuntimeWarning, match=reason) if "launched" in (reason or "") else nullcontext()
        with warned, preferring_triton(cuda):
            assert ops.explain(ops.gate, LOGITS, threshold=0.5).backend == ("cpp" if reason else "triton")
            # What it cannot take does not run on it, and nothing raises: nobody has chosen it.
            assert ops.explain(ops.gate, LOGITS.double(), threshold=0.5).backend == "reference"
            with ops.use_backend("reference"):
                assert ops.explain(ops.gate, LOGITS, threshold=0.5).backend == "reference"
        assert reason is None or re.search(reason, str(why_no_triton(cuda)))
        assert ops.explain(ops.gate, LOGITS, threshold=0.5).backend == "cpp"
    finally:
        _why_no_triton.cache_clear()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError("Triton Error [CUDA]: out of memory")])
def test_a_lack_of_memory_is_not_kept_as_a_reason(monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    def fails(device: torch.device) -> None:
        raise error

    monkeypatch.setattr("cet.ops.backend.has_triton", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    _why_no_triton.cache_clear()
    try:
        cuda = torch.device("cuda", 0)
        monkeypatch.setattr("cet.ops.backend._launch_on", fails)
        assert "has no memory left" in str(why_no_triton(cuda))
        monkeypatch.setattr("cet.ops.backend._launch_on", lambda device: None)
        assert why_no_triton(cuda) is None
    finally:
        _why_no_triton.cache_clear()


def test_an_error_of_earlier_work_says_nothing_about_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(device: torch.device) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    monkeypatch.setattr("cet.ops.backend.has_triton", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("cet.ops.backend._launch_on", fails)
    _why_no_triton.cache_clear()
    with pytest.raises(torch.AcceleratorError):
        why_no_triton(torch.device("cuda", 0))


def test_explain_refuses_what_is_no_operation() -> None:
    with pytest.raises(TypeError, match=r"explain: .* is no operation; give a function of cet.ops"):
        ops.explain(torch.relu, X)
    with pytest.raises(TypeError, match="missing a required argument: 'threshold'"):
        ops.explain(ops.gate, LOGITS)
    with pytest.raises(ValueError, match=r"^gate: threshold is NaN"):
        ops.explain(ops.gate, LOGITS, threshold=math.nan)


def test_explainers_take_what_their_operations_take() -> None:
    from cet.ops.registration import _explained

    # The pages of the documentation define an operation of their own.
    own = {op: explainer for op, explainer in _explained.items() if op.__module__.startswith("cet.")}
    assert {op.__name__ for op in own} == CALLS.keys() | {
        padded_gate.__name__,
        padded_exit_step.__name__,
        gather_and_scatter_rows.__name__,
    }
    for op, explainer in own.items():
        given = inspect.signature(explainer).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in given.values()):
            assert given.keys() == inspect.signature(op).parameters.keys()


def test_the_log_tells_what_does_not_take_the_fastest_kernel(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="cet.ops"):
        ops.gate(LOGITS.double(), threshold=0.5)
    (message,) = caplog.messages
    assert message.startswith("gate runs on reference, definition: backend 'cpp' ")


@kernels_only
def test_the_rooms_agree_on_numbers(backend: str) -> None:
    from cet import _C
    from cet.kernels import consistent_exit_loss as triton_loss

    assert tuple(_C.scores()) == SCORE_NAMES == tuple(SCORES)
    assert _C.UNLABELLED == UNLABELLED == triton_loss._UNLABELLED.value
    assert _C.HALF_GRADIENT_SCALE == HALF_GRADIENT_SCALE == triton_loss._HALF_GRADIENT_SCALE.value


@kernels_only
def test_stubs_name_the_arguments_of_the_compiled_modules(backend: str) -> None:
    from cet import _C

    (stub,) = [
        node
        for node in ast.parse((ROOT / "src/cet/_C.pyi").read_text()).body
        if isinstance(node, ast.ClassDef) and node.name == "Kernels"
    ]
    methods = {m.name: [a.arg for a in m.args.args] for m in stub.body if isinstance(m, ast.FunctionDef)}
    assert methods.pop("capability") == ["self"]
    for name, arguments in methods.items():
        documented = getattr(_C.Kernels, name).__doc__.partition("\n")[0]
        assert re.findall(r"(\w+): ", documented) == arguments


def test_kernels_import_nothing_above_them() -> None:
    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not str(node.module).startswith("cet.") or str(node.module).startswith("cet.kernels"), file


@pytest.mark.parametrize("how", ["gradient", "large weight"])
def test_two_steps_run_on_the_backend_that_is_told(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cet.ops.compact import COMPACT
    from cet.ops.exit_gate import GATE

    x, w = (X, GRAD) if how == "gradient" else LARGE
    launched: set[str] = set()
    for operation in (COMPACT, GATE):
        for name, run in operation.run.items():
            monkeypatch.setitem(
                operation.run, name, lambda *a, name=name, run=run, **k: (launched.add(name), run(*a, **k))[1]
            )
    choice = ops.explain(ops.exit_step, x, w, None, [x], threshold=0.5)
    ops.exit_step(x, w, None, [x], threshold=0.5)
    assert launched - {"definition"} <= {choice.backend}


@kernels_only
@pytest.mark.parametrize("number", [-1, len(SCORE_NAMES), 1000])
def test_kernels_refuse_a_score_that_they_do_not_know(backend: str, number: int) -> None:
    scores, flags = torch.empty(4), torch.empty(4, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"know no score of number {number}; build them again"):
        kernels().gate(  # type: ignore[union-attr]
            LOGITS.data_ptr(), 0, (4, 2), (2, 1), number, 0.5, 1.0, scores.data_ptr(), flags.data_ptr(), 1
        )


def test_the_command_line_offers_every_score() -> None:
    from cet.cli.calibrate import command

    (option,) = (parameter for parameter in command.params if parameter.name == "score")
    assert tuple(option.type.choices) == POLICY_SCORES  # type: ignore[attr-defined]
