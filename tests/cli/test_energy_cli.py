"""`cet energy`: what its commands print, write and pass on. The faults of counters are in test_energy_faults.py."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import simulated_net
from cet.cli import main
from cet.cli.errors import LoadError, NoSuchExitError
from cet.cli.loading import load_data, load_early_exit, load_model
from cet.energy import CounterFrozenError, CounterUnstableError, DomainEnergy, EnergyError, EnergyReading, Flag
from cet.energy.run import failure_of
from cet.energy.workloads import batches_of
from commands import CET, FAST, Commands, within_energy
from nvml.simulation import Simulation

SHORT = (*FAST, "--rounds", "3")
PROFILE = ("profile", "--model", "simulated_net:early_exit", "--data", "simulated_net:data", *SHORT)
COMPARE = ("compare", "simulated_net:small", "simulated_net:large", "--data", "simulated_net:data", *SHORT)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(simulation: Simulation, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``cet energy ARGS`` in this process, on a simulated GPU in real time, without RAPL: exit code, stdout, stderr."""
    simulation.reset(real_time=True)
    simulation.gpu(0, tick=0.004)
    monkeypatch.setenv("CET_POWERCAP_ROOT", "/no-powercap")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NVML_SIMULATION", "")  # nets of simulated_net then load the GPU
    threads = torch.get_num_threads()

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(within_energy(*args))
        torch.set_num_threads(threads)
        return int(stop.value.code or 0), *capfd.readouterr()

    return run


def figure(document: dict[str, Any], name: str, **labels: Any) -> dict[str, Any]:
    (found,) = (
        row for row in document["figures"] if row["name"] == name and all(row[key] == labels[key] for key in labels)
    )
    return dict(found)


class TestHelp:
    @pytest.mark.parametrize("command", ["", "run", "profile", "compare", "watch"])
    def test_it_has_examples_and_waits_for_nothing(self, command: str) -> None:
        heavy = "{'torch', 'numpy', 'scipy', 'matplotlib'}"
        code = (
            "import sys; from cet.cli import main\n"
            "try: main(sys.argv[1:])\n"
            f"finally: assert not {heavy} & set(sys.modules), 'imported for help'"
        )
        args = [sys.executable, "-c", code, "energy", *filter(None, [command]), "--help"]
        done = subprocess.run(args, capture_output=True, text=True, check=True)
        assert "Examples:\n" in done.stdout
        assert "cet energy " in done.stdout

    def test_every_exit_code_is_listed(self, run: Run) -> None:
        from cet.cli import errors
        from cet.energy import domains

        kinds = [*vars(domains).values(), *vars(errors).values()]
        codes = {
            kind.exit_code for kind in kinds if isinstance(kind, type) and isinstance(vars(kind).get("exit_code"), int)
        }
        assert len(codes) == 10
        _, out, _ = run("--help")
        assert codes <= {int(word) for word in out.replace(",", " ").split() if word.isdigit()}


