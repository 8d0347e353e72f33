"""Plots of a measurement, drawn from its document alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from cet.energy.figures import POLICY, Figures, PlainFigure, si_prefix
from cet.energy.measurement import IDLE
from cet.plotting import GREY, STYLE, png

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""From the palette of Okabe & Ito (2008), which stays apart under all kinds of colour blindness."""

GROSS, NET = COLOURS[0], COLOURS[5]
PARTS = {"backbone": COLOURS[2], "head": COLOURS[4], "gate": COLOURS[1]}
LIGHT_GREY = "#c8c8c8"

Document = Mapping[str, Any]


def draw(document: Document, label: str = "") -> dict[str, bytes]:
    """PNG files by name, as many as there are figures for.

    ``per_exit.png`` shows what it costs to leave at each exit, and ``accuracy.png`` accuracy against that cost, both in
    joules where these are known, else in seconds; ``power.png`` shows mean power of all windows, and sampled power.

    Args:
        document: of `cet energy profile` or `cet energy compare`.
        label: put on top of every plot.
    """
    figures = Figures(document)
    drawn = {}
    if figures.values("exit"):
        drawn["per_exit.png"] = plot_exits(figures)
        if figures("accuracy", batch=figures.values("batch")[0], exit=POLICY)["value"] is not None:
            drawn["accuracy.png"] = plot_accuracy(figures)
    if any(block["watts"] is not None for measurement in document["measurements"] for block in measurement["blocks"]):
        drawn["power.png"] = plot_power(document)
    return {name: _png(figure, document, label) for name, figure in drawn.items()}


@rc_context(STYLE)
def plot_exits(figures: Figures) -> Figure:
    """What it costs to leave at each exit, and below, what makes up the step from exit to exit; a column per batch."""
    batches, exits = figures.values("batch"), _exits(figures)
    name, word = _quantity(figures)
    figure = Figure(figsize=(max(7.0, 1.0 + 4.6 * len(batches)), 7.4), layout="constrained")
    panels = figure.subplots(2, len(batches), squeeze=False)
    whole = {f"{word}, gross" if name == "joules" else word: (name, GROSS)}
    net = [figures("net_joules", batch=size, exit=exits[0], part="cumulative") for size in batches]
    if any(figure["value"] is not None for figure in net):
        whole["above idle"] = "net_joules", NET
    for column, size in enumerate(batches):
        top, bottom = panels[:, column]
        at = [*((exit_name, "cumulative") for exit_name in exits), (POLICY, "predicted"), (POLICY, "measured")]
        groups = {
            title: ([figures(of, batch=size, exit=exit_name, part=part) for exit_name, part in at], colour)
            for title, (of, colour) in whole.items()
        }
        _grouped_bars(top, [*exits, "policy,\npredicted", "policy,\nmeasured"], groups)
        top.axvline(len(exits) - 0.5, color=LIGHT_GREY, linewidth=0.8)
        top.set_title(f"batch {size}")
        parts = {
            part: ([figures(name, batch=size, exit=exit_name, part=part) for exit_name in exits], colour)
            for part, colour in PARTS.items()
        }
        _grouped_bars(bottom, exits, parts)
        bottom.axhline(0, color=GREY, linewidth=0.8)
        bottom.set_xlabel("exit")
    for row, text in zip(panels, (f"{word} per sample", f"{word} added by each exit"), strict=True):
        row[0].set_ylabel(f"{text} / {row[0].get_ylabel()}")
    handles = [handle for row in panels for handle in row[0].get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) if len(batches) > 1 else 3)
    return figure


@rc_context(STYLE)
def plot_accuracy(figures: Figures) -> Figure:
    """Accuracy against what a sample costs, of each exit alone and of the policy; a curve per batch size."""
    name, word = _quantity(figures)
    exits = _exits(figures)
    figure = Figure(figsize=(7.6, 5.0), layout="constrained")
    axes = figure.subplots()
    batches = figures.values("batch")
    costs = {
        size: [*(figures(name, batch=size, exit=each, part="cumulative") for each in exits),
               figures(name, batch=size, exit=POLICY, part="measured")]
        for size in batches
    }  # fmt: skip
    scale, unit = _scale([cost for row in costs.values() for cost in row])
    for size, colour in zip(batches, cycle(COLOURS), strict=False):
        accuracy = [100 * figures("accuracy", batch=size, exit=each)["value"] for each in (*exits, POLICY)]
        x, errors = _values(costs[size], scale)
        axes.plot(x[:-1], accuracy[:-1], color=colour, linewidth=1.2, alpha=0.6)
        axes.errorbar(x[:-1], accuracy[:-1], xerr=errors[:, :-1], fmt="o", color=colour, mfc="white", capsize=3)
        axes.errorbar(x[-1:], accuracy[-1:], xerr=errors[:, -1:], fmt="*", color=colour, ms=14, capsize=3)
        for exit_name, left, height in zip(exits, x, accuracy, strict=False):
            axes.annotate(exit_name, (left, height), (6, -12), textcoords="offset points", color=GREY, fontsize=9)
    axes.set_xlabel(f"{word} per sample / {unit}")
    axes.set_ylabel("accuracy / %")
    axes.set_xlim(left=0)
    axes.grid()
    legend = [
        Line2D([], [], color=colour, label=f"batch {size}") for size, colour in zip(batches, COLOURS, strict=False)
    ]
    legend.append(Line2D([], [], color=GREY, marker="o", mfc="white", linestyle="", label="all samples leave here"))
    legend.append(Line2D([], [], color=GREY, marker="*", ms=12, linestyle="", label="the policy"))
    figure.legend(handles=legend, loc="outside lower center", ncols=3)
    return figure


