"""Every fault of the counters, driven into the real command: message, exit code, and that finished blocks survive."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pynvml
import pytest

from cet.energy import MonotonicClock
from commands import FAST, Commands, CommandsHere, obey_permissions
from nvml.simulation import FOR_GOOD, Simulation
from powercap import Powercap
from thinned import kept, slow

COUNTER = "nvmlDeviceGetTotalEnergyConsumption"
COMPARE = ("compare", "simulated_net:small", "simulated_net:large", "--data", "simulated_net:data", *FAST)
PROFILE = ("profile", "--model", "simulated_net:early_exit", "--data", "simulated_net:data", *FAST)


def fault(function: str, code: int, first: int = 0, count: int = FOR_GOOD) -> str:
    return f"fault {function} -1 {code} {first} {count}"


@pytest.fixture
def cet(nvml_library: Path, tmp_path: Path) -> Commands:
    return Commands(nvml_library, tmp_path)


@pytest.fixture
def here(
    simulation: Simulation, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandsHere:
    return CommandsHere(simulation, tmp_path, capfd, monkeypatch)


@pytest.fixture
def package(cet: Commands, tmp_path: Path) -> Iterator[Path]:
    """A CPU package that draws 25 W; its folder."""
    powercap = Powercap(tmp_path / "powercap")
    folder = powercap.zone("intel-rapl:0", "package-0")
    cet.environment["CET_POWERCAP_ROOT"] = str(powercap.root)
    stop = powercap.follow(MonotonicClock(), "intel-rapl:0", 25)
    yield folder
    stop()


def domain(document: dict[str, Any], name: str = "gpu:0") -> dict[str, Any]:
    """A domain in the window of `cet energy run`."""
    window = document["measurements"][0]["window"]
    return next(row for row in window["domains"] if row["domain"] == name)


def blocks(document: dict[str, Any]) -> list[dict[str, Any]]:
    return list(document["measurements"][0]["blocks"])


def total(document: dict[str, Any], name: str = "joules") -> dict[str, Any]:
    return next(row for row in document["figures"] if row["name"] == name and row["domain"] is None)


class TestNoNvml:
    """No NVML library (12), driver not loaded (9)."""

    @pytest.fixture(
        params=[
            pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
            slow(pynvml.NVML_ERROR_DRIVER_NOT_LOADED),
        ]
    )
    def script(self, cet: Commands, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ...]:
        if request.param == pynvml.NVML_ERROR_DRIVER_NOT_LOADED:
            return (fault("nvmlInitWithFlags", request.param),)
        # Nothing that can be loaded, wherever else a driver may be installed.
        (tmp_path / "libnvidia-ml.so.1").write_text("")
        cet.environment["LD_LIBRARY_PATH"] = str(tmp_path)
        return ()

    def test_doctor_explains(self, cet: Commands, script: tuple[str, ...]) -> None:
        code, out, err = cet.run("doctor", "--require-gpu", script=script)
        assert code == 11
        assert err.startswith("Error: no GPU's joules can be measured (gpu: ")
        assert "Energy that cannot be measured" in out
        assert "NVML error 9" in out or "NVML error 12" in out
        assert "fix: install the NVIDIA driver" in out or "fix: load the NVIDIA kernel module" in out

    def test_require_gpu_fails_before_the_command(self, cet: Commands, script: tuple[str, ...], tmp_path: Path) -> None:
        code, _, _ = cet.run("run", "--require-gpu", "--", "touch", str(tmp_path / "ran"), script=script)
        assert code == 11
        assert not (tmp_path / "ran").exists()

    def test_else_the_gpu_is_null(self, cet: Commands, script: tuple[str, ...], package: Path) -> None:
        code, document, text = cet.measure("run", "--", "sleep", "0.3", script=script)
        assert code == 0
        assert 25 * 0.25 < total(document)["value"] < 25 * 0.6
        gpu = next(row for row in document["figures"] if row["domain"] == "gpu" and row["name"] == "joules")
        assert gpu["value"] is None
        assert "NVML error" in gpu["reason"]
        assert "gpu – – – –" in text


class TestNotSupported:
    """NOT_SUPPORTED (3), per call or per field: power integral, tagged; else null."""

    NO_COUNTER = fault(COUNTER, pynvml.NVML_ERROR_NOT_SUPPORTED)

    @pytest.mark.parametrize(
        ("more", "flagged"),
        [
            ((), False),
            ((fault("field:186", pynvml.NVML_ERROR_NOT_SUPPORTED),), True),
            ((fault("nvmlDeviceGetFieldValues", pynvml.NVML_ERROR_NOT_SUPPORTED),), True),
        ],
    )
    def test_power_is_integrated_and_says_so(self, cet: Commands, more: tuple[str, ...], flagged: bool) -> None:
        code, document, text = cet.measure("run", "--", "sleep", "0.5", script=[self.NO_COUNTER, *more])
        assert code == 0
        figure = total(document)
        assert figure["source"] == "integral"
        assert figure["value"] == pytest.approx(71.1 * document["measurements"][0]["window"]["seconds"], rel=0.1)
        assert "total" in text
        assert "integral" in text
        assert "NVML error 3" in text
        assert ("integral-of-average" in document["flags"]) is flagged

    def test_else_null(self, cet: Commands) -> None:
        power = (fault(name, 3) for name in ("nvmlDeviceGetFieldValues", "nvmlDeviceGetPowerUsage"))
        code, document, text = cet.measure("run", "--", "true", script=[self.NO_COUNTER, *power])
        assert code == 0
        assert total(document)["value"] is None
        assert "gpu:0 – – – –" in text
        assert "NVML error 3" in text


class TestNoPermission:
    """NO_PERMISSION (4), RAPL EACCES: print the fix, go on without that domain."""

    def test_nvml(self, cet: Commands, package: Path) -> None:
        code, document, text = cet.measure("run", "--", "sleep", "0.3", script=[fault("*", 4)])
        assert code == 0
        assert total(document)["value"] > 0
        assert "NVML error 4" in text
        assert "/dev/nvidiactl" in text

    def test_rapl(self, cet: Commands, tmp_path: Path) -> None:
        powercap = Powercap(tmp_path / "powercap")
        counter = powercap.zone("intel-rapl:0", "package-0") / "energy_uj"
        counter.chmod(0)
        cet.environment["CET_POWERCAP_ROOT"] = str(powercap.root)
        code, document, text = cet.measure("run", "--", "sleep", "0.2", preexec_fn=obey_permissions)
        assert code == 0
        assert total(document)["source"] == "counter"
        assert f"sudo chmod a+r {counter}" in text.replace(" ", "").replace("sudochmoda+r", "sudo chmod a+r ")


class TestLost:
    """GPU_IS_LOST (15), RESET_REQUIRED (16): stop, keep finished blocks, status partial, non-zero exit."""

    @pytest.mark.parametrize(
        ("function", "visible"),
        kept(
            [
                (f"nvmlDeviceGet{name}", gpu)
                for name in ("HandleByIndex_v2", "MigMode")
                for gpu in (None, "0", "GPU-0000")
            ],
            ("nvmlDeviceGetHandleByIndex_v2", None),
            ("nvmlDeviceGetMigMode", "GPU-0000"),
        ),
    )
    def test_nothing_runs_on_one_that_is_lost_before(
        self, cet: Commands, function: str, visible: str | None, tmp_path: Path
    ) -> None:
        if visible is not None:
            cet.environment["CUDA_VISIBLE_DEVICES"] = visible
        for args in (("run", "--", "touch", str(tmp_path / "ran")), COMPARE, PROFILE, ("watch",)):
            code, out, err = cet.run(*args, script=[fault(function, pynvml.NVML_ERROR_GPU_IS_LOST)])
            assert (code, out) == (14, "")
            assert err.startswith("Error: gpu:0: nvmlDeviceGet")
            assert "GPU is lost (NVML error 15); reset it by nvidia-smi" in err
            assert err.count("\n") == 1
        assert not (tmp_path / "ran").exists()

    def test_doctor_lists_it(self, here: CommandsHere) -> None:
        script = [fault("nvmlDeviceGetHandleByIndex_v2", pynvml.NVML_ERROR_GPU_IS_LOST)]
        code, out, err = here.run("doctor", "--format", "json", script=script)
        assert (code, err) == (0, "")
        gpu = json.loads(out)["energy"]["unavailable"][0]
        assert (gpu["domain"], gpu["lost"]) == ("gpu:0", True)

    @pytest.mark.parametrize("code", [pynvml.NVML_ERROR_GPU_IS_LOST, slow(pynvml.NVML_ERROR_RESET_REQUIRED)])
    def test_run_keeps_the_rest(self, cet: Commands, package: Path, code: int) -> None:
        # By then the command runs: only imports take longer, and they come before the library is loaded.
        lost = f"at 2 {fault('*', code)}"
        exit_code, document, text = cet.measure("run", "--", "sleep", "2.5", script=[lost])
        assert exit_code == 14
        assert document["status"] == "partial"
        assert f"NVML error {code}" in document["stopped"]
        assert domain(document)["joules"] is None
        assert domain(document, "rapl:package-0")["joules"] > 0
        assert "partial" in text

    def test_a_measurement_keeps_its_blocks(self, here: CommandsHere) -> None:
        here.inject(fault("*", pynvml.NVML_ERROR_GPU_IS_LOST))
        code, document, text = here.measure(*COMPARE)
        assert code == 14
        assert document["status"] == "partial"
        assert "NVML error 15" in document["stopped"]
        assert [block["workload"] for block in blocks(document)][:1] == ["idle"]
        assert all(block["reading"]["joules"] > 0 for block in blocks(document))
        assert "partial" in text


class TestBackwards:
    """The counter runs backwards: void the block, repeat; never negative."""

    def test_run_has_no_joules(self, cet: Commands) -> None:
        code, document, text = cet.measure("run", "--", "sleep", "2.5", script=["at 2 gpu 0 counter 1000"])
        assert code == 16
        assert document["status"] == "partial"
        assert domain(document)["joules"] is None
        assert domain(document)["start"]["raw"] > domain(document)["end"]["raw"]
        assert "counter-backwards" in document["flags"]
        assert "backwards" in text

    def test_a_block_is_void_and_repeated(self, here: CommandsHere) -> None:
        # So many that one of them comes within a window, wherever warm-ups end.
        here.inject(*(f"at +{0.2 * k:.1f} gpu 0 counter 1000" for k in range(1, 5)))
        code, document, _ = here.measure(*COMPARE)
        assert (code, document["status"]) == (0, "complete")
        void = [block for block in blocks(document) if block["void"]]
        assert void
        assert all("backwards" in block["void"] and block["reading"]["joules"] is None for block in void)
        counted = [(block["round"], block["workload"]) for block in blocks(document) if not block["void"]]
        assert sorted(counted) == [(-1, "idle"), (0, "A"), (0, "B"), (0, "idle"), (1, "idle")]
        assert all(block["reading"]["joules"] > 0 for block in blocks(document) if not block["void"])


class TestFrozen:
    """The counter is frozen under load: longer window, then integral, then fail."""

    def test_a_longer_window_then_the_integral(self, here: CommandsHere) -> None:
        here.inject("gpu 0 frozen 1")
        code, document, text = here.measure(*COMPARE)
        assert (code, document["status"]) == (0, "complete")
        tried = [block for block in blocks(document) if block["void"]]
        assert len(tried) == 2
        assert tried[1]["seconds"] > 1.7 * tried[0]["seconds"]
        last = blocks(document)[-1]["reading"]["domains"][0]
        assert last["source"] == "integral"
        assert "stood" in last["reason"]
        assert "counter-frozen" in text

    def test_then_it_fails(self, here: CommandsHere) -> None:
        no_power = [fault(name, 3) for name in ("nvmlDeviceGetFieldValues", "nvmlDeviceGetPowerUsage")]
        here.inject("gpu 0 frozen 1", *no_power)
        code, document, text = here.measure(*COMPARE)
        assert code == 15
        assert document["status"] == "partial"
        assert document["stopped"].startswith("gpu:0: the counter stood")
        assert blocks(document)[0]["workload"] == "idle"
        assert blocks(document)[0]["reading"]["joules"] > 0
        assert "partial" in text


class TestFunctionNotFound:
    """FUNCTION_NOT_FOUND (13): that field only."""

    @pytest.mark.parametrize(
        ("function", "field"),
        [
            ("nvmlDeviceGetTemperature", ("state", "temperature")),
            ("nvmlDeviceGetCurrentClocksEventReasons", ("state", "throttle")),
            ("nvmlDeviceGetEnforcedPowerLimit", ("facts", "power_limit")),
            ("nvmlDeviceGetMigMode", None),
        ],
    )
    def test_the_rest_is_there(self, here: CommandsHere, function: str, field: tuple[str, str] | None) -> None:
        code, out, err = here.run("doctor", "--require-gpu", "--format", "json", script=[fault(function, 13)])
        assert (code, err) == (0, "")
        gpu = json.loads(out)["energy"]["measurable"][0]
        assert gpu["source"] == "counter"
        unknown = [(part, key) for part in ("state", "facts") for key, value in gpu[part].items() if value is None]
        assert unknown == ([field] if field else [])


class TestPassing:
    """UNKNOWN (999), TIMEOUT (10): bounded retry, then void."""

    def test_a_few_are_retried_and_more_make_a_block_void(self, here: CommandsHere) -> None:
        # Of the first window after its begin: two failures in reading its end; of the next: three.
        unknown = pynvml.NVML_ERROR_UNKNOWN
        here.inject(fault(COUNTER, unknown, first=1, count=2), fault(COUNTER, unknown, first=5, count=3))
        code, document, _ = here.measure(*COMPARE)
        assert (code, document["status"]) == (0, "complete")
        void = [block["void"] for block in blocks(document) if block["void"]]
        assert len(void) == 1
        assert "3 times" in void[0]
        assert "NVML error 999" in void[0]

    def test_for_good_ends_the_measurement(self, here: CommandsHere) -> None:
        here.inject(fault(COUNTER, pynvml.NVML_ERROR_TIMEOUT))
        code, document, text = here.measure(*COMPARE)
        assert code == 16
        assert document["status"] == "partial"
        assert "NVML error 10)" in document["stopped"]
        assert not blocks(document)[0]["void"]
        assert len([block for block in blocks(document) if block["void"]]) == 4
        assert "partial" in text


class TestVisibleDevices:
    """CUDA_VISIBLE_DEVICES with UUIDs, MIG, empty: resolve, refuse clearly, CPU only."""

    TWO = ("gpus 2", "gpu 0 tick 0.004", "gpu 1 tick 0.004")

    def test_a_uuid_is_resolved(self, cet: Commands) -> None:
        cet.environment["CUDA_VISIBLE_DEVICES"] = "GPU-00000001"
        _, document, _ = cet.measure("run", "--", "true", script=self.TWO)
        assert [row["domain"] for row in document["measurements"][0]["window"]["domains"]] == ["gpu:1"]

    @pytest.mark.parametrize(
        ("visible", "code", "named"),
        [
            ("MIG-8f2a", 13, "MIG"),
            ("0,MIG-8f2a", 13, "MIG"),
        ],
    )
    def test_what_cannot_be_measured_is_refused(
        self, cet: Commands, visible: str, code: int, named: str, tmp_path: Path
    ) -> None:
        cet.environment["CUDA_VISIBLE_DEVICES"] = visible
        exit_code, out, err = cet.run("run", "--", "touch", str(tmp_path / "ran"), script=self.TWO)
        assert (exit_code, out) == (code, "")
        assert err.startswith("Error: CUDA_VISIBLE_DEVICES=")
        assert named in err
        assert err.count("\n") == 1
        assert not (tmp_path / "ran").exists()

    def test_gpus_of_different_kinds_are_told_by_uuid_only(self, cet: Commands) -> None:
        cet.environment["CUDA_VISIBLE_DEVICES"] = "0"
        code, _, err = cet.run("run", "--", "true", script=[*self.TWO, "gpu 1 name NVIDIA Other GPU"])
        assert code == 12
        assert "set CUDA_DEVICE_ORDER=PCI_BUS_ID, or give UUIDs" in err

    @pytest.mark.parametrize(
        ("visible", "why"),
        [
            ("", "hides all GPUs"),
            slow("-1", "hides all GPUs"),
            slow("NoDevFiles", "before 'NoDevFiles', which names no GPU"),
            slow("5", "before '5', which names no GPU"),
            slow("GPU-7", "before 'GPU-7', which names no GPU"),
            ("GPU-0000", "before 'GPU-0000', which names more than one GPU"),
            slow("1,1", "names gpu:1 twice"),
        ],
    )
    def test_none_is_cpu_only(self, cet: Commands, visible: str, why: str, package: Path) -> None:
        cet.environment["CUDA_VISIBLE_DEVICES"] = visible
        code, document, text = cet.measure("run", "--", "sleep", "0.2", script=self.TWO)
        assert code == 0
        assert [row["domain"] for row in document["measurements"][0]["window"]["domains"]] == ["rapl:package-0"]
        assert why in text


class TestSignals:
    """SIGINT, SIGTERM: flush what is finished, stop the sampler."""

    @pytest.mark.parametrize("signum", [signal.SIGINT, slow(signal.SIGTERM)])
    def test_a_measurement_keeps_its_blocks(self, cet: Commands, signum: signal.Signals) -> None:
        args = (*COMPARE, "--rounds", "100", "--integral", "--output", str(cet.output))
        process = cet.start(*args)
        while not (cet.output.exists() and len(blocks(json.loads(cet.output.read_text()))) >= 2):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signum)
        out, err = process.communicate(timeout=10)
        assert process.returncode == 128 + signum
        document = json.loads(cet.output.read_text())
        assert (document["status"], document["stopped"]) == ("partial", signum.name)
        assert len(blocks(document)) >= 2
        assert all(block["reading"]["domains"][0]["samples"] for block in blocks(document))
        assert f"partial: {signum.name}" in out
        assert "Traceback" not in err

    @pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
    def test_run_passes_them_on(self, cet: Commands, signum: signal.Signals, tmp_path: Path) -> None:
        ready = tmp_path / "ready"  # SIGINT may have been ignored already where the tests were started
        command = ("env", "--default-signal=INT", "sh", "-c", f"touch {ready}; exec sleep 30")
        process = cet.start("run", "--output", str(cet.output), "--", *command)
        while not ready.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signum)
        process.communicate(timeout=10)
        assert process.returncode == 128 + signum
        document = json.loads(cet.output.read_text())
        assert (document["status"], document["exit_code"]) == ("partial", 128 + signum)
        assert signum.name in document["stopped"]
        assert total(document)["value"] > 0


class TestRefusedFirst:
    """Bad arguments, missing exit, unwritable output: refused before any GPU work."""

    @pytest.fixture
    def never_loaded(self, cet: Commands) -> Commands:
        """The simulation ends a process that loads it."""
        cet.environment["NVML_SIMULATION"] = str(cet.folder / "missing")
        return cet

    @pytest.mark.parametrize(
        ("args", "code", "named"),
        [
            (("run", "--idle", "-1", "--", "true"), 2, "--idle"),
            (("run",), 2, "COMMAND"),
            (("run", "--idle", "1", "--assume-watts", "5", "--", "true"), 2, "--assume-watts"),
            (("run", "--", "no-such-command"), 127, "no-such-command is not found"),
            (("run", "--", "./commands.py"), 126, "not executable"),
            (("run", "--output", "missing/run.json", "--", "true"), 20, "missing/run.json cannot be written"),
            (("run", "--output", ".", "--", "true"), 20, ". is a folder"),
            (("run", "--output", "commands.py", "--", "true"), 20, "commands.py exists"),
            (("run", "--prometheus", "missing/cet.prom", "--", "true"), 20, "missing/cet.prom"),
            ((*COMPARE, "--rounds", "0"), 2, "--rounds"),
            ((*COMPARE, "--window", "0"), 2, "--window"),
            ((*COMPARE, "--plots", "commands.py/plots"), 20, "commands.py/plots"),
            ((*PROFILE, "--batch-size", "none"), 2, "--batch-size"),
            (("run", "--idle", "nan", "--", "true"), 2, "'--idle': nan is not a finite number"),
            (("run", "--idle", "inf", "--", "true"), 2, "'--idle': inf is not a finite number"),
            (("run", "--assume-watts", "nan", "--", "true"), 2, "'--assume-watts': nan is not a finite number"),
            ((*PROFILE, "--assume-watts", "inf"), 2, "'--assume-watts': inf is not a finite number"),
            ((*COMPARE, "--window", "nan"), 2, "'--window': nan is not a finite number"),
            ((*COMPARE, "--warm-up", "inf"), 2, "'--warm-up': inf is not a finite number"),
            (("watch", "--interval", "nan"), 2, "'--interval': nan is not a finite number"),
            (("watch", "--duration", "inf"), 2, "'--duration': inf is not a finite number"),
            ((*PROFILE, "--plots", "missing", "--output", "./missing"), 2, "--output missing and --plots missing are"),
            ((*PROFILE, "--samples", "20", "--batch-size", "24"), 2, "--samples 20 is too few for a batch of 24"),
            ((*PROFILE, "--backbone", "simulated_net:backbone"), 2, "--backbone simulated_net:backbone is for a check"),
            ((*COMPARE, "--backbone", "simulated_net:backbone"), 2, "no model here is one; leave it out"),
            ((*PROFILE, "--output", "missing/profile.json"), 20, "missing/profile.json"),
        ],
    )
    def test_before_nvml(self, never_loaded: Commands, args: tuple[str, ...], code: int, named: str) -> None:
        exit_code, out, err = never_loaded.run(*args)
        assert (exit_code, out) == (code, "")
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        assert named in err

    def test_an_exit_that_is_missing_is_named_before_the_first_window(self, here: CommandsHere) -> None:
        code, out, err = here.run(*PROFILE, "--exit", "layer9", "--output", str(here.output))
        assert (code, out) == (22, "")
        assert err == "Error: the model has no early exit 'layer9'; give one of 0, 1\n"
        assert not here.output.exists()