class TestCompletion:
    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_script(self, shell: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            main(["completion", shell])
        assert not stop.value.code
        assert "_CET_COMPLETE" in capsys.readouterr().out

    def test_commands_and_options_are_completed(self) -> None:
        def complete(words: str, index: int) -> str:
            env = {**os.environ, "_CET_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(index)}
            return subprocess.run([CET], env=env, capture_output=True, text=True, check=True).stdout

        assert "plain,profile" in complete("cet energy pro", 2)
        assert "plain,--assume-watts" in complete("cet energy run --assu", 3)


class TestDoctor:
    def test_table(self, run: Run, simulation: Simulation) -> None:
        simulation.gpu(0, tick=0.04)
        code, out, err = run("doctor")
        assert (code, err) == (0, "")
        text = " ".join(out.split())
        assert "gpu:0 NVIDIA Simulated GPU (GPU-00000000-0000-4000-8000-000000000000)" in text
        shown = re.search(r"energy counter, scope: board, update period ([\d.]+) ms, 71 W now", text)
        assert shown
        assert float(shown[1]) == pytest.approx(40, rel=0.2)
        assert "Energy that cannot be measured rapl there is no RAPL zone in /no-powercap" in text
        assert "fix: run on bare metal" in text

    def test_json(self, run: Run, simulation: Simulation) -> None:
        simulation.gpu(0, tick=0.04)
        code, out, _ = run("doctor", "--format", "json", "--require-gpu")
        assert code == 0
        document = json.loads(out)
        assert document["schema_version"] == 2
        (gpu,) = document["energy"]["measurable"]
        assert gpu["domain"]["name"] == "gpu:0"
        assert gpu["update_period"] == pytest.approx(0.04, rel=0.2)
        assert gpu["state"]["watts"] == pytest.approx(71.1, rel=0.01)
        assert document["energy"]["unavailable"][0]["domain"] == "rapl"

    def test_what_disturbs_is_told(self, run: Run, simulation: Simulation) -> None:
        simulation.gpu(0, persistence=0, throttle=0x20, process=4711)
        text = " ".join(run("doctor")[1].split())
        assert "sudo nvidia-smi -pm 1" in text
        assert "clocks are lowered: SwThermalSlowdown" in text
        assert "other processes compute on it: 4711" in text

    def test_a_counter_that_stands_still_has_power_integrated(self, run: Run, simulation: Simulation) -> None:
        simulation.gpu(0, frozen=1)
        code, out, _ = run("doctor", "--require-gpu", "--format", "json")
        assert code == 0
        (gpu,) = json.loads(out)["energy"]["measurable"]
        assert (gpu["source"], gpu["update_period"]) == ("integral", None)
        assert re.fullmatch(r"gpu:0: the counter stood at \d+ mJ for 3\.\d+ s", gpu["reason"])

    @pytest.mark.parametrize("frozen", [True, False])
    def test_a_counter_that_gives_no_joules_is_not_measured(
        self, run: Run, simulation: Simulation, frozen: bool
    ) -> None:
        if frozen:
            simulation.gpu(0, frozen=1)
            for power in ("nvmlDeviceGetFieldValues", "nvmlDeviceGetPowerUsage"):
                simulation.fault(power, 3)
            reason = "the counter stood at"
        else:
            simulation.fault("nvmlDeviceGetTotalEnergyConsumption", 999, first=1)  # after the meter has found it
            reason = "nvmlDeviceGetTotalEnergyConsumption failed 3 times"
        code, out, err = run("doctor", "--require-gpu")
        assert code == 11
        assert "Energy that can be measured" not in [line.strip() for line in out.splitlines()]
        assert f" gpu:0 {reason}" in " ".join(out.partition("Energy that cannot be measured")[2].split())
        assert err.startswith(f"Error: no GPU's joules can be measured (gpu:0: {reason}")


class TestRun:
    def test_stdout_is_the_commands_and_stderr_has_the_result(self, run: Run) -> None:
        code, out, err = run("run", "--", "sh", "-c", "echo hello; echo spam >&2; sleep 0.2")
        assert (code, out) == (0, "hello\n")
        assert err.startswith("spam\nsh -c 'echo hello; echo spam >&2; sleep 0.2': 0.2")
        assert "gpu:0" in err
        assert "short-window" in err

    def test_joules_are_power_times_time(self, run: Run, tmp_path: Path) -> None:
        output = tmp_path / "run.json"
        assert run("run", "--output", str(output), "--", "sleep", "0.3")[0] == 0
        document = json.loads(output.read_text())
        seconds = document["measurements"][0]["window"]["seconds"]
        assert 0.3 < seconds < 1
        joules = figure(document, "joules", domain="gpu:0")
        assert joules["value"] == pytest.approx(71.1 * seconds, rel=0.05)
        assert joules["source"] == "counter"
        assert (document["kind"], document["command"], document["exit_code"]) == ("run", ["sleep", "0.3"], 0)

    def test_idle_is_taken_off(self, run: Run, tmp_path: Path) -> None:
        output = tmp_path / "run.json"
        assert run("run", "--idle", "0.3", "--output", str(output), "--", "sleep", "0.3")[0] == 0
        document = json.loads(output.read_text())
        assert len(document["measurements"][0]["idle"]) == 2
        assert abs(figure(document, "net_joules", domain=None)["value"]) < 3

    @pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -KILL $$", 128 + signal.SIGKILL)])
    def test_the_exit_code_is_passed_on(self, run: Run, script: str, code: int) -> None:
        assert run("run", "--", "sh", "-c", script)[0] == code

    def test_its_options_are_not_taken_for_ours(self, run: Run) -> None:
        assert run("run", "echo", "--format", "--idle")[1] == "--format --idle\n"

    def test_the_command_has_no_signal_blocked_or_ignored(self, run: Run) -> None:
        code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, []))"
        assert run("run", "--", sys.executable, "-c", code)[1] == "set()\n"
        assert run("run", "--", "sh", "-c", "kill -PIPE $$")[0] == 128 + signal.SIGPIPE
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()

    @pytest.mark.parametrize("form", ["json", "csv"])
    def test_formats(self, run: Run, form: str) -> None:
        code, out, err = run("run", "--format", form, "--", "true")
        assert (code, out) == (0, "")
        if form == "json":
            assert json.loads(err)["status"] == "complete"
        else:
            assert err.startswith("kind,status,name,unit,value")

    def test_metrics(self, run: Run, tmp_path: Path) -> None:
        metrics = tmp_path / "cet.prom"
        for _ in range(2):  # an older file is replaced
            assert run("run", "--prometheus", str(metrics), "--", "sleep", "0.1")[0] == 0
        text = metrics.read_text()
        assert 'cet_energy_joules{domain="gpu:0",kind="run",per="window",source="counter"} ' in text
        assert 'domain="rapl",kind="run",of="joules",per="window",reason="there is no RAPL zone' in text

    def test_overwrite(self, run: Run, tmp_path: Path) -> None:
        output = tmp_path / "run.json"
        output.write_text("mine")
        args = ("--output", str(output), "--", "true")
        assert run("run", *args)[0] == 20
        code, _, err = run("run", "--overwrite", *args)
        assert (code, output.read_text()) == (20, "mine")
        assert "holds something else than cet energy writes there" in err
        output.unlink()
        assert run("run", *args)[0] == 0
        assert run("run", *args)[0] == 20
        assert run("run", "--overwrite", *args)[0] == 0
        assert json.loads(output.read_text())

    @pytest.mark.parametrize("option", ["--output", "--prometheus"])
    def test_what_is_no_regular_file_is_left_alone(self, run: Run, tmp_path: Path, option: str) -> None:
        os.mkfifo(tmp_path / "pipe")
        code, _, err = run("run", option, str(tmp_path / "pipe"), "--overwrite", "--", "true")
        assert code == 20
        assert "pipe is no regular file; give a file" in err
        assert (tmp_path / "pipe").is_fifo()

    @pytest.mark.parametrize(
        ("output", "prometheus"), [("out", "out"), ("out", "folder/../out"), ("out", "link"), ("link", "out")]
    )
    def test_two_outputs_are_two_files(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, prometheus: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("folder").mkdir()
        Path("link").symlink_to("out")
        code, _, err = run("run", "--output", output, "--prometheus", prometheus, "--", "touch", "ran")
        assert code == 2
        assert err.startswith(f"Error: --output {output} and --prometheus {prometheus} are the same; ")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]

    def test_an_estimate_is_refused_where_there_is_a_counter(self, run: Run) -> None:
        code, out, err = run("run", "--assume-watts", "50", "--", "echo", "ran")
        assert (code, out) == (2, "")
        assert "here gpu:0 can be measured" in err

    def test_an_estimate_is_marked(self, run: Run, simulation: Simulation) -> None:
        simulation.fault("nvmlInitWithFlags", 9)
        code, _, err = run("run", "--assume-watts", "50", "--format", "json", "--", "sleep", "0.1")
        assert code == 0
        document = json.loads(err)
        joules = figure(document, "joules", domain=None)
        assert joules["source"] == "model"
        assert joules["value"] == pytest.approx(50 * document["measurements"][0]["window"]["seconds"])
        assert "modelled" in document["flags"]

    def test_a_command_shorter_than_the_tick_is_no_fault_of_the_counter(
        self, run: Run, simulation: Simulation, tmp_path: Path
    ) -> None:
        simulation.reset(real_time=True)
        simulation.gpu(0, tick=0.3)
        for attempt in range(8):  # a busy machine may take longer to start a process
            output = tmp_path / f"{attempt}.json"
            code, _, err = run("run", "--output", str(output), "--", "true")
            assert code == 0
            document = json.loads(output.read_text())
            if document["measurements"][0]["window"]["seconds"] < 0.25:
                break
        assert figure(document, "joules", domain="gpu:0")["value"] is None
        assert re.search(
            r"– gpu:0: the window of [\d.]+ ms is too short for a counter that moves", " ".join(err.split())
        )
        assert "counter-frozen" not in document["flags"]

    @pytest.mark.parametrize(
        ("flag", "in_total", "failure"),
        [
            (Flag.SHORT_WINDOW, True, None),  # for the counter to move
            (Flag.COUNTER_FROZEN, False, None),  # a part of another domain that is off
            (Flag.COUNTER_FROZEN, True, CounterFrozenError),
            (Flag.COUNTER_BACKWARDS, True, CounterUnstableError),
            (Flag.COUNTER_FAILED, True, CounterUnstableError),
        ],
    )
    def test_a_counter_that_fails_is_a_failure(
        self, flag: Flag, in_total: bool, failure: type[EnergyError] | None
    ) -> None:
        gpu = DomainEnergy("gpu:0", "", "board", in_total, None, None, reason="why", update_period=0.1, flags=(flag,))
        found = failure_of(EnergyReading(0.0, 5.0, (gpu,)))
        assert type(found) is (failure or type(None))
        assert found is None or str(found) == "why"

    def test_what_is_missing_and_what_may_be_wrong_stands_below_the_table(self, run: Run) -> None:
        text = " ".join(run("run", "--", "sleep", "0.3")[2].split())
        assert re.search(r"gpu:0 \d+\.\d+ ±\d+\.\d+ J – \d+\.\d+ ±\d+\.\d+ W counter", text)
        assert "– above idle: the idle machine was not measured; --idle 5 does that" in text
        assert "±: what an update of the counter at each end can hide at most, beside about 5 % of its gain." in text
        assert "shared-device" not in text

    def test_a_counter_that_stops_in_the_window_is_not_believed(self, run: Run, simulation: Simulation) -> None:
        simulation.at(simulation.time + 1.0, "gpu 0 frozen 1")
        code, _, err = run("run", "--", "sleep", "2")
        assert code == 15
        assert "the counter stands still after the window; it may have stopped within" in " ".join(err.split())
        assert re.search(r"total +– +– +– +–", err)

    def test_a_counter_that_stood_before_has_power_integrated(self, run: Run, simulation: Simulation) -> None:
        simulation.gpu(0, frozen=1)
        code, _, err = run("run", "--idle", "1", "--", "sleep", "1")
        assert code == 0
        assert re.search(r"gpu:0 +7\d\.\d+ J +-?\d[\d.]* \w*J .* integral", err)

    def test_a_signal_behind_the_command_keeps_its_joules(self, run: Run, tmp_path: Path) -> None:
        output = tmp_path / "run.json"
        kill = f"(sleep 1; kill -TERM {os.getpid()}) >/dev/null 2>&1 & sleep 0.2"
        code, _, err = run("run", "--idle", "3", "--output", str(output), "--", "sh", "-c", kill)
        document = json.loads(output.read_text())
        assert code == 128 + signal.SIGTERM, err
        assert document["stopped"] == "SIGTERM while the idle machine was measured"
        assert figure(document, "joules", domain=None)["value"] > 0
        assert figure(document, "net_joules", domain=None)["value"] is not None  # there is the idle window before

    def test_stderr_that_is_full_takes_nothing_from_the_exit_code(self, nvml_library: Path, tmp_path: Path) -> None:
        with open("/dev/full", "w") as full:
            process = Commands(nvml_library, tmp_path).start("run", "--", "sh", "-c", "exit 7", stderr=full)
            assert process.wait() == 7

    def test_another_process_on_the_gpu_is_flagged(self, run: Run, simulation: Simulation) -> None:
        simulation.gpu(0, process=4711)
        assert "! shared-device: Other processes used the device." in run("run", "--", "true")[2]


