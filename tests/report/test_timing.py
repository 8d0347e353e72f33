"""Speeds in a report: exact on a virtual clock, interleaved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cet.report import timing
from cet.report.schema import verdict


class Clocked(nn.Module):
    """Takes a fixed number of seconds per row of a virtual clock, and notes who ran."""

    def __init__(self, clock: list[float], seconds: float, log: list[float]) -> None:
        super().__init__()
        self.clock, self.seconds, self.log = clock, seconds, log

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += self.seconds * len(x)
        self.log.append(self.seconds)
        return x


def clocked_model(monkeypatch: pytest.MonkeyPatch, *, full: float, early: float) -> tuple[Any, list[float]]:
    """A model whose backbone takes ``full`` seconds per row and which itself takes ``early``."""
    clock, log = [0.0], list[float]()
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    model = Clocked(clock, early, log)
    model.backbone = Clocked(clock, full, log)
    return model, log


@pytest.mark.parametrize(("early", "outcome"), [(1.0, "faster"), (4.0, "slower"), (2.0, "no clear difference")])
def test_timing_is_exact_on_a_virtual_clock(monkeypatch: pytest.MonkeyPatch, early: float, outcome: str) -> None:
    model, _ = clocked_model(monkeypatch, full=2.0, early=early)
    x = torch.zeros(50, 3)
    throughput = timing.measure_throughput(model, x, batch_size=8, num_rounds=20, seed=0)
    assert throughput["full"] == pytest.approx({"p20": 0.5, "p50": 0.5, "p80": 0.5})
    assert throughput["early"]["p50"] == pytest.approx(1 / early)
    latency = timing.measure_latency(model, x, windows=30, seed=0)
    assert latency["early"] == pytest.approx({"p50": 1000 * early, "p90": 1000 * early})
    for speed in (throughput, latency):
        assert speed["speedup"] == pytest.approx({"value": 2 / early, "low": 2 / early, "high": 2 / early})
        assert verdict(speed) == outcome


def test_timing_is_interleaved_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, log = clocked_model(monkeypatch, full=2.0, early=1.0)
    timing.measure_latency(model, torch.zeros(60, 3), windows=50, seed=0)
    assert log[:2] == [2.0, 1.0]  # each takes longer than the warm-up lasts
    pairs = list(zip(log[2::2], log[3::2], strict=True))
    assert len(pairs) == 50
    assert set(pairs) == {(1.0, 2.0), (2.0, 1.0)}


def test_more_rows_than_there_are_make_a_smaller_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = clocked_model(monkeypatch, full=2.0, early=1.0)
    assert timing.measure_throughput(model, torch.zeros(5, 3), batch_size=8, num_rounds=2, seed=0)["batch_size"] == 5
    assert timing.measure_latency(model, torch.zeros(5, 3), windows=8, seed=0)["batches"] == 5