@rc_context(STYLE)
def plot_power(document: Document) -> Figure:
    """Mean power of every window over time, by kind of workload, and sampled power where there is any."""
    measurements = [measurement for measurement in document["measurements"] if measurement["blocks"]]
    figure = Figure(figsize=(10, 0.6 + 2.9 * len(measurements)), layout="constrained")
    panels = figure.subplots(len(measurements), squeeze=False)[:, 0]
    kinds = list(dict.fromkeys(_kind(block) for measurement in measurements for block in measurement["blocks"]))
    colours = dict(zip([kind for kind in kinds if kind != IDLE], cycle(COLOURS)))
    colours[IDLE] = LIGHT_GREY
    for axes, measurement in zip(panels, measurements, strict=True):
        begin = measurement["blocks"][0]["reading"]["start"]
        for block in measurement["blocks"]:
            start = block["reading"]["start"] - begin
            if block["watts"] is not None:
                axes.bar(start, block["watts"], block["seconds"], align="edge", color=colours[_kind(block)])
            else:
                axes.axvspan(start, start + block["seconds"], facecolor="none", edgecolor="red", hatch="//", lw=0)
            _draw_samples(axes, block, begin)
        axes.set_ylabel("power / W")
        axes.margins(x=0.01)
        if "batch_size" in measurement:
            axes.set_title(f"batch {measurement['batch_size']}")
    panels[-1].set_xlabel("time / s")
    handles = [Patch(color=colours[kind], label=kind) for kind in kinds]
    if any(block["watts"] is None for measurement in measurements for block in measurement["blocks"]):
        handles.append(Patch(facecolor="none", edgecolor="red", hatch="//", label="void"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), title="windows: mean power")
    return figure


def _draw_samples(axes: Axes, block: Mapping[str, Any], begin: float) -> None:
    """Sampled power of the domains that add to the total."""
    for domain in block["reading"]["domains"]:
        if domain["in_total"] and domain["samples"]:
            times = [sample["time"] - begin for sample in domain["samples"]]
            axes.plot(times, [sample["watts"] for sample in domain["samples"]], color="black", linewidth=0.7)


def _grouped_bars(axes: Axes, names: Sequence[str], groups: Mapping[str, tuple[Sequence[PlainFigure], str]]) -> None:
    """Bars with their intervals, in one unit, which becomes the label of the axis."""
    scale, unit = _scale([figure for row, _ in groups.values() for figure in row])
    width = 0.8 / len(groups)
    for index, (title, (row, colour)) in enumerate(groups.items()):
        offset = (index - (len(groups) - 1) / 2) * width
        values, errors = _values(row, scale)
        positions = [place + offset for place in range(len(names))]
        axes.bar(positions, values, width, color=colour, label=title)
        axes.errorbar(positions, values, errors, fmt="none", ecolor="black", elinewidth=1, capsize=3)
        for position, value in zip(positions, values, strict=True):
            if np.isnan(value):
                axes.annotate("unknown", (position, 0), (0, 3), textcoords="offset points", rotation=90,
                              ha="center", va="bottom", color=GREY, fontsize=8)  # fmt: skip
    axes.set_xticks(range(len(names)), names)
    axes.set_ylabel(unit)
    axes.grid(axis="y")


def _exits(figures: Figures) -> list[str]:
    return [name for name in figures.values("exit") if name != POLICY]


def _quantity(figures: Figures) -> tuple[str, str]:
    """Joules where they are known, else seconds; and the word for them."""
    first = figures("joules", batch=figures.values("batch")[0], exit=_exits(figures)[0], part="cumulative")
    if first["value"] is None:
        return "seconds", "time"
    return "joules", "MODELLED energy" if first["source"] == "model" else "energy"


def _scale(figures: Sequence[PlainFigure]) -> tuple[float, str]:
    """The factor and the unit in which the largest has one to three digits before the point."""
    power, prefix = si_prefix(max(abs(figure["value"] or 0.0) for figure in figures))
    return 10.0**-power, prefix + figures[0]["unit"]


def _values(figures: Sequence[PlainFigure], scale: float) -> tuple[list[float], NDArray[np.float64]]:
    """Values, and distances to the ends of their intervals ``(2, n)``; NaN, which is not drawn, where there is none."""
    rows = np.array([[figure[key] for key in ("value", "low", "high")] for figure in figures], dtype=np.float64).T
    value, low, high = rows * scale
    return value.tolist(), np.stack([value - low, high - value])


def _kind(block: Mapping[str, Any]) -> str:
    """The workload without its exit."""
    return str(block["workload"]).partition(":")[0]


def _png(figure: Figure, document: Document, label: str) -> bytes:
    """With what was measured where, and that it is partial, on top."""
    devices = dict.fromkeys(row["device"] for measurement in document["measurements"] for row in measurement["domains"])
    title = [label, f"cet energy {document['kind']}" + (f" on {', '.join(devices)}" if devices else "")]
    if Figures(document).modelled:
        title.append("Joules are MODELLED: assumed watts times measured time")
    if document["stopped"]:
        title.append(f"PARTIAL: {document['stopped']}")
    figure.suptitle("\n".join(filter(None, title)), fontsize=10)
    return png(figure)
