"""First contact with a GPU: what tells most comes first, and nothing that was found is lost.

``make gpu`` runs it. Builds with the Python that is given, without a virtual environment and without a network; then
each stage is a process of its own, with a limit. Checks append a line of JSON as they happen. After each stage, and at
the end whatever that is, all files go into one archive, ``OUTPUT/gpu.tar.gz``: from some machines few files come back.
``python -m benchmarks.gpu_read`` reads it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/gpu"
ARCHIVE = "gpu.tar.gz"
KERNELS = (
    "gate",
    "exit_gate",
    "order_rows",
    "gather_and_scatter_rows",
    "count_labelled",
    "consistent_exit_loss",
    "scale",
)
SANITIZED = ("every_way", "loss_and_gradients", "rows_move")
"""Checks that launch all of these, whose accesses the sanitizers see."""
OP_TESTS = ["tests/ops/test_padded.py"]
OP_TESTS += [f"tests/ops/test_triton_{name}.py" for name in ("exit_gate", "compact", "consistent_exit_loss")]
RUNNER_TESTS = ["tests/runtime/test_runners.py", "tests/runtime/test_runners_cuda.py"]
ENERGY_TESTS = ["tests/energy/test_energy_cuda.py"]
GROUPS = {"0": "machine and build", "A": "smoke", "B": "tests and sanitizers", "C": "benchmarks", "D": "joules"}


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        name: of its log.
        group: a key of :data:`GROUPS`.
        command: the arguments of Python.
        limit: seconds.
        tool: what Python runs under.
        environment: more variables.
        beside: whether the next stage of its group runs at the same time; never where something is timed, as nothing is
            in a rehearsal.
    """

    name: str
    group: str
    command: list[str]
    limit: float
    tool: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    beside: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    name: str
    passed: bool
    seconds: float
    last_line: str


