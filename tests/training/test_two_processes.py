"""Training on two processes ends with the weights of one process that takes the whole batch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import two_processes

from watchdog import start

TIMEOUT = 120.0


def run(task: str, folder: Path) -> list[dict[str, Any]]:
    """What each of two processes ended with; when one fails or TIMEOUT is over, all are killed and their logs shown."""
    logs = [folder / f"{rank}.log" for rank in range(2)]
    processes = [start(two_processes.one_of_two, (task, rank, folder), TIMEOUT, log) for rank, log in enumerate(logs)]
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(process.exitcode is None for process in processes):
            if any(process.exitcode for process in processes):
                deadline = min(deadline, time.monotonic() + 5)  # the others wait for the one that failed
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
            process.join()
    written = "\n".join(
        f"--- process {rank}: exit {code}\n{log.read_text()}"
        for rank, (code, log) in enumerate(zip(codes, logs, strict=True))
    )
    assert codes == [0, 0], written
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_close(got: Any, expected: Any, **tolerances: float) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], msg=lambda text, name=name: f"{name}: {text}", **tolerances
        )


def test_plain_ddp_ends_with_the_weights_of_one_process(tmp_path: Path) -> None:
    first, second = run("torch", tmp_path)
    alone = two_processes.main("torch", 0, 1, tmp_path)
    assert_close(first["weights"], second["weights"], rtol=0.0, atol=0.0)
    assert_close(first["weights"], alone["weights"])
    assert torch.equal(first["answers"], second["answers"])
    torch.testing.assert_close(first["answers"], alone["answers"])
    assert not any(
        torch.allclose(first["weights"][name], new) for name, new in two_processes.make_model().named_parameters()
    )


def test_lightning_ends_with_the_weights_of_one_process_and_each_process_draws_its_own(tmp_path: Path) -> None:
    first, second = run("lightning", tmp_path)
    alone = two_processes.main("lightning", 0, 1, tmp_path)
    assert_close(first["weights"], second["weights"], rtol=0.0, atol=0.0)
    assert_close(first["noisy_weights"], second["noisy_weights"], rtol=0.0, atol=0.0)
    # Adam divides by gradients that are rounded otherwise when they are means of means.
    assert_close(first["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
    assert first["metrics"] == pytest.approx(alone["metrics"], abs=1e-5)
    assert first["draws"].shape == second["draws"].shape == (4, 4)
    assert not (first["draws"] == second["draws"]).any()
