"""The documents of `cet energy` as text for people."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from rich.table import Table

from cet.cli.energy.tables import UNKNOWN, Scale, columns, interval, one, percent
from cet.energy.domains import with_domain
from cet.energy.figures import POLICY, Figures, PlainFigure

VERDICTS = {
    "less": "A takes less than B",
    "more": "A takes more than B",
    "not distinguishable": "A and B are not distinguishable",
    "unknown": "unknown",
}

Document = Mapping[str, Any]


def of_run(document: Document) -> Iterator[Table | str]:
    """A table of the domains."""
    figures = Figures(document)
    window = document["measurements"][0]["window"]
    yield f"{shlex.join(document['command'])}: {window['seconds']:.2f} s, exit code {document['exit_code']}"
    domains = [*figures.values("domain"), None]
    titles = {"energy": "joules", "above idle": "net_joules", "mean power": "watts"}
    yield columns(
        {
            "domain": [domain or "total" for domain in domains],
            **{title: [one(figures(name, domain=domain)) for domain in domains] for title, name in titles.items()},
            "from": [figures("joules", domain=domain)["source"] or UNKNOWN for domain in domains],
        }
    )
    notes = [with_domain(part["domain"], part["reason"]) for part in window["domains"] if part["reason"]]
    above_idle = figures("net_joules")
    if above_idle["value"] is None and figures("joules")["value"] is not None:
        fix = "" if figures.modelled or document["measurements"][0]["idle"] else "; --idle 5 does that"
        notes.append(f"{UNKNOWN} above idle: {above_idle['reason']}{fix}")
    if any(figure["low"] is not None for figure in document["figures"]):
        notes.append("±: what an update of the counter at each end can hide at most, beside about 5 % of its gain.")
    yield _remarks(document, notes)


def of_profile(document: Document) -> Iterator[Table | str]:
    """Four tables for each batch size that was finished, and what their figures mean."""
    figures = Figures(document)
    costs = _costs(figures)
    exits = [name for name in figures.values("exit") if name != POLICY]
    for size in figures.values("batch"):
        of_batch = partial(figures, batch=size)
        yield f"Batch {size}, per sample"
        yield _exits(of_batch, exits)
        yield _cumulative(of_batch, exits, costs)
        yield _marginal(of_batch, exits, costs)
        yield _policy(of_batch, costs)
    if exits:
        yield _errors(document) + " A sample's joules are its share of those of its batch: attributed, not measured."
    yield _remarks(document, _unexplained(document))


def of_comparison(document: Document) -> Iterator[Table | str]:
    """A table of the quantities with their ratios, and the verdicts."""
    figures = Figures(document)
    costs = _costs(figures)
    rows: dict[str, list[str]] = {"per sample": [], "A": [], "B": [], "A / B": []}
    verdicts = []
    for ratio in (figure for figure in document["figures"] if figure["part"] == "ratio"):
        domain = ratio["domain"]
        title = costs[ratio["name"]] + (f" of {domain}" if domain else "")
        both = [figures(ratio["name"], workload=workload, domain=domain) for workload in "AB"]
        scale = Scale(both)
        for column, cell in zip(
            rows.values(), (f"{title}, {scale.unit}", *map(scale, both), interval(ratio, 3)), strict=True
        ):
            column.append(cell)
        verdicts.append(f"{title}: {VERDICTS[ratio['verdict']]}")
    yield f"A: {document['models']['A']}\nB: {document['models']['B']}"
    if verdicts:
        yield columns(rows)
        yield "\n".join(verdicts)
        yield _errors(document)
    yield _remarks(document, _unexplained(document))


def _costs(figures: Figures) -> dict[str, str]:
    """What the quantities are called."""
    return {
        "seconds": "time",
        "joules": "MODELLED energy" if figures.modelled else "energy",
        "net_joules": "above idle",
    }


def _exits(figures: Callable[..., PlainFigure], exits: Sequence[str]) -> Table:
    return columns(
        {
            "leave at": [*exits, POLICY],
            "samples": [percent(figures("rate", exit=name)) for name in exits],
            "accuracy": [percent(figures("accuracy", exit=name)) for name in (*exits, POLICY)],
            "compute": [figures("flops", exit=name) for name in exits],
        }
    )


def _cumulative(figures: Callable[..., PlainFigure], exits: Sequence[str], costs: Mapping[str, str]) -> Table:
    rows = [*((name, "cumulative") for name in exits), (POLICY, "measured")]
    return columns(
        {
            "to leave at takes": [*exits, POLICY],
            **{title: [figures(name, exit=at, part=part) for at, part in rows] for name, title in costs.items()},
        }
    )


def _marginal(figures: Callable[..., PlainFigure], exits: Sequence[str], costs: Mapping[str, str]) -> Table:
    """Of energy where it is known, else of time."""
    name = "seconds" if figures("joules", exit=exits[0], part="cumulative")["value"] is None else "joules"
    parts = {costs[name]: "marginal", "backbone": "backbone", "head": "head", "gate": "gate"}
    return columns(
        {
            "each exit adds": exits,
            **{title: [figures(name, exit=at, part=part) for at in exits] for title, part in parts.items()},
        }
    )


def _policy(figures: Callable[..., PlainFigure], costs: Mapping[str, str]) -> Table:
    rows = ("predicted", "measured", "residual")
    return columns(
        {
            POLICY: [*rows, "measured / predicted"],
            **{
                title: [
                    *(figures(name, exit=POLICY, part=part) for part in rows),
                    interval(figures(name, exit=POLICY, part="ratio"), 2),
                ]
                for name, title in costs.items()
            },
        }
    )


def _errors(document: Document) -> str:
    """Where the joules come from, and what their intervals are."""
    settings = document["settings"]
    rounds = sorted(figure["rounds"] for figure in document["figures"] if figure["rounds"])
    sources = {figure["source"] for figure in document["figures"] if figure["name"] == "joules"} - {None}
    sentences = []
    if all(figure["low"] is None for figure in document["figures"]):
        sentences.append("There are too few rounds for intervals.")
    elif rounds:
        number = f"{rounds[0]}" if rounds[0] == rounds[-1] else f"{rounds[0]} to {rounds[-1]}"
        sentences.append(f"±: {settings['confidence']:.0%} intervals of the statistical error, over {number} rounds.")
    if "model" in sources:
        watts = settings["estimate_watts"]
        sentences.append(f"Joules are NOT measured: they are an assumed {watts:g} W times the time.")
    elif sources:
        sentences.append(
            f"Joules are from the {' and '.join(sorted(sources))}, and all share an error of about ±5 % besides."
        )
    window, asked = max(measurement["window"] for measurement in document["measurements"]), settings["window"]
    if asked and window > asked:
        sentences.append(f"Windows are {window:.3g} s long, not {asked:g} s, to hold enough updates of the counter.")
    return " ".join(sentences)


def _unexplained(document: Document) -> Iterator[str]:
    """Why figures are missing that no counter would bring."""
    known = {figure["name"] for figure in document["figures"] if figure["value"] is not None}
    for figure in document["figures"]:
        if figure["value"] is not None or not figure["reason"]:
            continue
        predictable = figure["name"] in known and figure["part"] in ("predicted", "ratio")
        above_idle = figure["name"] == "net_joules" and "joules" in known and figure["part"] == "measured"
        if predictable or above_idle or figure["name"] in ("accuracy", "flops"):
            yield f"{UNKNOWN} {figure['reason']}"


def _remarks(document: Document, notes: Iterable[str] = ()) -> str:
    """Why figures are missing, what the flags mean, and why it is partial; empty if there is nothing to say."""
    lines = list(notes)
    for measurement in document["measurements"]:
        for missing in measurement["unavailable"]:
            fix = f"; {missing['mend']}" if missing["mend"] else ""
            lines.append(f"{UNKNOWN} {with_domain(missing['domain'], missing['reason'])}{fix}")
    lines += [f"! {name}: {explanation}" for name, explanation in document["flags"].items()]
    if document["stopped"]:
        lines.append(f"! partial: {document['stopped']}")
    return "\n".join(dict.fromkeys(lines))
