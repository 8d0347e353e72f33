"""The first minute on a GPU: many short checks in one process, one JSON line per check, written as it happens.

A check that fails keeps no other from running; what it raises is in its line. One that does not end, as where programs
wait for each other for ever, is noted after ``--limit`` seconds, and a new process goes on behind it. ``python -m
benchmarks.smoke FILE cuda`` runs all, more arguments choose checks by how their names begin. On ``cpu`` the CPU stands
for the GPU (:mod:`benchmarks.rehearsal`) and Triton interprets: that rehearses this file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

ON_GPU = sys.argv[2:3] != ["cpu"] if __name__ == "__main__" else False
if not ON_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import torch
from torch import Tensor, nn

import cet
from cet import ops
from cet.ops.consistent_exit_loss import LossConfig
from cet.ops.exit_step import exit_step
from cet.ops.padded import Answers, PaddedExit, padded_exit_step
from cet.runtime import cuda_graphs
from cet.runtime.cuda_graphs import CudaGraphs

DEVICE = "cuda" if ON_GPU else "cpu"
Check = Callable[[], dict[str, Any]]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Run it with the others, in the order of this file: what tells most per second comes first."""
    CHECKS[function.__name__] = function
    return function


def enough(on_gpu: int, rehearsed: int) -> int:
    return on_gpu if ON_GPU else rehearsed


def synchronize() -> None:
    torch.cuda.synchronize()


@check
def machine() -> dict[str, Any]:
    """What this is, and whether the two ways that all else relies on work at all."""
    import triton

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}
    if ON_GPU:
        from benchmarks import gpu

        found |= {"name": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
        found |= {"no_switch": cuda_graphs.why_no_switch(), **gpu.state(torch.device("cuda", 0))}
    x = torch.randn(64, 8, 32, device=DEVICE)
    exit_step(x, torch.randn(3, 8, device=DEVICE), None, [x], threshold=0.5)
    return {"ok": True, **found}


@check
def every_way() -> dict[str, Any]:
    """The gate by each way through the kernels and each dtype, against float64."""
    shapes = [
        ((5, 20, 11), 5, "channels_first"),
        ((3, 40, 450), 5, "channels_first"),
        ((40, 70), 128, "channels_first"),
    ]
    if ON_GPU:
        shapes += [((3000, 64, 16), 7, "channels_first")]  # several rows a program
        shapes += [((300, 64, 48), 12, "channels_first"), ((9, 50, 96), 30, "channels_last")]
        shapes += [((33, 64), 1000, "channels_first"), ((2, 128), 32000, "channels_first")]
    worst: dict[str, tuple[float, float]] = {}
    for shape, classes, layout in shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(shape, device=DEVICE).to(dtype)
            channels = shape[-1 if layout == "channels_last" else 1]
            weight = (torch.randn(classes, channels, device=DEVICE) / channels**0.5).to(dtype)
            logits, scores, _ = ops.exit_gate(x, weight, layout=layout, threshold=0.0)
            pooled = x.double() if x.ndim == 2 else x.double().mean(2 if layout == "channels_first" else 1)
            truth = pooled @ weight.double().T
            entropy = torch.special.entr(logits.double().softmax(1)).sum(1)
            error = float((logits.double() - truth).norm() / truth.norm()), float((scores - entropy).abs().max())
            worst[f"{shape} {classes} {dtype}"] = error
    wrong = {k: e for k, e in worst.items() if not (e[0] < (1e-5 if "float32" in k else 1e-2) and e[1] < 1e-4)}
    return {"ok": not wrong, "wrong": wrong, "worst": max(worst.items(), key=lambda item: item[1])}


@check
def loss_and_gradients() -> dict[str, Any]:
    """Against the definition; in float16 with the loss scale that training begins with."""
    errors: dict[str, float] = {}
    for classes in (7, 1000, 5000) if ON_GPU else (7,):
        for dtype, scale in ((torch.float32, 3.0), (torch.bfloat16, 3.0), (torch.float16, 65536.0)):
            rows = enough(64, 4)
            logits = [torch.randn(rows, classes, device=DEVICE).to(dtype).requires_grad_() for _ in range(6)]
            labels = torch.randint(0, classes, (rows,), device=DEVICE)

            def gradients(logits: list[Tensor] = logits, labels: Tensor = labels, scale: float = scale) -> Any:
                loss = ops.consistent_exit_loss(logits[:3], logits[3:], labels).loss
                return torch.autograd.grad(scale * loss, logits)

            got = gradients()
            with ops.use_backend("reference"):
                want = gradients()
            pairs = zip(got, want, strict=True)
            errors[f"{classes} {dtype}"] = max(
                float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs
            )
    return {"ok": all(error < 1e-2 for error in errors.values()), "errors": errors}


@check
def counts_are_fresh() -> dict[str, Any]:
    """The host must never read the number of survivors of an earlier replay, however late the graph is."""
    backend = CudaGraphs(torch.device(DEVICE, 0) if ON_GPU else torch.device("cpu"), 1)
    source, slow = (
        torch.zeros((), dtype=torch.int32, device=DEVICE),
        torch.randn(enough(4096, 8), enough(4096, 8), device=DEVICE),
    )

    def body() -> None:
        product = slow
        for _ in range(4):
            product = product @ slow
        with backend.sending(0, source):
            pass

    graph = backend.capture(body)
    graph.instantiate()
    stale = 0
    for i in range(1, enough(500, 5)):
        source.fill_(i)
        with backend.in_order():
            graph.replay()
            stale += backend.receive_count(0) != i
    return {"ok": stale == 0, "stale": stale}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 32, 3), nn.ReLU())
        self.block = nn.Sequential(nn.Conv1d(32, 32, 3), nn.ReLU())
        self.classifier = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.block(self.stem(x)).mean(2))


