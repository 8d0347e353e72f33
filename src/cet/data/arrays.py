"""One's own samples: arrays in an `.npz` file, checked, split by group, their labels mapped to classes and back.

The file holds `x`, one row per sample; `y`, one whole number or string per sample, -100 or the empty string where it
has no label; and, where samples come from people or devices, `group`, whose each sample is. Nothing in it is executed:
files that hold pickled objects are refused.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cet.data.batches import UNLABELLED

KEYS = ("x", "y", "group")

Classes = tuple[int, ...] | tuple[str, ...]


@dataclass(frozen=True)
class Arrays:
    """The samples of one file.

    Attributes:
        source: the name of the file, for errors.
        x: ``(n, C, ...)`` float32, finite, ``n >= 1``.
        y: ``(n,)`` whole numbers or strings, the labels as they are in the file; ``None`` where it holds none.
        group: ``(n,)`` whole numbers or strings, whose each sample is; ``None`` where this is not known.
    """

    source: str
    x: Tensor
    y: NDArray[Any] | None
    group: NDArray[Any] | None

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, index: NDArray[np.int64]) -> Arrays:
        """Some of the samples, in the order of ``index``."""
        return replace(
            self,
            x=self.x[torch.from_numpy(index)],
            y=None if self.y is None else self.y[index],
            group=None if self.group is None else self.group[index],
        )

    def groups(self) -> list[Any]:
        """Whose samples these are, each once; empty where this is not known."""
        return [] if self.group is None else np.unique(self.group).tolist()

    def labelled(self) -> Arrays:
        """The samples that have a label."""
        return self.rows(np.flatnonzero(self._has_label()))

    def class_indices(self, classes: Classes) -> Tensor:
        """The labels as positions in ``classes``, ``(n,)`` int64, -100 where there is none.

        Raises:
            ValueError: for a label that is not among them, and where there are no labels.
        """
        labels = self._labels()
        position: dict[Any, int] = {label: index for index, label in enumerate(classes)}
        position[_no_label(labels)] = UNLABELLED
        unknown = [label for label in np.unique(labels).tolist() if label not in position]
        if unknown:
            raise ValueError(
                f"{self.source}: y holds the label {unknown[0]!r}, which is none of the {len(classes)} classes of the "
                f"training samples ({listed(classes)}); leave its samples out, or train with it"
            )
        return torch.tensor([position[label] for label in labels.tolist()], dtype=torch.int64)

    def classes(self) -> Classes:
        """The labels, each once, in order.

        Raises:
            ValueError: where no sample has a label.
        """
        labels = self._labels()
        has_label = self._has_label()
        if not has_label.any():
            raise ValueError(
                f"{self.source}: no sample has a label in y; give some, so that there are classes to learn"
            )
        return tuple(np.unique(labels[has_label]).tolist())

    def _has_label(self) -> NDArray[np.bool_]:
        labels = self._labels()
        has_label: NDArray[np.bool_] = labels != _no_label(labels)
        return has_label

    def _labels(self) -> NDArray[Any]:
        if self.y is None:
            raise ValueError(f"{self.source} holds no y; add one label per sample")
        return self.y


@dataclass(frozen=True)
class Parts:
    """Samples for training, for calibration and for testing; no group is in two of them."""

    train: Arrays
    calibration: Arrays
    test: Arrays | None


def read_arrays(path: Path) -> Arrays:
    """Read and check a file.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is no `.npz` file of numbers and strings, lacks ``x``, holds other arrays than ``x``, ``y``
            and ``group``, arrays of different lengths, or samples that are not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give an .npz file with x, y and, if known, group")
    try:
        with np.load(path, allow_pickle=False) as content:
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array")
            unknown = [name for name in content.files if name not in KEYS]
            arrays = {name: content[name] for name in content.files if name in KEYS}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("it holds something else")
    except (ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, KeyError) as error:
        reason = "it holds objects, not numbers or strings" if "allow_pickle" in str(error) else str(error)
        if not zipfile.is_zipfile(path):
            reason = "it is no archive"
        raise ValueError(
            f"{path} is no .npz file of plain arrays ({reason}); write it by numpy.savez(path, x=x, y=y, group=group)"
        ) from error
    if unknown:
        raise ValueError(
            f"{path} holds {listed(unknown)} beside {' and '.join(arrays) or 'nothing else'}; rename it to one of "
            "x, y and group, or leave it out"
        )
    if "x" not in arrays:
        raise ValueError(f"{path} holds no x; add the samples under this name")
    x = arrays["x"]
    if x.ndim < 2 or len(x) == 0:
        raise ValueError(f"{path}: x has shape {x.shape}; give (samples, channels, length) with at least one sample")
    if x.dtype.kind not in "fiu":
        raise ValueError(f"{path}: x is {x.dtype}; give floating-point or whole numbers")
    with np.errstate(over="ignore"):
        samples = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    finite = samples.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        first, count = int((~finite).nonzero()[0, 0]), int((~finite).sum())
        raise ValueError(
            f"{path}: x is not finite in {count} of {len(x)} samples, first in sample {first}; leave them out, or fill "
            "in what is missing"
        )
    return Arrays(path.name, samples, _column(path, arrays, "y", len(x)), _column(path, arrays, "group", len(x)))


