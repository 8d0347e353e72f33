"""What does an exported file save, against the full model in the same runtime and against PyTorch?

Thresholds are put between the scores of the very rows that are run, as in :mod:`benchmarks.end_to_end`. Every exit is
open, so that whoever goes on has paid for its gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch

import cet
from benchmarks.end_to_end import Fractions, Reference, choose_policy
from benchmarks.harness import Case, WrongResultError, check_close
from benchmarks.models import NETS, multi_exit, random_inputs
from benchmarks.operations import Benchmark, Measured, Point
from cet.deploy.check import NEAR
from cet.deploy.description import OUTPUTS, Description
from cet.deploy.export import describe, in_runtime
from cet.deploy.host_loop import Method, StagesModel
from cet.deploy.onnx import OnnxModel, session_of
from cet.deploy.onnx_writer import OnnxWriter
from cet.deploy.segments import export_segments
from cet.measure.host import installed_version
from cet.partition.stages import logits_of

ONE_ROW: dict[str, Fractions] = {
    "leaves_first": (1.0, 0.0, 0.0),
    "leaves_second": (0.0, 1.0, 0.0),
    "leaves_third": (0.0, 0.0, 1.0),
    "none_leaves": (0.0, 0.0, 0.0),
}
MANY_ROWS: dict[str, Fractions] = {
    "all_at_first": (1.0, 0.0, 0.0),
    "half_at_each": (0.5, 0.5, 0.5),
    "none_leaves": (0.0, 0.0, 0.0),
}
BATCHES = {"sensor_cnn": (1, 32, 256), "vit_tiny": (1, 16), "bert_tiny": (1, 16)}
OTHER_RUNTIMES = {"aoti": "torch", "executorch": "executorch", "litert": "litert-torch"}
"""Formats, measured for one row where their packages are installed, the last two as by ``make edge``."""
POINTS = [
    {"net": net, "batch": batch, "scenario": scenario, "threads": threads}
    for threads in (1, 2)
    for net, batches in BATCHES.items()
    for batch in batches
    for scenario in (ONE_ROW if batch == 1 else MANY_ROWS)
]


class Written(NamedTuple):
    """A net's stages, from which files are written for any policy."""

    writer: OnnxWriter
    description: Description


@cache
def built(net: str) -> cet.EarlyExit:
    made = NETS[net]()
    made.backbone.eval()
    return multi_exit(made, random_inputs(made, 32))


@cache
def written(net: str, batch: int | None) -> Written:
    model = built(net)
    example = random_inputs(NETS[net](), 4)
    stages = export_segments(model, ((example,), {}), (0.0,) * (model.num_exits - 1), batch)
    return Written(OnnxWriter(stages), describe(stages, batch, False, None))


@cache
def in_other_runtime(net: str, format: str, threads: int) -> tuple[StagesModel, Method]:
    """A net's stages for one row in another runtime, whose thresholds can be set; and the net without exits."""
    model = built(net)
    stages = export_segments(
        model, ((random_inputs(NETS[net](), 4),), {}), (0.0,) * (model.num_exits - 1), 1, sizes_vary=False
    )
    _, loaded, full = in_runtime(format, stages, replace(describe(stages, 1, True, None), score="entropy"), threads)
    return loaded, full


def set_up(point: Point) -> Case:
    torch.set_num_threads(point["threads"])
    model = built(point["net"])
    x = random_inputs(NETS[point["net"]](), point["batch"])
    reference = Reference.of(model, x)
    scenarios = ONE_ROW if point["batch"] == 1 else MANY_ROWS
    model.policy, exit_index = choose_policy(reference.scores, scenarios[point["scenario"]])
    expected = reference.logits[exit_index, torch.arange(len(x))]
    sure = torch.ones(len(x), dtype=torch.bool)
    for scores, threshold in zip(reference.scores, model.policy.thresholds, strict=False):
        sure &= threshold is None or (scores - threshold).abs() > NEAR
    array = x.numpy()

    def in_onnx_runtime(batch: int | None) -> dict[str, Any]:
        writer, description = written(point["net"], batch)
        described = replace(description, score="entropy", thresholds=model.policy.thresholds)
        full = session_of(writer.without_exits(described), point["threads"])
        loaded = OnnxModel(session_of(writer.with_exits(described), point["threads"]), "the file")
        feeds = {description.inputs[0].name: array}
        return {
            "cet": partial(loaded.session.run, OUTPUTS, feeds),
            "load_exported": partial(loaded.predict, array),
            "full": partial(full.run, OUTPUTS[:1], feeds),
        }

    one_row = point["batch"] == 1
    calls = in_onnx_runtime(1 if one_row else None)
    if one_row:
        calls["any_rows"] = in_onnx_runtime(None)["cet"]
        for format, package in OTHER_RUNTIMES.items():
            if installed_version(package) is not None:
                stages, whole = in_other_runtime(point["net"], format, point["threads"])
                calls[format] = partial(stages.run, [array], model.policy.thresholds)
                calls[f"{format}_full"] = partial(whole, [array])
    calls["predict"] = partial(model.predict, x)
    calls["backbone"] = lambda: logits_of(model.backbone(x))

    def check(results: Mapping[str, Any]) -> None:
        for name in results.keys() & {"cet", "any_rows", "load_exported", "predict", *OTHER_RUNTIMES}:
            out = results[name]
            logits, taken = out[:2] if isinstance(out, list | tuple) else (out.logits, out.exit_index)
            if strays := int((torch.as_tensor(taken) != exit_index)[sure].sum()):
                raise WrongResultError(f"{name} sends {strays} of {len(x)} rows to another exit than they take alone")
            check_close(name, torch.as_tensor(logits)[sure], expected[sure])
        check_close("full", torch.from_numpy(results["full"][0]), reference.logits[-1])

    return Case((), calls, check)


LIMITS = {
    "leaves_first": {1: 3.0},
    "all_at_first": {32: 4.5, 256: 4.5},
    "half_at_each": {32: 2.2, 256: 2.2},
    "none_leaves": {1: 1 / 1.10, 32: 1 / 1.05, 256: 1 / 1.05},
}
"""How many times as fast as the full model the sensor CNN shall be, by scenario and batch."""


def verdicts(measured: Measured) -> dict[str, Any]:
    """The file against the full model in the same runtime, and whether it is as fast as it shall be."""
    found = {}
    for point, timings in measured:
        wanted = LIMITS.get(point["scenario"], {}).get(point["batch"])
        if point["net"] == "sensor_cnn" and wanted is not None:
            times = timings.ratio("full", "cet").median
            where = " ".join(map(str, point.values()))
            found[where] = {"times_as_fast": times, "wanted": wanted, "met": times >= wanted}
    return found


RATIOS = [
    *((f"{format}_full", format) for format in OTHER_RUNTIMES),
    ("full", "cet"),
    ("full", "any_rows"),
    ("full", "load_exported"),
    ("predict", "cet"),
    ("predict", "full"),
]
main = Benchmark("deploy", POINTS, set_up, RATIOS, verdicts, ("onnxruntime", "onnxscript")).command()

if __name__ == "__main__":
    with torch.no_grad():
        main()
