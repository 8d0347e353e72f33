"""Does a batch with early exits cost no more than the work that its samples need?

For given fractions of samples that leave at each exit, times ``predict`` against the full backbone, against its own
stages run on just the rows that need them (the ideal), and against the plain boolean-mask loop that one would write by
hand. How to run it and how to read what it writes: README.md in this folder.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import click
import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

import cet
from benchmarks import gpu
from benchmarks.harness import NO_TIME, Case, Row, WrongResultError, check_close, failure
from benchmarks.models import NETS, Net, multi_exit, random_inputs
from benchmarks.session import Session, session_options
from cet.measure.rounds import Timings
from cet.measure.statistics import Spread
from cet.measure.timers import keep_freed_memory
from cet.partition.stages import logits_of
from cet.runtime import RunnerName
from cet.runtime.cuda_graphs import why_no_switch

Fractions = tuple[float | None, ...]

SCENARIOS: dict[str, Fractions] = {
    "closed": (None, None, None),
    "half_at_first": (0.5, None, None),
    "half_at_each": (0.5, 0.5, 0.5),
    "all_at_first": (1.0, None, None),
}
"""For each early exit, which of the rows that reach it leave there, rounded down; None: the exit is closed."""

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Point:
    """One net, batch size and scenario: its timings, or a note why there are none."""

    net: str
    batch: int
    scenario: str
    leaving: tuple[int, ...] = ()
    timings: Timings[str] | None = None
    note: str = ""
    absent: Mapping[str, str] = field(default_factory=dict)
    joules: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """What should hold: ``provider`` takes at most ``limit`` times as long as ``baseline`` at all these points."""

    baseline: str
    limit: float
    nets: tuple[str, ...]
    scenarios: tuple[str, ...]
    batches: tuple[int, ...]
    provider: str = "predict"

    def judge(self, points: Sequence[Point]) -> dict[str, Any]:
        """The worst of the points, and whether it keeps the limit; null where none was measured."""
        ratios = {
            (p.net, p.batch, p.scenario): p.timings.ratio(self.provider, self.baseline).median
            for p in points
            if p.timings and {self.provider, self.baseline} <= p.timings.seconds.keys()
            if p.net in self.nets and p.scenario in self.scenarios and p.batch in self.batches
        }
        worst = max(ratios, key=lambda where: ratios[where], default=None)
        return {
            "measure": f"{self.provider}/{self.baseline} <= {self.limit}",
            "nets": self.nets,
            "scenarios": self.scenarios,
            "batches": sorted({batch for _, batch, _ in ratios}),
            "worst": None if worst is None else ratios[worst],
            "worst_at": worst,
            "met": None if worst is None else ratios[worst] <= self.limit,
        }


IMAGE_NETS = ("vit_tiny", "resnet18")
CPU_NETS = ("sensor_cnn", *IMAGE_NETS)

MEASURES = (
    Measure("ideal", 1.05, IMAGE_NETS, tuple(SCENARIOS), tuple(batch for batch in BATCHES if batch >= 32)),
    Measure("backbone", 1.05, IMAGE_NETS, ("closed",), BATCHES),
    Measure("backbone", 1.15, ("sensor_cnn",), ("closed",), (1,)),
)

LARGE_NETS = ("vit_base", "resnet50")
LARGE_BATCHES = tuple(batch for batch in BATCHES if batch >= 64)

GPU_MEASURES = (
    Measure("ideal", 1.11, LARGE_NETS, ("half_at_each",), LARGE_BATCHES, "predict_device"),
    Measure(
        "graphed", 1.03, LARGE_NETS, ("closed",), tuple(batch for batch in BATCHES if batch >= 32), "predict_device"
    ),
    Measure("graphed", 1.00, LARGE_NETS, ("all_at_first",), (1,), "predict_device"),
)


@dataclass(frozen=True)
class Reference:
    """Logits ``(E, B, K)`` and scores ``(E, B)`` of every row at every exit, on the CPU each row run alone."""

    logits: Tensor
    scores: Tensor

    @classmethod
    def of(cls, model: cet.EarlyExit, x: Tensor) -> Reference:
        # On a GPU one by one would take longer than all that is measured: there the tests alone keep rows apart.
        rows = len(x) if x.is_cuda else 1
        logits = torch.cat([torch.stack(model.exit_logits(part)) for part in x.split(rows)], dim=1)
        return cls(logits, torch.stack([cet.ops.exit_score(exit_logits) for exit_logits in logits]))


def choose_policy(scores: Tensor, fractions: Fractions) -> tuple[cet.ExitPolicy, Tensor]:
    """The thresholds that make these fractions of the rows leave, and the exit ``(B,)`` that each row then takes."""
    exit_index = torch.full_like(scores[0], len(fractions), dtype=torch.int64)
    remaining = torch.arange(len(exit_index), device=scores.device)
    thresholds: list[float | None] = []
    for k, fraction in enumerate(fractions):
        if fraction is None:
            thresholds.append(None)
            continue
        leaving = int(fraction * len(remaining))
        ascending, order = scores[k, remaining].sort()
        below, above = torch.nn.functional.pad(ascending, (1, 1), value=torch.inf)[leaving : leaving + 2].tolist()
        thresholds.append(-torch.inf if leaving == 0 else (below + above) / 2)
        exit_index[remaining[order[:leaving]]] = k
        remaining = remaining[order[leaving:]]
    return cet.ExitPolicy("entropy", tuple(thresholds)), exit_index


def boolean_mask(
    stages: Sequence[Callable[[Tensor], Tensor]],
    heads: nn.ModuleList,
    thresholds: Sequence[float | None],
    x: Tensor,
) -> tuple[Tensor, Tensor]:
    """The plain loop: logits ``(B, K)`` and exit ``(B,)`` of each row."""
    logits: Tensor | None = None
    exit_index = torch.full((len(x),), len(heads), device=x.device)
    rows = torch.arange(len(x), device=x.device)
    h = x
    for k, (stage, head, threshold) in enumerate(zip(stages, heads, thresholds, strict=False)):
        h = stage(h)
        if threshold is None:
            continue
        exit_logits = head(h)
        if logits is None:
            logits = exit_logits.new_empty(len(x), exit_logits.shape[1])
        log_p = exit_logits.log_softmax(dim=1)
        leaves = -(log_p.exp() * log_p).sum(dim=1) <= threshold
        logits[rows[leaves]] = exit_logits[leaves]
        exit_index[rows[leaves]] = k
        h, rows = h[~leaves], rows[~leaves]
        if len(rows) == 0:
            return logits, exit_index
    final_logits = stages[-1](h)
    if logits is None:
        return final_logits, exit_index
    logits[rows] = final_logits
    return logits, exit_index


def stage_calls(model: cet.EarlyExit, x: Tensor, exit_index: Tensor) -> list[Callable[[], Any]]:
    """The model's own stages, each on the rows that need it and nothing else, their values already side by side."""
    program = model.stages_for(x)
    sizes = program.input_sizes([x])
    rows = torch.arange(len(x), device=x.device)
    values: Sequence[Any] = [x] * len(program.entry)
    calls: list[Callable[[], Any]] = []
    for k, stage in enumerate(program.stages):
        calls.append(partial(stage.run, len(rows), *sizes, *values))
        going_on = (exit_index[rows] > k).nonzero().squeeze(1)
        if len(going_on) == 0:
            break
        rows = rows[going_on]
        _, *values = calls[-1]()
        values = [
            value if dim is None else value.index_select(dim, going_on)
            for value, dim in zip(values, stage.row_dims, strict=True)
        ]
    return calls