class TestProfile:
    def test_a_checkpoint_at_two_batch_sizes(self, run: Run, tmp_path: Path) -> None:
        checkpoint, output, plots = tmp_path / "m.safetensors", tmp_path / "profile.json", tmp_path / "plots"
        simulated_net.early_exit().save(checkpoint)
        model = ("--model", str(checkpoint), "--backbone", "simulated_net:backbone", "--data", "simulated_net:data")
        more = ("--batch-size", "12", "--exit", "1", "--output", str(output), "--plots", str(plots), "--integral")
        code, out, err = run("profile", *model, *FAST, *more)
        assert code == 0, err
        assert max(map(len, out.splitlines())) <= 80
        assert "Batch 8, per sample" in out
        assert "Batch 12, per sample" in out
        assert "measured / predicted" in out
        assert "attributed, not measured" in " ".join(out.split())
        document = json.loads(output.read_text())
        assert document["status"] == "complete"
        assert document["exits"] == ["0", "1", "final"]
        assert [row["batch_size"] for row in document["measurements"]] == [8, 12]
        for size in (8, 12):
            assert figure(document, "joules", batch=size, exit="1", part="cumulative")["value"] > 0
            assert figure(document, "flops", batch=size, exit="final")["value"] > 0
        samples = document["measurements"][0]["blocks"][0]["reading"]["domains"][0]["samples"]
        assert len(samples) >= 2
        assert {path.name for path in plots.iterdir()} == {"per_exit.png", "accuracy.png", "power.png"}

    def test_without_a_counter_it_refuses_at_once(
        self, run: Run, simulation: Simulation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        def loaded() -> None:
            raise AssertionError("the model was loaded")

        monkeypatch.setattr(simulated_net, "early_exit", loaded)
        simulation.fault("nvmlInitWithFlags", 9)
        code, out, err = run(*PROFILE, "--output", str(tmp_path / "profile.json"))
        assert (code, out) == (11, "")
        assert err.startswith("Error: no joules can be measured (gpu: NVML: nvmlInit failed: ")
        assert "rapl: there is no RAPL zone" in err
        assert err.count("\n") == 1
        assert not list(tmp_path.iterdir())

    def test_without_a_counter_there_are_modelled_joules(self, run: Run, simulation: Simulation) -> None:
        simulation.fault("nvmlInitWithFlags", 9)
        args = (*PROFILE, "--window", "0.01", "--warm-up", "0.01", "--assume-watts", "50", "--format", "json")
        code, out, _ = run(*args)
        assert code == 0
        document = json.loads(out)
        assert figure(document, "seconds", exit="final", part="cumulative")["value"] > 0
        assert figure(document, "flops", exit="final")["value"] > 0
        assert figure(document, "joules", exit="final", part="cumulative")["source"] == "model"

    def test_without_labels_there_is_no_accuracy(self, run: Run, simulation: Simulation) -> None:
        simulation.fault("nvmlInitWithFlags", 9)
        args = (*PROFILE, "--data", "simulated_net:unlabelled", "--window", "0.01", "--warm-up", "0.01")
        code, out, _ = run(*args, "--assume-watts", "50", "--format", "json")
        assert code == 0
        accuracy = figure(json.loads(out), "accuracy", exit="final")
        assert (accuracy["value"], accuracy["reason"]) == (None, "the data has no labels")

    @pytest.mark.parametrize(
        ("args", "code", "named"),
        [
            (("--device", "cuda:9x"), 2, "torch, which sees 0 GPUs, cannot compute on 'cuda:9x'; give cpu or cuda:"),
            (("--device", "meta"), 2, "cannot compute on 'meta'"),
            (("--warm-up", "0"), 2, "--warm-up"),
            (("--model", "simulated_net:small"), 21, "give a cet.EarlyExit"),
            (("--model", "simulated_net:broken"), 21, "unexpected KeyError: 'spam'"),
            (("--batch-size", "64"), 21, "24 samples, too few for a batch of 64"),
            (("--data", "simulated_net:not_a_model"), 21, "it must give an iterable"),
            (("--model", "simulated_net:early_exits"), 21, "has no 'early_exits'; did you mean 'early_exit'?"),
            (("--model", "simulated_net"), 21, "neither MODULE:NAME, such as mynet:build, nor the file of a check"),
        ],
    )
    def test_what_cannot_be_measured_is_refused_before_the_first_window(
        self, run: Run, tmp_path: Path, args: tuple[str, ...], code: int, named: str
    ) -> None:
        exit_code, out, err = run(*PROFILE, *args, "--output", str(tmp_path / "profile.json"))
        assert (exit_code, out) == (code, "")
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        assert named in err
        assert not list(tmp_path.iterdir())


class TestDataThatDoNotFit:
    WATCH = ("watch", "--model", "simulated_net:early_exit", "--data", "simulated_net:data", "--batch-size", "8")

    @pytest.mark.parametrize("command", [PROFILE, COMPARE, WATCH], ids=["profile", "compare", "watch"])
    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (torch.zeros(8, 7), "x (8, 7) float32; give what the model takes (RuntimeError: "),
            (torch.zeros(8, 6, dtype=torch.float64), "x (8, 6) float64; give what the model takes (RuntimeError: "),
            ({"spam": torch.zeros(8, 6)}, "x['spam'] (8, 6) float32; give what the model takes (TypeError: "),
            (torch.full((8, 6), torch.nan), "x (8, 6) float32; give data without NaN"),
        ],
    )
    def test_model_and_data_are_named_before_the_first_window(
        self, run: Run, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], x: Any, message: str
    ) -> None:
        monkeypatch.setattr(simulated_net, "data", [(x, torch.zeros(8, dtype=torch.int64))])
        code, out, err = run(*command)
        assert (code, out) == (21, "")
        model = "A, simulated_net:small," if command is COMPARE else "--model simulated_net:early_exit"
        assert err.startswith(f"Error: {model} ")
        assert f" what --data simulated_net:data gives, {message}" in err
        assert err.count("\n") == 1


