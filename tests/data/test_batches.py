"""What loaders may yield, and what labels may be."""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from cet.data.batches import check_batch, class_indices, read_batches, split_batch

X, Y = torch.arange(12.0).view(4, 3), tensor([0, 2, -100, 1])
MASK = torch.ones(4, 3)
Sample = namedtuple("Sample", ["signal", "mask", "exercise"])


def same(a: Any, b: Any) -> bool:
    if isinstance(b, dict):
        return type(a) is dict and a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
    if isinstance(b, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a is b


@pytest.mark.parametrize(
    ("batch", "x"),
    [
        ((X, Y), X),
        ([X, Y], X),
        (((X, MASK), Y), (X, MASK)),
        (([X, MASK], Y), [X, MASK]),
        (({"signal": X, "mask": MASK}, Y), {"signal": X, "mask": MASK}),
        ((UserDict(signal=X), Y), {"signal": X}),
        ((X, MASK, Y), (X, MASK)),
        ([X, MASK, Y], (X, MASK)),
        (Sample(X, MASK, Y), (X, MASK)),
        ({"signal": X, "mask": MASK, "labels": Y}, {"signal": X, "mask": MASK}),
        (UserDict(signal=X, label=Y), {"signal": X}),
        ({"x": X, "y": Y}, {"x": X}),
        ({"labels": Y, "signal": X, "names": ["a", "b", "c", "d"]}, {"signal": X, "names": None}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_batch_is_inputs_and_labels(batch: Any, x: Any) -> None:
    if isinstance(x, dict) and "names" in x:
        x["names"] = batch["names"]
    kept = dict(batch) if isinstance(batch, dict | UserDict) else None
    got, y = split_batch(batch)
    assert same(got, x)
    assert y is Y
    assert kept is None or dict(batch).keys() == kept.keys()  # the loader's own dict is left whole


def test_batch_fn_takes_any_batch_apart() -> None:
    class Graphs:
        nodes, target = X, Y

    x, y = split_batch(Graphs(), lambda batch: ({"nodes": batch.nodes}, batch.target))
    assert same(x, {"nodes": X})
    assert y is Y
    x, y = split_batch({"labels": X, "target": Y}, lambda batch: ((batch["labels"],), batch["target"]))
    assert same(x, (X,))


@pytest.mark.parametrize(
    ("batch", "batch_fn", "message"),
    [
        (
            X,
            None,
            r"a batch is Tensor without labels; make the loader yield \(x, y\) or a dict with 'labels', or give ",
        ),
        (None, None, "a batch is NoneType without labels"),
        ("ab", None, "a batch is str without labels"),
        ((X,), None, "a batch is tuple of 1 without labels"),
        ((), None, "a batch is tuple of 0 without labels"),
        ({"x": X}, None, r"a batch is dict with the keys 'x' without labels; .* give batch_fn, batch -> \(x, y\)"),
        ({"labels": Y}, None, "a batch is dict with the keys 'labels' without inputs"),
        ({"x": X, "y": Y, "labels": Y}, None, "a batch has both 'labels' and 'y'; give batch_fn"),
        ((X, Y), 3, r"batch_fn is 3; give a function batch -> \(x, y\), or None"),
        ((X, Y), lambda batch: batch[0], r"batch_fn returns Tensor; return a pair \(x, y\)"),
        ((X, Y), lambda batch: (1, 2, 3), r"batch_fn returns tuple of 3; return a pair"),
    ],
)
def test_other_batches_are_refused_with_the_fix(batch: Any, batch_fn: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        split_batch(batch, batch_fn)


ONE_HOT = tensor([[1, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 0]])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_integers_of_any_size_are_class_indices(dtype: torch.dtype) -> None:
    y = class_indices(X, tensor([0, 2, 1, 1], dtype=dtype), 3)
    assert y.dtype == torch.int64
    assert y.tolist() == [0, 2, 1, 1]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64])
def test_one_hot_rows_are_class_indices(dtype: torch.dtype) -> None:
    y = class_indices(X, ONE_HOT.to(dtype), 3)
    assert y.dtype == torch.int64
    assert y.tolist() == [0, 2, 1, 1]


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32])
def test_labels_of_binary_cross_entropy_are_those_of_two_classes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    y = class_indices(X, tensor([0, 1, 1, 0]).to(dtype).view(shape), 2)
    assert y.dtype == torch.int64
    assert y.tolist() == [0, 1, 1, 0]


def test_int64_labels_are_used_as_they_are_and_unlabelled_rows_stay() -> None:
    assert class_indices(X, Y, 3) is Y
    assert class_indices(X, tensor([0.0, 1.0, -100.0, 1.0]), 2).tolist() == [0, 1, -100, 1]


@pytest.mark.parametrize("whose", ["", "the loader's "])
@pytest.mark.parametrize(
    ("y", "num_classes", "error", "message"),
    [
        (tensor([0, 1, 2, 3]), 3, ValueError, r"y holds the label 3 for 3 classes; give labels in \[0, 3\), or -100"),
        (tensor([0, 255, 2, 1], dtype=torch.uint8), 3, ValueError, "y holds the label 255 for 3 classes"),
        (tensor([0, 1, 2]), 3, ValueError, r"y has shape \(3,\) for 4 rows of x; give shape \(4,\)"),
        (tensor([[0], [1], [2], [0]]), 3, ValueError, r"y has shape \(4, 1\) for 4 rows of x; .*y\.squeeze\(1\)"),
        (
            torch.zeros(4, 8, 8, dtype=torch.int64),
            3,
            ValueError,
            r".*\(4, 8, 8\).*one class per sample: cet does no segmentation",
        ),
        (torch.zeros(4, 8, dtype=torch.int64), 3, ValueError, r".*\(4, 8\).*one class per sample"),
        (tensor([0.0, 1.0, 2.0, 0.0]), 3, TypeError, r"y is torch\.float32; give class indices by y\.long\(\)"),
        (tensor([0.5, 1.0, 0.0, 0.0]), 2, TypeError, r"y holds 0\.5, which is no class.*regression"),
        (tensor([0.25, 7.5, 2.0, 0.0]), 3, TypeError, r"y holds 0\.25, which is no class.*regression"),
        (tensor([0.0, torch.nan, 1.0, 0.0]), 2, TypeError, "y holds nan, which is no class"),
        (tensor([2.0, 1.0, 0.0, 0.0]), 2, TypeError, r"y is torch\.float32; give class indices by y\.long\(\)"),
        (torch.full((4, 3), 1 / 3), 3, TypeError, r"y holds soft labels.*y\.argmax\(dim=1\)"),
        (tensor([[1, 1, 0], *ONE_HOT[1:].tolist()]), 3, TypeError, "y holds several labels per row.*multi-label"),
        (tensor([[0, 0, 0], *ONE_HOT[1:].tolist()]), 3, TypeError, "y holds a row without a label"),
        (2 * ONE_HOT, 3, TypeError, r"y has shape \(4, 3\) but is not one-hot"),
        (ONE_HOT[:, :2], 3, ValueError, r"y has shape \(4, 2\)"),
        (torch.zeros(4, dtype=torch.complex64), 3, TypeError, r"y is torch\.complex64; give class indices as"),
        ([0, 1, 2, 0], 3, TypeError, "y is list; give class indices as an int64 tensor"),
        (3, None, TypeError, "y is int; give class indices as an int64 tensor"),
        (None, 3, TypeError, "y is NoneType"),
    ],
)
def test_labels_that_name_no_class_per_sample_are_refused(
    y: Any, num_classes: int | None, error: type[Exception], message: str, whose: str
) -> None:
    with pytest.raises(error, match=f"^{whose}{message}"):
        class_indices(X, y, num_classes, whose)


def test_labels_belong_to_the_rows_of_any_tensor() -> None:
    assert class_indices({"scale": 2.0, "adjacency": torch.eye(7), "x": X}, Y, 3) is Y
    with pytest.raises(TypeError, match="x is str without a tensor"):
        class_indices("ab", Y, 3)


def test_a_check_of_class_indices_converts_nothing() -> None:
    assert check_batch(X, Y, 3) == 4
    with pytest.raises(TypeError, match=r"y is torch\.int32 \(4,\); give class indices \(B,\) as an int64 tensor"):
        check_batch(X, Y.int(), 3)


class Single(Dataset[tuple[Tensor, int]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i >= 4:
            raise IndexError
        return X[i], int(Y[i])


class Unordered(Single):
    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        raise AssertionError("a dataset is not read")


def test_batches_are_read_checked_and_converted() -> None:
    loader = DataLoader(TensorDataset(X, MASK, tensor([0, 1, 1, 0]).int()), batch_size=3)
    (x, y), (x_last, y_last) = read_batches(loader, 3)
    assert torch.equal(x[0], X[:3])
    assert torch.equal(x[1], MASK[:3])
    assert len(x_last) == 2
    assert (y.dtype, y.tolist(), y_last.tolist()) == (torch.int64, [0, 1, 1], [0])
    assert [y.tolist() for _, y in read_batches([X], 3, lambda batch: (batch, Y))] == [Y.tolist()]


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        (None, TypeError, r"loader is None; give an iterable of batches, such as a torch\.utils\.data\.DataLoader"),
        ("train", TypeError, "loader is 'train'; give an iterable of batches"),
        (3, TypeError, "loader is 3; give an iterable of batches"),
        (X, TypeError, "loader is a Tensor; give an iterable of batches"),
        ({"train": [(X, Y)]}, TypeError, "loader is a dict; give an iterable of batches"),
        ((X, Y), TypeError, r"loader is one batch; give an iterable of batches, such as \[\(x, y\)\]"),
        (
            Single(),
            TypeError,
            r"the loader yields single samples, y is int without a batch dimension; .*DataLoader\(dataset, batch_size",
        ),
        ([(X[0], tensor(1))], TypeError, "the loader yields single samples"),
        ([X], TypeError, "a batch is Tensor without labels"),
        ([1, 2], TypeError, "a batch is int without labels"),
        ([(X, MASK, torch.rand(4))], TypeError, r"the loader's y holds .*; the last of 3 .*give batch_fn"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_loaders_of_anything_else_are_refused(loader: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(read_batches(loader, 3))


def test_a_loader_is_refused_before_it_is_read() -> None:
    def loader() -> Iterator[Any]:
        raise AssertionError("the loader was read")
        yield

    read_batches(loader(), 3)
    with pytest.raises(TypeError, match="batch_fn is 3"):
        read_batches(loader(), 3, 3)  # type: ignore[arg-type]