def set_up(
    net: Net,
    model: cet.EarlyExit,
    x: Tensor,
    reference: Reference,
    fractions: Fractions,
    compiled: Callable[[Tensor], Tensor] | None,
) -> tuple[Case, Tensor]:
    """Set the model's policy; what competes under it, and the exit ``(B,)`` that each row takes."""
    model.policy, exit_index = choose_policy(reference.scores, fractions)
    check_rows = partial(
        _check_rows, tolerance=TOLERANCES[x.dtype], doubtful=_doubtful(reference, model.policy, x.dtype)
    )
    expected = reference.logits[exit_index, torch.arange(len(x), device=x.device)]
    final = exit_index == len(fractions)
    calls = stage_calls(model, x, exit_index)

    def ideal(_: Tensor) -> Any:
        for call in calls:
            result = call()
        return result

    def check(results: Mapping[str, Any]) -> None:
        for name in results.keys() & {"predict", *BY_RUNNER}:
            check_rows(name, results[name].logits, results[name].exit_index, expected, exit_index)
        check_rows("boolean_mask", *results["boolean_mask"], expected, exit_index)
        check_rows("forward", results["forward"], exit_index, expected, exit_index)
        for name in results.keys() & ("backbone", "compiled", "graphed"):
            check_close(name, results[name], reference.logits[-1], TOLERANCES[x.dtype])
        if final.any():
            check_close("ideal", results["ideal"], expected[final], TOLERANCES[x.dtype])

    providers: dict[str, Callable[[Tensor], Any]] = {
        "predict": model.predict,
        "forward": model,
        "backbone": lambda x: logits_of(net.backbone(x)),
        "ideal": ideal,
        "boolean_mask": partial(boolean_mask, net.stages, model.heads, model.policy.thresholds),
    }
    absent = {}
    if x.is_cuda:
        no_switch = why_no_switch()
        if no_switch is not None:
            absent["predict_device"] = no_switch
        providers |= {
            **{name: partial(predict_by, model, BY_RUNNER[name]) for name in BY_RUNNER.keys() - absent.keys()},
            "predict": partial(predict_by, model, None),
            "graphed": _graphed(providers["backbone"], x),
            "ideal": gpu.graphed(ideal, x),
        }
    if compiled is None:
        absent["compiled"] = "not asked for; give --compile"
    else:
        providers["compiled"] = compiled
    return Case((x,), providers, check, absent), exit_index


