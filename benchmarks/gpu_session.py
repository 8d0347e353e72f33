"""Everything that needs a GPU, in one go and under nine minutes: build, tests, sanitizers, benchmarks.

Builds with the Python that runs it, without a virtual environment and without a network, and leaves the log of each
step and the results of the benchmarks in a folder, and all of it in one archive beside the folder, which is made anew
after each step. A step that fails or takes too long does not keep the others from running; the exit status then is 1.
Where the CUDA part cannot be built, the rest is. Tests run side by side where pytest-xdist is installed: most of their
time goes into compiling kernels.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/gpu"
OP_TESTS = ["tests/ops/test_padded.py"]
OP_TESTS += [f"tests/ops/test_triton_{name}.py" for name in ("exit_gate", "compact", "consistent_exit_loss")]
ON_GPU = "cuda or triton"  # the Triton tests run on the GPU where there is one
SANITIZED = f"({ON_GPU}) and (every_way or ticket or padding or padded_rows or longer or retained or rows_move)"
NEEDED = ("torch", "triton", "numpy", "scipy", "safetensors", "pynvml", "rich", "matplotlib", "transformers")
NEEDED += ("setuptools", "pybind11", "pytest", "hypothesis")
SETUPTOOLS = 77  # older ones refuse the licence in pyproject.toml
WITHIN = "{within}"  # stands for the seconds after which a step is to come to its end
KERNELS = (
    "gate",
    "pool",
    "head",
    "order_rows",
    "gather_and_scatter_rows",
    "count_labelled",
    "consistent_exit_loss",
    "scale",
)
RUNNER_TESTS = ["tests/runtime/test_runners.py", "tests/runtime/test_runners_cuda.py"]
ENERGY_TESTS = ["tests/energy/test_energy_cuda.py"]


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    limit: int
    """Seconds."""
    tool: tuple[str, ...] = ()
    """What Python runs under."""
    environment: dict[str, str] = field(default_factory=dict)
    stretches: bool = False
    """Whether it may take, besides, the time that those before it have left."""
    fallback: dict[str, str] | None = None
    """Other variables of the environment, with which the step is run again if it fails."""


@dataclass(frozen=True)
class Outcome:
    name: str
    passed: bool
    seconds: float
    last_line: str


def steps(output: Path) -> list[Step]:
    """All of them, in order; their limits add up to less than nine minutes."""

    def benchmark(script: str, limit: int, *options: str, name: str = "", stretches: bool = False) -> Step:
        where = str(output / "results" / name)
        timing = ["--cold", "--seconds", "0.2", "--within", WITHIN, "--output", where]
        command = ["-m", f"benchmarks.{script}", "--device", "cuda", *timing, *options]
        return Step(name or script, command, limit, stretches=stretches)

    def tests(name: str, limit: int, *files: str) -> Step:
        side_by_side = ["-n", "8"] if importlib.util.find_spec("xdist") else []
        command = ["-m", "pytest", "-q", "-k", ON_GPU, *side_by_side, *files]
        return Step(name, command, limit, environment={"OMP_NUM_THREADS": "1"})

    def sanitized(tool: str) -> Step:
        kernels = [f"--kernel-name=kns={name}_kernel" for name in KERNELS]
        # PyTorch looks for functions that the driver lacks, which is no error.
        under = ("compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--report-api-errors=no", *kernels)
        command = ["-m", "pytest", "-q", "-k", SANITIZED, "--hypothesis-profile=quick", *OP_TESTS]
        # Within a block of PyTorch's own cache no access would be out of bounds.
        return Step(tool, command, 35, under, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    install = ["-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", "--no-index", "--no-build-isolation"]
    half = ("--dtype", "bfloat16")
    large = ("--models", "resnet50,vit_base", "--batches", "1,64,256,1024", "--longest-call", "0.15")
    return [
        Step("build", [*install, "--target", str(BUILD), "."], 45, fallback={"CET_BUILD_CUDA": "0"}),
        tests("op_tests", 90, *OP_TESTS),
        tests("runner_tests", 65, *RUNNER_TESTS),
        Step("energy_tests", ["-m", "pytest", "-q", *ENERGY_TESTS], 35),
        sanitized("memcheck"),
        sanitized("racecheck"),
        benchmark("exit_gate", 45, "--skip", "compiled"),
        benchmark("compact", 25),
        benchmark("consistent_exit_loss", 35, "--skip", "compiled"),
        benchmark("end_to_end", 20, "--models", "sensor_cnn", "--batches", "1,64,1024", name="sensor_cnn"),
        benchmark("end_to_end", 95, *large, *half, "--joules", "1", stretches=True),
    ]


def run(step: Step, output: Path) -> Outcome:
    """Run one step; its output goes to a file and not to the screen."""
    path = os.pathsep.join(filter(None, (str(BUILD), os.environ.get("PYTHONPATH"))))
    variables = {"PYTHONPATH": path, "CET_BUILD_CPP": "0", "CET_BUILD_CUDA": "1", **step.environment}
    start = time.monotonic()
    log = output / f"{step.name}.log"
    command = [argument.replace(WITHIN, str(step.limit * 4 // 5)) for argument in step.command]
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                [*step.tool, sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status = process.wait(step.limit)
            note = "" if status == 0 else f"exit status {status}; "
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started, which else would hold the GPU
            status, note = process.wait(), f"stopped after {step.limit} s; "
        except FileNotFoundError as error:
            status, note = 1, f"{error.filename} is not installed"
    lines = log.read_text(errors="replace").strip().splitlines()
    return Outcome(step.name, status == 0, time.monotonic() - start, note + (lines[-1] if lines else ""))


def archive(folder: Path) -> None:
    """Put all that is in the folder into one file beside it, ``FOLDER.tar.gz``, at once or not at all."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = shutil.make_archive(str(Path(temporary) / folder.name), "gztar", folder.parent, folder.name)
        os.replace(made, folder.parent / f"{folder.name}.tar.gz")