def stages(work: Path, device: str) -> list[Stage]:
    """All of them, in order. On a CPU, which stands for the GPU in a rehearsal, each does the least that it can."""
    on_gpu = device == "cuda"
    checks = work / "checks.jsonl"

    def benchmark(group: str, script: str, limit: int, *options: str) -> Stage:
        timing = (
            ["--cold", "--seconds", "0.1", "--within", str(limit * 3 // 4)] if on_gpu else ["--quick", "--within", "0"]
        )
        command = [
            "-m",
            f"benchmarks.{script}",
            "--device",
            device,
            *timing,
            "--output",
            str(work / "results"),
            *options,
        ]
        return Stage(script, group, command, limit if on_gpu else 120, beside=not on_gpu)

    def tests(name: str, group: str, limit: int, *arguments: str) -> Stage:
        workers = ["-n", "8"] if on_gpu else ["--collect-only", "-p", "no:randomly"]
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=40", *workers, *arguments]
        return Stage(name, group, command, limit, environment={"OMP_NUM_THREADS": "1"}, beside=True)

    def sanitized(tool: str) -> Stage:
        names = [f"--kernel-name=kns={name}_kernel" for name in KERNELS]
        # PyTorch looks for functions that the driver lacks, which is no error.
        under = ("compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--report-api-errors=no", *names)
        command = ["-m", "benchmarks.smoke", str(work / f"{tool}.jsonl"), device, *SANITIZED, "--limit", "100"]
        # Within a block of PyTorch's own cache no access would be out of bounds.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Stage(tool, "B", command, 110, under if on_gpu else (), alone, beside=True)

    def build(part: str) -> list[str]:
        return ["-c", f"from benchmarks.gpu_first import build; build('{part}')"]

    # What a call costs the host is told by the compiled parts of the package; rehearsed is the shorter one.
    parts = ("cuda", "cpp") if on_gpu else ("cuda",)
    skipping = ("--skip", "compiled")
    nets = (
        ("--models", "vit_base", "--batches", "1,64,256", "--dtype", "bfloat16")
        if on_gpu
        else ("--models", "sensor_cnn")
    )
    return [
        Stage("machine", "0", ["-m", "benchmarks.smoke", str(checks), device, "machine"], 60, beside=not on_gpu),
        *(Stage(f"{part}_part", "0", build(part), 90, beside=True) for part in parts),
        Stage("smoke", "A", ["-m", "benchmarks.smoke", str(checks), device, "--limit", "50" if on_gpu else "100"], 130),
        sanitized("memcheck"),
        sanitized("racecheck"),
        tests("op_tests", "B", 100, *OP_TESTS, "-k", "cuda or triton"),
        tests("runner_tests", "B", 100, *RUNNER_TESTS, "-k", "cuda"),
        benchmark("C", "exit_gate", 50, *skipping),
        benchmark("C", "consistent_exit_loss", 50, *skipping),
        benchmark("C", "compact", 30),
        benchmark("C", "end_to_end", 120, *nets),
        Stage("joules", "D", ["-m", "pytest", "-q", *ENERGY_TESTS] if on_gpu else ["-c", "import cet.energy"], 40),
    ]


class Running:
    """A stage that was started; its output goes to a file."""

    def __init__(self, stage: Stage, work: Path) -> None:
        self.stage = stage
        self.log = work / f"{stage.name}.log"
        self._start = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        path = os.pathsep.join(filter(None, (str(BUILD), os.environ.get("PYTHONPATH"))))
        variables = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **stage.environment}
        if (ROOT / ".tcache").is_dir():  # kernels that were compiled beforehand
            variables["TRITON_CACHE_DIR"] = str(ROOT / ".tcache")
        with self.log.open("w") as file:
            try:
                self._process = subprocess.Popen(
                    [*stage.tool, sys.executable, *stage.command],
                    cwd=ROOT,
                    env={**os.environ, **variables},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                file.write(f"{error.filename} is not installed\n")

    def wait(self) -> Outcome:
        """Wait for its end, which comes at its limit at the latest."""
        status, note = 1, ""
        if self._process is not None:
            try:
                status = self._process.wait(max(0.1, self.stage.limit - (time.monotonic() - self._start)))
                note = "" if status == 0 else f"exit status {status}; "
            except subprocess.TimeoutExpired:
                self.stop()
                note = f"stopped after {self.stage.limit:g} s; "
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return Outcome(
            self.stage.name, status == 0, time.monotonic() - self._start, note + (lines[-1] if lines else "")
        )

    def stop(self) -> None:
        """End it with all that it started, which else would hold the GPU."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def copy_sources() -> None:
    """Put the package where Python finds it, without an installer: it may be old, and Python needs none."""
    shutil.rmtree(BUILD, ignore_errors=True)
    shutil.copytree(ROOT / "src/cet", BUILD / "cet", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "kernels", BUILD / "cet/kernels", ignore=shutil.ignore_patterns("__pycache__"))


def build(part: str) -> None:
    """Build the compiled ``cuda`` or ``cpp`` part beside it, in a copy without pyproject.toml, which an old setuptools
    refuses."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        shutil.copy(ROOT / "setup.py", copy)
        (copy / "src").mkdir()
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(BUILD), "--build-temp", "tmp"]
        chosen = {**os.environ, **{f"CET_BUILD_{each.upper()}": str(int(each == part)) for each in ("cuda", "cpp")}}
        sys.exit(subprocess.run(command, cwd=copy, env=chosen).returncode)


def archive(work: Path, output: Path) -> None:
    """Put all that is in the folder ``work`` into one file, at once or not at all."""
    with tempfile.TemporaryDirectory(dir=output) as temporary:
        made = shutil.make_archive(str(Path(temporary) / "gpu"), "gztar", work.parent, work.name)
        os.replace(made, output / ARCHIVE)


class Contact:
    """The outcomes so far, written after each."""

    def __init__(self, work: Path, output: Path) -> None:
        self.work, self.output = work, output
        self.outcomes: list[Outcome] = []

    def note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        text = json.dumps([asdict(each) for each in self.outcomes], indent=2) + "\n"
        (self.work / "stages.json").write_text(text)
        archive(self.work, self.output)
        passed = "passed" if outcome.passed else "FAILED"
        print(f"{outcome.name:<22}{passed}{outcome.seconds:>7.0f} s  {outcome.last_line[:80]}", flush=True)

    def run(self, coming: list[Stage]) -> None:
        together: list[Running] = []
        try:
            for index, stage in enumerate(coming):
                together.append(Running(stage, self.work))
                following = coming[index + 1].group if index + 1 < len(coming) else ""
                if stage.beside and following == stage.group:
                    continue
                while together:
                    self.note(together[0].wait())
                    together.pop(0)
        finally:
            for running in together:  # only where this was interrupted
                running.stop()
            archive(self.work, self.output)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_first", description=__doc__)
    parser.add_argument("output", type=Path, help=f"folder for {ARCHIVE}")
    parser.add_argument("--groups", default="".join(GROUPS), help=f"some of {GROUPS}")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal without a GPU")
    given = parser.parse_args(arguments)
    if not set(given.groups) <= GROUPS.keys():
        parser.error(f"--groups is {given.groups}; give some of {''.join(GROUPS)}")
    output = given.output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="gpu-"))
        (work / "results").mkdir()
        archive(work, output)
    except OSError as error:
        parser.error(f"{output} cannot be written ({error.strerror}); give another folder")
    copy_sources()
    contact = Contact(work, output)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was found is packed
    contact.run([stage for stage in stages(work, given.device) if stage.group in given.groups])
    failed = [outcome.name for outcome in contact.outcomes if not outcome.passed]
    print(f"{len(failed)} of {len(contact.outcomes)} stages failed; read all with")
    print(f"python -m benchmarks.gpu_read {output / ARCHIVE}")
    shutil.rmtree(work, ignore_errors=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
