"""Turns what ``make gpu`` brought back into tables: ``python -m benchmarks.gpu_read ARCHIVE``.

What failed comes first, then what the checks found, then the figures of the benchmarks. With ``--output`` the tables go
into that file, as Markdown, and the results of the benchmarks into ``benchmarks/results/gpu``.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

RESULTS = Path(__file__).parent / "results/gpu"
BENCHMARKS = ("exit_gate", "consistent_exit_loss", "compact", "end_to_end")


class ArchiveError(Exception):
    """The file is no archive of ``make gpu``."""


class Archive:
    """The files of one run, by name; a file that is missing is empty, and a line that is not whole is left out."""

    def __init__(self, path: Path) -> None:
        try:
            with tarfile.open(path) as packed:
                members = [member for member in packed.getmembers() if member.isfile()]
                contents = {member.name: packed.extractfile(member) for member in members}
                # Without the folder, whose name is of no interest.
                self.files = {name.partition("/")[2]: file.read() for name, file in contents.items() if file}
        except (OSError, tarfile.TarError, EOFError) as error:
            raise ArchiveError(f"{path} cannot be read ({error}); give the OUT.tar.gz that make gpu wrote") from error
        if not any(name.endswith((".log", ".jsonl")) for name in self.files):
            raise ArchiveError(f"{path} holds no logs; give the OUT.tar.gz that make gpu wrote")

    def text(self, name: str) -> str:
        return self.files.get(name, b"").decode(errors="replace")

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a file of JSON lines."""
        found = []
        for line in self.text(name).splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:  # the last one, of a process that was stopped
                continue
        return found

    def json(self, name: str) -> Any:
        try:
            return json.loads(self.text(name) or "null")
        except json.JSONDecodeError:
            return None


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines)


def failures(archive: Archive) -> list[str]:
    """What failed, one line each: stages, checks, and points of benchmarks."""
    found = [f"stage {s['name']}: {s['last_line']}" for s in archive.json("stages.json") or [] if not s["passed"]]
    for name in sorted(name for name in archive.files if name.endswith(".jsonl")):
        for line in archive.lines(name):
            if not line["ok"]:
                what = line.get("error") or {k: v for k, v in line.items() if k not in ("check", "ok", "device")}
                found.append(f"{name.removesuffix('.jsonl')}: {line['check']}: {what}"[:300])
    for name in BENCHMARKS:
        for row in _figures(archive, name):
            if row["note"].startswith("not timed"):
                found.append(f"benchmark {name}: {_point(row)}: {row['note']}")
    return found


def _figures(archive: Archive, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(archive.text(f"results/{name}.csv"))))


def _point(row: dict[str, str]) -> str:
    """What stands before the quantity."""
    return " ".join(value for key, value in list(row.items())[: list(row).index("quantity")] if value)


def report(archive: Archive) -> str:
    """All tables, as Markdown."""
    checks = archive.lines("checks.jsonl")
    parts = ["# First contact with a GPU"]
    machine = next((line for line in checks if line["check"] == "machine"), None)
    if machine is not None:
        parts.append(", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("check", "ok", "seconds")))
    failed = failures(archive)
    parts += ["## What failed", "\n".join(f"- {line}" for line in failed) or "Nothing."]
    stages = [
        (s["name"], "yes" if s["passed"] else "no", f"{s['seconds']:.0f}") for s in archive.json("stages.json") or []
    ]
    parts += ["## Stages", table(("stage", "passed", "s"), stages)]
    rows = [(line["check"], "yes" if line["ok"] else "no", line.get("seconds", "")) for line in checks]
    parts += ["## Checks", table(("check", "right", "s"), rows)]
    points = [
        (
            line["check"].removeprefix("bandwidth_"),
            line["megabytes"],
            line["step_us"],
            line["copy_us"],
            line["of_copy_bandwidth"],
        )
        for line in checks
        if line["check"].startswith("bandwidth_") and line["ok"]
    ]
    if points:
        head = ("rows_channels_positions_classes_dtype, or loss", "MB", "step us", "copy us", "of the copy's bandwidth")
        parts += ["## The exit step, and the loss, against a copy", table(head, points)]
    for name in BENCHMARKS:
        figures = [(_point(r), r["quantity"], r["median"], r["unit"]) for r in _figures(archive, name) if r["median"]]
        if figures:
            parts += [f"## {name}", table(("point", "quantity", "median", "unit"), figures)]
            parts.append(f"Measures: {(archive.json(f'results/{name}.json') or {}).get('measures')}")
    return "\n\n".join(parts) + "\n"


@click.command()
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File for the tables.")
def main(archive: Path, output: Path | None) -> None:
    """Make tables of the ARCHIVE that make gpu wrote; fails if something in it failed."""
    try:
        opened = Archive(archive)
    except ArchiveError as error:
        raise click.ClickException(str(error)) from error
    text = report(opened)
    if output is None:
        click.echo(text, nl=False)
    else:
        output.write_text(text)
        for name, content in opened.files.items():
            if name.startswith("results/"):
                RESULTS.mkdir(parents=True, exist_ok=True)
                (RESULTS / Path(name).name).write_bytes(content)
    if failures(opened):
        sys.exit(1)


if __name__ == "__main__":
    main()
