"""What do the loss of all exits and its gradients cost?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, check_close
from benchmarks.operations import Benchmark, Measured, Point, geometric_mean, speedups
from cet import ops

EXITS, ROWS = 4, 256
POINTS = [
    {"classes": classes, "dtype": dtype, "target": target}
    for dtype in ("float32", "bfloat16")
    for target in ("soft", "hard")
    for classes in (7, 100, 1000, 32000)
]

Result = tuple[Tensor, ...]


def set_up(point: Point) -> Case:
    dtype = getattr(torch, point["dtype"])
    logits = [torch.randn(ROWS, point["classes"]).to(dtype).requires_grad_() for _ in range(2 * EXITS)]
    labels = torch.randint(0, point["classes"], (ROWS,))

    def forward_and_backward(*logits: Tensor) -> Result:
        losses = ops.consistent_exit_loss(logits[:EXITS], logits[EXITS:], labels, target=point["target"])
        return losses.loss.detach(), *torch.autograd.grad(losses.loss, logits)

    def eager(*logits: Tensor) -> Result:
        with ops.use_backend("reference"):
            return forward_and_backward(*logits)

    def loss_alone(*logits: Tensor) -> Tensor:
        return ops.consistent_exit_loss(logits[:EXITS], logits[EXITS:], labels, target=point["target"]).loss

    compiled_loss = torch.compile(loss_alone, fullgraph=True, dynamic=False)

    def compiled(*logits: Tensor) -> Result:
        with ops.use_backend("reference"):
            loss = compiled_loss(*logits)
        return loss.detach(), *torch.autograd.grad(loss, logits)

    providers: dict[str, Callable[..., Any]] = {"cet": forward_and_backward, "eager": eager, "compiled": compiled}

    def check(results: Mapping[str, Any]) -> None:
        for name in results.keys() & {"cet", "compiled"}:
            for got, expected in zip(results[name], results["eager"], strict=True):
                check_close(name, got.float(), expected.float(), 1e-4 if dtype is torch.float32 else 1e-2)

    return Case(tuple(logits), providers, check)


def verdicts(measured: Measured) -> dict[str, Any]:
    over_eager = speedups(measured, ["eager"])
    return {
        "speedup_over_eager_geometric_mean": geometric_mean(over_eager),
        "speedup_over_eager_least": min(over_eager, default=None),
        "speedup_over_compiled_least": min(speedups(measured, ["compiled"]), default=None),
    }


RATIOS = [("eager", "cet"), ("compiled", "cet")]
main = Benchmark("consistent_exit_loss", POINTS, set_up, RATIOS, verdicts).command()

if __name__ == "__main__":
    main()
