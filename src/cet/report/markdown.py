"""The report as text, written from the figures of `report.json` alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import fmean

from cet.calibration.report import BOUNDED
from cet.report.folder import ACCURACY_PLOT, EXITS_PLOT, REPORT
from cet.report.schema import Condition, RecipeReport, Report, at, verdict
from cet.report.timing import Speed
from cet.words import counted

SCOPE = (
    "One split by person and one seed: this shows how early exit works, not how much it gains on average. "
    "It is an implementation of the objective of arXiv 2109.13192, not a reproduction of its tables."
)

TRAINED = {
    "joint": "with the cross-entropy of all exits",
    "augmentation": "with the cross-entropy of all exits on the windows and on a perturbed copy",
    "consistent": "with the consistency objective on top",
    "noisy-labels": "with the consistency objective on top, its weight 3",
}
"""How each recipe trains, where two are compared."""


def wrong_labels_scope(share: float) -> str:
    """What a report says first when labels were made wrong."""
    return f"{100 * share:.3g} % of the training windows have a wrong label; all others are right."


def to_markdown(report: Report) -> str:
    """The content of `report.md`."""
    sections = [
        f"# {report['title']}",
        report["scope"],
        _set_up(report),
        f"![Accuracy against compute]({ACCURACY_PLOT})",
        "## With early exit",
        calibration_verdict(report),
        *class_warnings(report),
        _early_table(report),
        f"![Where samples leave]({EXITS_PLOT})",
        "## Time",
        "Early exit against the full network, the plain eager backbone; both run each batch, in random order. "
        f"{_host(report)}",
        _time_table(report),
        time_verdict(report),
        "## Energy",
        energy_verdict(report),
        *(text for name, recipe in report["recipes"].items() for text in _recipe_section(report, name, recipe)),
        f"All figures with all their digits, settings and versions are in [{REPORT}]({REPORT}).\n",
    ]
    return "\n\n".join(sections)


def calibration_verdict(report: Report) -> str:
    """What calibration promised, and whether the test persons bear it out."""
    recipes, persons = report["recipes"], report["data"]["persons"]
    calibration = next(iter(recipes.values()))["calibration"]
    certificates = {name: recipe["certificate"] for name, recipe in recipes.items() if recipe["certificate"]}
    calibrated_on, tested_on = (
        counted(len(persons[part]), f"{part} person") if persons[part] else f"{part} windows"
        for part in ("calibration", "test")
    )
    outcome = _outcome(report, tested_on)
    if calibration["certificate"] is not None:
        promises = (f"The promise for {name}: {certificate['promise']}." for name, certificate in certificates.items())
        return " ".join([*promises, outcome])
    reasons: dict[str, list[str]] = {}
    for name, certificate in certificates.items():
        new = "persons, who are the groups," if certificate["unit"] == "groups" else "samples"
        reasons.setdefault(f"No promise about new {new} can be made for NAMES: {certificate['reason']}.", []).append(
            name
        )
    text = [reason.replace("NAMES", _and(names)) for reason, names in reasons.items()]
    bound = f"{100 * calibration['max_drop']:g}"
    text.append(
        f"{'So the thresholds are fitted instead, which promises nothing: over' if certificates else 'Over'} "
        f"{_and(report['conditions'])} windows of the {calibrated_on}, they lose at most {counted(bound, 'point')} of "
        f"{BOUNDED[calibration['metric']]} against the full network. {outcome}"
    )
    return " ".join(text)


def _outcome(report: Report, tested_on: str) -> str:
    """What accuracy loses on the test persons, and whether that is within what may be lost."""
    calibration = next(iter(report["recipes"].values()))["calibration"]
    alike = len(report["data"]["persons"]["test"]) > 1
    lost = {}
    for name, recipe in report["recipes"].items():
        rows = [at(recipe, severity) for severity in report["conditions"].values()]
        lost[name] = max(
            fmean(row["group_losses"])
            if alike and row.get("group_losses")
            else row["exits"][-1]["accuracy"] - row["early"]["accuracy"]
            for row in rows
        )
    bound = calibration["max_drop"] if calibration["metric"] == "accuracy" else None
    within = {
        name: "" if bound is None else " (within it)" if loss <= bound else " (more)" for name, loss in lost.items()
    }
    worse = f", on the worse of {_and(report['conditions'])} input" * (len(report["conditions"]) > 1)
    losses = _and(f"{100 * loss:.1f} points with {name}{within[name]}" for name, loss in lost.items())
    return f"On the {tested_on}{', who count alike' * alike}{worse}, accuracy loses {losses}."


def class_warnings(report: Report) -> list[str]:
    """What calibration warned of, for each recipe."""
    warnings = {name: recipe["calibration"]["warning"] for name, recipe in report["recipes"].items()}
    return [f"On the calibration samples of {name}, {warning}." for name, warning in warnings.items() if warning]


def time_verdict(report: Report) -> str:
    """In one or two sentences, whether early exit paid on this machine."""
    rows = [row for recipe in report["recipes"].values() for row in recipe["severities"]]
    if all(row["early"]["exit_shares"][-1] == 1 for row in rows):
        return "No sample leaves early: what differs in time is how the network is run, in stages or whole."
    cases: dict[str, list[str]] = {"faster": [], "no clear difference": [], "slower": []}
    for what, name, condition, speed in speeds(report):
        cases[verdict(speed)].append(f"{what} of {name} on {condition} input ({_ratio(speed)})")
    if not cases["slower"] and not cases["no clear difference"]:
        return "Early exit was faster in every case measured."
    sentences = []
    if cases["slower"]:
        sentences.append(f"Early exit does not pay on this machine for {_and(cases['slower'])}.")
    if cases["no clear difference"]:
        sentences.append(f"There is no clear difference for {_and(cases['no clear difference'])}.")
    if not cases["faster"]:
        sentences.append("It was faster in no case measured.")
    return " ".join(sentences)


def energy_verdict(report: Report) -> str:
    """What early exit takes of the full network's energy."""
    joules = report["timing"]["joules"]
    if joules["ratio"] is None:
        return f"Joules are not known: {joules['reason']}."
    interval = "" if joules["low"] is None else f", {joules['low']:.2f} to {joules['high']:.2f}"
    flags = f"; flagged: {joules['flags']}" if joules["flags"] else ""
    return (
        f"Early exit of {joules['recipe']} takes {joules['ratio']:.2f}x the full network's energy{interval}: "
        f"{joules['early']:.2e} J against {joules['full']:.2e} J per sample of clean input in batches of "
        f"{joules['batch_size']}, gross, by the CPU's {joules['source']}{flags}."
    )


