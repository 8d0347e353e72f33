"""Smartwatch recordings of shoulder exercises, cut into windows and split by person.

The data are those of D. Burns et al., "Shoulder physiotherapy exercise recognition: machine learning the inertial
signals from a smartwatch", arXiv 1802.01489: 140 recordings of 10 people doing 7 exercises, acceleration in g and
angular velocity in rad/s at 50 Hz. The `seglearn` package (BSD licence) carries them in its wheel.
"""

from __future__ import annotations

import importlib.util
import io
import pickle
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Signals = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

SENSORS = (slice(0, 3), slice(3, 6))  # the axes of the accelerometer, then those of the gyroscope


@dataclass(frozen=True)
class Windows:
    """Labelled windows of sensor data.

    Attributes:
        x: ``(N, 6, L)`` float32, acceleration along x, y, z, then angular velocity about x, y, z.
        y: ``(N,)`` int64, the exercise, an index into ``classes``.
        person: ``(N,)`` int64, who wore the watch.
        classes: the names of the exercises.
        recording: ``(N,)`` int64, which recording the window was cut from; ``None`` where that is not known.
    """

    x: Tensor
    y: Tensor
    person: Tensor
    classes: tuple[str, ...]
    recording: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def of_persons(self, persons: Iterable[int]) -> Windows:
        """The windows of these persons, in the order they have here."""
        chosen = torch.isin(self.person, torch.tensor(list(persons), dtype=torch.int64))
        return self.rows(chosen)

    def rows(self, index: Tensor) -> Windows:
        """Some of the windows: those that a mask ``(N,)`` or indices name."""
        recording = None if self.recording is None else self.recording[index]
        return replace(self, x=self.x[index], y=self.y[index], person=self.person[index], recording=recording)


@dataclass(frozen=True)
class Split:
    """Windows of three disjoint sets of persons."""

    train: Windows
    calibration: Windows
    test: Windows


def find_dataset() -> Path:
    """Where the installed `seglearn` keeps the recordings; the package is not imported.

    Raises:
        FileNotFoundError: when it is not installed or lacks the file.
    """
    path = _installed_dataset()
    if path is None:
        raise FileNotFoundError(
            "seglearn/data/watch_dataset.npy is not installed; pip install 'cet[demo]', or pass the path of the file"
        )
    return path


def load_windows(path: Path | None = None, *, length: int = 128, stride: int = 32) -> Windows:
    """Cut every recording into windows; what is left at its end is dropped.

    Nothing in the file is executed: it is a pickle, but only lists, strings and arrays of numbers are admitted.

    Args:
        path: the recordings; those of the installed `seglearn` when not given.
        length: samples per window, 20 ms each.
        stride: samples from the start of one window to the start of the next.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged or holds anything else, or ``length`` or ``stride`` is out of range.
    """
    if length < 1 or stride < 1:
        raise ValueError(f"length is {length} and stride {stride}; give at least 1 sample for each")
    path = find_dataset() if path is None else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give the path of seglearn's watch_dataset.npy")
    content = path.read_bytes()
    try:
        signals, exercises, persons, classes = _recordings(_read_object_array(io.BytesIO(content)))
    except Exception as error:  # a damaged pickle may raise anything
        fix = "reinstall seglearn 1.2.5" if path == _installed_dataset() else "give seglearn 1.2.5's watch_dataset.npy"
        raise ValueError(f"{path} is damaged or holds no smartwatch recordings ({error}); {fix}") from error
    x, y, person, recording = [], [], [], []
    for index, (signal, exercise, subject) in enumerate(zip(signals, exercises, persons, strict=True)):
        for start in range(0, len(signal) - length + 1, stride):
            x.append(torch.tensor(signal[start : start + length].T, dtype=torch.float32))
            y.append(int(exercise))
            person.append(int(subject))
            recording.append(index)
    if not x:
        raise ValueError(f"length is {length}, longer than every recording in {path}; give a smaller one")
    return Windows(torch.stack(x), torch.tensor(y), torch.tensor(person), classes, torch.tensor(recording))


