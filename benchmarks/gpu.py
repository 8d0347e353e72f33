"""What benchmarks need on a GPU besides: its ceilings, its state, any call as a CUDA graph, joules."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pynvml
import torch
from torch import Tensor

from cet.energy import EnergyMeter
from cet.measure.timers import Call, cuda_events

COPY_BYTES = 1 << 30
MATMUL_SIZE = 8192


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device does at best, measured on random data: bytes per second of a large copy, counting those read and
    those written, and operations per second of a large bfloat16 matrix product. Medians of ten."""
    source = torch.randint(0, 256, (COPY_BYTES,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    return {
        "copy_bytes_per_s": 2 * COPY_BYTES / _median_seconds(lambda: target.copy_(source)),
        "bf16_matmul_flops": 2 * MATMUL_SIZE**3 / _median_seconds(lambda: torch.mm(a, b, out=product)),
    }


def _median_seconds(call: Call) -> float:
    for _ in range(3):
        call()
    return median(cuda_events(call, 1) for _ in range(10))


def state(device: torch.device) -> dict[str, Any]:
    """Driver, power limit (W), clocks (MHz) and temperature (degrees Celsius) now, as NVML tells them; None for what it
    does not tell here."""
    pynvml.nvmlInit()
    try:
        handle = _handle(device)
        limit = _told(pynvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "cuda": torch.version.cuda,
            "power_limit_w": None if limit is None else limit / 1e3,
            "sm_clock_mhz": _told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            "memory_clock_mhz": _told(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
            "temperature_c": _told(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        }
    finally:
        pynvml.nvmlShutdown()


def _told(read: Callable[..., int], *arguments: Any) -> int | None:
    try:
        return read(*arguments)
    except pynvml.NVMLError_NotSupported:
        return None


def joules_per_call(call: Callable[[], Any], seconds: float) -> float | None:
    """Joules of the whole board for one call, idle power included, over so many seconds; None where it has no counter.

    For a look beside the times; the protocol of `cet energy` takes minutes.
    """
    with EnergyMeter(["cuda"], rapl=False) as meter:
        calls, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            call()
            torch.cuda.synchronize()
            calls += 1
    joules = meter.reading.joules
    return None if joules is None else joules / calls


def _handle(device: torch.device) -> Any:
    return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")


def graphed(call: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
    """The call on these very tensors as one CUDA graph; what it returns is overwritten by the next call.

    The arguments of what is returned are ignored: nothing but the replay is timed.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(*inputs)

    def replay(*_: Tensor, _read: Any = (call, inputs)) -> Any:  # by the graph: their memory must not be freed
        graph.replay()
        return result

    return replay


def graphed_with_copy(call: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
    """The call as one CUDA graph into which the arguments are copied first, as whoever has new inputs must."""
    static = [tensor.clone() for tensor in inputs]
    replay = graphed(call, *static)

    def copy_and_replay(*given: Tensor) -> Any:
        for target, source in zip(static, given, strict=True):
            target.copy_(source)
        return replay()

    return copy_and_replay
