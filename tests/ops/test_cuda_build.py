"""The CUDA part without a GPU: what nvcc makes of it, and when `setup.py` builds it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
ARCHITECTURES = [80, 90, 100] if NVCC else []


def disassembler() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_for(architecture: int, source: str, folder: Path) -> tuple[str, str]:
    """The report of ptxas, and the machine code."""
    cubin = folder / "out.cubin"
    command = [NVCC or "", "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas=-v", "-cubin", "-o", str(cubin)]
    built = subprocess.run([*command, str(ROOT / "csrc/cuda" / source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    code = subprocess.run([disassembler(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return built.stderr, code


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernel_fits_its_registers(architecture: int, tmp_path: Path) -> None:
    report, code = compile_for(architecture, "switch_graph.cu", tmp_path)
    print(*(line for line in report.splitlines() if "registers" in line or "spill" in line), sep="\n")
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert stacks == [("0", "0", "0")]
    (registers,) = re.findall(r"Used (\d+) registers", report)
    assert int(registers) <= 64
    instructions = Counter(re.findall(r"\b(?:LD|ST)[GLS]?\.[\w.]*|\b(?:LDL|STL)\b", code))
    assert not [name for name in instructions if name.startswith(("LDL", "STL"))]


def build(folder: Path, *, nvcc: str | None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py with no compiler but this shell script for nvcc, or with none."""
    tools = folder / "bin"
    tools.mkdir()
    if nvcc is not None:
        script = tools / "nvcc"
        script.write_text(f"#!/bin/sh\n{nvcc}\n")
        script.chmod(0o755)
    return subprocess.run(
        [
            sys.executable,
            "setup.py",
            "build_ext",
            "--build-lib",
            str(folder / "lib"),
            "--build-temp",
            str(folder / "tmp"),
        ],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tools), "CET_BUILD_CPP": "0", **environment},
        capture_output=True,
        text=True,
    )


LISTS = 'if [ "$1" = --list-gpu-arch ]; then printf "compute_75\\ncompute_80\\ncompute_100\\ncompute_90\\n"; exit; fi'
KEEPS = 'for last; do :; done; echo "$@" > "$last"'


def test_targets_are_those_that_nvcc_knows_in_the_order_of_numbers(tmp_path: Path) -> None:
    run = build(tmp_path, nvcc=f"{LISTS}\n{KEEPS}", CET_BUILD_CUDA="1")
    assert run.returncode == 0, run.stderr
    (library,) = (tmp_path / "lib/cet").glob("_cuda*")
    command = library.read_text()
    targets = re.findall(r"arch=compute_(\d+),code=(\w+)", command)
    assert targets == [("80", "sm_80"), ("90", "sm_90"), ("100", "sm_100"), ("100", "compute_100")]
    assert "-cudart=static" in command


@pytest.mark.parametrize(
    ("nvcc", "reason"),
    [
        (None, "nvcc is not on the PATH; install the CUDA toolkit"),
        (f"{LISTS}\nexit 1", "nvcc failed; its messages are above"),
        ("echo compute_50", "compiles for none of sm_80, sm_90 and sm_100"),
        ("echo nvcc fatal: no licence >&2; exit 3", "--list-gpu-arch failed: nvcc fatal: no licence"),
    ],
)
def test_a_build_that_fails_is_loud_if_wanted_and_left_out_if_not(
    tmp_path: Path, nvcc: str | None, reason: str
) -> None:
    for folder in ("wanted", "unset", "unwanted"):
        (tmp_path / folder).mkdir()
    wanted = build(tmp_path / "wanted", nvcc=nvcc, CET_BUILD_CUDA="1")
    assert wanted.returncode != 0
    assert reason in wanted.stderr
    unset = build(tmp_path / "unset", nvcc=nvcc, CET_BUILD_CUDA="")
    assert unset.returncode == 0, unset.stderr
    assert nvcc is None or reason in unset.stdout + unset.stderr
    assert build(tmp_path / "unwanted", nvcc="exit 1", CET_BUILD_CUDA="0").returncode == 0


def test_an_unknown_wish_is_refused(tmp_path: Path) -> None:
    run = build(tmp_path, nvcc=None, CET_BUILD_CUDA="yes")
    assert run.returncode != 0
    assert "CET_BUILD_CUDA is 'yes'; set it to 0 or 1, or leave it unset" in run.stderr
