"""Ctrl-C, a full disk, a read-only folder, a reader that leaves: for every command one sentence, and no half a file."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cet.cli import COMMANDS
from commands import CET, FAST, Commands, obey_permissions
from thinned import slow

ENERGY = {
    "run": ("run", "--", "true"),
    "profile": ("profile", "--model", "simulated_net:early_exit", "--data", "simulated_net:data", *FAST),
    "compare": ("compare", "simulated_net:small", "simulated_net:large", "--data", "simulated_net:data", *FAST),
}
PRINTING = [("--help",), slow(("doctor",)), ("completion", "bash")]


@pytest.fixture
def cet(nvml_library: Path, tmp_path: Path) -> Commands:
    return Commands(nvml_library, tmp_path)


def small_disk() -> None:
    """Let no file grow beyond 64 bytes: writing more fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))


def heed_ctrl_c() -> None:
    """Have Ctrl-C back, which a shell takes from what it runs in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def cet_(*args: str, **more: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``cet ARGS``."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    done = subprocess.run([CET, *args], text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    return done.returncode, done.stdout or "", done.stderr


def check_one_sentence(err: str, *named: str) -> None:
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    for name in named:
        assert name in err


def test_these_are_all_commands() -> None:
    """A new command is tried here as well; what `cet export` does is in test_export_command.py."""
    assert set(COMMANDS) == {"demo", "train", "calibrate", "predict", "export", "doctor", "energy", "completion"}


class TestReader:
    """Nobody reads stdout to its end."""

    @staticmethod
    def unread(start: Callable[..., subprocess.Popen[str]]) -> tuple[int, str]:
        reading, writing = os.pipe()
        os.close(reading)
        process = start(stdout=writing)
        os.close(writing)
        _, err = process.communicate(timeout=300)
        return process.returncode, err

    @pytest.mark.parametrize("args", PRINTING, ids=" ".join)
    def test_what_is_printed_is_dropped(self, args: Sequence[str]) -> None:
        assert self.unread(lambda **more: subprocess.Popen([CET, *args], stderr=-1, text=True, **more)) == (0, "")

    @pytest.mark.parametrize("command", ["run", slow("compare"), slow("profile")])
    def test_a_measurement_ends_as_it_would(self, cet: Commands, command: str) -> None:
        first, *args = ENERGY[command]
        code, err = self.unread(lambda **more: cet.start(first, "--output", str(cet.output), *args, **more))
        assert code == 0, err
        assert json.loads(cet.output.read_text())["status"] == "complete"

    @pytest.mark.parametrize("form", ["text", slow("json")])
    def test_watch_ends(self, cet: Commands, form: str) -> None:
        args = ("watch", "--interval", "0.05", "--format", form)
        assert self.unread(lambda **more: cet.start(*args, **more)) == (0, "")


class TestFullDisk:
    @pytest.mark.parametrize("args", PRINTING, ids=" ".join)
    def test_of_stdout(self, args: Sequence[str]) -> None:
        with open("/dev/full", "w") as full:
            code, _, err = cet_(*args, stdout=full)
        assert code == 20
        check_one_sentence(err, "stdout cannot be written (No space left on device)")

    @pytest.mark.parametrize("command", [slow("profile"), "watch"])
    def test_of_the_stdout_of_a_measurement(self, cet: Commands, command: str) -> None:
        args = ENERGY.get(command, (command, "--interval", "0.05", "--duration", "0.1"))
        with open("/dev/full", "w") as full:
            code, _, err = cet.run(*args, stdout=full)
        assert code == 20
        check_one_sentence(err, "stdout cannot be written (No space left on device)")

    @pytest.mark.parametrize(
        ("command", "option"),
        [
            ("run", "--output"),
            ("run", "--prometheus"),
            slow("profile", "--output"),
            slow("compare", "--prometheus"),
        ],
    )
    def test_of_an_output(self, cet: Commands, command: str, option: str) -> None:
        first, *args = ENERGY[command]
        folder = cet.folder / "results"
        folder.mkdir()
        code, out, err = cet.run(first, option, str(folder / "file"), *args, preexec_fn=small_disk)
        assert (code, out) == (20, "")
        check_one_sentence(err, f"{folder / 'file'} cannot be written (File too large)")
        assert list(folder.iterdir()) == []

    def test_of_the_plots(self, cet: Commands) -> None:
        first, *args = ENERGY["compare"]
        code, _, err = cet.run(first, "--plots", str(cet.folder / "plots"), *args, preexec_fn=small_disk)
        assert code == 20
        check_one_sentence(err, "plots/power.png cannot be written (File too large)")
        assert list((cet.folder / "plots").iterdir()) == []

    @pytest.mark.slow
    def test_of_the_demonstration(self, tmp_path: Path) -> None:
        code, _, err = cet_("demo", "--quick", "--output", str(tmp_path / "demo"), preexec_fn=small_disk)
        assert code == 20
        check_one_sentence(err, "demo/run.json cannot be written (File too large)")
        assert not (tmp_path / "demo").exists()


class TestReadOnlyFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "read-only"
        folder.mkdir(mode=0o555)
        return folder

    @pytest.mark.parametrize("option", ["--output", "--prometheus", "--plots"])
    @pytest.mark.parametrize("command", ENERGY)
    def test_of_an_output(self, cet: Commands, folder: Path, command: str, option: str) -> None:
        if (command, option) == ("run", "--plots"):
            option = "--output"
        first, *args = ENERGY[command]
        code, out, err = cet.run(first, option, str(folder / "new"), *args, preexec_fn=obey_permissions)
        assert (code, out) == (20, "")
        check_one_sentence(err, f"{folder / 'new'} cannot be written (Permission denied)")

    def test_of_the_demonstration(self, folder: Path) -> None:
        code, out, err = cet_("demo", "--output", str(folder / "new" / "demo"), preexec_fn=obey_permissions)
        assert (code, out) == (20, "")
        check_one_sentence(err, "new/demo cannot be written (Permission denied)")

    @pytest.mark.parametrize("args", [("doctor",), ("completion", "zsh")], ids=" ".join)
    def test_as_the_current_folder(self, folder: Path, args: Sequence[str]) -> None:
        code, out, err = cet_(*args, cwd=folder, preexec_fn=obey_permissions)
        assert (code, err) == (0, "")
        assert out


class TestCtrlC:
    """That of the demonstration is in tests/demo, those of measurements are in test_energy_faults.py."""

    @pytest.mark.parametrize("module", ["click", "cet.cli.group", "cet.cli.energy", "torch", "cet.model.early_exit"])
    def test_while_something_is_imported(self, module: str) -> None:
        code = (
            "import sys\n"
            "class Interrupt:\n"
            "    def find_spec(self, name, *_):\n"
            f"        if name == {module!r}: raise KeyboardInterrupt\n"
            "sys.meta_path.insert(0, Interrupt())\n"
            "from cet.cli import main\n"
            "main(['doctor'])\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "Interrupted.")

    def test_at_any_moment(self) -> None:
        for delay in (0.1, 0.3, 1.0):
            process = subprocess.Popen([CET, "doctor"], stdout=-1, stderr=-1, text=True, preexec_fn=heed_ctrl_c)
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
            # Python itself begins, or the few files before the one that heeds interrupts.
            begins = "<frozen site>" in err or ("import main" in err and not re.search(r"/(torch|click|rich)/", err))
            if not begins:
                assert process.returncode in (0, 130, -signal.SIGINT)  # the last before and after Python runs
                assert err.strip() in ("", "Interrupted.")

    def test_while_data_are_loaded(self, cet: Commands) -> None:
        output = cet.folder / "profile.json"
        first, *args = ENERGY["profile"]
        process = cet.start(first, "--output", str(output), *args, "--data", "slow_data:batches")
        assert process.stderr is not None
        process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err.strip() == "Stopped by SIGINT."
        assert not output.exists()
