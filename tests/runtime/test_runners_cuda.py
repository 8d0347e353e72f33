"""What only a GPU shows of the graph runners; collected where there is one."""

from __future__ import annotations

import math

import pytest
import torch
from test_runners import GRAPH_RUNNERS, small_model
from torch import Tensor, nn

import cet
from cet.runtime import RunnerName
from oracle import answer_each_row_alone

# The second one is not current when it is used.
ON_GPUS = pytest.mark.parametrize("device", [f"cuda:{index}" for index in range(torch.cuda.device_count())][:2])


@ON_GPUS
def test_the_device_runner_never_waits(device: str) -> None:
    model = small_model().to(device)
    model.runner = "device"
    x = torch.randn(8, 3, 16, device=device)
    model.predict(x)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile() as profile:
            for _ in range(3):
                model.predict(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls.get("cudaGraphLaunch", 0) == 3
    # the profiler itself waits once, at its end
    waits = {name: n for name, n in calls.items() if "Synchronize" in name or name in ("cudaMemcpy", "cuMemcpyDtoH_v2")}
    assert sum(waits.values()) <= 1, waits


@ON_GPUS
@pytest.mark.parametrize("runner", GRAPH_RUNNERS)
def test_calls_on_any_stream_come_one_after_the_other(device: str, runner: RunnerName) -> None:
    model = small_model().to(device)
    model.runner = runner
    batches = [torch.randn(8, 3, 16, device=device) for _ in range(6)]
    expected = [answer_each_row_alone(model, {"x": x}, model.policy) for x in batches]
    torch.cuda.synchronize(device)
    streams = [torch.cuda.Stream(device) for _ in range(3)]
    got = []
    for index, x in enumerate(batches):
        with torch.cuda.stream(streams[index % 3]):
            got.append(model.predict(x))
    torch.cuda.synchronize(device)
    for output, answers in zip(got, expected, strict=True):
        assert torch.equal(output.exit_index.cpu(), answers.exit_index)
        torch.testing.assert_close(output.logits, answers.logits, rtol=1e-4, atol=1e-4)


@ON_GPUS
def test_an_operation_that_waits_is_named_and_its_segment_runs_eagerly(device: str) -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.new_ones(()).item())

    backbone = cet.Stages(stem=nn.Linear(3, 8), waits=nn.Sequential(Waits(), nn.Linear(8, 8)), tail=nn.Linear(8, 4))
    model = cet.EarlyExit(backbone, ["stem", "waits"], (torch.randn(2, 3),), runner="graphs").eval().to(device)
    x = torch.randn(6, 3, device=device)
    model.policy = cet.ExitPolicy("confidence", (math.inf, math.inf))
    with pytest.warns(UserWarning, match="before exit 'waits' cannot be captured .*item"):
        got = model.predict(x)
    assert model.captures[0].eager == ("waits",)
    with torch.no_grad():
        torch.testing.assert_close(got.logits, model.exit_logits(x)[-1])
    assert torch.randn(3, device=device).isfinite().all()  # the capture that failed let go of the generator
    model.free_graphs()
    assert torch.randn(1 << 20, device=device).isfinite().all()  # and of the allocator
