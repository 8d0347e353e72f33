"""What does an exit step cost, gate and compaction with half of the rows leaving, and how far is it from the floor?

The floor is what copying would take of the bytes that must move: features read once, kept_rows written once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import cet
from benchmarks import gpu
from benchmarks.harness import Case, WrongResultError, check_close
from benchmarks.operations import Benchmark, Measured, Point, geometric_mean, speedups
from cet import ops
from cet.ops.padded import Answers, PaddedExit, padded_exit_step

GRID = (
    (1, 128, 32, 7),
    (32, 128, 32, 7),
    (1024, 128, 64, 7),
    (4096, 64, 128, 12),
    (256, 256, 784, 100),
    (256, 768, 196, 1000),
)
POINTS = [
    {"rows": b, "channels": c, "positions": n, "classes": k, "dtype": dtype, "layout": layout}
    for dtype in ("float32", "bfloat16")
    for b, c, n, k in GRID
    for layout in (["channels_last"] if c == 768 else ["channels_first"])
]

Step = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


def set_up(point: Point) -> Case:
    dtype = getattr(torch, point["dtype"])
    shape = [point["rows"], point["channels"], point["positions"]]
    if point["layout"] == "channels_last":
        shape = [shape[0], shape[2], shape[1]]
    x = torch.randn(shape).to(dtype)
    head = cet.ExitHead(point["channels"], point["classes"], layout=point["layout"]).to(dtype).requires_grad_(False)
    switches: dict[str, Any] = {"layout": point["layout"], "pool": "mean", "score": "entropy"}
    with ops.use_backend("reference"):
        scores = ops.exit_score(head(x)).sort().values
    half = len(scores) // 2
    switches["threshold"] = float(scores[half - 1 : half + 1].mean()) if half else float(scores[0]) - 1
    weight, bias = head.linear.weight, head.linear.bias

    def cet_step(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, scores, (kept, _, moved) = ops.exit_step(x, weight, bias, [x], **switches)
        return logits, scores, kept, moved[0]

    def eager(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits = head(x)
        log_p = logits.float().log_softmax(dim=1)
        scores = -(log_p.exp() * log_p).sum(dim=1)
        kept = (scores > switches["threshold"]).nonzero().squeeze(1)
        return logits, scores, kept, x.index_select(0, kept)

    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    target = torch.empty_like(x)
    rows = len(x)
    count, num_kept = torch.tensor([rows, 0], dtype=torch.int32)
    positions, state = torch.arange(rows, dtype=torch.int32), torch.zeros(2 + 2 * rows, dtype=torch.int64)
    decision = torch.tensor([switches["threshold"], 1.0])
    at = PaddedExit(decision, torch.tensor(0), count, num_kept, positions, state)
    answers = Answers(x.new_empty(rows, point["classes"]), torch.empty(rows), torch.empty(rows, dtype=torch.int64))
    gate: dict[str, Any] = {name: switches[name] for name in ("layout", "pool", "score")}

    def padded(x: Tensor) -> Tensor:
        """The step of the graph runners: nothing in it waits for the device. It answers the rows that leave."""
        kept_rows = torch.empty_like(x)
        padded_exit_step(x, weight, bias, at, [(x, kept_rows)], answers, **gate)
        return kept_rows

    providers: dict[str, Callable[..., Any]] = {
        "cet": cet_step,
        "eager": eager,
        "compiled": torch.compile(eager, fullgraph=True, dynamic=False),
        "copy": lambda x: target.copy_(x),
    }
    if x.is_cuda:
        providers |= {"padded": padded, "graphed": gpu.graphed(padded, x)}

    def check(results: Mapping[str, Any]) -> None:
        truth = copy.deepcopy(head).double()(x.double()).to(dtype).float()  # graphs hold the storage of the weights
        tolerance = 1e-4 if dtype is torch.float32 else 3e-2
        for name in results.keys() & {"cet", "eager", "compiled"}:
            logits, _, kept, moved = results[name]
            check_close(name, logits.float(), truth, tolerance)
            if not torch.equal(moved, x[kept]):
                raise WrongResultError(f"{name} moves other rows than the kept ones")
        if "padded" in results:
            kept = results["cet"][2]
            leaves = torch.ones(rows, dtype=torch.bool, device=x.device).index_fill(0, kept, False)
            for name in ("padded", "graphed"):
                if int(num_kept) != len(kept) or not torch.equal(results[name][: len(kept)], x[kept]):
                    raise WrongResultError(f"{name} moves other rows than the kept ones")
                check_close(name, answers.logits[leaves].float(), truth[leaves], tolerance)

    return Case((x,), providers, check)


def verdicts(measured: Measured) -> dict[str, Any]:
    """The step against the better of eager and compiled; of the copy's bandwidth; at batch 1. On a GPU the step is the
    one of the graph runners."""
    cet_step = "graphed" if any("graphed" in timings.seconds for _, timings in measured) else "cet"
    found = speedups(measured, ["eager", "compiled"], cet_step)
    large = [(p, t) for p, t in measured if p["rows"] * p["channels"] * p["positions"] >= 1 << 25]
    # A copy reads and writes all; the step reads all and writes half.
    bandwidth = [0.75 * ratio for ratio in speedups(large, ["copy"], cet_step)]
    single = [t.time(cet_step).median * 1e6 for p, t in measured if p["rows"] == 1 and cet_step in t.seconds]
    return {
        "speedup_geometric_mean": geometric_mean(found),
        "speedup_least": min(found, default=None),
        "fraction_of_copy_bandwidth_least": min(bandwidth, default=None),
        "batch_1_us": single,
    }


RATIOS = [("eager", "cet"), ("compiled", "cet"), ("copy", "cet"), ("eager", "graphed"), ("copy", "graphed")]
main = Benchmark("exit_gate", POINTS, set_up, RATIOS, verdicts).command()

if __name__ == "__main__":
    with torch.inference_mode():
        main()
