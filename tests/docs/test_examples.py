"""The examples run as they stand, and are short."""

from __future__ import annotations

import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from nvml.simulation import Simulation
from thinned import slow

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))
MOST_LINES = 60


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _run(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "1 class loses|. classes lose")
            runpy.run_path(str(path), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    return capsys.readouterr().out


def test_there_are_the_five() -> None:
    assert [path.stem for path in EXAMPLES] == ["hugging_face", "joules", "own_cnn", "stream", "two_inputs"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < MOST_LINES


@pytest.mark.parametrize("name", ["hugging_face", "own_cnn", slow("two_inputs")])
def test_an_example_learns_and_lets_samples_leave(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    [path] = [path for path in EXAMPLES if path.stem == name]
    _check(_run(path, capsys))


def _check(out: str) -> None:
    *_, last = out.splitlines()
    accuracy, exits = last.removeprefix("accuracy ").split("%", 1)
    counts = [int(number) for number in exits.partition("[")[2].rstrip("]").split(",")]
    assert float(accuracy) > 65  # chance is 25 to 33
    assert sum(counts[:-1]) > 0


def test_the_stream_needs_no_torch() -> None:
    [path] = [path for path in EXAMPLES if path.stem == "stream"]
    code = "import runpy, sys; runpy.run_path(sys.argv.pop(), run_name='__main__'); assert 'torch' not in sys.modules"
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    _check(run.stdout)


def test_joules_are_time_where_no_counter_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("CET_POWERCAP_ROOT", str(tmp_path))
    out = _run(Path(__file__).parents[2] / "examples/joules.py", capsys)
    assert "not measured: rapl" in out
    assert "seconds of full: " in out
    assert "joules of full: " in out
    assert " of early (" not in out.split("joules of full: ", 1)[1].splitlines()[0]


def test_joules_of_a_simulated_gpu_are_told(
    simulation: Simulation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CET_POWERCAP_ROOT", str(tmp_path))
    simulation.reset(real_time=True)
    simulation.install()
    out = _run(Path(__file__).parents[2] / "examples/joules.py", capsys)
    assert " of early (" in out.split("\njoules of full: ", 1)[1].splitlines()[0]
