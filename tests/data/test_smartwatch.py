"""The smartwatch data: what is read, what is refused, and that people are never mixed."""

from __future__ import annotations

import io
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cet.data import smartwatch
from cet.data.smartwatch import find_dataset, load_windows, split_by_person


def recordings(lengths: tuple[int, ...] = (200, 150), **replaced: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "X": [rng.normal(size=(length, 6)) for length in lengths],
        "y": np.arange(len(lengths)) % 2,
        "subject": np.arange(len(lengths)) + 10,
        "y_labels": ["PEN", "ABD"],
        **replaced,
    }


def npy(content: Any, protocol: int = 2) -> bytes:
    file = io.BytesIO()
    array = np.empty((), dtype=object)
    array[()] = content
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    return file.getvalue() + pickle.dumps(array, protocol)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(content: bytes) -> Path:
        path = tmp_path / "watch.npy"
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(scope="module")
def windows() -> Any:
    return load_windows()


def test_windows_are_cut_from_the_recordings(write: Any) -> None:
    data = recordings((100, 70))
    windows = load_windows(write(npy(data)), length=64, stride=16)
    assert windows.x.shape == (4, 6, 64)
    assert windows.x.dtype == torch.float32
    assert windows.y.tolist() == [0, 0, 0, 1]
    assert windows.person.tolist() == [10, 10, 10, 11]
    assert windows.classes == ("PEN", "ABD")
    torch.testing.assert_close(windows.x[2], torch.tensor(data["X"][0][32:96].T, dtype=torch.float32), rtol=0, atol=0)
    torch.testing.assert_close(windows.x[3], torch.tensor(data["X"][1][:64].T, dtype=torch.float32), rtol=0, atol=0)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_every_pickle_protocol_that_numpy_has_written_is_read(write: Any, protocol: int) -> None:
    data = recordings()
    data["X"][0] = np.asfortranarray(data["X"][0])
    windows = load_windows(write(npy(data, protocol)), length=150)
    torch.testing.assert_close(windows.x[0], torch.tensor(data["X"][0][:150].T, dtype=torch.float32), rtol=0, atol=0)


class Calls:
    def __init__(self, function: Any, *args: Any) -> None:
        self.reduced = (function, args)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.mark.parametrize(
    "hide", [lambda bad: bad, lambda bad: recordings(y_labels=[bad]), lambda bad: recordings(X=bad)]
)
def test_a_malicious_pickle_is_refused_and_does_not_run(write: Any, tmp_path: Path, hide: Any) -> None:
    trace = tmp_path / "trace"
    path = write(npy(hide(Calls(os.mkdir, str(trace)))))
    with pytest.raises(ValueError, match=r"watch.npy is damaged or holds no smartwatch recordings.*mkdir"):
        load_windows(path)
    assert not trace.exists()
    np.load(path, allow_pickle=True)  # the same file does run where pickles are trusted
    assert trace.exists()


@pytest.mark.parametrize("function", [eval, getattr, np.load, np.memmap, pickle.loads, np.frombuffer])
def test_nothing_but_arrays_is_admitted(write: Any, function: Any) -> None:
    with pytest.raises(ValueError, match=f"asks for .*{function.__name__}"):
        load_windows(write(npy(recordings(y_labels=Calls(function, "1")))))


