"""Fixtures with the simulated NVML."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from nvml.simulation import Simulation, build


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The simulated libnvidia-ml.so.1, for ``LD_LIBRARY_PATH``: see :func:`nvml.simulation.environment`."""
    return build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="session")
def _loaded(nvml_library: Path) -> Simulation:
    return Simulation(nvml_library)


@pytest.fixture
def simulation(_loaded: Simulation, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    """One simulated GPU on a virtual clock, under nvidia-ml-py; whoever opens NVML in the test must close it."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    _loaded.reset()
    _loaded.install()
    yield _loaded
    _loaded.uninstall()
    assert _loaded.references == 0, "NVML was left open"
