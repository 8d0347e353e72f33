"""What the compiler makes of every Triton kernel, in every path, for GPUs that need not be there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from thinned import kept

SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # of a processor
ROW_COPIES = ["row copy", "row copy, channels last", "row copy, padded"]


@pytest.fixture(scope="module", params=kept(SHARED_BYTES, 90))
def kernels(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """In a process of its own, because Triton may interpret in this one."""
    script = Path(__file__).parents[1] / "compile_triton.py"
    command = [sys.executable, script, str(request.param)]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    compiled: list[dict[str, Any]] = [json.loads(line) for line in result.stdout.splitlines()]
    print(f"\nsm_{request.param:<24} {'kernel':<30} registers  shared bytes  warps")
    for k in compiled:
        print(f"{k['case']:<27} {k['kernel']:<30} {k['registers']:>9} {k['shared']:>13} {k['warps']:>6}")
    return compiled


MANY_REGISTERS = {"many rows of half precision": 12, "loss, 4000 classes": 16}
"""Cases that are wide for a thread, and how many warps run at once then: to be tried narrower on a GPU."""


def test_nothing_is_spilled(kernels: list[dict[str, Any]]) -> None:
    for kernel in kernels:
        if kernel["case"] in MANY_REGISTERS:
            assert kernel["stack"] <= 16, kernel["case"]
        else:
            assert kernel["stack"] == kernel["local"] == 0, kernel["case"]
            assert not [name for name in kernel["instructions"] if name[:3] in ("LDL", "STL")], kernel["case"]
        assert kernel["registers"] * 32 * kernel["warps"] <= 2**15, f"{kernel['case']}: not even two programs at a time"


def test_the_driver_is_given_what_each_kernel_takes(kernels: list[dict[str, Any]]) -> None:
    """By Triton's launcher, and by cet's of what is compiled: parameters, their sizes, grid, threads, shared memory."""
    for kernel in kernels:
        assert kernel["wrong_launches"] == [], (kernel["case"], kernel["kernel"])
    assert len([kernel for kernel in kernels if kernel["case"] == "mixed"]) == 5


def programs_at_once(kernel: dict[str, Any]) -> int:
    """On one processor, by warps, by registers, of which a warp gets multiples of 256, and by shared memory."""
    warps, capability = kernel["warps"], kernel["capability"]
    by_registers = 2**16 // (-(-kernel["registers"] * 32 // 256) * 256 * warps)
    by_memory = SHARED_BYTES[capability] // (kernel["shared"] + 1024)
    return min(by_registers, by_memory, 64 // warps, 32)


@pytest.mark.parametrize(
    ("kernel", "warps"),
    [
        ("exit_gate_kernel", 20),  # of 32 once, and of 24 for the loss: on an H200 it took longer (docs/gpu.md)
        ("gate_kernel", 16),
        ("gather_and_scatter_rows_kernel", 32),
        ("consistent_exit_loss_kernel", 20),
        ("scale_kernel", 64),
    ],
)
def test_enough_warps_run_at_once_to_hide_what_each_waits_for(
    kernels: list[dict[str, Any]], kernel: str, warps: int
) -> None:
    for found in kernels:
        if found["kernel"] == kernel:
            wanted = MANY_REGISTERS.get(found["case"], warps)
            assert programs_at_once(found) * found["warps"] >= wanted, (found["case"], found["registers"])


def wide(kernel: dict[str, Any]) -> dict[str, int]:
    """How many loads from and stores to global memory are of 16 bytes."""
    counts = kernel["instructions"].items()
    return {kind: sum(n for name, n in counts if name.startswith(kind) and ".128" in name) for kind in ("LDG", "STG")}


def test_rows_are_copied_16_bytes_at_a_time(kernels: list[dict[str, Any]]) -> None:
    copies = {kernel["case"]: kernel for kernel in kernels if kernel["kernel"] == "gather_and_scatter_rows_kernel"}
    for case in ROW_COPIES:
        moves = 2 if case == "row copy, padded" else 1
        assert wide(copies[case]) == {"LDG": 8 * moves, "STG": 8 * moves}, "eight independent loads in flight"
        others = [
            n for name, n in copies[case]["instructions"].items() if name.startswith("STG") and ".128" not in name
        ]
        assert not others, case


@pytest.mark.parametrize(
    ("case", "kernel", "loads"),
    [
        ("sensor rows", "exit_gate_kernel", 4),
        ("tokens", "exit_gate_kernel", 4),
        ("one long recording", "exit_gate_kernel", 4),
        ("1000 classes", "gate_kernel", 1),
        ("loss, 1000 classes", "consistent_exit_loss_kernel", 3),
        ("loss, 32000 classes", "consistent_exit_loss_kernel", 12),
        ("loss, 4097 classes", "consistent_exit_loss_kernel", 5),
    ],
)
def test_features_and_logits_are_read_16_bytes_at_a_time(
    kernels: list[dict[str, Any]], case: str, kernel: str, loads: int
) -> None:
    (found,) = [k for k in kernels if k["case"] == case and k["kernel"] == kernel]
    assert wide(found)["LDG"] >= loads


def test_odd_rows_of_many_classes_are_read_in_words_by_programs_that_share_a_processor(
    kernels: list[dict[str, Any]],
) -> None:
    """Eight bytes in bfloat16, of which a thread has four entries; all but what is at the ends of a row."""
    found = {k["case"]: k for k in kernels if k["kernel"] == "consistent_exit_loss_kernel"}
    assert found["loss, 50257 classes"]["instructions"]["LDG.E.64"] >= 12
    assert found["loss, 50257 classes"]["instructions"]["STG.E.64"] == 2
    assert wide(found["loss, 4097 classes"])["STG"] == 2
    for case in ("loss, 4097 classes", "loss, 50257 classes"):
        assert 2 * found[case]["registers"] * 32 * found[case]["warps"] <= 2**16


def test_another_number_of_rows_or_threshold_compiles_nothing(kernels: list[dict[str, Any]]) -> None:
    """Each case was launched with several."""
    compiled = [(kernel["case"], kernel["kernel"]) for kernel in kernels if kernel["case"] != "mixed"]
    assert len(compiled) == len(set(compiled))


def test_the_last_program_sees_what_the_others_wrote(kernels: list[dict[str, Any]]) -> None:
    """A barrier, then one thread's addition that releases and acquires; and no load through the read-only cache."""
    ordered = [kernel for kernel in kernels if "atom" in kernel["ptx"]]
    assert {kernel["kernel"] for kernel in ordered} == {
        "exit_gate_kernel",
        "gate_kernel",
        "consistent_exit_loss_kernel",
    }
    for kernel in ordered:
        ptx = kernel["ptx"]
        releases = [found.start() for found in re.finditer(r"atom\.(global\.)?(gpu\.acq_rel|acq_rel\.gpu)", ptx)]
        assert releases, kernel["case"]
        for release in releases:
            before = ptx[:release]
            last_stored = before.rfind("st.global")
            assert re.search(r"bar(rier)?\.(warp\.)?sync", before[max(0, last_stored) :]), kernel["case"]
        # Turns, and words that hold all that belongs to them, order nothing else.
        others = re.findall(r"atom\.(?:global\.)?([\w.]+?)\.b?\w*\s", ptx)
        assert all("relaxed" in each or "acq_rel" in each for each in others), others
        assert "ld.global.nc" not in ptx


