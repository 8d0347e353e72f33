"""Everything that needs a GPU, in one go and under nine minutes: build, tests, sanitizers, benchmarks.

Builds with the Python that runs it, without a virtual environment and without a network, and leaves the log of each
step and the results of the benchmarks in a folder. A step that fails or takes too long does not keep the others from
running; the exit status then is 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/gpu"
OP_TESTS = ["tests/test_padded.py"]
OP_TESTS += [f"tests/test_triton_{name}.py" for name in ("exit_gate", "compact", "consistent_exit_loss")]
ON_GPU = ("-k", "cuda or triton")  # the Triton tests run on the GPU where there is one
RUNNER_TESTS = ["tests/test_runners.py", "tests/test_runners_cuda.py"]
ENERGY_TESTS = ["tests/test_energy_cuda.py"]


@dataclass(frozen=True)
class Step:
    name: str
    command: list[str]
    limit: int
    """Seconds."""
    tool: tuple[str, ...] = ()
    """What Python runs under."""


@dataclass(frozen=True)
class Outcome:
    name: str
    passed: bool
    seconds: float
    last_line: str


def steps(output: Path) -> list[Step]:
    """All of them, in order; their limits add up to less than nine minutes."""

    def benchmark(script: str, *options: str, folder: str = "") -> list[str]:
        where = str(output / "results" / folder)
        return [f"benchmarks/{script}.py", "--device", "cuda", "--cold", "--output", where, *options]

    def sanitized(tool: str) -> Step:
        under = ("compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--target-processes=all")
        return Step(tool, ["-m", "pytest", "-q", *ON_GPU, "--hypothesis-profile=quick", *OP_TESTS], 60, under)

    install = ["-m", "pip", "install", "--quiet", "--upgrade", "--no-deps", "--no-index", "--no-build-isolation"]
    nets, batches = ("--models", "resnet50,vit_base"), ("--batches", "1,8,64,256,1024")
    end_to_end = benchmark("end_to_end", *nets, *batches, "--dtype", "bfloat16", "--seconds", "0.2", "--joules", "0.2")
    sensor = benchmark(
        "end_to_end", "--models", "sensor_cnn", *batches, "--seconds", "0.2", "--joules", "0.2", folder="sensor_cnn"
    )
    compiled = benchmark(
        "end_to_end",
        *nets,
        "--batches",
        "64",
        "--dtype",
        "bfloat16",
        "--compile",
        "--seconds",
        "0.2",
        folder="compiled",
    )
    return [
        Step("build", [*install, "--target", str(BUILD), "."], 60),
        Step("tests", ["-m", "pytest", "-q", *ON_GPU, *OP_TESTS, *RUNNER_TESTS, *ENERGY_TESTS], 110),
        sanitized("memcheck"),
        sanitized("racecheck"),
        Step("exit_gate", benchmark("exit_gate", "--skip", "compiled", "--seconds", "0.3"), 30),
        Step("compact", benchmark("compact", "--seconds", "0.3"), 30),
        Step("consistent_exit_loss", benchmark("consistent_exit_loss", "--skip", "compiled", "--seconds", "0.3"), 30),
        Step("end_to_end", end_to_end, 80),
        Step("sensor_cnn", sensor, 30),
        Step("compiled", compiled, 40),
    ]


def run(step: Step, output: Path) -> Outcome:
    """Run one step; its output goes to a file and not to the screen."""
    environment = {**os.environ, "PYTHONPATH": str(BUILD), "CET_BUILD_CPP": "1", "CET_BUILD_CUDA": "1"}
    start = time.monotonic()
    log = output / f"{step.name}.log"
    with log.open("w") as file:
        try:
            status = subprocess.run(
                [*step.tool, sys.executable, *step.command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=step.limit,
            ).returncode
            note = "" if status == 0 else f"exit status {status}; "
        except subprocess.TimeoutExpired:
            status, note = 1, f"stopped after {step.limit} s; "
        except FileNotFoundError as error:
            status, note = 1, f"{error.filename} is not installed"
    lines = log.read_text(errors="replace").strip().splitlines()
    return Outcome(step.name, status == 0, time.monotonic() - start, note + (lines[-1] if lines else ""))


@click.command()
@click.argument("output", type=click.Path(file_okay=False, path_type=Path))
def main(output: Path) -> None:
    """Build, test, sanitize and measure on this machine's GPU; logs and results go to OUTPUT."""
    output = output.resolve()
    (output / "results").mkdir(parents=True, exist_ok=True)
    outcomes = []
    for step in steps(output):
        outcomes.append(run(step, output))
        (output / "steps.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n")
    for outcome in outcomes:
        passed = "passed" if outcome.passed else "FAILED"
        click.echo(f"{outcome.name:<22}{passed}{outcome.seconds:>7.0f} s  {outcome.last_line[:80]}")
    if not all(outcome.passed for outcome in outcomes):
        raise click.ClickException(f"some steps failed; their logs are in {output}")


if __name__ == "__main__":
    main()
