"""Fixtures that several test files share."""

from __future__ import annotations

import copy
import functools
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Without a GPU Triton's kernels are interpreted. Triton reads this once, when it is imported, as cet.ops does.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import cet
from cet.ops import backend as backends
from families import FAMILIES, Family
from interleaving import interleaved
from oracle import spread_logits

# Fuzzing: 20 examples each in a test run, CET_FUZZ_EXAMPLES each with --hypothesis-profile=fuzz, and
# few under tools that slow all down.
_FUZZ: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("test", max_examples=20, derandomize=True, **_FUZZ)
settings.register_profile("quick", max_examples=2, derandomize=True, **_FUZZ)
settings.register_profile("fuzz", max_examples=int(os.environ.get("CET_FUZZ_EXAMPLES", 2000)), print_blob=True, **_FUZZ)
settings.load_profile("test")

# In TF32, PyTorch's default for convolutions, a row's answer depends on its batch mates in the third digit.
torch.backends.cudnn.allow_tf32 = False

ON_A_GPU, WITHOUT_ONE = ["energy/test_energy_cuda.py", "runtime/test_runners_cuda.py"], ["ops/test_traffic.py"]
collect_ignore = WITHOUT_ONE if torch.cuda.is_available() else ON_A_GPU
pytest_plugins = ("nvml.fixtures",)

Built = tuple[Family, cet.EarlyExit]


def pytest_collection_finish() -> None:
    """All that was imported lives as long as the process, and is much: the search for cycles leaves it out."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


def pytest_runtest_setup() -> None:
    """``torch.onnx.export`` parses its translations anew at each call; here it gets a copy of those of the first."""
    registry = getattr(sys.modules.get("torch.onnx._internal.exporter._registration"), "ONNXRegistry", None)
    if registry is None or isinstance(vars(registry)["from_torchlib"], staticmethod):
        return
    parsed = functools.cache(registry.from_torchlib)

    def from_torchlib(*args: Any, **options: Any) -> Any:
        twin = copy.copy(parsed(*args, **options))
        twin.functions = {name: [*translations] for name, translations in twin.functions.items()}
        return twin

    registry.from_torchlib = staticmethod(from_torchlib)


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


def _convert_float(values: Any, source: Any, target: Any, _rounding: Any) -> Any:
    """Between float32 and bfloat16, which NumPy lacks: Triton's interpreter cuts off where GPUs round to nearest."""
    bits = torch.from_numpy(np.ascontiguousarray(values))
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    converted = bits.view(dtypes[source.name]).to(dtypes[target.name])
    return converted.view(torch.uint16 if target.name == "bf16" else torch.uint32).numpy()


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Triton's kernels, on the GPU where there is one, which tensors then are made on; else interpreted.

    A test file that imports this as ``backend`` runs the tests that it imports on Triton.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr("triton.runtime.interpreter._convert_float", _convert_float)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Without a GPU the programs of a launch take turns at random.
    side_by_side = nullcontext() if torch.cuda.is_available() else interleaved()
    with device, backends.use_backend("triton"), np.errstate(all="ignore"), side_by_side:
        yield "triton"
    torch.use_deterministic_algorithms(False)


kernels_only = pytest.mark.parametrize(
    "backend", _ways_to_run()[1:], ids=lambda way: f"{way[0]}-{way[1]}", indirect=True
)


def build_family(name: str) -> Built:
    """A family and its multi-exit model in eval mode, its logits spread such that scores differ between rows."""
    family = FAMILIES[name]
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backbone = family.build()
    model = cet.EarlyExit(backbone, family.exits, family.inputs(2)).eval()
    spread_logits(model, family.inputs(16))
    return family, model


@pytest.fixture(scope="module", params=FAMILIES)
def built(request: pytest.FixtureRequest) -> Built:
    return build_family(request.param)
