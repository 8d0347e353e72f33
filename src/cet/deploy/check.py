"""Compares an exported file with the model that it was made from, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from cet.data.batches import UNLABELLED, as_call
from cet.deploy.description import BATCH, Description, ExportError, reason_of
from cet.deploy.loaded import LoadedModel
from cet.deploy.segments import ExportedStages, with_rows
from cet.model.check import AnswerMismatchError
from cet.model.output import ExitOutput
from cet.partition.inputs import copied
from cet.partition.verify import coarsest_dtype, is_close

T = TypeVar("T")
Thresholds = tuple[float | None, ...]

NEAR = 1e-4
"""A score so near to a threshold may fall on either side of it, as two runtimes round differently."""

_ROWS = 16


@dataclass(frozen=True)
class Comparison:
    """What came of comparing a file with its model.

    Attributes:
        rows: how many answers were compared.
        near: how many more were left out, since a score of theirs is within 1e-4 of a threshold.
        by_exit: how many of the compared rows left at each exit.
        largest_difference: between two logits.
    """

    rows: int
    near: int
    by_exit: tuple[int, ...]
    largest_difference: float


@dataclass(frozen=True)
class Agreement:
    """How far the answers of a quantised file are those of its model.

    Attributes:
        rows: how many were compared at every exit.
        same: for each exit, the share of them to which both give the same class.
        labelled: how many of them have a label.
        accuracy: for each exit, that of the model and that of the file on these; empty without labels.
    """

    rows: int
    same: tuple[float, ...]
    labelled: int
    accuracy: tuple[tuple[float, float], ...]


@torch.no_grad()
def agreement(loaded: LoadedModel, stages: ExportedStages, batches: Iterable[tuple[Any, Tensor]]) -> Agreement:
    """Compare a quantised file, whose thresholds are an input, with its model at every exit, on batches ``(x, y)``."""
    found, labels = [], []
    for x, y in batches:
        args, kwargs = as_call(x)
        inputs = stages.input_format.flatten(args, kwargs)
        by_model = stages.model.exit_answers(*args, **kwargs)
        for rows in parts_of(inputs, stages.input_format.is_batched, loaded.description.batch):
            args, kwargs = stages.input_format.unflatten(rows)
            by_file = loaded.exit_answers(*args, **kwargs)
            found.append(torch.stack([logits.argmax(1) for logits, _ in by_file]))
        labels.append((y, torch.stack([logits.argmax(1) for logits, _ in by_model])))
    y = torch.cat([y for y, _ in labels])
    models, files = torch.cat([classes for _, classes in labels], 1), torch.cat(found, 1)
    known = y != UNLABELLED
    accuracy = [((at == y)[:, known].double().mean(1)).tolist() for at in (models, files)] if known.any() else [[], []]
    same = (models == files).double().mean(1).tolist()
    return Agreement(len(y), tuple(same), int(known.sum()), tuple(zip(*accuracy, strict=True)))


@torch.no_grad()
def compare(loaded: LoadedModel, stages: ExportedStages) -> Comparison:
    """Compare exits, logits and scores of the example and of noise like it, for one row and for many.

    Where thresholds are an input of the file they are also set such that about half of the rows leave at each exit, and
    all at one of them, so that every way through the file is taken.

    Raises:
        AnswerMismatchError: naming the exit at which the first row differs.
        ValueError: where no answer to the example is finite.
    """
    description, dtype = loaded.description, coarsest_dtype(stages.model)
    own = loaded.thresholds
    rows, near, largest, is_finite = 0, 0, 0.0, False
    by_exit = [0] * len(description.exits)
    for inputs in _probes(stages, description):
        args, kwargs = stages.input_format.unflatten(copied(inputs))
        every_exit = stages.model.exit_answers(*args, **kwargs)
        forced = _forced(every_exit, stages, description) if description.thresholds_are_input else ()
        given = dict(zip(stages.input_format.names, inputs, strict=True))
        tensors = [given[expected.name] for expected in description.inputs]
        for thresholds in (own, *forced):
            if description.thresholds_are_input:
                loaded.thresholds = thresholds
            got = _answer(loaded, tensors)
            logits, exit_index, score, is_near = _expected(every_exit, thresholds, description)
            sure = ~is_near
            for k, exit_name in enumerate(description.exits):
                chosen = sure & (exit_index == k)
                pairs = ((got.logits[chosen], logits[chosen]), (got.score[chosen], score[chosen]))
                same = torch.equal(got.exit_index[chosen], exit_index[chosen])
                if not (same and all(is_close(answer, wanted, dtype) for answer, wanted in pairs)):
                    raise AnswerMismatchError(
                        f"the exported model answers otherwise than the model at exit {exit_name!r}; nothing was "
                        "written: report the backbone, or export it in another format"
                    )
                by_exit[k] += int(chosen.sum())
            rows, near = rows + int(sure.sum()), near + int(is_near.sum())
            if bool(sure.any()):
                is_finite |= bool(logits[sure].isfinite().any())
                largest = max(largest, float((got.logits[sure] - logits[sure]).abs().nan_to_num(0).max()))
    if description.thresholds_are_input:
        loaded.thresholds = own
    if not is_finite:
        raise ValueError("no answer to the example is finite, and nothing can be compared; give other example_inputs")
    return Comparison(rows, near, tuple(by_exit), largest)


def of_right_sizes(write: Callable[[bool], T], sizes_vary: bool) -> T:
    """What ``write`` makes, which takes whether sizes besides the batch may vary: with those of the example alone where
    a runtime answers otherwise at others, as some do that pool to several positions.

    Raises:
        AnswerMismatchError: where it answers otherwise at those of the example.
    """
    try:
        return write(sizes_vary)
    except AnswerMismatchError:
        if not sizes_vary:
            raise
    return write(False)


def _answer(loaded: LoadedModel, tensors: Sequence[Any]) -> ExitOutput:
    try:
        return loaded.answer(tensors)
    except ExportError:
        raise
    except Exception as error:  # each runtime has errors of its own
        raise AnswerMismatchError(
            f"the exported model fails where the model answers ({reason_of(error)}); nothing was written: report the "
            "backbone, or export it in another format"
        ) from error


def _expected(
    every_exit: Sequence[tuple[Tensor, Tensor]], thresholds: Thresholds, description: Description
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, exit index and score of each row, and whether one of its scores is near a threshold."""
    *early, (logits, scores) = every_exit
    exit_index = torch.full((len(logits),), len(early))
    is_near = torch.zeros(len(logits), dtype=torch.bool)
    for k, ((at_exit, exit_scores), threshold) in reversed(list(enumerate(zip(early, thresholds, strict=True)))):
        if threshold is None:
            continue
        leaves = exit_scores <= threshold if description.is_low_when_sure else exit_scores >= threshold
        logits = torch.where(leaves[:, None], at_exit, logits)
        scores = torch.where(leaves, exit_scores, scores)
        exit_index = torch.where(leaves, k, exit_index)
        is_near = (is_near & ~leaves) | ((exit_scores - threshold).abs() <= NEAR)
    if description.score == "patience" and description.own_is_low is None:
        # Counts are exact, so that it is what they count that may be near.
        gaps = [logits.float().nan_to_num(0.0).topk(min(2, logits.shape[1])).values for logits, _ in every_exit]
        is_near = torch.stack([top[:, 0] - top[:, -1] <= NEAR * top[:, 0].abs().clamp(min=1) for top in gaps]).any(0)
    return logits, exit_index, scores, is_near