class TestCompare:
    def test_without_a_counter_there_is_time(self, run: Run, simulation: Simulation) -> None:
        simulation.fault("nvmlInitWithFlags", 9)
        code, out, _ = run(*COMPARE, "--window", "0.01", "--warm-up", "0.01", "--format", "json")
        assert code == 0
        document = json.loads(out)
        assert figure(document, "seconds", workload="A", domain=None)["value"] > 0
        joules = figure(document, "joules", workload="A", domain=None)
        assert joules["value"] is None
        assert "NVML error 9" in joules["reason"]

    def test_table(self, run: Run) -> None:
        code, out, err = run(*COMPARE)
        assert code == 0, err
        assert max(map(len, out.splitlines())) <= 80
        assert out.startswith("A: simulated_net:small\nB: simulated_net:large\n")
        for title in ("time", "energy", "above idle"):
            assert re.search(rf"^{title}, .*\[\d\.\d+, \d", out, re.MULTILINE)
            assert re.search(
                rf"^{title}: A (takes (less|more) than B|and B are not distinguishable)$", out, re.MULTILINE
            )

    def test_progress_goes_to_stderr_and_json_to_stdout(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cet.cli.energy.progress.PERIOD", 0.0)
        code, out, err = run(*COMPARE, "--rounds", "1", "--format", "json")
        assert code == 0
        document = json.loads(out)
        assert document["models"] == {"A": "simulated_net:small", "B": "simulated_net:large"}
        assert "A against B: window 2 of 5, about " in err
        assert " left\n" in err

    def test_an_exception_in_the_model_keeps_the_blocks(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        output = tmp_path / "compare.json"

        def fails_later(module: Any, _: Any) -> None:
            if output.exists():
                raise RuntimeError("out of memory")

        model = simulated_net.small()
        model.register_forward_pre_hook(fails_later)
        monkeypatch.setattr(simulated_net, "small", model)
        code, out, _ = run(*COMPARE, "--output", str(output))
        assert code == 1
        assert "! partial: A failed: RuntimeError: out of memory" in " ".join(out.split())
        document = json.loads(output.read_text())
        assert (document["status"], document["stopped"]) == ("partial", "A failed: RuntimeError: out of memory")
        assert figure(document, "seconds", workload="B", domain=None)["value"] > 0
        assert document["measurements"][0]["blocks"]

    def test_three_backbones_are_too_many(self, run: Run) -> None:
        code, _, err = run(*COMPARE, *("--backbone", "a:b") * 3)
        assert code == 2
        assert "--backbone" in err

    def test_both_models_run_the_same_samples_of_data_without_end(
        self, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: list[Tensor] = []

        def endless() -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                given.append(torch.randn(8, 6))
                yield given[-1], torch.zeros(8, dtype=torch.int64)

        monkeypatch.setattr(simulated_net, "data", endless())
        seen: dict[str, Tensor] = {}
        for name in ("small", "large"):
            model = getattr(simulated_net, name)()
            model.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, args[0]))
            monkeypatch.setattr(simulated_net, name, model)
        assert run(*COMPARE, "--rounds", "1", "--samples", "20")[0] == 0
        assert len(given) == 3
        assert seen["small"].equal(given[0])
        assert seen["large"].equal(given[0])


class TestWatch:
    def test_lines(self, run: Run) -> None:
        code, out, err = run("watch", "--interval", "0.1", "--duration", "0.3")
        assert (code, err) == (0, "")
        lines = out.splitlines()
        assert len(lines) == 3
        assert all("gpu:0 71.1 W  rapl –" in line for line in lines)

    def test_exit_rates_as_json_lines(self, run: Run) -> None:
        model = ("--model", "simulated_net:early_exit", "--data", "simulated_net:data", "--batch-size", "8")
        code, out, _ = run("watch", *model, "--interval", "0.1", "--duration", "0.2", "--format", "json")
        assert code == 0
        looks = [json.loads(line) for line in out.splitlines()]
        assert len(looks) == 2
        for look in looks:
            assert look["watts"] == {"gpu:0": pytest.approx(71.1, rel=0.01), "rapl": None}
            assert "no RAPL zone" in look["reasons"]["rapl"]
            assert sum(look["exit_rates"].values()) == pytest.approx(1)
            assert look["samples_per_second"] > 0

    def test_the_energy_counter_is_left_alone(self, run: Run, simulation: Simulation) -> None:
        run("watch", "--interval", "0.01", "--duration", "0.01")
        simulation.fault("nvmlDeviceGetTotalEnergyConsumption", 15, first=1)
        assert run("watch", "--interval", "0.05", "--duration", "0.3")[0] == 0

    def test_a_lost_gpu_ends_it(self, run: Run, simulation: Simulation) -> None:
        simulation.fault("nvmlDeviceGetTemperature", 15, first=2)
        code, out, err = run("watch", "--interval", "0.05", "--duration", "5")
        assert code == 14
        assert len(out.splitlines()) == 2
        assert "NVML error 15" in err

    def test_nothing_to_see_is_refused(self, run: Run, simulation: Simulation) -> None:
        simulation.fault("nvmlInitWithFlags", 9)
        code, out, err = run("watch")
        assert (code, out) == (11, "")
        assert "no power can be seen (gpu: " in err

    def test_ctrl_c_ends_it(self, nvml_library: Path, tmp_path: Path) -> None:
        process = Commands(nvml_library, tmp_path).start("watch", "--interval", "0.1")
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=600)
        assert process.returncode == 130
        assert err.split() == ["Stopped", "by", "SIGINT."]


