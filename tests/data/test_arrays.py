"""Arrays of one's own: what is refused, how they are split, and how labels become classes and labels again."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cet.data.arrays import (
    Arrays,
    channel_statistics,
    check_classes,
    check_disjoint,
    read_arrays,
    split_parts,
)


def saved(folder: Path, **arrays: Any) -> Path:
    path = folder / "data.npz"
    np.savez(path, **arrays)
    return path


def samples(labels: Any, group: Any = None) -> Arrays:
    y = np.array(labels)
    x = torch.arange(len(y), dtype=torch.float32).view(-1, 1, 1)
    return Arrays("data.npz", x, y, None if group is None else np.array(group))


X = np.arange(24.0).reshape(4, 2, 3)


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    data = read_arrays(saved(tmp_path, x=X, y=["b", "a", "b", "c"], group=[7, 7, 8, 9]))
    assert data.x.dtype == torch.float32
    assert np.array_equal(data.x.numpy(), X)
    assert data.classes() == ("a", "b", "c")
    assert data.groups() == [7, 8, 9]
    assert len(data) == 4
    assert read_arrays(saved(tmp_path, x=X)).groups() == []


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([3, -2, 3, 10], (-2, 3, 10)),
        (np.array([3, 3, 0, 1], dtype=np.uint8), (0, 1, 3)),
        ([True, False, True, True], (0, 1)),
        (["walk", "sit", "walk", "été"], ("sit", "walk", "été")),
    ],
)
def test_labels_become_classes_and_labels_again(tmp_path: Path, labels: Any, classes: tuple[Any, ...]) -> None:
    data = read_arrays(saved(tmp_path, x=X, y=labels))
    assert data.classes() == classes
    indices = data.class_indices(classes)
    assert indices.dtype == torch.int64
    assert [classes[index] for index in indices.tolist()] == np.asarray(labels).tolist()
    assert all(type(label) in (int, str) for label in data.classes())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": [1, 2, 3, 4]}, r"data\.npz holds no x; add the samples"),
        ({"x": X, "groups": [1, 1, 2, 2]}, "holds 'groups' beside x; rename it to one of x, y and group"),
        ({"x": X[:, 0, 0]}, r"x has shape \(4,\); give \(samples, channels, length\)"),
        ({"x": X[:0]}, "with at least one sample"),
        ({"x": X.astype(str)}, "x is <U.*; give floating-point or whole numbers"),
        ({"x": X.astype(complex)}, "x is complex128"),
        (
            {"x": X.astype(object)},
            r"no \.npz file of plain arrays \(it holds objects, not numbers or strings\); write it",
        ),
        ({"x": X, "y": np.array(["a", 1, None, 2], dtype=object)}, "it holds objects"),
        (
            {"x": np.where(np.arange(4)[:, None, None] == 2, np.nan, X)},
            "not finite in 1 of 4 samples, first in sample 2",
        ),
        ({"x": np.where(X > 11, np.inf, X)}, "not finite in 2 of 4 samples, first in sample 2"),
        ({"x": X * 1e300}, "not finite in 4 of 4 samples, first in sample 0"),
        ({"x": X, "y": [1, 2, 3]}, r"y has shape \(3,\) for 4 samples; give \(4,\)"),
        ({"x": X, "y": [[1], [2], [3], [4]]}, r"y has shape \(4, 1\)"),
        ({"x": X, "y": [1.0, 2.0, 3.0, 4.0]}, "y is float64; give whole numbers or strings"),
        ({"x": X, "group": [1, 2]}, r"group has shape \(2,\) for 4 samples"),
        ({"x": X, "group": [0.5, 1, 2, 3]}, "group is float64"),
    ],
)
def test_bad_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_arrays(saved(tmp_path, **arrays))
    assert "\n" not in str(error.value)
    assert "data.npz" in str(error.value)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "executed",)

    path = saved(tmp_path, x=X, y=np.array([Bomb()] * 4, dtype=object))
    with pytest.raises(ValueError, match="it holds objects"):
        read_arrays(path)
    assert not (tmp_path / "executed").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    with pytest.raises(FileNotFoundError, match=r"data.npz is no file; give an \.npz file"):
        read_arrays(path)
    with pytest.raises(FileNotFoundError, match="is no file"):
        read_arrays(tmp_path)
    good = saved(tmp_path, x=X).read_bytes()
    np.save(tmp_path / "single.npy", X)
    single = (tmp_path / "single.npy").read_bytes()
    flipped = bytearray(good)
    flipped[200] ^= 255
    for content in (b"", b"x,y\n1,2\n", good[:-40], single, bytes(flipped), good[:100]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"data.npz is no \.npz file of plain arrays \("):
            read_arrays(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", "no array")
    with pytest.raises(ValueError, match=r"is no \.npz file of plain arrays"):
        read_arrays(path)


def test_labels_must_be_known_and_there() -> None:
    data = samples(["a", "b", "x", "y"])
    with pytest.raises(
        ValueError, match=r"data\.npz: y holds the label 'x', which is none of the 2 classes of the tra"
    ):
        data.class_indices(("a", "b"))
    with pytest.raises(ValueError, match="the label 0, which"):
        samples([0, 1]).class_indices(("0", "1"))
    unlabelled = Arrays("new.npz", torch.zeros(2, 1, 1), None, None)
    for use in (unlabelled.classes, lambda: unlabelled.class_indices((0,))):
        with pytest.raises(ValueError, match=r"new\.npz holds no y; add one label per sample"):
            use()


def test_a_class_that_a_part_lacks_is_named() -> None:
    check_classes(samples([1, 2]), "train", (1, 2))
    with pytest.raises(ValueError, match=r"no calibration sample has the label 'b', 'c'; split with another seed"):
        check_classes(samples(["a", "a"]), "calibration", ("a", "b", "c"))


def test_groups_in_two_parts_are_refused() -> None:
    check_disjoint([("train", ["a"]), ("calibration", []), ("test", ["b"])])
    with pytest.raises(ValueError, match="group 'a' is in the samples for train and for test; keep"):
        check_disjoint([("train", ["b", "a"]), ("calibration", ["c"]), ("test", ["a"])])


def test_shares_that_leave_nothing_to_train_on_are_refused() -> None:
    for groups in (None, list(range(100))):
        with pytest.raises(ValueError, match=r"0\.5 and 0\.5, leave nothing to train on; give less than 1"):
            split_parts(samples([0] * 100, groups), 0.5, 0.5, 0)
    with pytest.raises(ValueError, match="2 samples with a label are too few for 3 parts; give more"):
        split_parts(samples(["walk", "stand"]), 0.2, 0.2, 0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8)), min_size=12, max_size=60),
    st.booleans(),
    st.sampled_from([(0.2, 0.2), (0.5, 0.4), (0.01, 0.3), (0.3, 0.0), (0.0, 0.0)]),
    st.integers(0, 5),
)
def test_every_sample_is_in_one_part(
    rows: list[tuple[int, int]], has_groups: bool, shares: tuple[float, float], seed: int
) -> None:
    data = samples([row[0] for row in rows], [row[1] for row in rows] if has_groups else None)
    num_parts = 1 + sum(share > 0 for share in shares)
    if has_groups and len(data.groups()) < num_parts:
        with pytest.raises(ValueError, match=r"group names \d with a label, too few for \d parts that share none"):
            split_parts(data, *shares, seed)
        return
    parts = split_parts(data, *shares, seed)
    assert len(parts) == num_parts
    positions = torch.cat([part.x.flatten() for part in parts])
    assert sorted(positions.tolist()) == list(range(len(rows)))
    for part in parts:
        assert part.y is not None
        assert part.y.tolist() == [rows[int(i)][0] for i in part.x.flatten()]
        assert len(part) or not has_groups
    check_disjoint((str(index), part.groups()) for index, part in enumerate(parts))
    again = split_parts(data, *shares, seed)
    assert all(torch.equal(a.x, b.x) for a, b in zip(parts, again, strict=True))


def test_shares_are_those_asked_for() -> None:
    by_sample = split_parts(samples([0] * 50 + [1] * 50), 0.2, 0.3, 0)
    assert [len(part) for part in by_sample] == [50, 20, 30]
    assert all(part.classes() == (0, 1) for part in by_sample)
    by_group = split_parts(samples([0] * 100, [f"p{i % 10}" for i in range(100)]), 0.2, 0.3, 0)
    assert [len(part.groups()) for part in by_group] == [5, 2, 3]
    seeds = {tuple(split_parts(samples([0] * 100, list(range(100))), 0.2, 0.2, seed)[1].groups()) for seed in range(5)}
    assert len(seeds) == 5


def test_what_has_no_label_trains() -> None:
    """Among them a person of whom nothing is labelled, as one whom a model is adapted to."""
    y, group = [0, 1] * 50, [f"p{i // 10}" for i in range(100)]
    known, *held_out = split_parts(samples(y, group), 0.2, 0.3, 0)
    more = samples([*y, *[-100] * 30], [*group, *(f"new{i // 3}" for i in range(30))])
    train, *same = split_parts(more, 0.2, 0.3, 0)
    assert [part.groups() for part in same] == [part.groups() for part in held_out]
    assert train.groups() == sorted([*known.groups(), *(f"new{i}" for i in range(10))])
    train, *same = split_parts(samples([*y, *[-100] * 30]), 0.2, 0.3, 0)
    assert [len(train), *map(len, same)] == [80, 20, 30]
    assert all(part.labelled().x.shape == part.x.shape for part in same)
    with pytest.raises(ValueError, match="no sample has a label in y"):
        split_parts(samples([-100] * 4, ["a", "b", "c", "d"]), 0.2, 0.2, 0)


def test_channels_are_standardised() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 3, 20) * torch.tensor([2.0, 1e-6, 0.0])[:, None] + torch.tensor([5.0, 0.0, 0.1])[:, None]
    mean, scale = channel_statistics(x)
    assert mean.dtype == scale.dtype == torch.float32
    assert mean.tolist() == pytest.approx(x.double().mean((0, 2)).tolist(), abs=1e-7)
    assert scale[:2].tolist() == pytest.approx(x.double().std((0, 2), correction=0)[:2].tolist(), rel=1e-6)
    assert scale[2] == 1.0


@pytest.mark.parametrize(("y", "none"), [(np.array([3, -100, 7]), -100), (np.array(["a", "", "b"]), "")])
def test_samples_may_lack_a_label(y: Any, none: Any) -> None:
    data = Arrays("f.npz", torch.zeros(3, 2, 4), y, None)
    assert data.classes() == (y[0], y[2])
    assert data.class_indices(data.classes()).tolist() == [0, -100, 1]
    assert data.labelled().y.tolist() == [y[0], y[2]]  # type: ignore[union-attr]
    unlabelled = Arrays("f.npz", data.x, np.full_like(y, none), None)
    with pytest.raises(ValueError, match=r"f\.npz: no sample has a label in y; give some"):
        unlabelled.classes()
