"""What tests of formats with all stages in one file share: answers at several numbers of rows, bad input."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cet
from cet.deploy.check import NEAR
from cet.deploy.loaded import LoadedModel
from cet.deploy.seal import sealed
from cet.ops.definitions import ScoreName
from families import FAMILIES
from oracle import policy_between_scores, spread_logits


def check_answers(
    name: str,
    score: ScoreName,
    path: Path,
    sizes: tuple[int, ...],
    batch: Any = "dynamic",
    load: Callable[[Path], LoadedModel] = cet.load_exported,
) -> None:
    """Exits, logits and scores of a family are those of its model, about half of the rows leaving at each exit."""
    family = FAMILIES[name]
    torch.manual_seed(1)
    inputs = family.inputs(max(64, sum(sizes)))
    few = {key: value[:64] for key, value in inputs.items()}
    model = cet.EarlyExit(family.build().eval(), family.exits, {key: value[:4] for key, value in few.items()}).eval()
    spread_logits(model, few)
    model.policy = policy_between_scores(model, few, score, [0.5] * (model.num_exits - 1), (1.5,) * model.num_exits)
    report = cet.export(model, path, {key: value[:4] for key, value in few.items()}, batch=batch, thresholds="input")
    files = [*path.iterdir()] if path.is_dir() else [path]
    assert report.num_bytes == sum(file.stat().st_size for file in files)
    loaded = load(path)
    start, num_near, left = 0, 0, set()
    for rows in sizes:
        part = {key: value[start : start + rows] for key, value in inputs.items()}
        with torch.no_grad():
            near = torch.zeros(rows, dtype=torch.bool)
            for (_, scores), threshold in zip(model.exit_answers(**part), model.policy.thresholds, strict=False):
                near |= (scores - threshold).abs() <= NEAR
        sure = ~near.numpy()
        expected, got = model.predict(**part), loaded.predict(**{key: value.numpy() for key, value in part.items()})
        np.testing.assert_array_equal(got.exit_index[sure], expected.exit_index.numpy()[sure])
        np.testing.assert_allclose(got.logits[sure], expected.logits.numpy()[sure], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.score[sure], expected.score.numpy()[sure], rtol=1e-3, atol=1e-5)
        assert (got.exit_index.dtype, got.score.dtype) == (np.int64, np.float32)
        num_near += int(near.sum())
        left |= set(expected.exit_index.tolist())
        start += rows
    assert len(left) > 1
    assert num_near <= 0.1 * sum(sizes)
    if load is not cet.load_exported:  # another reader may know the thresholds of the file alone
        return
    loaded.thresholds = (None,) * (model.num_exits - 1)
    assert loaded.predict(**{key: value[:1] for key, value in few.items()}).exit_index == model.num_exits - 1
    empty = loaded.predict(**{key: value[:0].numpy() for key, value in few.items()}) if batch == "dynamic" else None
    assert empty is None or empty.logits.shape == (0, model.num_classes)


def passing_on(score: ScoreName) -> cet.EarlyExit:
    """A model whose first exit has its input for logits."""
    layers = [nn.Linear(5, 5, bias=False), nn.Linear(5, 5)]
    model = cet.EarlyExit(nn.Sequential(*layers), ["0"], (torch.randn(8, 5),)).eval()
    with torch.no_grad():
        for linear in (layers[0], model.heads[0].linear):
            linear.weight.copy_(torch.eye(5))
        model.heads[0].linear.bias.zero_()
    model.policy = cet.ExitPolicy(score, (0.5,), (1.5, 0.7))
    return model


def check_scores(score: ScoreName, path: Path) -> None:
    """A score is that of the model for logits of any size; a row whose score is NaN never leaves early."""
    model = passing_on(score)
    cet.export(model, path, thresholds="input")
    x = torch.randn(30, 5) * 3
    x[3, 1], x[4, 2], x[5], x[6], x[7, 0] = torch.nan, torch.inf, torch.nan, 1e30, 1e38
    x[8] = torch.tensor([2.0, 2.0, -1.0, 0.0, 2.0])  # equal ones
    expected, got = model.predict(x), cet.load_exported(path).predict(x)
    assert torch.equal(got.exit_index, expected.exit_index)
    assert expected.exit_index[[3, 4, 5]].tolist() == [1, 1, 1]
    assert set(expected.exit_index.tolist()) == {0, 1}
    torch.testing.assert_close(got.score, expected.score, equal_nan=True, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.logits, expected.logits, equal_nan=True, rtol=1e-4, atol=1e-5)


def small_model() -> cet.EarlyExit:
    """With a second exit that is closed."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    model = cet.EarlyExit(nn.Sequential(*layers), ["1", "3"], (torch.randn(8, 4),)).eval()
    model.policy = cet.ExitPolicy("confidence", (0.45, None))
    return model


