"""What does compaction cost, by the fraction of rows that leave and the size of a row?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu
from benchmarks.harness import Case, WrongResultError
from benchmarks.operations import Benchmark, Measured, Point, geometric_mean, speedups
from cet import ops
from cet.ops.padded import gather_and_scatter_rows

POINTS = [
    {"rows": rows, "row_bytes": row_bytes, "leaving": leaving}
    for rows, row_bytes in ((32, 4096), (1024, 64), (1024, 32768), (4096, 32768))
    for leaving in (0.1, 0.5, 0.9)
]


def set_up(point: Point) -> Case:
    rows = point["rows"]
    exit_mask = torch.rand(rows) < point["leaving"]
    tensors = [torch.randn(rows, point["row_bytes"] // 4), torch.rand(rows, 8) < 0.5, torch.arange(rows)]

    def cet_compact(exit_mask: Tensor, *tensors: Tensor) -> list[Tensor]:
        return ops.compact(exit_mask, tensors).tensors

    def index_select(exit_mask: Tensor, *tensors: Tensor) -> list[Tensor]:
        kept = (~exit_mask).nonzero().squeeze(1)
        return [tensor.index_select(0, kept) for tensor in tensors]

    def boolean_mask(exit_mask: Tensor, *tensors: Tensor) -> list[Tensor]:
        is_kept = ~exit_mask
        return [tensor[is_kept] for tensor in tensors]

    target = torch.empty_like(tensors[0])
    order = torch.stack([(~exit_mask), exit_mask]).int().argsort(dim=1, descending=True, stable=True).int()
    positions = torch.arange(rows, dtype=torch.int32)
    num_kept, count = torch.tensor([int((~exit_mask).sum()), rows], dtype=torch.int32)

    def padded(_exit_mask: Tensor, *tensors: Tensor) -> list[Tensor]:
        """The move of the graph runners, whose counts are on the device."""
        moved = [torch.empty_like(tensor) for tensor in tensors]
        gather_and_scatter_rows(order, positions, num_kept, count, list(zip(tensors, moved, strict=True)), [])
        return moved

    providers: dict[str, Callable[..., Any]] = {
        "cet": cet_compact,
        "index_select": index_select,
        "boolean_mask": boolean_mask,
        "copy": lambda _exit_mask, x, *_others: target.copy_(x),
    }
    if exit_mask.is_cuda:
        providers |= {"padded": padded, "graphed": gpu.graphed(padded, exit_mask, *tensors)}

    def check(results: Mapping[str, Any]) -> None:
        is_kept = ~exit_mask
        for name in results.keys() - {"copy"}:
            pairs = zip(results[name], tensors, strict=True)
            if not all(torch.equal(got[: int(num_kept)], x[is_kept]) for got, x in pairs):
                raise WrongResultError(f"{name} moves other rows than the kept ones")

    return Case((exit_mask, *tensors), providers, check)


def verdicts(measured: Measured) -> dict[str, Any]:
    found = speedups(measured, ["index_select", "boolean_mask"])
    return {"speedup_geometric_mean": geometric_mean(found), "speedup_least": min(found, default=None)}


RATIOS = [
    ("index_select", "cet"),
    ("boolean_mask", "cet"),
    ("copy", "cet"),
    ("boolean_mask", "graphed"),
    ("copy", "graphed"),
]
main = Benchmark("compact", POINTS, set_up, RATIOS, verdicts).command()

if __name__ == "__main__":
    with torch.inference_mode():
        main()
