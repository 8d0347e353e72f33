"""A soak of random use, and that it finds faults."""

from __future__ import annotations

import copy
import os
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import cet
import soak
from thinned import kept
from watchdog import in_a_process

SECONDS = float(os.environ.get("CET_SOAK_SECONDS", soak.SECONDS))


def test_random_use_gives_every_row_the_answer_that_it_gets_alone() -> None:
    in_a_process(soak.soak_from_environment, seconds=SECONDS + 300)


def answers_of_a_stale_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = cet.EarlyExit.predict
    copies: dict[int, cet.EarlyExit] = {}

    def stale(self: cet.EarlyExit, *args: Any, **kwargs: Any) -> cet.ExitOutput:
        twin = copies.get(id(self))
        if twin is None or twin.exit_names != self.exit_names:
            twin = copies[id(self)] = copy.deepcopy(self)
        twin.policy = self.policy
        return predict(twin, *args, **kwargs)

    monkeypatch.setattr(cet.EarlyExit, "predict", stale)


def inputs_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    exit_logits = cet.EarlyExit.exit_logits
    shared: dict[str, Any] = {}

    def mixed(self: cet.EarlyExit, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        shared["call"] = args, kwargs
        if threading.active_count() > 1:
            time.sleep(0.01)
        args, kwargs = shared["call"]
        return exit_logits(self, *args, **kwargs)

    monkeypatch.setattr(cet.EarlyExit, "exit_logits", mixed)


def rows_that_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    predict = cet.EarlyExit.predict

    def rolled(self: cet.EarlyExit, *args: Any, **kwargs: Any) -> cet.ExitOutput:
        found = predict(self, *args, **kwargs)
        if len(found.logits) < 5:
            return found
        return cet.ExitOutput(found.logits.roll(1, 0), found.exit_index.roll(1, 0), found.score.roll(1, 0))

    monkeypatch.setattr(cet.EarlyExit, "predict", rolled)


def a_child_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    predict, parent = cet.EarlyExit.predict, os.getpid()

    def failing(self: cet.EarlyExit, *args: Any, **kwargs: Any) -> cet.ExitOutput:
        if os.getpid() != parent:
            raise RuntimeError("planted in the child")
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(cet.EarlyExit, "predict", failing)


FAULTS = [answers_of_a_stale_copy, inputs_of_another_thread, rows_that_change_places, a_child_that_fails]


@pytest.mark.parametrize("plant", kept(FAULTS, inputs_of_another_thread, rows_that_change_places))
def test_the_soak_finds_a_planted_fault(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plant(monkeypatch)
    try:
        with pytest.raises(soak.SoakError, match=r"CET_SOAK_SEED=\d+ failed after") as found:
            soak.soak(seconds=60, seed=1)
    finally:
        torch.set_num_threads(threads)
    assert "a new" in str(found.value)