def speeds(report: Report) -> Iterator[tuple[str, str, Condition, Speed]]:
    """Every comparison as (throughput or latency, recipe, condition, figures)."""
    for what, by_recipe in (
        ("throughput", report["timing"]["throughput"]),
        ("latency", report["timing"]["latency"]),
    ):
        for name, by_condition in by_recipe.items():
            for condition, speed in by_condition.items():
                yield what, name, condition, speed


def _set_up(report: Report) -> str:
    persons, windows = report["data"]["persons"], report["data"]["windows"]
    parts = [
        f"{windows[part]} of {part} persons {_and(map(str, persons[part]))}"
        if persons[part]
        else f"{windows[part]} for {part}"
        for part in persons
    ]
    epochs = next(iter(report["recipes"].values()))["recipe"]["epochs"]
    trained = (
        f"The same net, trained twice for {epochs} epochs: "
        + ", ".join(f"*{name}* {TRAINED[name]}" for name in report["recipes"])
        + "."
        if len(report["recipes"]) > 1
        else f"A net trained for {epochs} epochs with the {_and(report['recipes'])} objective."
    )
    perturbed = report["conditions"].get("perturbed")
    return (
        f"{trained} Windows of {report['data']['length']} samples, {', '.join(parts)}; "
        f"seed {report['settings']['seed']}."
        + ("" if perturbed is None else f" Perturbed input has severity {perturbed:g}.")
    )


def _early_table(report: Report) -> str:
    rows = []
    for name, recipe in report["recipes"].items():
        for condition, severity in report["conditions"].items():
            row = at(recipe, severity)
            full, early = row["exits"][-1], row["early"]
            rows.append(
                [
                    name,
                    condition,
                    _percent(full["accuracy"]),
                    _percent(full["macro_f1"]),
                    _percent(early["accuracy"]),
                    _percent(early["macro_f1"]),
                    _percent(early["mean_flops"] / recipe["flops"]["full"]),
                ]
            )
    header = ["recipe", "input", "full accuracy", "full F1", "early accuracy", "early F1", "FLOPs of full"]
    return _table(header, rows)


def _time_table(report: Report) -> str:
    rows = []
    for what, name, condition, speed in speeds(report):
        digits = 2 if speed["unit"] == "ms" else 0
        full, early = (
            " / ".join(f"{value:,.{digits}f}" for value in speed[side].values()) + f" {speed['unit']}"
            for side in ("full", "early")
        )
        rows.append([f"{what}, batch {speed['batch_size']}", name, condition, full, early, _ratio(speed)])
    return (
        _table(["measured", "recipe", "input", "full network", "early exit", "speed-up (95 % interval)"], rows)
        + "\n\nThroughput: percentiles 20 / 50 / 80 over batches. Latency: percentiles 50 / 90 over windows."
    )


def _recipe_section(report: Report, name: str, recipe: RecipeReport) -> list[str]:
    exits = report["exits"]
    quality = [
        [f"{row['severity']:g}"]
        + [f"{_percent(e['accuracy'])} / {_percent(e['macro_f1'])}" for e in row["exits"]]
        + [f"{_percent(row['early']['accuracy'])} / {_percent(row['early']['macro_f1'])}"]
        for row in recipe["severities"]
    ]
    leaving = [
        [f"{row['severity']:g}"]
        + [_percent(share) for share in row["early"]["exit_shares"]]
        + [_percent(row["early"]["mean_flops"] / recipe["flops"]["full"])]
        for row in recipe["severities"]
    ]
    return [
        f"## {name.capitalize()}",
        "Accuracy / macro-F1 by severity, if all samples left at one exit, and with early exit:",
        _table(["severity", *exits, "early exit"], quality),
        "Share of samples that leave at each exit, and their mean FLOPs:",
        _table(["severity", *exits, "FLOPs of full"], leaving),
    ]


def _host(report: Report) -> str:
    host = report["timing"]["host"]
    return (
        f"Measured on the CPU: {host['processor']}, {host['cores']} cores, torch with {host['threads']} thread(s), "
        f"torch {report['versions']['torch']}, {host['platform']}."
    )


def _ratio(speed: Speed) -> str:
    ratio = speed["speedup"]
    return f"{ratio['value']:.2f}x, {ratio['low']:.2f} to {ratio['high']:.2f}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f} %"


def _and(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