def _graphed(backbone: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[Tensor], Tensor]:
    """As one CUDA graph. Some versions of transformers (5.17) attend under a mask that masks nothing when they see a
    capture, three times as slowly; that would be no baseline."""
    seen = "transformers.utils.import_utils.is_cuda_stream_capturing"
    with mock.patch(seen, return_value=False, create=True) if "transformers" in sys.modules else nullcontext():
        return gpu.graphed_with_copy(backbone, x)


BY_RUNNER: dict[str, RunnerName] = {"predict_graphs": "graphs", "predict_device": "device"}
"""On a GPU; ``predict`` is by the default one, ``"eager"``."""


TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Of the largest logit: on a GPU other batch sizes take other kernels, which round otherwise."""


MARGINS = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""Of the entropy in nats, for the same reason."""


def _doubtful(reference: Reference, policy: cet.ExitPolicy, dtype: torch.dtype) -> Tensor:
    """The rows ``(B,)`` for which rounding decides, on a GPU, whether they pass a threshold.

    Raises:
        WrongResultError: when that is more than half of them, so that too little would be checked.
    """
    doubtful = torch.zeros_like(reference.scores[0], dtype=torch.bool)
    if not reference.scores.is_cuda:
        return doubtful
    for scores, threshold in zip(reference.scores, policy.thresholds, strict=False):
        if threshold is not None:
            doubtful |= (scores - threshold).abs() <= MARGINS[dtype]
    if 2 * int(doubtful.sum()) > len(doubtful):
        raise WrongResultError(
            f"{int(doubtful.sum())} of {len(doubtful)} rows are too near to a threshold to be checked"
        )
    return doubtful


def _check_rows(
    name: str,
    logits: Tensor,
    taken: Tensor,
    expected: Tensor,
    exit_index: Tensor,
    tolerance: float,
    doubtful: Tensor,
) -> None:
    strays = int(((taken != exit_index) & ~doubtful).sum())
    if strays:
        raise WrongResultError(f"{name} sends {strays} of {len(taken)} rows to another exit than they take alone")
    check_close(name, logits[~doubtful], expected[~doubtful], tolerance)


def predict_by(model: cet.EarlyExit, runner: RunnerName | None, x: Tensor) -> cet.ExitOutput:
    """``model.predict(x)`` by this runner; the device's own for None."""
    model.runner = runner
    return model.predict(x)


def compile_backbone(net: Net) -> Callable[[Tensor], Tensor]:
    """The backbone compiled for one batch size, which its first call settles."""
    torch.compiler.reset()
    compiled: Callable[[Tensor], Tensor] = torch.compile(
        lambda x: logits_of(net.backbone(x)), fullgraph=True, dynamic=False
    )
    return compiled


