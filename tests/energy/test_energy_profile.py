"""Profiles of models whose stages and heads draw known power for a known time on a simulated GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import cet
from cet.energy.domains import EnergyError
from cet.energy.measurement import Settings
from cet.energy.meter import EnergyMeter
from cet.energy.profile import CostUnit, measured_costs, profile
from nvml.simulation import Simulation

ROWS = 8
IDLE_WATTS, WATTS = 100.0, 300.0
STAGE, HEAD = 2e-3, 0.5e-3
"""s per row of a stage and of a head."""
QUICK = Settings(rounds=4, window=2.5, warmup=0.3)


class Burn(nn.Module):
    """Costs time and power per call and per row."""

    def __init__(self, simulation: Simulation, per_row: float, per_call: float = 0.0) -> None:
        super().__init__()
        self.simulation, self.per_row, self.per_call = simulation, per_row, per_call

    def forward(self, x: Tensor) -> Tensor:
        self.simulation.load(WATTS - IDLE_WATTS)
        self.simulation.clock.sleep(self.per_call + self.per_row * len(x))
        self.simulation.load(0)
        return x


class Head(Burn):
    """Sure of class 0 where column ``k`` is 1, and undecided where it is 0."""

    def __init__(self, simulation: Simulation, k: int) -> None:
        super().__init__(simulation, HEAD)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        sure = 10 * super().forward(x)[:, self.k]
        return torch.stack([sure, torch.zeros_like(sure)], dim=1)


class Last(Burn):
    """Class 0 for all rows."""

    def __init__(self, simulation: Simulation, per_call: float) -> None:
        super().__init__(simulation, STAGE, per_call)
        self.linear = nn.Linear(2, 2)
        nn.init.zeros_(self.linear.weight)
        self.linear.bias.data = torch.tensor([1.0, 0.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(super().forward(x))


@dataclass
class Bench:
    simulation: Simulation
    meter: EnergyMeter

    def model(self, *, policy: cet.ExitPolicy | None = None, per_call: float = 0.0) -> cet.EarlyExit:
        backbone = cet.Stages(
            first=Burn(self.simulation, STAGE),
            second=Burn(self.simulation, STAGE),
            last=Last(self.simulation, per_call),
        )
        heads = {"first": Head(self.simulation, 0), "second": Head(self.simulation, 1)}
        model = cet.EarlyExit(backbone, heads, (torch.randn(2, 2),)).eval()
        model.policy = policy or cet.ExitPolicy("confidence", (0.9, 0.9))
        return model


@pytest.fixture
def bench(simulation: Simulation) -> Iterator[Bench]:
    simulation.gpu(leakage=0, idle=IDLE_WATTS, tick=0.02)
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        yield Bench(simulation, meter)


def batches(labels: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Of each eight rows four leave at the first exit, two at the second, two at the end."""
    x = torch.tensor([[1.0, 1.0]] * 4 + [[0.0, 1.0]] * 2 + [[0.0, 0.0]] * 2)
    return [(x, torch.full((ROWS,), labels)), (x.flip(0), torch.full((ROWS,), labels))]


def near(seconds: float) -> tuple[object, object]:
    """The seconds, and the joules that they take at full power, to 1 % of a whole pass."""
    return pytest.approx(seconds, abs=1e-9), pytest.approx(WATTS * seconds, abs=0.01 * WATTS * 3 * STAGE)


def test_each_exit_is_split_into_backbone_head_and_gate(bench: Bench) -> None:
    found = profile(bench.model(), batches(), bench.meter, QUICK)
    assert [row.name for row in found.exits] == ["first", "second", "final"]
    assert [row.rate for row in found.exits] == [0.5, 0.25, 0.25]
    assert (found.batch_size, found.samples) == (ROWS, 2 * ROWS)
    for row, stages, heads in zip(found.exits, (1, 2, 3), (1, 2, 2), strict=True):
        own_head = heads if row.name == "first" else heads - stages + 1
        expected = {
            "cumulative": stages * STAGE + heads * HEAD,
            "marginal": STAGE + own_head * HEAD,
            "backbone": STAGE,
            "head": own_head * HEAD,
            "gate": 0.0,
        }
        for part, seconds in expected.items():
            assert (getattr(row.seconds, part).value, getattr(row.joules, part).value) == near(seconds), part
    net = [row.net_joules.cumulative.value for row in found.exits]
    gross = [row.joules.cumulative.value for row in found.exits]
    assert net == pytest.approx([2 / 3 * joules for joules in gross], rel=0.01)