def check_small_file(file: Path, model: cet.EarlyExit) -> LoadedModel:
    """A file with baked thresholds: answers, what it says of itself, and the calls that it refuses."""
    loaded = cet.load_exported(file)
    x = torch.randn(20, 4)
    assert torch.equal(loaded.predict(x).exit_index, model.predict(x).exit_index)
    assert set(model.predict(x).exit_index.tolist()) == {0, 2}
    assert (loaded.exit_names, loaded.class_labels) == (("1", "3", "final"), ("a", "b", "c"))
    read_only = x.numpy().copy()
    read_only.flags.writeable = False
    assert isinstance(loaded.predict(read_only).logits, np.ndarray)
    turned = np.asfortranarray(x.numpy())
    np.testing.assert_array_equal(loaded.predict(turned).exit_index, model.predict(x).exit_index.numpy())
    for wrong, message in (
        (np.zeros((2, 5), np.float32), r"input has shape \(2, 5\) but the file takes \(batch, 4\)"),
        (np.zeros((2, 4)), "input is float64 but the file takes float32; convert it"),
        ([[0.0] * 4], "input is list; give a NumPy array or a tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loaded.predict(wrong)
    with pytest.raises(ValueError, match="thresholds are part of this file"):
        loaded.thresholds = (0.5, 0.5)
    return loaded


def check_bad_files(file: Path, foreign: bytes, tmp_path: Path, runtime: str) -> None:
    """Files that are damaged, of others or missing are refused."""
    bad = (tmp_path / "bad").with_suffix(file.suffix)
    whole = file.read_bytes()
    for content in (b"", b"no model" * 50, whole[: len(whole) // 2], whole[:-20], whole[:200] + bytes(200)):
        bad.write_bytes(content)
        with pytest.raises(cet.ExportError, match=r"bad.* does not end as files of cet.export do: .*; export it again"):
            cet.load_exported(bad)
    for place in range(0, len(whole) - 100, len(whole) // 40):
        bad.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(cet.ExportError, match=r"bad.* is damaged: its bytes are not those that were written"):
            cet.load_exported(bad)
    bad.write_bytes(sealed(b"no model" * 50))
    with pytest.raises(cet.ExportError, match=rf"{runtime} cannot read .*bad.* \(.*\); export it again"):
        cet.load_exported(bad)
    bad.write_bytes(sealed(foreign))
    with pytest.raises(cet.ExportError, match=r"was not written by cet.export; give a file that was"):
        cet.load_exported(bad)
    with pytest.raises(FileNotFoundError, match=r"is no file; give the path that cet.export wrote"):
        cet.load_exported(tmp_path / f"missing{file.suffix}")
    shutil.copy(file, tmp_path / "named")
    with pytest.raises(ValueError, match="no known format"):
        cet.load_exported(tmp_path / "named")


class Svd(nn.Module):
    """Has no kernel in either runtime."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.linalg.svd(x.unflatten(1, (2, 2)))[1].sum(dim=1, keepdim=True)
