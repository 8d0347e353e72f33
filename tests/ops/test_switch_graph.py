"""The C++ code that links graphs, on the CPU and under sanitizers, with a runtime that keeps to the documentation."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import triton

from thinned import slow

COMPILER = shutil.which("g++") or shutil.which("clang++") or "g++"
HEADERS = Path(triton.__file__).parent / "backends/nvidia/include"


@pytest.mark.parametrize("fault", [None, "counts[1] = 0;", slow("segment ? &last : nullptr")])
def test_a_linked_graph_runs_each_segment_for_its_least_bucket(tmp_path: Path, fault: str | None) -> None:
    """And what is left out of the code is missed."""
    root, tests = Path(__file__).parents[2], tmp_path / "tests/ops"
    shutil.copytree(root / "csrc/cuda", tmp_path / "csrc/cuda")
    tests.mkdir(parents=True)
    shutil.copy(Path(__file__).parent / "fake_graphs.cpp", tests)
    if fault is not None:
        source = tmp_path / "csrc/cuda/switch_graph.cu"
        text = source.read_text()
        assert fault in text
        source.write_text(text.replace(fault, "nullptr" if "nullptr" in fault else ";"))
    program = tmp_path / "linked"
    options = ["-std=c++17", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{HEADERS}"]
    command = [COMPILER, *options, str(tests / "fake_graphs.cpp"), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    if fault is None:
        assert (done.returncode, done.stdout) == (0, "2000 launches\n"), done.stdout + done.stderr
    else:
        assert done.returncode != 0, "the fault was not found"
        assert "broken: " in done.stdout
