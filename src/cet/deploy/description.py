"""What an exported file says of itself, and calls of it on NumPy arrays or tensors. Nothing here imports torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

FORMAT = "cet-exported"
FORMAT_VERSION = 1
KEY = "cet"
"""Under which name a file holds its description."""

BATCH = "batch"
OUTPUTS = ("logits", "exit_index", "score")
THRESHOLDS = "thresholds"


class ExportError(ValueError):
    """A model cannot be exported, or an exported file cannot be used."""


def reason_of(error: Exception) -> str:
    """The first line of an error of another library, with the next where that announces it, or its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 1 + lines[0].endswith(":")])


class Range(NamedTuple):
    """The least and the largest value of a size; None: any."""

    least: int
    largest: int | None


@dataclass(frozen=True)
class Input:
    """A tensor that a file takes.

    Attributes:
        name: as in the backbone's signature; parts of a nested input as ``name[0]`` or ``name['key']``.
        dtype: the name that NumPy and torch have for it.
        shape: for each dimension a number, or the name of a size that may vary; ``"batch"`` is the number of rows.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Description:
    """What an exported file says of itself.

    Attributes:
        exits: names of all exits, shallow first, the final one included.
        num_classes: how many logits a row has.
        class_labels: a name for each class, or None.
        score: of the policy, see :class:`cet.ExitPolicy`; the name of a function of the user's own.
        thresholds: one per early exit, None for a closed one.
        temperatures: one per exit, or None for 1 everywhere.
        thresholds_are_input: whether thresholds may be given at each call.
        batch: the number of rows that the file takes, None for any.
        inputs: the tensors that the file takes, in its order.
        constants: inputs of the example that are no tensors: they are part of the file.
        ignored: inputs of the example that the answer does not depend on.
        parameters: the parameters of the backbone's forward, in its order, a star before one that takes the rest.
        ranges: of the sizes that may vary besides the batch.
        logits_dtype: of the answers.
        versions: of the packages that wrote the file.
        own_is_low: of a score that is a function, whether a sample leaves at or below the threshold; None for others.
    """

    exits: tuple[str, ...]
    num_classes: int
    class_labels: tuple[str, ...] | None
    score: str
    thresholds: tuple[float | None, ...]
    temperatures: tuple[float, ...] | None
    thresholds_are_input: bool
    batch: int | None
    inputs: tuple[Input, ...]
    constants: Mapping[str, Any]
    ignored: tuple[str, ...]
    parameters: tuple[str, ...]
    ranges: Mapping[str, Range]
    logits_dtype: str
    versions: Mapping[str, str] = field(default_factory=dict)
    own_is_low: bool | None = None

    @property
    def is_low_when_sure(self) -> bool:
        """Whether a sample leaves at or below the threshold; else at or above it."""
        if self.own_is_low is not None:
            return self.own_is_low
        return self.score == "entropy"  # as in cet.ops.definitions.SCORES, which needs torch

    def to_json(self) -> str:
        """The description as JSON, in which infinite thresholds are the strings that ``float`` reads."""
        thresholds = [str(t) if t is not None and math.isinf(t) else t for t in self.thresholds]
        values = {**asdict(self), "thresholds": thresholds}
        if self.own_is_low is None:
            del values["own_is_low"]  # which older readers do not know
        return json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **values})

    @classmethod
    def from_json(cls, text: str | None, path: str) -> Description:
        """The description that :meth:`to_json` wrote.

        Raises:
            ExportError: when it is missing or damaged, or of a newer version, naming ``path``.
        """
        if text is None:
            raise ExportError(f"{path} was not written by cet.export; give a file that was")
        try:
            values = json.loads(text)
            version = values.pop("version") if values.pop("format", None) == FORMAT else None
            if isinstance(version, int) and version > FORMAT_VERSION:
                raise ExportError(f"{path} has format {version}, and this cet reads up to {FORMAT_VERSION}; update cet")
            values["inputs"] = tuple(Input(i["name"], i["dtype"], tuple(i["shape"])) for i in values["inputs"])
            values["ranges"] = {name: Range(*limits) for name, limits in values["ranges"].items()}
            values["thresholds"] = [None if t is None else float(t) for t in values["thresholds"]]
            lists = ("exits", "class_labels", "thresholds", "temperatures", "ignored", "parameters")
            values |= {name: None if values[name] is None else tuple(values[name]) for name in lists}
            return cls(**values)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ExportError(f"{path} has a damaged description ({error}); export the model again") from error
