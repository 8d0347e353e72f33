"""What each exit of an early-exit model costs in joules and seconds, and what its policy costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cet.calibration.cost import exit_costs
from cet.data.batches import call, check_batch
from cet.energy.measurement import Block, Measurement, Quantity, Settings
from cet.energy.meter import EnergyMeter
from cet.energy.protocol import Progress, Workload, measure
from cet.energy.statistics import Estimate
from cet.model.early_exit import EarlyExit, StagedBatch
from cet.ops.consistent_exit_loss import UNLABELLED
from cet.partition.stages import evaluating
from cet.runtime.eager import run_prefix
from cet.runtime.policy import ExitPolicy

MIXED = "mixed"
"""The name of the workload in which the policy decides where each sample leaves."""

Batches = Sequence[tuple[Any, Tensor]]


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


def profile(
    model: EarlyExit,
    batches: Batches,
    meter: EnergyMeter,
    settings: Settings | None = None,
    *,
    exits: Sequence[str] | None = None,
    progress: Progress | None = None,
    on_block: Callable[[Block], object] | None = None,
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
        progress: is told how far the measurement is.
        on_block: gets each window as it ends.

    Raises:
        ValueError: for an exit that the model has not, for no batches, and for batches of different sizes.
    """
    names = model.exit_names
    early, final = names[:-1], names[-1]
    open_in_policy = [name for name, t in zip(early, model.policy.thresholds, strict=True) if t is not None]
    requested = (open_in_policy or early) if exits is None else exits
    for name in requested:
        if name not in early:
            raise ValueError(f"exit {name!r} is no early exit of the model; name one of {', '.join(early)}")
    rows = {check_batch(x, y, model.num_classes) for x, y in batches}
    if len(rows) != 1:
        raise ValueError(f"the batches have {sorted(rows)} rows; give at least one batch, and all of the same size")
    profiled = [name for name in names if name in requested or name == final]
    opened = [name for name in early if name in requested or name in open_in_policy]

    with torch.no_grad(), evaluating(model):
        leaving, right, policy_right, labelled = _count(model, batches)
        workloads = _workloads(model, batches, profiled, opened)
        measurement = measure(workloads, meter, settings, progress=progress, on_block=on_block)

    samples = sum(leaving)
    rates = {name: count / samples for name, count in zip(names, leaving, strict=True)}
    unpredictable = None
    if opened != open_in_policy:
        closed = ", ".join(name for name in opened if name not in open_in_policy)
        unpredictable = f"the policy closes {closed}, which ran open where exits were forced"
    elif any(rates[name] for name in names if name not in profiled):
        unpredictable = "samples leave at exits that were not profiled"
    terms = {f"forced:{name}": rates[name] for name in profiled}
    predict = partial(_prediction, measurement, terms, unpredictable)
    split = partial(_splits, measurement, profiled)
    flops = _flops(model, opened)
    return BatchProfile(
        batch_size=rows.pop(),
        samples=samples,
        exits=tuple(
            ExitProfile(
                name=name,
                rate=rates[name],
                accuracy=right[names.index(name)] / labelled if labelled else None,
                flops=None if flops is None else flops[names.index(name)],
                seconds=seconds,
                joules=joules,
                net_joules=net_joules,
            )
            for name, seconds, joules, net_joules in zip(
                profiled, split("seconds"), split("joules"), split("net_joules"), strict=True
            )
        ),
        accuracy=policy_right / labelled if labelled else None,
        seconds=predict("seconds"),
        joules=predict("joules"),
        net_joules=predict("net_joules"),
        measurement=measurement,
    )


def _count(model: EarlyExit, batches: Batches) -> tuple[list[int], list[int], int, int]:
    """Samples that leave at each exit under the policy, that each exit alone gets right, that the policy gets right,
    and that have a label."""
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
    return leaving.tolist(), right.tolist(), policy_right, labelled


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
    always = math.inf if policy.score == "entropy" else -math.inf
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


def _prediction(
    measurement: Measurement, terms: Mapping[str, float], unpredictable: str | None, quantity: Quantity
) -> Prediction:
    measured = measurement.estimate(MIXED, quantity)
    if unpredictable is not None:
        unknown = Estimate(None, None, None, measured.unit, 0, reason=unpredictable)
        return Prediction(unknown, measured, unknown, replace(unknown, unit="1"))
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