def check_machine() -> None:
    """Refuse a Python that lacks what all steps need, and a machine without a GPU."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        raise click.ClickException(f"{sys.executable} lacks {', '.join(lacking)}; give PYTHON, one that has them")
    setuptools = metadata.version("setuptools")
    if int(setuptools.partition(".")[0]) < SETUPTOOLS:
        raise click.ClickException(
            f"setuptools {setuptools} of {sys.executable} cannot build cet; install {SETUPTOOLS}"
        )
    import torch

    if not torch.cuda.is_available():
        raise click.ClickException(f"PyTorch {torch.__version__} of {sys.executable} sees no CUDA device")


@click.command()
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
def main(output: Path) -> None:
    """Build, test, sanitize and measure on this machine's GPU; logs and results go to OUTPUT."""
    check_machine()
    output = output.resolve()
    try:
        (output / "results").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.ClickException(f"{output} cannot be written ({error.strerror}); give another OUT") from error
    outcomes = []
    coming = steps(output)
    end = time.monotonic() + sum(step.limit for step in coming)
    while coming:
        step = coming.pop(0)
        if step.stretches:
            left = end - time.monotonic() - sum(later.limit for later in coming)
            step = replace(step, limit=int(left))
        outcome = run(step, output)
        outcomes.append(outcome)
        if not outcome.passed and step.fallback is not None:
            environment = {**step.environment, **step.fallback}
            coming.insert(0, replace(step, name=f"{step.name}_again", environment=environment, fallback=None))
        (output / "steps.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
        archive(output)
        passed = "passed" if outcome.passed else "FAILED"
        click.echo(f"{outcome.name:<22}{passed}{outcome.seconds:>7.0f} s  {outcome.last_line[:80]}")
    if not all(outcome.passed for outcome in outcomes):
        raise click.ClickException(f"some steps failed; their logs are in {output}")


if __name__ == "__main__":
    main()
