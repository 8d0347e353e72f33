"""The two plots, drawn from the figures of `report.json` alone, as PNG."""

from __future__ import annotations

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cet.plotting import GREY, STYLE, png
from cet.report.schema import Condition, RecipeReport, Report, at

COLOURS = {"joint": "#0072B2", "augmentation": "#0072B2", "consistent": "#D55E00", "noisy-labels": "#D55E00"}
"""Baselines blue, consistent exits red; from the palette of Okabe & Ito (2008), which stays apart under all kinds of
colour blindness."""

DEPTHS = ("#d4e4f1", "#86b6da", "#3576b0", "#12325e")
"""Shallow to deep, apart by lightness alone."""


@rc_context(STYLE)
def plot_accuracy(report: Report) -> bytes:
    """Accuracy on the test persons against mean compute per sample, clean and perturbed, for both recipes."""
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    panels = figure.subplots(1, len(report["conditions"]), sharey=True, squeeze=False)[0]
    for axes, (condition, severity) in zip(panels, report["conditions"].items(), strict=True):
        for name, recipe in report["recipes"].items():
            _draw_recipe(axes, COLOURS[name], recipe, condition, severity)
        _mark_exits(axes, report)
        axes.set_title("clean input" if severity == 0 else f"perturbed input, severity {severity:g}", pad=24)
        axes.set_xlabel("mean compute per sample / MFLOP")
        axes.grid(axis="y")
    panels[0].set_ylabel("accuracy on test persons / %")
    legend = [
        *(Line2D([], [], color=COLOURS[name], linewidth=2.2, label=name) for name in report["recipes"]),
        Line2D([], [], color=GREY, linewidth=2.2, label="one threshold for all exits"),
        Line2D([], [], color=GREY, marker="o", mfc="white", linestyle="", label="all samples leave at one exit"),
        Line2D([], [], color=GREY, marker="*", markersize=13, linestyle="", label="calibrated thresholds"),
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), columnspacing=1.4)
    return png(figure)


@rc_context(STYLE)
def plot_exits(report: Report) -> bytes:
    """The share of samples that leave at each exit, by severity, for both recipes."""
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplots(1, len(report["recipes"]), sharey=True, squeeze=False)[0]
    for axes, (name, recipe) in zip(panels, report["recipes"].items(), strict=True):
        rows = recipe["severities"]
        positions = range(len(rows))
        bottom = [0.0] * len(rows)
        for k, (exit_name, colour) in enumerate(zip(report["exits"], DEPTHS, strict=True)):
            shares = [100 * row["early"]["exit_shares"][k] for row in rows]
            bars = axes.bar(positions, shares, 0.78, bottom, color=colour, edgecolor="white", label=exit_name)
            inside = [f"{share:.0f}" if share >= 5 else "" for share in shares]
            axes.bar_label(bars, inside, label_type="center", fontsize=9, color="white" if k >= 2 else "#222222")
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
        for position, row in zip(positions, rows, strict=True):
            axes.annotate(
                f"{100 * row['early']['accuracy']:.0f} %",
                (position, 100),
                (0, 4),
                textcoords="offset points",
                ha="center",
                color=GREY,
            )
        axes.set_title(name, pad=22)
        axes.set_xticks(positions, [f"{row['severity']:g}" for row in rows])
        axes.set_xlabel("severity of the perturbation (0: clean)")
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
    panels[0].set_ylabel("share of test samples / %")
    panels[0].set_ylim(0, 100)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        title="exit taken; above the bars: accuracy with early exit",
    )
    return png(figure)


def _draw_recipe(axes: Axes, colour: str, recipe: RecipeReport, condition: Condition, severity: float) -> None:
    curve = sorted((point["mean_flops"], point["accuracy"]) for point in recipe["curves"][condition])
    axes.plot([x / 1e6 for x, _ in curve], [100 * y for _, y in curve], color=colour, linewidth=2.2, zorder=2)
    row = at(recipe, severity)
    axes.plot(
        [flops / 1e6 for flops in recipe["flops"]["exits"]],
        [100 * quality["accuracy"] for quality in row["exits"]],
        "o",
        color=colour,
        markerfacecolor="white",
        markersize=7,
        markeredgewidth=1.6,
        zorder=3,
    )
    early = row["early"]
    axes.plot(
        early["mean_flops"] / 1e6, 100 * early["accuracy"], "*", color=colour, markersize=16, mec="white", zorder=4
    )


def _mark_exits(axes: Axes, report: Report) -> None:
    """Name the exits above the plot, over faint lines at what it costs to leave there."""
    costs = next(iter(report["recipes"].values()))["flops"]["exits"]
    for name, flops in zip(report["exits"], costs, strict=True):
        axes.axvline(flops / 1e6, color="#d0d0d0", linewidth=0.8, linestyle=":", zorder=0)
        axes.annotate(
            name,
            (flops / 1e6, 1),
            (0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=GREY,
        )
    axes.set_xlim(0, costs[-1] / 1e6 * 1.06)