def run_net(
    name: str,
    batches: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
    longest_call: float,
    with_compiled: bool,
    time_case: Callable[[Case], Timings[str]],
    joules: float | None,
    end: float,
) -> Iterator[Point]:
    """Measure one net at all batch sizes and scenarios.

    A point that fails says why, and the others go on. Once a pass of the full backbone is expected to take more than
    ``longest_call`` seconds, larger batches are left out, and so are all points after ``end`` on the clock of
    :func:`time.perf_counter`; they say so.
    """
    torch.manual_seed(0)
    with device:
        net = NETS[name]()
        net.backbone.eval()
        example = random_inputs(net, 32)
    model = multi_exit(net, example).to(dtype)
    seconds_per_row = 0.0
    for batch in sorted(batches):
        if seconds_per_row * batch > longest_call:
            note = f"not run: one pass of the backbone would take {seconds_per_row * batch:.1f} s"
            yield Point(name, batch, "all", note=note)
            continue
        try:
            with device:
                x = random_inputs(net, batch).to(dtype)
            reference = Reference.of(model, x)
            compiled = compile_backbone(net) if with_compiled else None
        except Exception as error:
            yield Point(name, batch, "all", note=failure(error))
            continue
        for scenario, fractions in SCENARIOS.items():
            model.free_graphs()
            point = partial(Point, name, batch, scenario)
            if time.perf_counter() > end:
                yield point(note=NO_TIME)
                continue
            try:
                case, exit_index = set_up(net, model, x, reference, fractions, compiled)
                point = partial(point, tuple(exit_index.bincount(minlength=model.num_exits).tolist()))
                timings = time_case(case)
            except Exception as error:  # what was measured before, and what comes after, counts
                yield point(note=failure(error))
                continue
            seconds_per_row = timings.time("backbone").median / batch
            # NVML's counter moves every tenth of a second or so: few figures, over long enough.
            counted = ("predict_device", "graphed") if joules is not None and batch == max(batches) else ()
            energy = {
                name: gpu.joules_per_call(partial(case.providers[name], x), joules)
                for name in counted
                if name in case.providers
            }
            yield point(timings=timings, absent=case.absent, joules=energy)


def figures(points: Sequence[Point]) -> Iterator[tuple[dict[str, Any], Row]]:
    """The rows of the CSV file: times and ratios of every point, and what is missing with the reason."""
    for point in points:
        where = {
            "net": point.net,
            "batch": point.batch,
            "scenario": point.scenario,
            "leaving": "+".join(map(str, point.leaving)),
        }
        if point.timings is None:
            yield where, Row("predict", "s", note=point.note)
            continue
        timings = point.timings
        for name in timings.seconds:
            yield where, Row.of(name, "s", timings.time(name), timings.num_rounds)
        others = [(name, "backbone") for name in timings.seconds if name != "backbone"]
        runners = [name for name in ("predict", *BY_RUNNER) if name in timings.seconds]
        others += [(name, "graphed") for name in runners if "graphed" in timings.seconds]
        for name, baseline in [*others, *((name, "ideal") for name in runners), ("boolean_mask", "predict")]:
            yield where, Row.of(f"{name}/{baseline}", "ratio", timings.ratio(name, baseline), timings.num_rounds)
        for name, joules in point.joules.items():
            per_sample = None if joules is None else joules / point.batch
            yield where, Row(name, "J/sample", per_sample, note="" if joules else "no energy counter")
        for name, reason in point.absent.items():
            yield where, Row(name, "s", note=reason)


def table(net: str, points: Sequence[Point]) -> Table:
    """What was measured for one net, as ``median (20th-80th percentile)``."""
    table = Table(title=f"{net}: medians (20th-80th percentile)")
    ratios = [("predict", "ideal"), ("predict", "backbone"), ("boolean_mask", "predict")]
    table.add_column("batch", justify="right")
    for heading in ("scenario", "leaving"):
        table.add_column(heading)
    for heading in ("predict ms", "backbone ms", *(f"{name}/{baseline}" for name, baseline in ratios)):
        table.add_column(heading, justify="right")
    for point in points:
        if point.timings is None:
            continue
        times = [f"{1e3 * point.timings.time(name).median:.3f}" for name in ("predict", "backbone")]
        spreads = [_text(point.timings.ratio(name, baseline)) for name, baseline in ratios]
        leaving = "+".join(map(str, point.leaving))
        last = point.scenario == [*SCENARIOS][-1]
        table.add_row(str(point.batch), point.scenario, leaving, *times, *spreads, end_section=last)
    table.caption = "\n".join(f"batch {p.batch}, {p.scenario}: {p.note}" for p in points if p.note)
    return table


def _text(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.p20:.2f}-{spread.p80:.2f})"


def measures_table(verdicts: Sequence[Mapping[str, Any]]) -> Table:
    """Whether the measures are met, and where each comes closest to failing."""
    table = Table("measure", "nets", "worst", "at", "met", title="Measures")
    for verdict in verdicts:
        row = [verdict["measure"], ", ".join(verdict["nets"])]
        if verdict["worst"] is None:
            table.add_row(*row, "not measured")
        else:
            net, batch, scenario = verdict["worst_at"]
            met = "yes" if verdict["met"] else "no"
            table.add_row(*row, f"{verdict['worst']:.3f}", f"{net}, batch {batch}, {scenario}", met)
    return table