def _forced(
    every_exit: Sequence[tuple[Tensor, Tensor]], stages: ExportedStages, description: Description
) -> Iterator[Thresholds]:
    """Thresholds by which all rows leave at one exit, for each; and by which half of those that come leave."""
    early = [segment.exit_index for segment in stages.segments[:-1]]
    is_low = description.is_low_when_sure
    always, closed = (math.inf if is_low else -math.inf), [None] * len(description.thresholds)
    for k in early:
        yield tuple(always if index == k else None for index in range(len(closed)))
    halving: list[float | None] = list(closed)
    kept = torch.ones(len(every_exit[0][0]), dtype=torch.bool)
    for k in early:
        scores = every_exit[k][1]
        ordered = scores[kept & ~scores.isnan()].sort().values
        if len(ordered) < 2:
            break
        middle = len(ordered) // 2
        halving[k] = threshold = float((ordered[middle - 1] + ordered[middle]) / 2)
        kept &= scores > threshold if is_low else scores < threshold
    yield tuple(halving)


def _probes(stages: ExportedStages, description: Description) -> Iterator[list[Any]]:
    """The example's rows; noise like them, in several numbers of rows and sizes, or each row alone."""
    is_batched = stages.input_format.is_batched
    given = list(stages.inputs)
    rows = min(len(given[is_batched.index(True)]), _ROWS)
    noise = torch.Generator().manual_seed(0)
    many = with_rows(given, is_batched, _ROWS)
    for index, value in enumerate(many):
        if is_batched[index] and value.is_floating_point():
            spread = value.float().nan_to_num(0, 0, 0).std().clamp(min=0.1)
            drawn = torch.randn(value.shape, generator=noise) * spread
            many[index] = (value + drawn.to(value.dtype)) if value.dtype.is_floating_point else value
    if description.batch is not None:
        for row in range(min(rows, 4)):
            yield _chosen(given, is_batched, slice(row, row + 1))
        for row in range(4):
            yield _chosen(many, is_batched, slice(row, row + 1))
    else:
        yield _chosen(given, is_batched, slice(rows))
        yield many
        yield _chosen(given, is_batched, slice(1))
    if description.ranges:
        few = _chosen(many, is_batched, slice(description.batch or 5))
        for shorter in _SHORTER:
            yield _shortened(few, stages, description, shorter)


def parts_of(inputs: Sequence[Any], is_batched: Sequence[bool], most: int | None) -> Iterator[list[Any]]:
    """A call in calls of at most so many rows."""
    rows = len(inputs[is_batched.index(True)])
    for at in range(0, rows, most or rows):
        yield _chosen(inputs, is_batched, slice(at, at + (most or rows)))


def _chosen(inputs: Sequence[Any], is_batched: Sequence[bool], rows: slice) -> list[Any]:
    return [value[rows] if batched else value for value, batched in zip(inputs, is_batched, strict=True)]


_SHORTER: tuple[Callable[[int], int], ...] = (lambda n: n * 2 // 3, lambda n: n - 1, lambda n: n - 2)
"""Sizes to try instead of the example's. Of two successive ones at most one is a multiple of anything."""


def _shortened(
    inputs: Sequence[Any], stages: ExportedStages, description: Description, shorter: Callable[[int], int]
) -> list[Any]:
    """The inputs with every size that may vary cut."""
    shortened = []
    for value, shape in zip(inputs, stages.shapes, strict=True):
        for dim, size in enumerate(shape or ()):
            if isinstance(size, str) and size != BATCH:
                length = value.shape[dim]
                value = value.narrow(dim, 0, min(length, max(description.ranges[size].least, shorter(length))))
        shortened.append(value)
    return shortened
