"""Which samples belong together: people, devices, recordings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from cet.data.batches import BatchFn, split_batch
from cet.words import counted

Ints = NDArray[np.int64]

Groups = Sequence[Any] | Tensor | NDArray[Any] | Callable[[Any], Any]
"""One entry per row in the order of the loader, or a function of a batch that returns them."""


class GroupReader:
    """Reads the groups of a loader's rows, beside its batches.

    Args:
        groups: as :func:`cet.calibrate` takes them; ``None``: rows are independent.
        loader: of the rows.
        batch_fn: of the loader, or ``None``.

    Raises:
        ValueError: when groups are listed for a loader that shuffles.
    """

    def __init__(self, groups: Groups | None, loader: Any = None, batch_fn: BatchFn | None = None) -> None:
        self._seen: list[NDArray[Any]] = []
        self._listed = None if groups is None or callable(groups) else _as_array(groups)
        self._untold = groups is None and _tells_of_groups(loader)
        self.batch_fn = batch_fn
        if self._listed is not None and isinstance(loader, DataLoader) and not _is_in_order(loader):
            raise ValueError(
                "groups are listed, but the loader shuffles its samples; give shuffle=False, or a function that "
                "returns the groups of a batch"
            )
        if callable(groups):

            def reading(batch: Any) -> tuple[Any, Any]:
                self._seen.append(_as_array(groups(batch)))
                return split_batch(batch, batch_fn)

            self.batch_fn = reading

    def indices(self, is_labelled: NDArray[np.bool_]) -> Ints | None:
        """The group of each labelled row, from 0; ``None`` without groups.

        Args:
            is_labelled: ``(N,)``, of all rows of the loader.

        Raises:
            ValueError: when there are not as many groups as rows, or one is missing.
        """
        of_rows = np.concatenate(self._seen) if self._seen else self._listed
        if of_rows is None:
            return None
        if of_rows.shape != is_labelled.shape:
            raise ValueError(
                f"groups has {counted(len(of_rows), 'entry', 'entries')} for {counted(len(is_labelled), 'row')} of the "
                "loader; give one per row"
            )
        if any(group is None or group != group for group in of_rows.tolist()):
            raise ValueError("groups holds a missing value; give the group of every row, or leave such rows out")
        _, index = np.unique(of_rows[is_labelled], return_inverse=True)
        return index.astype(np.int64)

    def notes(self, index: Ints | None) -> list[str]:
        """What the certificate should say of them."""
        if index is not None:
            num_groups = int(index.max()) + 1
            if num_groups == len(index) > 1:
                return ["every group holds a single row, so the groups tell nothing that rows do not"]
            are = counted(len(index), "sample is", "samples are")
            return [f"{are} in {counted(num_groups, 'group')}; only whole groups are taken to be independent"]
        if self._untold:
            return [
                "the loader's dataset has groups, which were not given: the promise holds only if its samples are "
                "independent, which overlapping windows of one recording are not; give groups="
            ]
        return [
            "samples are taken to be independent: where several are from one person, device or recording, give groups="
        ]


def _as_array(groups: Any) -> NDArray[Any]:
    if isinstance(groups, str | bytes) or not (hasattr(groups, "__len__") and hasattr(groups, "__iter__")):
        raise TypeError(f"groups is {groups!r}; give one entry per row, or a function of a batch that returns them")
    array = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
    if array.ndim != 1:
        raise ValueError(f"groups has shape {array.shape}; give one entry per row, (B,)")
    return array


def _is_in_order(loader: DataLoader[Any]) -> bool:
    sampler = getattr(loader, "sampler", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    return isinstance(getattr(batch_sampler, "sampler", sampler), SequentialSampler)


def _tells_of_groups(loader: Any) -> bool:
    """Whether the loader, or its dataset, has groups by that name."""
    return any(getattr(owner, "groups", None) is not None for owner in (loader, getattr(loader, "dataset", None)))
