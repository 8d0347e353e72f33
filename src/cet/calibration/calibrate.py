"""Calibration: an exit policy from held-out samples that keeps a stated accuracy at the least mean cost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cet.calibration.cost import ExitCosts, exit_costs
from cet.calibration.metrics import MetricFunction, MetricName, check_metric, metric_on
from cet.calibration.report import CalibrationReport, ClassReport, ExitReport, drop_interval
from cet.calibration.temperatures import fit_temperature
from cet.calibration.thresholds import search_thresholds, simulate
from cet.data.batches import BatchFn, Inputs, as_call, read_batches
from cet.model.early_exit import EarlyExit
from cet.ops import exit_score
from cet.ops.consistent_exit_loss import UNLABELLED
from cet.ops.definitions import SCORE_NAMES, SCORES, ScoreName
from cet.partition.stages import evaluating
from cet.runtime.policy import ExitPolicy

_SCORED_AT_ONCE = 2**14


@dataclass(frozen=True)
class Calibration:
    """The policy, to be assigned to ``model.policy``, and what it does on the calibration samples."""

    policy: ExitPolicy
    report: CalibrationReport


def calibrate(
    model: nn.Module,
    loader: Iterable[Any],
    max_accuracy_drop: float = 0.01,
    confidence: float = 0.95,
    *,
    score: ScoreName = "entropy",
    temperature: bool = True,
    costs: ExitCosts | None = None,
    metric: MetricName | MetricFunction = "accuracy",
    class_weights: Sequence[float] | Tensor | None = None,
    batch_fn: BatchFn | None = None,
) -> Calibration:
    """Choose temperatures and thresholds on held-out samples; ``model`` keeps its policy until you assign the new one.

    What the metric loses against the final exit is at most ``max_accuracy_drop`` **on the calibration samples**. What
    is known about others is the report's confidence interval of the loss of accuracy, and it is optimistic, because the
    thresholds were chosen on the same samples. There is no distribution-free guarantee. Overall accuracy hides a rare
    class: the report gives the recall of each, and a warning is issued when one loses more than ``max_accuracy_drop``.

    Logits and scores are those that :meth:`EarlyExit.predict` computes, to the bit when its batches take the same
    kernels; the first batch is checked by :meth:`EarlyExit.check`. The logits of all exits are held
    in memory, ``E * n * K`` numbers for ``n`` samples and ``K`` classes.

    Args:
        model: an :class:`cet.EarlyExit`, also inside DataParallel, DistributedDataParallel or ``torch.compile``, whose
            wrapper is then passed by. It runs in eval mode, and has its own modes back afterwards.
        loader: yields batches ``(x, y)``, longer tuples or dicts, see :mod:`cet.data.batches`; ``y`` holds class
            indices, -100 for rows to ignore.
        max_accuracy_drop: as a fraction, in [0, 1); 0.01 is one percentage point.
        confidence: level of the interval, in (0, 1).
        score: the score of the policy.
        temperature: whether to fit a temperature per exit, see :func:`fit_temperature`; else all are 1.
        costs: what stages and heads cost; :func:`cet.exit_costs` when not given.
        metric: what may fall by ``max_accuracy_drop``: ``"accuracy"``; ``"balanced"``, the mean recall over the classes
            that occur; ``"per_class"``, the recall of each of them; or a function of labels and predictions, int64
            tensors ``(n,)`` on the CPU, that returns one number, more for better. A function is called often: up to
            1024 times for each group of exits that the search moves, and the result is less often the cheapest.
        class_weights: ``K`` numbers >= 0, by which ``"accuracy"`` weighs samples and ``"balanced"`` recalls.
        batch_fn: takes a batch of another form apart: ``batch_fn(batch) -> (x, y)``.

    Raises:
        ValueError: for arguments out of range, a loader without labelled rows, labels out of range, or a backbone whose
            FLOPs cannot be counted when ``costs`` is not given.
        TypeError: for a model that is no :class:`cet.EarlyExit`, arguments of a wrong type, a loader that does not
            yield labelled batches and labels that name no class.
        AnswerMismatchError: when the stages that ``predict`` runs differ from the backbone on the first batch.
    """
    model = _early_exit(model)
    _check_fraction("max_accuracy_drop", max_accuracy_drop)
    if not 0 <= max_accuracy_drop < 1:
        raise ValueError(f"max_accuracy_drop is {max_accuracy_drop}; give a fraction in [0, 1), 0.01 for one point")
    _check_fraction("confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; give a level in (0, 1)")
    if score not in SCORE_NAMES:
        raise ValueError(f"score {score!r} is unknown; choose one of {', '.join(SCORE_NAMES)}")
    check_metric(metric, class_weights, model.num_classes)
    batches = read_batches(loader, model.num_classes, batch_fn)
    if costs is not None and len(costs.stage) != model.num_exits:
        raise ValueError(f"costs has {len(costs.stage)} stages but the model has {model.num_exits} exits; give as many")
    costs = costs or exit_costs(model)
    exit_logits, labels = _collect(model, batches)

    temperatures = tuple(fit_temperature(logits, labels) if temperature else 1.0 for logits in exit_logits)
    sign = 1.0 if SCORES[score].is_low_when_sure else -1.0  # the search lets low scores leave
    scores = sign * _scores(exit_logits[:-1], score, temperatures, _device(model))
    predictions = torch.stack([logits.argmax(dim=1) for logits in exit_logits], dim=1)
    correct = (predictions == labels[:, None]).numpy()
    bounded = metric_on(metric, class_weights, labels, predictions)
    point = search_thresholds(scores, correct, costs, max_accuracy_drop, bounded)
    thresholds = tuple(None if t == -math.inf else sign * t for t in point.thresholds)

    exit_index = simulate(point.thresholds, scores)
    right, right_at_final = correct[np.arange(len(correct)), exit_index], correct[:, -1]
    lost, won = int((right_at_final & ~right).sum()), int((right & ~right_at_final).sum())
    fractions = np.bincount(exit_index, minlength=model.num_exits) / len(labels)
    survival = tuple((1.0 - fractions.cumsum()[:-1]).clip(0, 1).tolist())
    columns = zip(
        model.exit_names,
        correct.mean(axis=0).tolist(),
        temperatures,
        (*thresholds, None),
        fractions.tolist(),
        costs.cumulative([t is not None for t in thresholds]).tolist(),
        strict=True,
    )
    report = CalibrationReport(
        num_samples=len(labels),
        score=score,
        exits=tuple(ExitReport(*row) for row in columns),
        classes=_by_class(labels.numpy(), correct, exit_index),
        accuracy=point.accuracy,
        final_accuracy=float(right_at_final.mean()),
        drop=(lost - won) / len(labels),
        metric=metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__),
        metric_drop=bounded.drop(correct, exit_index),
        max_drop=max_accuracy_drop,
        interval=drop_interval(lost, won, len(labels), confidence),
        confidence=confidence,
        mean_cost=point.cost,
        full_cost=costs.full,
        unit=costs.unit,
    )
    if report.warning is not None:
        warnings.warn(report.warning, stacklevel=2)
    return Calibration(ExitPolicy(score, thresholds, temperatures if temperature else None, survival), report)


def _early_exit(model: Any) -> EarlyExit:
    """The model inside the wrappers of data parallelism and compilation."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    if isinstance(model, EarlyExit):
        return model
    if isinstance(model, torch.jit.ScriptModule | torch.export.ExportedProgram | torch.fx.GraphModule):
        raise TypeError(f"model is {type(model).__name__}, a recording; give the cet.EarlyExit that it was made from")
    fix = "wrap it first: cet.EarlyExit(net, exits, example_inputs)" if isinstance(model, nn.Module) else "give one"
    raise TypeError(f"model is {type(model).__name__}, which is no cet.EarlyExit; {fix}")