def test_the_machine_code_writes_back_before_and_reads_anew_after_the_addition(kernels: list[dict[str, Any]]) -> None:
    """All threads arrive, one fences, adds, and invalidates the first cache, and all go on; but for turns, which order
    nothing."""
    ordered = re.compile(r"BAR\S* MEMBAR\.(?:ALL|SC)\.GPU (ATOMG\.E\.ADD\.\S*STRONG\.GPU) CCTL\.IVALL BAR\S*")
    for kernel in kernels:
        found = ordered.findall(" ".join(kernel["in_order"]))
        additions = [name for name in kernel["in_order"] if name.startswith("ATOM") and ".ADD" in name]
        turns = kernel["kernel"] in ("exit_gate_kernel", "gate_kernel") and len(additions) > 0
        assert len(found) == len(additions) - turns, (kernel["case"], kernel["in_order"])


def test_words_are_read_anew_each_time(kernels: list[dict[str, Any]]) -> None:
    """By volatile loads, which no cache serves, one for each thread: of copies, threads could make different things."""
    looking = [k for k in kernels if k["kernel"] in ("exit_gate_kernel", "gate_kernel") and "atom" in k["ptx"]]
    for kernel in looking:
        loads = re.findall(r"ld\.volatile\.global\.(\S+)", kernel["ptx"])
        assert len(loads) == 1, (kernel["case"], loads)
        names = [name for name in kernel["instructions"] if name.startswith("LDG")]
        assert any("STRONG.SYS" in name for name in names), kernel["case"]
