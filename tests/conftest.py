"""Fixtures that several test files share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

import cet
from cet.ops import backend as backends
from families import FAMILIES, Family

# Fuzzing: 20 examples each in a test run, as many as time allows with --hypothesis-profile=fuzz.
_FUZZ: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("test", max_examples=20, derandomize=True, **_FUZZ)
settings.register_profile("fuzz", max_examples=2000, **_FUZZ)
settings.load_profile("test")

pytest_plugins = ("nvml.fixtures",)

Built = tuple[Family, cet.EarlyExit]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Each test draws the same numbers, and leaves the generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _ways_to_run() -> list[tuple[str, int]]:
    """The reference, and the kernels for every set of instructions that this machine has, each with 1 and 2 threads."""
    built = [] if backends.kernels() is None else import_module("cet._C").capabilities()
    return [("reference", 1), *((capability, threads) for capability in built for threads in (1, 2))]


@pytest.fixture(params=_ways_to_run(), ids=lambda way: f"{way[0]}-{way[1]}")
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend that operations run on; what they allocate is filled with NaN or the largest integer first."""
    name, threads = request.param
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    if name != "reference":
        kernels = import_module("cet._C").kernels(name)
        monkeypatch.setattr(backends, "kernels", lambda: kernels)
    backend: backends.Backend = "reference" if name == "reference" else "cpp"
    with backends.use_backend(backend):
        yield backend
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads_before)


kernels_only = pytest.mark.parametrize(
    "backend", _ways_to_run()[1:], ids=lambda way: f"{way[0]}-{way[1]}", indirect=True
)


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest) -> Built:
    """A family and its multi-exit model in eval mode, its logits spread such that scores differ between rows."""
    family = FAMILIES[request.param]
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone = family.build()
    model = cet.EarlyExit(backbone, family.exits, family.inputs(2)).eval()
    with torch.no_grad():
        for head, logits in zip(model.heads, model.exit_logits(**family.inputs(16)), strict=False):
            spread = logits.std(dim=0).mean()
            head.linear.bias.sub_(logits.mean(dim=0)).div_(spread)
            head.linear.weight.div_(spread)
    return family, model