@pytest.mark.parametrize("kept", [0, 5, 40, 200, 3000, -1])
def test_a_truncated_file_is_refused(write: Any, kept: int) -> None:
    with pytest.raises(ValueError, match=r"watch.npy is damaged .*; give seglearn 1\.2\.5's watch_dataset\.npy"):
        load_windows(write(npy(recordings())[:kept]))


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ([1, 2], "list indices"),
        ({"X": []}, "'y'"),
        (recordings(X=[np.zeros((200, 3)), np.zeros((200, 6))]), "recording 0 is no finite array of 6 columns"),
        (recordings(X=[np.zeros((200, 6)), np.full((200, 6), np.nan)]), "recording 1 is no finite array"),
        (recordings(X=[np.zeros((200, 6), np.float16)] * 2), "dtype 'f2'"),
        (recordings(X=[np.zeros((200, 6), ">f8")] * 2), "byte order '>'"),
        (recordings(y=np.array([0, 1, 0])), "not one whole number per recording"),
        (recordings(subject=np.array([np.nan, 1.0])), "not one whole number per recording"),
        (recordings(y=np.array([0, 2])), "y does not index y_labels"),
        (recordings(y_labels=["PEN", 3]), "y does not index y_labels"),
    ],
)
def test_other_content_is_refused(write: Any, content: Any, rule: str) -> None:
    with pytest.raises(ValueError, match=f"watch.npy .*{rule}.*; give seglearn"):
        load_windows(write(npy(content)))


def test_another_npy_file_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "numbers.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"numbers.npy .* shape \(3,\) and dtype float64"):
        load_windows(tmp_path / "numbers.npy")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.npy is no file; give the path"):
        load_windows(tmp_path / "none.npy")


def test_the_mend_is_named_where_seglearn_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"not installed; pip install 'cet\[demo\]'"):
        find_dataset()


@pytest.mark.parametrize(("length", "stride"), [(0, 1), (1, 0), (10**6, 1)])
def test_windows_that_cannot_be_cut_are_refused(write: Any, length: int, stride: int) -> None:
    with pytest.raises(ValueError, match=f"length is {length}"):
        load_windows(write(npy(recordings())), length=length, stride=stride)


def test_the_installed_data_are_those_of_the_paper(windows: Any) -> None:
    assert len(windows) == 7141
    assert windows.person.unique().tolist() == list(range(1, 11))
    assert windows.classes == ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
    gravity = windows.x[:, :3].square().sum(1).sqrt().mean()
    assert 0.9 < gravity < 1.3  # in g


def test_seglearn_is_not_imported(windows: Any) -> None:
    assert "seglearn" not in sys.modules


@pytest.mark.parametrize("seed", [0, 3, 7])
def test_people_are_never_mixed(windows: Any, seed: int) -> None:
    split = split_by_person(windows, seed=seed)
    people = [set(part.person.tolist()) for part in (split.train, split.calibration, split.test)]
    assert [len(each) for each in people] == [6, 2, 2]
    assert len(set.union(*people)) == 10
    assert len(split.train) + len(split.calibration) + len(split.test) == len(windows)


def test_five_seeds_test_everyone_once(windows: Any) -> None:
    tested = [p for seed in range(5) for p in split_by_person(windows, seed=seed).test.person.unique().tolist()]
    assert sorted(tested) == list(range(1, 11))
    other = [split_by_person(windows, seed=seed).test.person.unique().tolist() for seed in range(5, 10)]
    assert sorted(map(tuple, other)) != sorted(zip(tested[::2], tested[1::2], strict=True))


def test_the_scale_comes_from_the_training_people_and_keeps_directions(windows: Any) -> None:
    split = split_by_person(windows, seed=0)
    for axes in (slice(0, 3), slice(3, 6)):
        assert float(split.train.x[:, axes].square().mean()) == pytest.approx(1.0, rel=1e-4)
        raw = windows.of_persons(split.test.person.unique().tolist()).x[:, axes]
        ratio = (split.test.x[:, axes] / raw)[raw.abs() > 1e-3]
        assert float(ratio.std() / ratio.mean()) < 1e-3


def test_too_few_people_are_refused(windows: Any) -> None:
    with pytest.raises(ValueError, match="windows hold 2 persons; give at least 3"):
        split_by_person(windows.of_persons([1, 2]), seed=0)


def test_only_the_installed_recordings_are_mended_by_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "watch_dataset.npy"
    path.write_bytes(b"not the recordings")
    monkeypatch.setattr(smartwatch, "_installed_dataset", lambda: path)
    with pytest.raises(ValueError, match=r"damaged .*; reinstall seglearn 1\.2\.5"):
        load_windows()