def test_the_policy_is_predicted_from_forced_exits(bench: Bench) -> None:
    found = profile(bench.model(), batches(), bench.meter, QUICK)
    expected = 0.5 * (STAGE + HEAD) + 0.25 * 2 * (STAGE + HEAD) + 0.25 * (3 * STAGE + 2 * HEAD)
    for prediction in ("predicted", "measured"):
        assert (getattr(found.seconds, prediction).value, getattr(found.joules, prediction).value) == near(expected)
    assert (found.seconds.residual.value, found.joules.residual.value) == near(0)
    assert found.seconds.ratio.value == pytest.approx(1)
    assert not found.joules.ratio.excludes(1)
    assert not found.net_joules.residual.excludes(0)


def test_what_small_batches_cost_is_left_in_the_residual(bench: Bench) -> None:
    per_call = 8e-3
    found = profile(bench.model(per_call=per_call), batches(), bench.meter, QUICK)
    residual = per_call * (1 - 0.25) / ROWS  # paid in full for the quarter of the rows that comes to the last stage
    assert (found.seconds.residual.value, found.joules.residual.value) == near(residual)
    assert found.joules.residual.excludes(0)
    assert found.joules.ratio.excludes(1)


@pytest.mark.parametrize(("label", "accuracy"), [(0, 1.0), (1, 0.0), (-100, None)])
def test_accuracy_of_exits_and_policy(bench: Bench, label: int, accuracy: float | None) -> None:
    found = profile(bench.model(), batches(label), bench.meter, QUICK)
    assert found.accuracy == accuracy
    assert found.exits[-1].accuracy == accuracy


def test_flops_are_those_of_exit_costs(bench: Bench) -> None:
    model = bench.model()
    found = profile(model, batches(), bench.meter, QUICK)
    assert [row.flops for row in found.exits] == cet.exit_costs(model).cumulative([True, True]).tolist()


@pytest.mark.parametrize(("unit", "per_second"), [("ms", 1e3), ("J", WATTS)])
def test_measured_costs_are_those_of_stages_and_heads(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, unit: CostUnit, per_second: float
) -> None:
    monkeypatch.setattr(
        cet.energy.profile, "EnergyMeter", lambda: EnergyMeter(rapl=False, clock=bench.simulation.clock)
    )
    model = bench.model(policy=cet.ExitPolicy("confidence", (None, 0.9)))
    costs = measured_costs(model, batches(), unit, QUICK)
    assert costs.stage == pytest.approx([STAGE * per_second] * 3, rel=0.02)
    assert costs.head == pytest.approx([HEAD * per_second] * 2, rel=0.04)
    assert costs.unit == unit
    report = cet.calibrate(model, batches(), 0.0, guarantee=None, score="confidence", costs=costs).report
    assert report.unit == unit
    assert report.full_cost == pytest.approx(3 * STAGE * per_second, rel=0.02)


def test_costs_that_cannot_be_measured_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unit is 'W'; choose ms or J"):
        measured_costs(bench.model(), batches(), "W")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loader yields no rows to measure; give"):
        measured_costs(bench.model(), [], "ms")
    no_counter = lambda: EnergyMeter([], rapl=False, clock=bench.simulation.clock)  # noqa: E731
    monkeypatch.setattr(cet.energy.profile, "EnergyMeter", no_counter)
    with pytest.raises(EnergyError, match=r"joules cannot be measured here: .*; use milliseconds"):
        measured_costs(bench.model(), batches(), "J")