def _check_fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; give a number as a fraction, 0.01 for 1 %")


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _collect(model: EarlyExit, batches_read: Iterable[tuple[Inputs, Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Logits of each exit, ``E`` tensors ``(n, K)`` as `predict` computes them, and labels ``(n,)``, of the labelled
    rows, on the CPU."""
    device = _device(model)
    batches: list[list[Tensor]] = []
    labels: list[Tensor] = []
    with torch.no_grad(), evaluating(model):
        for x, y in batches_read:
            is_labelled = y != UNLABELLED
            if not is_labelled.any():
                continue
            args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), as_call(x))
            if not batches:
                model.check(*args, **kwargs)
            answers = model.exit_answers(*args, **kwargs)
            batches.append([logits.cpu()[is_labelled] for logits, _ in answers])
            labels.append(y[is_labelled])
    if not labels:
        raise ValueError("loader yields no labelled rows; give it held-out samples with class indices as labels")
    return [torch.cat(parts) for parts in zip(*batches, strict=True)], torch.cat(labels)


def _scores(
    exit_logits: Sequence[Tensor], score: ScoreName, temperatures: Sequence[float], device: torch.device
) -> NDArray[np.float32]:
    """What the gate compares at each early exit, ``(n, E - 1)``: from logits in their own dtype, on their device."""
    columns = [
        torch.cat([exit_score(part.to(device), score, t).cpu() for part in torch.split(logits, _SCORED_AT_ONCE)])
        for logits, t in zip(exit_logits, temperatures, strict=False)
    ]
    scores: NDArray[np.float32] = torch.stack(columns, dim=1).numpy()
    return scores


def _by_class(
    labels: NDArray[np.int64], correct: NDArray[np.bool_], exit_index: NDArray[np.int64]
) -> tuple[ClassReport, ...]:
    """One report per class that occurs."""
    classes, of_sample = np.unique(labels, return_inverse=True)
    counts = np.zeros((len(classes), correct.shape[1]), dtype=np.int64)
    np.add.at(counts, (of_sample, exit_index), 1)
    num_samples = counts.sum(axis=1)
    right = np.bincount(of_sample, correct[np.arange(len(labels)), exit_index])
    right_at_final = np.bincount(of_sample, correct[:, -1])
    columns = zip(
        classes.tolist(),
        num_samples.tolist(),
        (right / num_samples).tolist(),
        (right_at_final / num_samples).tolist(),
        map(tuple, counts.tolist()),
        strict=True,
    )
    return tuple(ClassReport(*row) for row in columns)
