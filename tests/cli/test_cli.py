"""The command line: help, versions, and errors of one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cet
from cet.cli import main
from cet.cli.doctor import findings
from cet.cli.errors import one_sentence
from cet.measure import host


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*args: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of ``cet ARGS``."""
        with pytest.raises(SystemExit) as stop:
            main(args)
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


def check_one_sentence(err: str) -> None:
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_help_does_not_wait_for_torch() -> None:
    heavy = "{'torch', 'lightning', 'matplotlib', 'numpy'}"
    code = (
        f"import sys; from cet.cli import main; sys.argv = ['cet']; assert not {heavy} & set(sys.modules); main(['-h'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "demo" in done.stdout
    assert "doctor" in done.stdout


@pytest.mark.parametrize("args", [(), ("--help",), ("demo", "--help"), ("doctor", "-h")])
def test_help_shows_examples(run: Any, args: tuple[str, ...]) -> None:
    code, out, err = run(*args)
    assert (code, err) == (0, "")
    assert "Examples:\n" in out


def test_version(run: Any) -> None:
    assert run("--version") == (0, f"cet {cet.__version__}\n", "")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("demo", "--quik"), "--quik"),
        (("dmo",), "dmo"),
        (("demo", "--threads", "0"), "--threads"),
        (("demo", "--seed", "one"), "--seed"),
        (("doctor", "--format", "xml"), "--format"),
        (("demo", "--resume", "--seed", "1"), "--seed"),
        (("demo", "--resume", "--overwrite"), "--overwrite"),
        (("demo", "--output", ""), "'--output': the path is empty"),
        (("demo", "--data", ""), "'--data': the path is empty"),
        (("energy", "run", "--output", "", "--", "true"), "'--output': the path is empty"),
        (("export", "net:build", "--backbone", "net:other", "--output", "m.onnx"), "net:build is none; leave it out"),
        (("calibrate", "runs/x", "--any-drop"), "--any-drop needs a budget"),
        (("calibrate", "runs/x", "--any-drop", "--mean-budget", "1", "--max-drop", "0.1"), "--max-drop exclude each"),
        (("energy", "run", "--prometheus=", "--", "true"), "'--prometheus': the path is empty"),
    ],
)
def test_bad_usage_is_one_sentence_and_exits_with_2(run: Any, args: tuple[str, ...], named: str) -> None:
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    check_one_sentence(err)
    assert named in err
    assert "--help" in err


@pytest.mark.parametrize(
    ("args", "command"),
    [
        (("demo", "--output"), "cet demo"),
        (("energy", "run", "--output"), "cet energy run"),
        (("-x",), "cet"),
    ],
)
def test_an_option_without_its_value_names_the_help_of_its_command(
    run: Any, args: tuple[str, ...], command: str
) -> None:
    code, _, err = run(*args)
    assert code == 2
    assert err.endswith(f" See '{command} --help'.\n")


def test_output_that_cannot_be_written_is_refused_first(run: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, out, err = run("demo", "--output", str(tmp_path / "file" / "demo"), "--data", "missing.npy")
    assert (code, out) == (20, "")
    check_one_sentence(err)
    assert str(tmp_path / "file" / "demo") in err
    assert "cannot be written" in err


def test_missing_recordings_are_refused_and_leave_nothing(run: Any, tmp_path: Path) -> None:
    code, _, err = run("demo", "--output", str(tmp_path), "--data", str(tmp_path / "missing.npy"))
    assert code == 1
    check_one_sentence(err)
    assert str(tmp_path / "missing.npy") in err
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_before_it_begins_leaves_no_folder(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "new" / "demo"
    for more in (("--data", str(tmp_path / "missing.npy")), ("--resume",)):
        code, _, err = run("demo", "--output", str(new), *more)
        assert code == 1
        check_one_sentence(err)
        assert list(tmp_path.iterdir()) == []

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, _, err = run("demo", "--output", str(new))
    assert code == 20
    assert (
        err
        == f"Error: {new}/run.json cannot be written (No space left on device); give another path, or make room there\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_damaged_recordings_are_refused_and_spare_the_run_to_replace(run: Any, tmp_path: Path) -> None:
    data, output = tmp_path / "watch.npy", tmp_path / "demo"
    data.write_bytes(b"not the recordings")
    output.mkdir()
    (output / "report.json").write_text("{}")
    code, _, err = run("demo", "--output", str(output), "--data", str(data), "--overwrite")
    assert code == 1
    check_one_sentence(err)
    assert "damaged" in err
    assert (output / "report.json").read_text() == "{}"


def test_missing_extra_is_refused_with_the_command_that_installs_it(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host, "installed_version", lambda package: None if package == "lightning" else "1.0")
    code, _, err = run("demo", "--output", str(tmp_path))
    assert code == 1
    assert err == "Error: cet demo needs lightning; pip install 'cet[demo]'\n"


def test_resume_without_a_run_is_refused(run: Any, tmp_path: Path) -> None:
    code, _, err = run("demo", "--resume", "--output", str(tmp_path))
    assert code == 1
    check_one_sentence(err)
    assert "no run to go on with" in err


@pytest.mark.parametrize(
    ("files", "mend"),
    [
        (("run.json", "report.json"), "--overwrite"),
        (("run.json",), "--resume"),
        (("report.md",), "give another folder"),
    ],
)
def test_a_folder_in_use_is_refused(run: Any, tmp_path: Path, files: tuple[str, ...], mend: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    code, _, err = run("demo", "--output", str(tmp_path))
    assert code == 1
    check_one_sentence(err)
    assert mend in err
    assert {path.name for path in tmp_path.iterdir()} == set(files)


@pytest.mark.parametrize("state", ["", "[]", "{", "{}", '{"settings": {"epoch": 1}}'])
def test_damaged_state_is_refused(run: Any, tmp_path: Path, state: str) -> None:
    (tmp_path / "run.json").write_text(state)
    code, _, err = run("demo", "--resume", "--output", str(tmp_path))
    assert code == 1
    check_one_sentence(err)
    assert "run.json is damaged" in err


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path, place: int) -> None:
    args = ["demo", "--output", str(tmp_path), "--resume"]
    with pytest.raises(FileNotFoundError, match="no run to go on with"):
        main([*args[:place], "--debug", *args[place:]])


def test_an_error_that_nobody_foresaw_says_so(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(_: object) -> None:
        raise KeyError("spam")

    monkeypatch.setattr(host, "installed_version", broken)
    expected = (1, "", "Error: unexpected KeyError: 'spam'; --debug shows where\n")
    assert run("demo", "--output", str(tmp_path)) == expected


def test_ctrl_c_exits_with_130(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(findings, "backends", interrupted)
    code, out, err = run("doctor")
    assert (code, out) == (130, "")
    assert err.strip() == "Interrupted."


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        ("lightning", "lightning is not installed; pip install 'cet[train]'"),
        ("matplotlib", "matplotlib is not installed; pip install 'cet[demo]'"),
        ("ai_edge_litert", "ai_edge_litert is not installed; pip install 'cet[litert]'"),
        ("somebodys", "No module named 'somebodys'"),
    ],
)
def test_a_module_that_is_missing_is_told_with_the_extra_that_has_it(module: str, sentence: str) -> None:
    assert one_sentence(ModuleNotFoundError(f"No module named {module!r}", name=module)) == sentence
