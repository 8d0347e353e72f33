"""`cet export`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cet
from cet.cli import main
from cet.cli.errors import LoadError

NET = """
import torch
from torch import nn

import cet


def backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def build():
    policy = cet.ExitPolicy("confidence", (0.4,))
    return cet.EarlyExit(backbone(), ["1"], (torch.zeros(2, 4),), policy=policy).eval()
"""


def cet_export(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["export", *args])
    return int(stop.value.code or 0), *capsys.readouterr()


def test_a_model_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("export_net.py").write_text(NET)
    command = ("export_net:build", "--output", "m.onnx", "--batch", "1", "--thresholds", "input")
    code, out, err = cet_export(capsys, *command)
    assert (code, err) == (0, "")
    assert "answers are those of the model" in out
    assert "leaving at 1:" in out
    loaded = cet.load_exported("m.onnx", threads=1)
    loaded.thresholds = (0.0,)
    assert loaded.predict(torch.zeros(1, 4)).exit_index.tolist() == [0]

    code, out, err = cet_export(capsys, *command)
    assert (code, out) == (20, "")
    assert err == "Error: m.onnx exists; give another file, or replace it with --overwrite\n"

    code, _, err = cet_export(capsys, "export_net:build", "--output", "m.bin")
    assert code == 1
    assert "m.bin ends in '.bin', which is no known format" in err

    code, _, err = cet_export(capsys, "export_net:backbone", "--output", "n.onnx")
    assert code == LoadError.exit_code
    assert err == "Error: export_net:backbone gives Sequential; give a cet.EarlyExit\n"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_stop_or_a_full_disk_leaves_no_file(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop: BaseException | type[BaseException],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("export_net.py").write_text(NET)
    Path("m.onnx").write_bytes(b"an older file")

    def replace(*_: object) -> None:
        raise stop

    monkeypatch.setattr("os.replace", replace)
    code, _, err = cet_export(capsys, "export_net:build", "--output", "m.onnx", "--batch", "1", "--overwrite")
    assert code not in (0, 1) or err.startswith("Error: ")
    assert err.strip().count("\n") == 0
    assert "Traceback" not in err
    assert Path("m.onnx").read_bytes() == b"an older file"
    assert {path.name for path in tmp_path.iterdir()} <= {"export_net.py", "m.onnx", "__pycache__"}
