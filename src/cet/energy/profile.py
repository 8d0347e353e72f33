"""What each exit of an early-exit model costs in joules and seconds, and what its policy costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cet.calibration.cost import ExitCosts, exit_costs
from cet.data.batches import BatchFn, call, check_batch, read_batches
from cet.energy.domains import EnergyError
from cet.energy.measurement import Measurement, Quantity, Settings, WindowRecord
from cet.energy.meter import EnergyMeter
from cet.energy.protocol import Progress, Workload, measure
from cet.energy.statistics import Estimate
from cet.model.early_exit import EarlyExit, StagedBatch
from cet.ops.consistent_exit_loss import UNLABELLED
from cet.partition.stages import evaluating
from cet.runtime.eager import run_prefix
from cet.runtime.policy import ExitPolicy
from cet.runtime.scores import is_low_when_sure

MIXED = "mixed"
"""The name of the workload in which the policy decides where each sample leaves."""

QUANTITIES: tuple[Quantity, ...] = ("seconds", "joules", "net_joules")

Batches = Sequence[tuple[Any, Tensor]]

CostUnit = Literal["ms", "J"]

_MEASURED_BATCHES = 8


@dataclass(frozen=True)
class Split:
    """One quantity per sample at one exit.

    Attributes:
        cumulative: when all samples leave here.
        marginal: beyond the profiled exit before.
        backbone: the stages' share of ``marginal``.
        head: the share of the heads, run in plain PyTorch.
        gate: the rest: scores, decision, compaction and the runner. It is negative where fused kernels win more on the
            head than the gate takes.
    """

    cumulative: Estimate
    marginal: Estimate
    backbone: Estimate
    head: Estimate
    gate: Estimate


@dataclass(frozen=True)
class ExitProfile:
    """One exit.

    Attributes:
        name: the exit's submodule, or ``"final"``.
        rate: fraction of the samples that leave here under the policy.
        accuracy: of this exit alone; ``None`` without labels.
        flops: per sample that leaves here, as :func:`cet.exit_costs` counts; ``None`` where it cannot.
        seconds, joules, net_joules: per sample; ``net_joules`` are those above idle.
    """

    name: str
    rate: float
    accuracy: float | None
    flops: float | None
    seconds: Split
    joules: Split
    net_joules: Split


@dataclass(frozen=True)
class Prediction:
    """The policy in one quantity per sample, predicted from forced exits and measured in a mixed run.

    Attributes:
        predicted: the cumulative figures of the exits, weighted by how many samples leave there.
        measured: of the mixed run.
        residual: ``measured - predicted``: what smaller batches in the later stages cost, and moving rows.
        ratio: ``measured / predicted``.
    """

    predicted: Estimate
    measured: Estimate
    residual: Estimate
    ratio: Estimate


@dataclass(frozen=True)
class BatchProfile:
    """The profile at one batch size.

    Attributes:
        batch_size: rows.
        samples: in the data.
        exits: those profiled, shallow first.
        accuracy: of the policy; ``None`` without labels.
        seconds, joules, net_joules: the policy's; ``net_joules`` are those above idle.
        measurement: the windows behind all figures.
    """

    batch_size: int
    samples: int
    exits: tuple[ExitProfile, ...]
    accuracy: float | None
    seconds: Prediction
    joules: Prediction
    net_joules: Prediction
    measurement: Measurement

    def costs(self, unit: CostUnit) -> ExitCosts:
        """Costs of stages and heads per sample, for :func:`cet.calibrate`; a gate counts as a part of its head.

        Raises:
            EnergyError: for joules that are unknown, with the reason.
        """
        splits = [row.seconds if unit == "ms" else row.joules for row in self.exits]
        for split in splits:
            if split.marginal.value is None:
                raise EnergyError(f"the joules of an exit are unknown: {split.marginal.reason}; use milliseconds")
        scale = 1e3 if unit == "ms" else 1.0

        def per_sample(*parts: Estimate) -> float:
            return max(sum(part.value or 0.0 for part in parts), 0.0) * scale  # noise may make nothing negative

        stages = tuple(per_sample(split.backbone) for split in splits)
        return ExitCosts(stages, tuple(per_sample(split.head, split.gate) for split in splits[:-1]), unit)


def measured_costs(
    model: EarlyExit,
    loader: Iterable[Any],
    unit: CostUnit = "ms",
    settings: Settings | None = None,
    *,
    batch_fn: BatchFn | None = None,
    progress: Progress | None = None,
) -> ExitCosts:
    """What each stage and head costs a sample on this machine, in milliseconds or joules, by :func:`profile`.

    They hold for the batch size of the loader's first batch: a sample's share of the batch's.

    Args:
        model: runs in eval mode, and has its own modes back afterwards.
        loader: as for :func:`cet.calibrate`; up to 8 batches of one size are run again and again.
        unit: ``"ms"`` or ``"J"``.
        settings: of the protocol; when not given, 5 rounds with short windows, and for joules those of ``Settings``.
        batch_fn: takes a batch of another form apart.
        progress: is called with how far the measurement is.

    Raises:
        ValueError: for an unknown unit, or a loader without rows.
        EnergyError: for joules on a machine without an energy counter.
    """
    if unit not in get_args(CostUnit):
        raise ValueError(f"unit is {unit!r}; choose ms or J")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    batches: list[tuple[Any, Tensor]] = []
    for x, y in read_batches(loader, model.num_classes, batch_fn):
        if len(y) and (not batches or len(y) == len(batches[0][1])):
            batches.append((pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device), x), y))
        if len(batches) == _MEASURED_BATCHES:
            break
    if not batches:
        raise ValueError("loader yields no rows to measure; give it a batch of samples at least")
    with EnergyMeter().opened() as meter:
        if unit == "J" and not meter.domains:
            reasons = "; ".join(missing.reason for missing in meter.unavailable)
            raise EnergyError(f"joules cannot be measured here: {reasons}; use milliseconds or FLOPs")
        quick = Settings(rounds=5) if unit == "J" else Settings(rounds=5, window=0.1, update_periods=1, warmup=0.1)
        exits = model.exit_names[:-1]
        return profile(model, batches, meter, settings or quick, exits=exits, progress=progress).costs(unit)


def profile(
    model: EarlyExit,
    batches: Batches,
    meter: EnergyMeter,
    settings: Settings | None = None,
    *,
    exits: Sequence[str] | None = None,
    progress: Progress | None = None,
    on_window: Callable[[WindowRecord], object] | None = None,
) -> BatchProfile:
    """Measure a model exit by exit, in windows that each pass over all batches again and again.

    For each exit there are three workloads: ``backbone:<exit>``, the stages up to it; ``heads:<exit>``, with the open
    heads on the way; and ``forced:<exit>``, the model under a policy that lets no row leave before this exit and every
    row at it. The workload ``mixed`` runs the policy itself. The figures of one exit are differences of those; a
    sample's share of a batch is attributed, not measured.

    Args:
        model: runs in eval mode, and has its own modes back afterwards.
        batches: ``(x, y)`` with the same number of rows each, on the model's device; ``y`` ``(B,)`` int64 class
            indices, -100 for rows without a label. Few enough to be passed over in a few seconds, since a window holds
            whole passes.
        meter: an open one.
        settings: of the protocol.
        exits: the early exits to profile; those that the policy opens if not given, or all if it opens none. The final
            exit is always profiled. Heads and gates run at these and at those that the policy opens.
        progress: is called with how far the measurement is.
        on_window: gets each window as it ends.

    Raises:
        ValueError: for an exit that the model has not, for no batches, and for batches of different sizes.
    """
    plan = _Plan.of(model, exits)
    rows = {check_batch(x, y, model.num_classes) for x, y in batches}
    if len(rows) != 1:
        raise ValueError(f"the batches have {sorted(rows)} rows; give at least one batch, and all of the same size")
    with torch.no_grad(), evaluating(model):
        counts = _count(model, batches)
        workloads = _workloads(model, batches, plan.profiled, plan.opened)
        measurement = measure(workloads, meter, settings, progress=progress, on_window=on_window)
    predict = partial(_prediction, measurement, plan, counts)
    return BatchProfile(
        batch_size=rows.pop(),
        samples=sum(counts.leaving),
        exits=_exit_profiles(model, plan, counts, measurement),
        accuracy=counts.accuracy(counts.policy_right),
        seconds=predict("seconds"),
        joules=predict("joules"),
        net_joules=predict("net_joules"),
        measurement=measurement,
    )


@dataclass(frozen=True)
class _Plan:
    """Which exits are profiled, and which run their heads and gates on the way.

    Attributes:
        names: all exits, shallow first.
        profiled: those that get figures, the final exit among them.
        opened: the early exits that run.
        open_in_policy: those that the policy opens.
    """

    names: Sequence[str]
    profiled: list[str]
    opened: list[str]
    open_in_policy: list[str]

    @classmethod
    def of(cls, model: EarlyExit, exits: Sequence[str] | None) -> _Plan:
        """For the early exits that were asked for, see :func:`profile`."""
        names = model.exit_names
        early, final = names[:-1], names[-1]
        open_in_policy = [name for name, t in zip(early, model.policy.thresholds, strict=True) if t is not None]
        requested = (open_in_policy or early) if exits is None else exits
        for name in requested:
            if name not in early:
                raise ValueError(f"exit {name!r} is no early exit of the model; name one of {', '.join(early)}")
        profiled = [name for name in names if name in requested or name == final]
        opened = [name for name in early if name in requested or name in open_in_policy]
        return cls(names, profiled, opened, open_in_policy)

    def unpredictable(self, rates: Mapping[str, float]) -> str | None:
        """Why the forced exits do not foretell the policy, which has these exit rates; ``None`` if they do."""
        if self.opened != self.open_in_policy:
            closed = ", ".join(name for name in self.opened if name not in self.open_in_policy)
            return f"the policy closes {closed}, which ran open where exits were forced"
        if any(rates[name] for name in self.names if name not in self.profiled):
            return "samples leave at exits that were not profiled"
        return None


class _Counts(NamedTuple):
    """How many samples leave at each exit under the policy, how many each exit alone gets right, how many the policy
    gets right, and how many have a label."""

    leaving: list[int]
    right: list[int]
    policy_right: int
    labelled: int

    def rates(self, names: Sequence[str]) -> dict[str, float]:
        """The fraction of the samples that leaves at each exit."""
        return {name: count / sum(self.leaving) for name, count in zip(names, self.leaving, strict=True)}

    def accuracy(self, right: int) -> float | None:
        """``None`` without labels."""
        return right / self.labelled if self.labelled else None


def _count(model: EarlyExit, batches: Batches) -> _Counts:
    leaving = torch.zeros(model.num_exits, dtype=torch.int64)
    right = torch.zeros(model.num_exits, dtype=torch.int64)
    policy_right = labelled = 0
    for x, y in batches:
        y = y.cpu()
        has_label = y != UNLABELLED  # no prediction equals that
        output = call(model.predict, x)
        leaving += output.exit_index.cpu().bincount(minlength=model.num_exits)
        right += torch.stack([(logits.argmax(dim=1).cpu() == y).sum() for logits in call(model.exit_logits, x)])
        policy_right += int((output.labels.cpu() == y).sum())
        labelled += int(has_label.sum())
    return _Counts(leaving.tolist(), right.tolist(), policy_right, labelled)


def _workloads(model: EarlyExit, batches: Batches, profiled: Sequence[str], opened: Sequence[str]) -> list[Workload]:
    """Three per profiled exit, and the mixed one; a call of each passes over all batches once."""
    staged = [call(model.staged, x) for x, _ in batches]
    samples = sum(batch.num_rows for batch in staged)
    workloads = [Workload(MIXED, partial(_run, model, model.policy, batches), samples)]
    for name in profiled:
        last = model.exit_names.index(name)
        heads = {k: head for k, head in enumerate(model.heads) if k <= last and model.exit_names[k] in opened}
        policy = _forced(model.policy, last, heads)
        workloads += [
            Workload(f"backbone:{name}", partial(_run_stages, staged, last, {}), samples),
            Workload(f"heads:{name}", partial(_run_stages, staged, last, heads), samples),
            Workload(f"forced:{name}", partial(_run, model, policy, batches), samples),
        ]
    return workloads


def _forced(policy: ExitPolicy, last: int, open_exits: Container[int]) -> ExitPolicy:
    """A policy that tries the open exits up to ``last``, at which every row leaves, and none before."""
    always = math.inf if is_low_when_sure(policy.score) else -math.inf
    thresholds = [
        (always if k == last else -always) if k in open_exits else None for k in range(len(policy.thresholds))
    ]
    return replace(policy, thresholds=tuple(thresholds))


def _run(model: EarlyExit, policy: ExitPolicy, batches: Batches) -> None:
    own, model.policy = model.policy, policy
    try:
        for x, _ in batches:
            call(model, x)
    finally:
        model.policy = own


def _run_stages(batches: Sequence[StagedBatch], last: int, heads: Mapping[int, nn.Module]) -> None:
    """The stages up to exit ``last``, and some heads, without any decision."""
    for batch in batches:
        run_prefix(batch.program, batch.inputs, batch.num_rows, last, heads)


def _exit_profiles(model: EarlyExit, plan: _Plan, counts: _Counts, measurement: Measurement) -> tuple[ExitProfile, ...]:
    rates, flops = counts.rates(plan.names), _flops(model, plan.opened)
    columns = (_splits(measurement, plan.profiled, quantity) for quantity in QUANTITIES)
    profiles = []
    for name, *splits in zip(plan.profiled, *columns, strict=True):
        index = plan.names.index(name)
        accuracy = counts.accuracy(counts.right[index])
        profiles.append(ExitProfile(name, rates[name], accuracy, None if flops is None else flops[index], *splits))
    return tuple(profiles)


def _splits(measurement: Measurement, profiled: Sequence[str], quantity: Quantity) -> list[Split]:
    def estimate(name: str, before: str | None, **factors: int) -> Estimate:
        terms = {f"{kind}:{name}": float(factor) for kind, factor in factors.items()}
        if before is not None:
            terms |= {f"{kind}:{before}": -float(factor) for kind, factor in factors.items()}
        return measurement.estimate(terms, quantity)

    return [
        Split(
            cumulative=estimate(name, None, forced=1),
            marginal=estimate(name, before, forced=1),
            backbone=estimate(name, before, backbone=1),
            head=estimate(name, before, heads=1, backbone=-1),
            gate=estimate(name, before, forced=1, heads=-1),
        )
        for name, before in zip(profiled, [None, *profiled], strict=False)
    ]


def _prediction(measurement: Measurement, plan: _Plan, counts: _Counts, quantity: Quantity) -> Prediction:
    measured = measurement.estimate(MIXED, quantity)
    rates = counts.rates(plan.names)
    unpredictable = plan.unpredictable(rates)
    if unpredictable is not None:
        unknown = Estimate(None, None, None, measured.unit, 0, reason=unpredictable)
        return Prediction(unknown, measured, unknown, replace(unknown, unit="1"))
    terms = {f"forced:{name}": rates[name] for name in plan.profiled}
    return Prediction(
        predicted=measurement.estimate(terms, quantity),
        measured=measured,
        residual=measurement.estimate({MIXED: 1.0, **{name: -rate for name, rate in terms.items()}}, quantity),
        ratio=measurement.ratio(MIXED, terms, quantity),
    )


def _flops(model: EarlyExit, opened: Sequence[str]) -> list[float] | None:
    """Per sample that leaves at each exit; ``None`` for a model without an operation that is counted."""
    try:
        costs = exit_costs(model)
    except ValueError:
        return None
    return [float(cost) for cost in costs.cumulative([name in opened for name in model.exit_names[:-1]])]
