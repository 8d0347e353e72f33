"""benchmarks.quality in its smoke size, and the arithmetic of its intervals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

from benchmarks.quality import report
from benchmarks.quality.__main__ import main
from benchmarks.quality.conditions import INPUTS, KINDS, LABELS, METHODS, SEEN, with_labels
from benchmarks.quality.figures import VALUES, Figures, _expected, _macro_f1
from benchmarks.quality.runs import split_of
from cet.data.smartwatch import Windows


def test_a_smoke_run_is_resumed_and_tells_all(tmp_path: Path) -> None:
    """The second call finds the trainings of the first."""
    args = ["--smoke", "--splits", "1", "--seeds", "1", "--labels", "40 % wrong windows"]
    args += ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "figures")]
    seen = []
    for _ in range(2):
        done = CliRunner().invoke(main, args)
        assert done.exit_code == 0, done.output
        seen.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()})
    assert seen[0] == seen[1]
    assert len(seen[0]) == 2
    figures = report.read_csv((tmp_path / "figures" / "quality.csv").read_text())
    assert len(figures) == 2 * 2 * len(INPUTS)  # methods, test persons
    assert {f.method for f in figures} == {"augmentation", "consistent"}
    assert all(0 <= getattr(f, value) <= 101 for f in figures for value in VALUES)
    assert all(f.flips == 0 for f in figures if f.severity == 0)
    summary = json.loads((tmp_path / "figures" / "quality.json").read_text())
    assert summary["smoke"] is True
    (primary,) = [d for d in summary["differences"] if "corrected" in d]
    assert (primary["labels"], primary["people"], primary["trainings"]) == ("40 % wrong windows", 2, 1)
    text = (tmp_path / "figures" / "quality.md").read_text()
    assert f"**{primary['mean']:+.1f} ± {primary['half_width']:.1f}**" in text
    assert (tmp_path / "figures" / "quality.png").read_bytes().startswith(b"\x89PNG")


def figure(method: str, person: int, seed: int, accuracy: float, kind: str = SEEN, severity: float = 1.0) -> Figures:
    zeros = dict.fromkeys(VALUES, 0.0)
    return Figures("full", method, person // 2, seed, person, kind, severity, **{**zeros, "accuracy": accuracy})


def test_intervals_are_over_people_and_paired() -> None:
    gains = [1.0, 3.0, 2.0, 4.0]
    figures = []
    for person, gain in enumerate(gains):
        for seed in (0, 1):
            base = 50.0 + 7 * person + seed
            figures += [figure("augmentation", person, seed, base), figure("consistent", person, seed, base + gain)]
    figures.append(figure("consistent", 9, 0, 99.0))  # nobody to compare with
    found = report.Table(figures).difference("full", "consistent", "perturbed")
    assert found is not None
    assert (found.mean, found.people) == (2.5, 4)
    error = np.std(gains, ddof=1) / 2
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 3) * error)
    assert found.corrected == pytest.approx(stats.t.ppf(1 - 0.05 / 8, 3) * error)
    assert report.read_csv(report.as_csv(figures).decode()) == figures


def test_a_measure_over_several_inputs_is_their_mean() -> None:
    unseen = [kind for kind in KINDS if kind != SEEN]
    figures = [
        figure(method, person, 0, 10.0 * k + (person + 1) * (method == "consistent"), kind)
        for method in ("augmentation", "consistent")
        for person in (0, 1)
        for k, kind in enumerate([SEEN, *unseen])
    ]
    found = report.Table(figures).difference("full", "consistent", "unseen")
    assert found is not None
    assert found.mean == pytest.approx(1.5)


def test_calibration_error_and_f1() -> None:
    sure, right = np.array([[0.9, 0.9, 0.9, 0.9]]), np.array([[1.0, 1.0, 1.0, 0.0]])
    assert _expected(sure - right, sure) == pytest.approx(0.15)
    assert _macro_f1(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])) == pytest.approx((2 / 3 + 0.5) / 2)


@pytest.fixture(scope="module")
def windows() -> Windows:
    return split_of(10).train


def test_labels_are_wrong_as_often_as_they_say(windows: Windows) -> None:
    assert windows.recording is not None
    for labels in LABELS:
        y = with_labels(windows, labels, 10, 0).y
        assert torch.equal(y, with_labels(windows, labels, 10, 0).y)
        if labels == "full":
            assert torch.equal(y, windows.y)
            continue
        assert not torch.equal(y, with_labels(windows, labels, 10, 1).y)
        changed = y != windows.y
        if labels == "5 % labels":
            assert int((~changed).sum()) == round(0.05 * len(y))
            assert set(y[changed].tolist()) == {-100}
        elif labels == "40 % wrong windows":
            assert int(changed.sum()) == round(0.4 * len(y))
            assert set(y.tolist()) == set(windows.y.tolist())
        else:
            recordings = windows.recording.unique()
            whole = [changed[windows.recording == r].float().mean().item() for r in recordings]
            assert sorted(set(whole)) == [0.0, 1.0]
            assert sum(whole) == round(0.2 * len(recordings))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != SEEN])
def test_unseen_kinds_leave_labels_and_input_alone_and_grow(kind: str) -> None:
    x = torch.randn(64, 6, 65)
    before = x.clone()
    moved = []
    for severity in (0.0, 0.5, 2.0):
        y = KINDS[kind](severity)(x, generator=torch.Generator().manual_seed(0))
        assert y.shape == x.shape
        assert y.isfinite().all()
        moved.append((y - x).square().mean().item())
    assert torch.equal(x, before)
    assert 0 == moved[0] < moved[1] < moved[2]


def test_all_methods_see_as_many_rows_a_step_and_take_as_many_steps() -> None:
    for labels in LABELS:
        for name, method in ((name, make(labels)) for name, make in METHODS.items()):
            recipe = method.recipe
            copies = 1 if recipe.consistency_weight == recipe.supervise_perturbed == 0 else 2
            assert copies * recipe.batch_size == 128, name
            times = 3 if name.endswith("3 times as long") else 1
            assert recipe.epochs / recipe.batch_size == pytest.approx(times * 6 / 64), name
    full, few = (METHODS["consistent"](labels).recipe for labels in ("full", "5 % labels"))
    assert full == replace(few, name="consistent", consistency_weight=1.0)