def split_by_person(windows: Windows, *, seed: int) -> Split:
    """One fifth of the persons for testing, one fifth for calibration, the others for training.

    Seeds 0 to 4 are the folds of one cross-validation, in which everyone is a test person once; 5 to 9 are another
    one, and so on. Each sensor is scaled to a root mean square of 1 over the training windows, its three axes alike,
    so that a rotated watch gives a rotated window; the direction of gravity stays in.

    Raises:
        ValueError: when there are fewer than 3 persons.
    """
    persons = sorted(set(windows.person.tolist()))
    if len(persons) < 3:
        raise ValueError(f"windows hold {len(persons)} persons; give at least 3, to train, to calibrate and to test")
    held_out = max(1, len(persons) // 5)
    folds = len(persons) // held_out
    order = torch.randperm(len(persons), generator=torch.Generator().manual_seed(seed // folds))
    shuffled = [persons[i] for i in order.roll(-held_out * (seed % folds)).tolist()]
    test, calibration, train = shuffled[:held_out], shuffled[held_out : 2 * held_out], shuffled[2 * held_out :]
    scaled = replace(windows, x=windows.x / _sensor_scale(windows.of_persons(train).x))
    return Split(scaled.of_persons(train), scaled.of_persons(calibration), scaled.of_persons(test))


def mislabelled(windows: Windows, share: float, draw: torch.Generator, *, whole_recordings: bool = False) -> Tensor:
    """Labels of which a share is wrong, each another class drawn at random, as happens where people note what they did.

    Args:
        windows: as they were recorded.
        share: in [0, 1], of the windows; of the recordings with ``whole_recordings``, all windows of which then get the
            same wrong label.
        draw: where the random numbers come from.
        whole_recordings: see above; the windows must know their recording.

    Returns:
        ``(N,)`` int64.

    Raises:
        ValueError: for a share out of range, and windows that do not know their recording.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; give a fraction in [0, 1]")
    if whole_recordings and windows.recording is None:
        raise ValueError("windows do not know which recording they are from; leave out whole_recordings")
    units = torch.arange(len(windows))
    if whole_recordings:
        units = windows.recording.unique(return_inverse=True)[1]  # type: ignore[union-attr]
    count = int(units.max()) + 1
    is_wrong = torch.zeros(count, dtype=torch.bool)
    is_wrong[torch.randperm(count, generator=draw)[: round(share * count)]] = True
    step = torch.randint(1, len(windows.classes), (count,), generator=draw)
    return torch.where(is_wrong[units], (windows.y + step[units]) % len(windows.classes), windows.y)


def _installed_dataset() -> Path | None:
    package = importlib.util.find_spec("seglearn")
    for location in (package and package.submodule_search_locations) or ():
        path = Path(location) / "data" / "watch_dataset.npy"
        if path.is_file():
            return path
    return None


def _sensor_scale(x: Tensor) -> Tensor:
    """(6, 1): the root mean square of each sensor, the same for its three axes."""
    scale = torch.empty(x.shape[1], 1)
    for axes in SENSORS:
        scale[axes] = x[:, axes].square().mean().sqrt()
    return scale


def _recordings(data: Any) -> tuple[list[Signals], Labels, Labels, tuple[str, ...]]:
    """Signals, exercise and person of every recording, and the names of the exercises, all checked."""
    signals = [array.value for array in data["X"]]
    exercises, persons, classes = data["y"].value, data["subject"].value, tuple(data["y_labels"])
    for index, signal in enumerate(signals):
        if signal.ndim != 2 or signal.shape[1] != 6 or not np.isfinite(signal).all():
            raise ValueError(f"recording {index} is no finite array of 6 columns")
    if not all(labels.shape == (len(signals),) and labels.dtype == np.int64 for labels in (exercises, persons)):
        raise ValueError("y and subject are not one whole number per recording")
    if not set(exercises.tolist()) <= set(range(len(classes))) or not all(isinstance(name, str) for name in classes):
        raise ValueError("y does not index y_labels")
    return signals, exercises, persons, classes


def _read_object_array(file: BinaryIO) -> Any:
    """The object in a .npy file that holds a 0-d object array, its arrays as :class:`_Array`."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("it is no .npy file of version 1.0")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if shape != () or dtype != np.dtype(object):
        raise ValueError(f"it holds an array of shape {shape} and dtype {dtype}")
    return _ArrayUnpickler(file).load().value[0]


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles lists, dicts, strings and NumPy arrays of float64 and int64, and can call nothing else.

    The functions with which NumPy rebuilds its arrays trust the pickle with sizes and flags, so not even those are
    called: stand-ins rebuild the arrays from their checked state.
    """

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return lambda *_: _Array()
            case "numpy", "ndarray":
                return None  # only an argument of _reconstruct
            case "numpy", "dtype":
                return lambda code, *_: _Dtype(code)
            case "_codecs", "encode":  # how protocol 2 writes bytes
                return lambda text, _: text.encode("latin1")
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array of numbers")


@dataclass
class _Dtype:
    """Stands in for a pickled ``numpy.dtype``."""

    code: str

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|"):
            raise ValueError(f"it holds numbers of byte order {state[1]!r}")


class _Array:
    """Stands in for a pickled ``numpy.ndarray``; ``value`` is the array, or the list of a flat object array."""

    value: Any

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        if dtype.code == "O8":
            self.value = content
        elif dtype.code in ("f8", "i8"):
            self.value = np.frombuffer(content, "<" + dtype.code).reshape(shape, order="F" if is_fortran else "C")
        else:
            raise ValueError(f"it holds an array of dtype {dtype.code!r}")
