"""What a file or folder with one model per stage says of itself, for the loop that runs them. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cet.deploy.description import Description, ExportError


@dataclass(frozen=True)
class StageEntry:
    """What a manifest says of a stage.

    Attributes:
        file: that holds it, beside the manifest; of one file with all stages, the method or signature within it.
        exit_index: the exit behind it.
        inputs: the tensors that it takes by name, the model's or those of earlier stages, each with the dimension that
            holds the rows; None: common to all rows.
        outputs: the tensors that it makes for later stages, behind ``logits`` ``(n, K)`` and ``score`` ``(n,)``.
        sha256: of the file beside the manifest, in hexadecimal digits.
        arena_bytes: the memory that TFLite Micro needs for it; None in other formats.
    """

    file: str
    exit_index: int
    inputs: Mapping[str, int | None]
    outputs: tuple[str, ...]
    sha256: str = ""
    arena_bytes: int | None = None


@dataclass(frozen=True)
class Manifest:
    """A model, its stages, and how the loop is to run them.

    Attributes:
        description: what the file says of the model.
        stages: in the order in which they run.
        most_rows: how many rows the stages take at once, None for any number.
    """

    description: Description
    stages: tuple[StageEntry, ...]
    most_rows: int | None = None

    def to_json(self) -> str:
        """The manifest as JSON, which says when rows leave as well."""
        manifest = {
            "model": json.loads(self.description.to_json()),
            "leaves": "at or below" if self.description.is_low_when_sure else "at or above",
            "most_rows": self.most_rows,
            "stages": [_as_dict(entry) for entry in self.stages],
        }
        return json.dumps(manifest, indent=1) + "\n"

    @classmethod
    def from_json(cls, content: str | bytes, name: str) -> Manifest:
        """The manifest that :meth:`to_json` wrote.

        Raises:
            ExportError: where it is damaged, of another kind or of a newer format, naming ``name``.
        """
        try:
            manifest = json.loads(content)
            description = Description.from_json(json.dumps(manifest["model"]), name)
            entries = [StageEntry(**entry) for entry in manifest["stages"]]
            entries = [replace(entry, outputs=tuple(entry.outputs), inputs=dict(entry.inputs)) for entry in entries]
            _check(entries, description)
            return cls(description, tuple(entries), manifest.get("most_rows"))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ExportError):
                raise
            raise ExportError(f"{name} is damaged ({error}); export the model again") from error


def _as_dict(entry: StageEntry) -> dict[str, Any]:
    values = asdict(entry)
    if entry.arena_bytes is None:
        del values["arena_bytes"]  # which older readers do not know
    return values


def _check(entries: Sequence[StageEntry], description: Description) -> None:
    """Refuse stages from which some row would get no answer, or that of the wrong exit."""
    exits = [entry.exit_index for entry in entries]
    wanted = [*(k for k in range(len(description.thresholds)) if k in exits), len(description.exits) - 1]
    if exits != wanted:
        raise ValueError(f"its stages end at the exits {exits}, not in order and up to the last")
    known = {given.name for given in description.inputs}
    for entry in entries:
        if not isinstance(entry.file, str) or not entry.inputs.keys() <= known:
            raise ValueError(f"stage {entry.file} takes what no stage before it makes")
        known |= {*entry.outputs}