def runner(name: str, backend: ops.backend.Backend | None) -> dict[str, Any]:
    """A runner against the eager one, row by row, and what a call costs."""
    torch.manual_seed(0)
    model = cet.EarlyExit(Net(), ["stem", "block"], (torch.randn(2, 3, 64),)).eval().to(DEVICE)
    rows = enough(64, 4)
    x = torch.randn(rows, 3, 64, device=DEVICE)
    scores = ops.exit_score(model.exit_logits(x)[0]).sort().values
    model.policy = cet.ExitPolicy("entropy", tuple(scores[[rows // 3, rows // 2]].tolist()))
    want = model.predict(x)
    model.runner = name  # type: ignore[assignment]
    with ops.use_backend(backend), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = [model.predict(x) for _ in range(2)][-1]
        same = int((got.exit_index == want.exit_index).sum())
        captures = model.captures
        synchronize()
        start = time.perf_counter()
        calls = enough(50, 1)
        for _ in range(calls):
            model.predict(x)
        synchronize()
        microseconds = (time.perf_counter() - start) / calls * 1e6
    is_captured = bool(captures) and not captures[0].eager and captures[0].runner == name
    return {
        "ok": same >= rows - 2 and is_captured,  # whose score is within rounding of the threshold
        "same": same,
        "us_per_call": round(microseconds, 1),
        "captures": str(captures)[:300],
        "warnings": [str(each.message)[:200] for each in caught][:2],
    }


for _name in ("graphs", "device"):
    for _backend in (None, "triton"):
        CHECKS[f"runner_{_name}_{_backend}"] = partial(runner, _name, _backend)


class Step:
    """The padded exit step of some features on static memory; nobody waits for it."""

    def __init__(self, shape: tuple[int, ...], classes: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        rows, channels = shape[:2]
        self.x = torch.randn(shape, device=DEVICE).to(dtype)
        self.y = torch.empty_like(self.x)
        self.weight = torch.randn(classes, channels, device=DEVICE).to(dtype) / channels**0.5
        self.decision = torch.ones(2, device=DEVICE)
        numbers = torch.tensor([rows, 0], dtype=torch.int32, device=DEVICE)
        self.num_kept = numbers[1]
        self._at = PaddedExit(
            self.decision,
            torch.zeros((), dtype=torch.int64, device=DEVICE),
            numbers[0],
            self.num_kept,
            torch.arange(rows, dtype=torch.int32, device=DEVICE),
            torch.zeros(2 + 2 * rows, dtype=torch.int64, device=DEVICE),
        )
        self._answers = Answers(
            self.x.new_empty(rows, classes),
            torch.zeros(rows, device=DEVICE),
            torch.zeros(rows, dtype=torch.int64, device=DEVICE),
        )

    def __call__(self) -> None:
        kept, where = [(self.x, self.y)], {"layout": "channels_first", "pool": "mean", "score": "entropy"}
        padded_exit_step(self.x, self.weight, None, self._at, kept, self._answers, **where)


@check
def rows_move() -> dict[str, Any]:
    """Steps on padded and whole batches, and rows moved alone, more tensors than a launch takes: as the reference."""
    wrong: list[str] = []
    several, shared, by_product = (enough(3000, 9), 16, 24), (enough(9, 2), 64, enough(4096, 192)), (40, 8, 3)
    for shape, classes in ((several, 7), (shared, 7), (by_product, 100)):

        def moved(shape: tuple[int, ...] = shape, classes: int = classes) -> list[Tensor]:
            step = Step(shape, classes)
            ascending = ops.exit_gate(step.x, step.weight, threshold=0.0)[1].sort().values
            threshold = float(ascending[len(ascending) // 2 - 1 :][:2].mean())
            step.decision[0] = threshold
            step()
            others = [step.x.flatten(1)[:, : i + 1].contiguous() for i in range(10)]
            exit_mask = ops.exit_gate(step.x, step.weight, threshold=threshold)[2]
            together = exit_step(step.x, step.weight, None, [step.x, *others], threshold=threshold)[2]
            alone = ops.compact(exit_mask, others)
            output = torch.zeros_like(others[9])
            ops.scatter_rows(output, others[9], exit_mask.nonzero()[:, 0])
            return [step.y[: int(step.num_kept)], *together.tensors, *alone.tensors, output]

        got = moved()
        with ops.use_backend("reference"):
            want = moved()
        wrong += [f"{shape}: {i}" for i, (a, b) in enumerate(zip(got, want, strict=True)) if not torch.equal(a, b)]
    return {"ok": not wrong, "wrong": wrong}


@check
def places_under_load() -> dict[str, Any]:
    """Who goes where, found by programs that look back at each other: many rows, launches on two streams at once."""
    bad, launches = 0, enough(600, 2)
    for shape in (
        (enough(3000, 24), 64, 16),
        (enough(300, 2), 64, enough(4096, 192)),
    ):  # one, and several programs a row
        steps = [Step(shape, 7) for _ in range(2)]
        scores = ops.exit_gate(steps[0].x, steps[0].weight, threshold=0.0)[1]
        ascending = scores.sort().values
        streams = [torch.cuda.Stream() for _ in steps]
        wrong = torch.zeros(2, dtype=torch.int64, device=DEVICE)
        synchronize()
        for launch in range(launches):
            step, stream = steps[launch % 2], streams[launch % 2]
            with torch.cuda.stream(stream):
                threshold = ascending[launch * 37 % len(ascending)]
                step.decision[0] = threshold
                step()
                want = (scores <= threshold).long().argsort(stable=True)
                num_kept = (scores > threshold).sum()
                is_kept = torch.arange(len(scores), device=DEVICE) < num_kept
                is_wrong = (step.y[:, 0, 0] != step.x[want, 0, 0]) & is_kept
                wrong[launch % 2] += is_wrong.any() | (step.num_kept != num_kept)
        synchronize()
        bad += int(wrong.sum())
    return {"ok": bad == 0, "bad": bad, "launches": 2 * launches}


POINTS = (
    (1, 128, 32, 7),
    (32, 128, 32, 7),
    (4096, 128, 32, 7),
    (4096, 64, 128, 12),
    (256, 256, 784, 100),
    (256, 768, 196, 1000),
)


def against_copy(step: Callable[[], Any], copy: Callable[[], Any], moved: int, share: float) -> dict[str, Any]:
    """The graphed step on static input against a copy of ``moved`` bytes, of whose traffic it needs ``share``; caches
    cold."""
    from benchmarks import gpu
    from cet.measure.timers import cuda_events

    replays = gpu.graphed(step), gpu.graphed(copy)
    flush = torch.empty(enough(128 << 20, 8), dtype=torch.uint8, device=DEVICE)
    times: list[list[float]] = [[], []]
    for _ in range(enough(15, 1)):
        for replay, of in zip(replays, times, strict=True):
            flush.fill_(1)
            of.append(cuda_events(replay, 1))
    step_s, copy_s = (sorted(of)[len(of) // 2] for of in times)
    return {
        "ok": True,
        "step_us": round(1e6 * step_s, 1),
        "copy_us": round(1e6 * copy_s, 1),
        "of_copy_bandwidth": round(share * copy_s / step_s, 3) if step_s else None,
        "megabytes": round(moved / 1e6, 1),
    }


def exit_step_bandwidth(rows: int, channels: int, positions: int, classes: int, dtype: torch.dtype) -> dict[str, Any]:
    """Half of the rows leave, so that half of the features are written."""
    step = Step((rows, channels, positions), classes, dtype)
    step.decision[0] = ops.exit_gate(step.x, step.weight, threshold=0.0)[1].sort().values[rows // 2]
    return against_copy(step, lambda: step.y.copy_(step.x), step.x.nbytes, 0.75)


def loss_bandwidth(rows: int, classes: int, dtype: torch.dtype) -> dict[str, Any]:
    """The loss of four exits with its gradients, which are as large as the logits."""
    from cet.kernels.consistent_exit_loss import losses_and_gradients

    logits = [torch.randn(rows, classes, device=DEVICE).to(dtype) for _ in range(8)]
    labels = torch.randint(0, classes, (rows,), device=DEVICE)
    copies, config = [torch.empty_like(x) for x in logits], LossConfig(1.0, 1.0, "soft", "mean", 0.0, (0.25,) * 4)

    def step() -> None:
        losses_and_gradients(logits, labels, config, [True] * 8)

    def copy() -> None:
        for to, x in zip(copies, logits, strict=True):
            to.copy_(x)

    return against_copy(step, copy, 8 * logits[0].nbytes, 1.0)


for _dtype in (torch.float32, torch.bfloat16):
    for _shape in POINTS if ON_GPU else POINTS[:1]:
        _name = f"bandwidth_{'_'.join(map(str, _shape))}_{str(_dtype)[6:]}"
        CHECKS[_name] = partial(exit_step_bandwidth, *_shape, _dtype)
    _rows, _classes = enough(8192, 4), enough(1000, 10)
    CHECKS[f"bandwidth_loss_{_rows}_{_classes}_{str(_dtype)[6:]}"] = partial(loss_bandwidth, _rows, _classes, _dtype)


class Watch:
    """Notes a check that does not end, and puts a process that goes on behind it in the place of this one: nothing else
    would end what waits for a device."""

    def __init__(self, file: Path, limit: float, onward: list[str]) -> None:
        self._file, self._limit, self._onward = file, limit, onward

    @contextmanager
    def over(self, name: str) -> Iterator[None]:
        timer = threading.Timer(self._limit, self._give_up, [name])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _give_up(self, name: str) -> None:
        error = f"no end after {self._limit:g} s"
        line = {"check": name, "seconds": self._limit, "device": DEVICE, "ok": False, "error": error}
        with self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(name, f"FAILED {error}", flush=True)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.smoke", *self._onward, "--after", name])


def main(path: Path, wanted: list[str], limit: float, after: str | None, onward: list[str]) -> int:
    """Run the checks whose names begin so, or all; 1 if one failed, 3 if the GPU did not survive it."""
    failed = int(after is not None)
    names = [name for name in CHECKS if not wanted or name.startswith(tuple(wanted))]
    watch = Watch(path, limit, onward)
    ops.use_backend("triton")
    with path.open("a") as file:
        for name in names[names.index(after) + 1 if after in names else 0 :]:
            start = time.perf_counter()
            torch.manual_seed(0)
            try:
                with watch.over(name):
                    result = CHECKS[name]()
            except Exception as error:
                result = {"ok": False, "error": f"{type(error).__name__}: {error}"[:500]}
                result["trace"] = traceback.format_exc()[-2000:]
            line = {"check": name, "seconds": round(time.perf_counter() - start, 2), "device": DEVICE, **result}
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(name, "ok" if result["ok"] else f"FAILED {result.get('error', result)}"[:200], flush=True)
            failed += not result["ok"]
            if ON_GPU and not result["ok"]:
                try:
                    synchronize()
                except RuntimeError as error:  # nothing works after it
                    file.write(json.dumps({"check": "device lost", "ok": False, "error": str(error)[:500]}) + "\n")
                    return 3
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.smoke", description=__doc__)
    parser.add_argument("file", type=Path, help="that lines are added to")
    parser.add_argument("device", choices=["cuda", "cpu"])
    parser.add_argument("checks", nargs="*", help="how their names begin")
    parser.add_argument("--limit", type=float, default=25, help="seconds for a check")
    parser.add_argument("--after", choices=CHECKS, help="begin behind this one, which had no end")
    given = parser.parse_args()
    if ON_GPU and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; rehearse with cpu")
    rehearsed: Any = nullcontext()
    if not ON_GPU:
        from benchmarks.rehearsal import rehearsing

        rehearsed = rehearsing()
    onward = [str(given.file), given.device, *given.checks, "--limit", str(given.limit)]
    with rehearsed:
        sys.exit(main(given.file, given.checks, given.limit, given.after, onward))