def plot(points: Sequence[Point], title: str) -> Figure:
    """Time over the backbone's against the batch size: a column per net, half leaving at each exit above, exits closed
    below; bands are the 20th to 80th percentile."""
    nets = list(dict.fromkeys(point.net for point in points))
    scenarios = {"half_at_each": "half leave at each exit", "closed": "all exits closed"}
    styles = {
        "predict": ("C0", "o-"),
        "ideal": ("black", "--"),
        "boolean_mask": ("C1", "s-"),
        "compiled": ("C2", "^-"),
    }
    figure = Figure(figsize=(1.5 + 4 * len(nets), 6.5), layout="constrained")
    axes = figure.subplots(len(scenarios), len(nets), sharex="col", sharey="row", squeeze=False)
    for line, (scenario, label) in zip(axes, scenarios.items(), strict=True):
        line[0].set_ylabel(f"{label}\ntime over the backbone's")
        for ax, net in zip(line, nets, strict=True):
            measured = [(p.batch, p.timings) for p in points if p.net == net and p.scenario == scenario and p.timings]
            ax.axhline(1, color="0.6", linewidth=1)
            for name, (color, style) in styles.items():
                found = [(b, timings.ratio(name, "backbone")) for b, timings in measured if name in timings.seconds]
                if not found:
                    continue
                batches = [batch for batch, _ in found]
                ax.plot(batches, [s.median for _, s in found], style, color=color, markersize=4, label=name)
                ax.fill_between(batches, [s.p20 for _, s in found], [s.p80 for _, s in found], color=color, alpha=0.15)
            ax.set_xscale("log", base=2)
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            ax.xaxis.set_major_formatter("{x:.0f}")
    for ax, net in zip(axes[0], nets, strict=True):
        ax.set_title(net)
    for ax in axes[-1]:
        ax.set_xlabel("batch size")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(styles))
    figure.suptitle(title, fontsize=10)
    return figure


class CommaSeparated(click.ParamType):
    """A list such as ``1,8,64``."""

    name = "list"

    def __init__(self, item: click.ParamType) -> None:
        self.item = item

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if not isinstance(value, str):
            return tuple(value)
        return tuple(self.item.convert(item.strip(), param, ctx) for item in value.split(","))


@click.command()
@click.option("--models", type=CommaSeparated(click.Choice([*NETS])), default=",".join(CPU_NETS), show_default=True)
@click.option("--batches", type=CommaSeparated(click.IntRange(min=1)), help="[default: 1,2,4,...,1024; quick: 1,4]")
@click.option(
    "--longest-call",
    type=click.FloatRange(min=0, min_open=True),
    default=1.5,
    show_default=True,
    help="Leave out the batches for which one pass of the backbone takes more seconds than this.",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", show_default=True)
@click.option(
    "--joules",
    type=click.FloatRange(min=0, min_open=True),
    help="Count joules at the largest batch for so many seconds, on a GPU whose counter NVML reads.",
)
@click.option("--compile", "with_compiled", is_flag=True, help="Time the backbone under torch.compile too.")
@session_options
def main(
    models: tuple[str, ...],
    batches: tuple[int, ...] | None,
    longest_call: float,
    dtype: str,
    joules: float | None,
    with_compiled: bool,
    **options: Any,
) -> None:
    """Time predict against the backbone, its stages (the ideal) and a boolean-mask loop."""
    if joules is not None and options["device"] == "cpu":
        raise click.UsageError("--joules are those of a GPU; give --device cuda, or see benchmarks.energy.")
    kept = keep_freed_memory()
    about = {"dtype": dtype, "longest_call": longest_call, "keep_freed_memory": kept}
    session = Session("end_to_end", "end_to_end", about, **options)
    measures = GPU_MEASURES if session.device.type == "cuda" else MEASURES
    points: list[Point] = []

    def save(figure: Figure | None = None) -> None:
        session.save([*figures(points)], [measure.judge(points) for measure in measures], figure)

    with torch.no_grad():
        for number, net in enumerate(models, 1):
            for point in run_net(
                net,
                batches or ((1, 4) if options["quick"] else BATCHES),
                device=session.device,
                dtype=getattr(torch, dtype),
                longest_call=longest_call,
                with_compiled=with_compiled,
                time_case=session.time,
                joules=joules,
                end=session.began + (session.end - session.began) * number / len(models),  # a share for each net
            ):
                click.echo(f"{point.net}, batch {point.batch}, {point.scenario}: {point.note or 'measured'}", err=True)
                points.append(point)
                save()
            session.console.print(table(net, [point for point in points if point.net == net]))
    session.console.print(measures_table([measure.judge(points) for measure in measures]))
    about_host = session.description
    title = f"{about_host['device']}, {about_host['threads']} threads, torch {about_host['torch']}"
    save(plot(points, title))


if __name__ == "__main__":
    main()