class TestLoading:
    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("simulated_net:", "'simulated_net:' is not MODULE:NAME"),
            ("no_such_module:build", "No module named 'no_such_module'"),
            ("simulated_net:spam", "module simulated_net has no 'spam'; give a name that it has"),
            ("simulated_net:backbones", "has no 'backbones'; did you mean 'backbone'"),
            ("simulated_net:not_a_model.reel", "int has no 'reel'; did you mean 'real'"),
            ("simulated_net", "'simulated_net' is neither MODULE:NAME, such as mynet:build, nor the file of a check"),
            ("simulated_net:broken", "unexpected KeyError: 'spam'"),
            ("simulated_net:not_a_model", "gives int; it must give a torch.nn.Module"),
            ("missing.safetensors", "missing.safetensors is not there; give the file of a checkpoint, or MODULE"),
            (__file__, "name its backbone by --backbone"),
            ("./simulated_net:build", "names a file; write its module as import does, simulated_net:build"),
            ("simulated_net.py:build", "names a file; write its module as import does, simulated_net:build"),
        ],
    )
    def test_what_is_no_model_is_refused(self, spec: str, message: str) -> None:
        with pytest.raises(LoadError, match=message):
            load_model(spec, None, None)

    def test_a_model_comes_in_eval_mode(self) -> None:
        assert not load_model("simulated_net:backbone", None, None).training

    def test_only_an_early_exit_model_has_exits(self) -> None:
        assert load_early_exit("simulated_net:early_exit", None, None, ["1"]).exit_names == ("0", "1", "final")
        with pytest.raises(LoadError, match=r"give a cet\.EarlyExit"):
            load_early_exit("simulated_net:backbone", None, None, [])
        with pytest.raises(NoSuchExitError, match="no early exit 'final'; give one of 0, 1"):
            load_early_exit("simulated_net:early_exit", None, None, ["final"])

    def test_the_first_samples_are_joined_and_cut(self) -> None:
        x, y = load_data("simulated_net:data", 20, 4)
        assert x.shape == (20, 6)
        assert y.shape == (20,)
        assert torch.equal(x, torch.cat([x for x, _ in simulated_net.data()])[:20])
        batches = batches_of((x, y), 6)
        assert [len(y) for _, y in batches] == [6, 6, 6]
        assert torch.equal(torch.cat([x for x, _ in batches]), x[:18])

    def test_inputs_may_be_a_dict(self, monkeypatch: pytest.MonkeyPatch) -> None:
        batches = [({"ids": torch.arange(6).view(3, 2), "mask": torch.ones(3, 2)}, torch.zeros(3, dtype=torch.int64))]
        monkeypatch.setattr(simulated_net, "data", batches)
        data = load_data("simulated_net:data", 100, None)
        first, second, third = batches_of(data, 1)
        assert first[0]["ids"].tolist() == [[0, 1]]
        assert third[0]["ids"].tolist() == [[4, 5]]
        assert second[0]["mask"].shape == (1, 2)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (3, "gives int; it must give an iterable"),
            ([], "gives no sample"),
            ([torch.zeros(2, 6)], "a batch is Tensor; give pairs"),
            ([(torch.zeros(2, 6), torch.zeros(2))], "give class indices by y.long()"),
            ([(torch.zeros(2, 6), torch.tensor([0, 9]))], "the label 9 for 4 classes"),
            (
                [(torch.zeros(2, width), torch.tensor([0, 1])) for width in (6, 7)],
                "--data simulated_net:data gives batches that do not fit together",
            ),
        ],
    )
    def test_what_is_no_data_is_refused(self, data: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(simulated_net, "data", data)
        with pytest.raises(LoadError, match=message):
            load_data("simulated_net:data", 100, 4)