@pytest.mark.parametrize("score", ["entropy", "confidence", "margin"])
def test_exits_are_forced_whatever_the_score(bench: Bench, score: str) -> None:
    model = bench.model(policy=cet.ExitPolicy(score, (0.1, 0.1) if score == "entropy" else (0.9, 0.9)))
    found = profile(model, batches(), bench.meter, QUICK)
    cumulative = [row.seconds.cumulative.value for row in found.exits]
    assert cumulative == pytest.approx([STAGE + HEAD, 2 * (STAGE + HEAD), 3 * STAGE + 2 * HEAD])


def test_only_open_exits_are_profiled_and_pay_for_heads(bench: Bench) -> None:
    found = profile(bench.model(policy=cet.ExitPolicy("confidence", (None, 0.9))), batches(), bench.meter, QUICK)
    assert [row.name for row in found.exits] == ["second", "final"]
    assert found.exits[0].seconds.cumulative.value == pytest.approx(2 * STAGE + HEAD)
    assert (found.seconds.residual.value, found.joules.residual.value) == near(0)


def test_all_exits_are_profiled_and_nothing_predicted_where_the_policy_opens_none(bench: Bench) -> None:
    found = profile(bench.model(policy=cet.ExitPolicy.closed(3)), batches(), bench.meter, QUICK)
    assert [row.name for row in found.exits] == ["first", "second", "final"]
    assert (found.seconds.predicted.value, found.joules.ratio.value) == (None, None)
    assert "the policy closes first, second" in found.joules.residual.reason
    assert found.seconds.measured.value == pytest.approx(3 * STAGE)


def test_some_exits_alone_predict_nothing_if_samples_leave_at_others(bench: Bench) -> None:
    found = profile(bench.model(), batches(), bench.meter, QUICK, exits=["second"])
    assert [row.name for row in found.exits] == ["second", "final"]
    assert found.exits[0].seconds.cumulative.value == pytest.approx(2 * (STAGE + HEAD))
    assert "not profiled" in found.joules.predicted.reason


@pytest.mark.parametrize("name", ["third", "final"])
def test_an_unknown_exit_is_refused_before_any_work(bench: Bench, name: str) -> None:
    model = bench.model()
    started = bench.simulation.time
    with pytest.raises(ValueError, match=f"exit '{name}' is no early exit of the model; name one of first, second"):
        profile(model, batches(), bench.meter, QUICK, exits=[name])
    assert bench.simulation.time == started


def test_batches_of_different_sizes_are_refused(bench: Bench) -> None:
    (x, y), _ = batches()
    with pytest.raises(ValueError, match=r"the batches have \[4, 8\] rows"):
        profile(bench.model(), [(x, y), (x[:4], y[:4])], bench.meter, QUICK)
    with pytest.raises(ValueError, match=r"the batches have \[\] rows"):
        profile(bench.model(), [], bench.meter, QUICK)


def test_the_model_gets_its_modes_and_policy_back(bench: Bench) -> None:
    model = bench.model().train()
    policy = model.policy

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    found = profile(model, batches(), bench.meter, QUICK, on_window=interrupt)
    assert found.measurement.status == "partial"
    assert model.policy is policy
    assert model.training
    assert found.joules.measured.value is None


def test_a_traced_model_in_real_time_without_a_counter() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(torch.relu(self.linear(x)))  # writes to what it is given

    backbone = nn.Sequential(Block(), Block(), nn.Linear(16, 3))
    model = cet.EarlyExit(backbone, ["0", "1"], (torch.randn(2, 16),)).eval()
    model.policy = cet.ExitPolicy("entropy", (0.9, 0.9))
    x = torch.randn(32, 16)
    before = x.clone()
    with EnergyMeter([], rapl=False).opened() as meter:
        settings = Settings(rounds=3, window=0.02, warmup=0.01)
        found = profile(model, [(x, torch.zeros(32, dtype=torch.int64))], meter, settings)
    assert torch.equal(x, before)
    assert found.measurement.status == "complete"
    for row in found.exits:
        assert row.seconds.cumulative.value > 0
        assert row.seconds.backbone.value is not None
        assert row.joules.cumulative.value is None
        assert row.joules.cumulative.reason
    assert sum(row.rate for row in found.exits) == 1