def split_parts(data: Arrays, calibration_share: float, test_share: float, seed: int) -> tuple[Arrays, ...]:
    """Samples for training, calibration and testing; a part whose share is 0 is left out.

    Whole groups are drawn where the samples have groups, so that nobody is in two parts; else samples are drawn class
    by class, so that every part has all classes. Samples without a label, and groups without one, train: nothing else
    can be done with them.

    Args:
        data: samples, some of which have a label.
        calibration_share: of the groups, or samples, that calibrate; at least one when > 0.
        test_share: likewise of those that test.
        seed: of the draw.

    Raises:
        ValueError: when there are fewer groups or samples with a label than parts, where no sample has a label, and for
            shares that leave nothing to train on.
    """
    data.classes()
    has_label = data._has_label()
    rng = np.random.default_rng(seed)
    shares = [share for share in (calibration_share, test_share) if share > 0]
    if sum(shares) >= 1:
        raise ValueError(
            f"the shares for calibration and testing, {calibration_share:g} and {test_share:g}, leave nothing to train "
            "on; give less than 1 together"
        )
    if data.group is not None:
        groups = np.array(data.labelled().groups())
        if len(groups) <= len(shares):
            raise ValueError(
                f"{data.source}: group names {len(groups)} with a label, too few for {len(shares) + 1} parts that "
                "share none; give samples of more, or files of their own for calibration and testing"
            )
        _, *held_out = (np.isin(data.group, groups[part]) for part in _cut(rng.permutation(len(groups)), shares))
        train = ~np.logical_or.reduce([np.zeros(len(data), dtype=bool), *held_out])
        return tuple(data.rows(np.flatnonzero(part)) for part in (train, *held_out))
    labels = data._labels()
    of_classes = [_cut(rng.permutation(np.flatnonzero(labels == label)), shares) for label in data.classes()]
    of_classes.append([np.flatnonzero(~has_label), *(np.empty(0, dtype=np.int64) for _ in shares)])
    parts = [np.sort(np.concatenate(part)) for part in zip(*of_classes, strict=True)]
    if not all(has_label[part].any() for part in parts):
        raise ValueError(
            f"{data.source}: {int(has_label.sum())} samples with a label are too few for {len(parts)} parts; give "
            "more, or files of their own for calibration and testing"
        )
    return tuple(data.rows(part) for part in parts)


def check_classes(part: Arrays, name: str, classes: Classes) -> None:
    """Refuse a part of the samples in which a class does not occur.

    Raises:
        ValueError: then.
    """
    absent = [label for label in classes if label not in set(part.classes())]
    if absent:
        raise ValueError(
            f"{part.source}: no {name} sample has the label {listed(absent)}; split with another seed, give samples of "
            "every class, or leave these labels out"
        )


def check_disjoint(parts: Iterable[tuple[str, Sequence[Any]]]) -> None:
    """Refuse parts that share a group.

    Args:
        parts: for each its name and groups.

    Raises:
        ValueError: then.
    """
    found: dict[Any, str] = {}
    for name, groups in parts:
        for group in groups:
            if group in found:
                raise ValueError(
                    f"group {group!r} is in the samples for {found[group]} and for {name}; keep the samples of one "
                    "group together, or rename it where it is another one"
                )
            found[group] = name


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel of samples ``(n, C, ...)``, each ``(C,)``; the latter is 1 for a
    channel that is constant."""
    channels = x.double().transpose(0, 1).flatten(1)
    mean, std = channels.mean(dim=1), channels.std(dim=1, correction=0)
    # A constant that float64 rounds has a tiny standard deviation.
    varies = std > 1e-9 * channels.abs().amax(dim=1)
    return mean.float(), std.where(varies, torch.ones_like(std)).float()


def _no_label(labels: NDArray[Any]) -> int | str:
    """What stands in ``y`` for a sample without a label."""
    return "" if labels.dtype.kind == "U" else UNLABELLED


def listed(names: Iterable[Any], at_most: int = 5) -> str:
    """Names for a message."""
    quoted = [repr(name) for name in names]
    more = f" and {len(quoted) - at_most} more" if len(quoted) > at_most else ""
    return ", ".join(quoted[:at_most]) + more


def _column(path: Path, arrays: dict[str, NDArray[Any]], name: str, num_samples: int) -> NDArray[Any] | None:
    """One whole number or string per sample."""
    if name not in arrays:
        return None
    values = arrays[name]
    if values.dtype.kind == "b":
        values = values.astype(np.int64)
    if values.dtype.kind not in "iuU":
        raise ValueError(f"{path}: {name} is {values.dtype}; give whole numbers or strings")
    if values.shape != (num_samples,):
        raise ValueError(f"{path}: {name} has shape {values.shape} for {num_samples} samples; give ({num_samples},)")
    return values


def _cut(order: NDArray[np.int64], shares: Sequence[float]) -> list[NDArray[np.int64]]:
    """The rest of ``order``, then a part of it for each share: at least one where more than one is left."""
    parts, rest = [], order
    for share in shares:
        size = min(max(1, round(share * len(order))), len(rest) - 1)
        parts.append(rest[:size])
        rest = rest[size:]
    return [rest, *parts]
