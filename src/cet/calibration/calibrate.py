"""Calibration: an exit policy from held-out samples that keeps a stated accuracy, on new samples, at the least mean
cost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cet.calibration.budget import Budget, Reach
from cet.calibration.certify import Answers, Terms, certify, divide, fitted, pooled
from cet.calibration.cost import ExitCosts, exit_costs
from cet.calibration.groups import GroupReader, Groups
from cet.calibration.guarantee import GUARANTEES, Guarantee
from cet.calibration.metrics import MetricChoice, MetricName, check_metric, metric_on
from cet.calibration.report import CalibrationReport, ClassReport, ExitReport, drop_interval
from cet.calibration.temperatures import fit_temperature
from cet.calibration.thresholds import simulate
from cet.data.batches import BatchFn, Inputs, as_call, read_batches
from cet.model.early_exit import EarlyExit
from cet.model.output import ExitAnswers
from cet.ops.consistent_exit_loss import UNLABELLED
from cet.partition.stages import evaluating
from cet.runtime.policy import ExitPolicy
from cet.runtime.scores import PolicyScore, ScoreFunction, Scorer, check_score, is_low_when_sure, score_name
from cet.words import counted

Ints = NDArray[np.int64]
Perturb = Callable[[Inputs], Inputs]

_SCORED_AT_ONCE = 2**14


@dataclass(frozen=True)
class Calibration:
    """The policy, to be assigned to ``model.policy``, and what it does on the calibration samples."""

    policy: ExitPolicy
    report: CalibrationReport


def calibrate(
    model: nn.Module | ExitAnswers,
    loader: Iterable[Any],
    max_accuracy_drop: float | None = 0.01,
    confidence: float | None = 0.95,
    *,
    guarantee: Guarantee | None = "auto",
    groups: Groups | None = None,
    perturb: Perturb | Mapping[str, Perturb] | None = None,
    split: bool = True,
    seed: int = 0,
    score: PolicyScore = "entropy",
    temperature: bool = True,
    costs: ExitCosts | None = None,
    mean_budget: float | None = None,
    worst_budget: float | None = None,
    metric: MetricChoice = "accuracy",
    class_weights: Sequence[float] | Tensor | None = None,
    batch_fn: BatchFn | None = None,
) -> Calibration:
    """Choose thresholds on held-out samples that keep their promise on new ones; ``model`` keeps its policy until you
    assign the new one.

    With a probability of at least ``confidence`` over the calibration samples, what the metric loses against the full
    model on **new samples of the same kind** is at most ``max_accuracy_drop``. That holds for every model and every
    distribution, as long as the calibration samples were not trained on, are independent of each other, and come from
    where the new ones will come from. Where nothing can be certified all exits are closed, and the report's certificate
    says why and how many samples could do. See :mod:`cet.calibration.guarantee` for the method and its sources.

    With ``guarantee=None`` the bound holds **on the calibration samples** alone: the thresholds are the best of many on
    the samples that judge them, and break it on new samples more often than not.

    Logits and scores are those that :meth:`EarlyExit.predict` computes, to the bit when its batches take the same
    kernels; the first batch is checked by :meth:`EarlyExit.check`. The logits of all exits are held in memory,
    ``E * n * K`` numbers for ``n`` samples and ``K`` classes, once more per perturbation; :func:`calibrate_scores` does
    without.

    Args:
        model: an :class:`cet.EarlyExit`, also inside DataParallel, DistributedDataParallel or ``torch.compile``, whose
            wrapper is then passed by. It runs in eval mode, and has its own modes back afterwards. Or a file that
            :func:`cet.load_exported` has read, exported with ``thresholds="input"``.
        loader: yields batches ``(x, y)``, longer tuples or dicts, see :mod:`cet.data.batches`; ``y`` holds class
            indices, -100 for rows to ignore.
        max_accuracy_drop: what the metric may lose, in its own units, in [0, 1); 0.01 is one percentage point. ``None``
            with a budget: whatever it takes to keep that.
        confidence: in (0, 1). ``None``: the loss is within the bound in expectation over the calibration samples, which
            asks for fewer of them (conformal risk control).
        guarantee: how p-values are computed: ``"exact"`` for right-or-wrong answers, ``"betting"``, ``"bentkus"``, or
            ``"auto"``, the sharpest that fits. ``None``: thresholds fitted on these samples, without a guarantee.
        groups: the group of each row, such as the person or device it is from: one entry per row in the order of the
            loader, or a function of a batch as the loader yields it that returns them, ``(B,)``. The bound then holds
            for new groups, each counting alike, and the groups must be independent, not the rows.
        perturb: a perturbation, or several by name, under which the bound must hold as well; see :mod:`cet.perturb`.
            It is called with a copy of the inputs of a batch, and returns as many rows.
        split: whether a fifth of the samples fits temperatures and lays the path of policies that the others test.
            If not, all samples test, one threshold serves all exits, and all temperatures are 1.
        seed: of the division of the samples, and of the perturbations.
        score: of the policy, see :class:`cet.ExitPolicy`. Of ``"patience"`` one whole number is chosen for all exits,
            which all stay open; it needs no path, so all samples test.
        temperature: whether to fit a temperature per exit, see :func:`fit_temperature`; else all are 1.
        costs: what stages and heads cost; :func:`cet.exit_costs` when not given. :func:`cet.energy.measured_costs` has
            them in milliseconds or joules.
        mean_budget: what the mean cost of new samples must be within, in the unit of the costs. Then the best metric
            within it is chosen instead of the least cost, and the certificate holds for both, budget and bound.
        worst_budget: what no sample may cost more than: all leave at the last exit that is within it, or before.
        metric: what may fall by ``max_accuracy_drop``: ``"accuracy"``; ``"balanced"``, the mean recall;
            ``"per_class"``, the recall of every class. Or what may grow by it: ``"disagreement"``, the share of
            answers that differ from the full model's; ``"brier"``, the Brier score of the softmax of the returned
            logits, in [0, 2]; a :class:`cet.BoundedLoss`. Or, with ``guarantee=None`` alone, a function of labels and
            predictions, int64 tensors ``(n,)`` on the CPU, that returns one number, more for better. It is called
            often: up to 1024 times for each group of exits that the search moves.
        class_weights: ``K`` numbers >= 0, by which ``"accuracy"`` weighs samples and ``"balanced"`` recalls.
        batch_fn: takes a batch of another form apart: ``batch_fn(batch) -> (x, y)``.

    Raises:
        ValueError: for arguments out of range, a loader without labelled rows, labels out of range, groups that do not
            fit the rows, logits of which none is finite, a backbone whose FLOPs cannot be counted when ``costs`` is
            not given, or a budget that nothing meets, with the least that something does.
        TypeError: for a model that is no :class:`cet.EarlyExit`, arguments of a wrong type, a loader that does not
            yield labelled batches and labels that name no class.
        AnswerMismatchError: when the stages that ``predict`` runs differ from the backbone on the first batch.
    """
    model = _early_exit(model)
    order = _check_order(
        max_accuracy_drop, confidence, guarantee, groups is not None, split, seed, score, metric, class_weights,
        model.num_classes, mean_budget, worst_budget,
    )  # fmt: skip
    perturbations = _check_perturb(perturb)
    if perturbations and callable(metric):
        raise ValueError("perturb is for metrics of single samples, and metric is a function; leave one of them out")
    recorder = GroupReader(groups, loader, batch_fn)
    batches = read_batches(loader, model.num_classes, recorder.batch_fn)
    if costs is not None and len(costs.stage) != model.num_exits:
        raise ValueError(
            f"costs has {counted(len(costs.stage), 'stage')} but the model has {counted(model.num_exits, 'exit')}; "
            "give as many"
        )
    if costs is None:
        if not isinstance(model, EarlyExit):
            raise ValueError("costs is None, and a file does not tell its own; give the .costs of cet.export's report")
        costs = exit_costs(model)
    if order.terms:
        Reach.within(costs, order.terms.budget)  # refuses a budget that no exit is within
    collected, labels, is_labelled = _collect(model, batches, perturbations, seed)
    y: Ints = labels.numpy()
    of_groups = recorder.indices(is_labelled.numpy())
    is_fit = divide(order.terms, y, of_groups, model.num_classes) if order.terms else np.ones(len(y), dtype=bool)

    temperatures = _fit_temperatures(collected, labels, is_fit) if temperature else (1.0,) * model.num_exits
    sign = _sign(score)
    answers = []
    for name, exit_logits in collected.items():
        scores = sign * _scores(exit_logits[:-1], score, temperatures, _device(model))
        predictions = torch.stack([logits.argmax(dim=1) for logits in exit_logits], dim=1)
        answers.append(
            Answers(
                name,
                scores,
                predictions.numpy(),
                (predictions == labels[:, None]).numpy(),
                metric_on(metric, class_weights, labels, predictions, exit_logits),
            )
        )
    notes = [*recorder.notes(of_groups), *_finite_notes(collected, model.exit_names)]
    calibration = _calibrated(order, model.exit_names, answers, y, of_groups, is_fit, temperatures, costs, notes)
    _warn(calibration.report)
    return calibration if temperature else replace(calibration, policy=replace(calibration.policy, temperatures=None))


def calibrate_scores(
    scores: ArrayLike,
    predictions: ArrayLike,
    labels: ArrayLike,
    costs: ExitCosts,
    max_accuracy_drop: float | None = 0.01,
    confidence: float | None = 0.95,
    *,
    num_classes: int,
    guarantee: Guarantee | None = "auto",
    groups: ArrayLike | None = None,
    split: bool = True,
    seed: int = 0,
    score: PolicyScore = "entropy",
    metric: MetricName = "accuracy",
    class_weights: Sequence[float] | Tensor | None = None,
    mean_budget: float | None = None,
    worst_budget: float | None = None,
    exit_names: Sequence[str] | None = None,
) -> Calibration:
    """:func:`calibrate` from what the exits said, for many samples of many classes, or for answers that are on disk.

    Args:
        scores: ``(n, E - 1)`` of each early exit, as the policy will see them; a NaN never leaves.
        predictions: ``(n, E)`` class indices, the final exit's last.
        labels: ``(n,)`` class indices.
        costs: of ``E`` stages.
        max_accuracy_drop, confidence, guarantee, split, seed, score, class_weights, mean_budget, worst_budget: as for
            :func:`calibrate`.
        num_classes: ``K``.
        groups: ``(n,)``, the group of each row.
        metric: one that needs no logits: ``"accuracy"``, ``"balanced"``, ``"per_class"`` or ``"disagreement"``.
        exit_names: for the report.

    Raises:
        ValueError, TypeError: for arguments that :func:`calibrate` refuses, and arrays whose shapes disagree.
    """
    num_exits = len(costs.stage)
    if not isinstance(metric, str) or metric == "brier":
        raise ValueError(f"metric is {metric!r}, which needs logits; give a model to cet.calibrate")
    order = _check_order(
        max_accuracy_drop,
        confidence,
        guarantee,
        groups is not None,
        split,
        seed,
        score,
        metric,
        class_weights,
        num_classes,
        mean_budget,
        worst_budget,
    )
    of_samples = np.asarray(scores, dtype=np.float32)
    said, y = _class_array("predictions", predictions, num_classes), _class_array("labels", labels, num_classes)
    n = len(y)
    if not n:
        raise ValueError("labels is empty; give held-out samples")
    for name, shape, expected in (
        ("scores", of_samples.shape, (n, num_exits - 1)),
        ("predictions", said.shape, (n, num_exits)),
        ("labels", y.shape, (n,)),
    ):
        if shape != expected:
            raise ValueError(
                f"{name} has shape {shape}; for {counted(n, 'label')} and {counted(num_exits, 'stage')} of costs give "
                f"{expected}"
            )
    recorder = GroupReader(None if groups is None else np.asarray(groups))
    of_groups = recorder.indices(np.ones(n, dtype=bool))
    is_fit = divide(order.terms, y, of_groups, num_classes) if order.terms else np.ones(n, dtype=bool)
    on_samples = metric_on(metric, class_weights, torch.from_numpy(y), torch.from_numpy(said))
    answers = [Answers("clean", _sign(score) * of_samples, said, said == y[:, None], on_samples)]
    names = list(exit_names or [*(str(k) for k in range(num_exits - 1)), "final"])
    temperatures, notes = (1.0,) * num_exits, recorder.notes(of_groups)
    calibration = _calibrated(order, names, answers, y, of_groups, is_fit, temperatures, costs, notes)
    _warn(calibration.report)
    return replace(calibration, policy=replace(calibration.policy, temperatures=None))


@dataclass(frozen=True)
class _Order:
    """What was asked for; ``terms`` are ``None`` without a guarantee."""

    terms: Terms | None
    max_drop: float | None
    confidence: float
    score: PolicyScore
    metric: MetricChoice
    num_classes: int


def _calibrated(
    order: _Order,
    exit_names: Sequence[str],
    answers: Sequence[Answers],
    labels: Ints,
    groups: Ints | None,
    is_fit: NDArray[np.bool_],
    temperatures: tuple[float, ...],
    costs: ExitCosts,
    notes: Sequence[str],
) -> Calibration:
    """Thresholds from the answers of all exits, and what they do on the clean samples; where they are fitted, on the
    samples of all conditions."""
    certificate = None
    if order.terms is None:
        answers = [pooled(answers)]
        labels = np.tile(labels, len(answers[0].scores) // len(labels))
        assert order.max_drop is not None
        limits = fitted(answers, costs, order.max_drop, score=order.score).thresholds
    else:
        limits, certificate = certify(
            order.terms, answers, labels, groups, is_fit, costs, order.score, order.num_classes, notes
        )
    clean, sign = answers[0], _sign(order.score)
    thresholds = tuple(None if t == -math.inf else sign * t + 0.0 for t in limits)  # a zero has no sign
    exit_index, correct = simulate(limits, clean.scores), clean.correct
    right, right_at_final = correct[np.arange(len(correct)), exit_index], correct[:, -1]
    lost, won = int((right_at_final & ~right).sum()), int((right & ~right_at_final).sum())
    fractions = np.bincount(exit_index, minlength=len(exit_names)) / len(labels)
    survival = tuple((1.0 - fractions.cumsum()[:-1]).clip(0, 1).tolist())
    path_cost = costs.cumulative([t is not None for t in thresholds])
    columns = zip(
        exit_names,
        correct.mean(axis=0).tolist(),
        temperatures,
        (*thresholds, None),
        fractions.tolist(),
        path_cost.tolist(),
        strict=True,
    )
    metric = order.metric
    report = CalibrationReport(
        num_samples=len(labels),
        score=score_name(order.score),
        exits=tuple(ExitReport(*row) for row in columns),
        classes=_by_class(labels, correct, exit_index),
        accuracy=float(right.mean()),
        final_accuracy=float(right_at_final.mean()),
        drop=(lost - won) / len(labels),
        metric=metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__),
        metric_drop=clean.metric.drop(correct, exit_index),
        max_drop=order.max_drop,
        interval=drop_interval(lost, won, len(labels), order.confidence),
        confidence=order.confidence,
        mean_cost=float(path_cost[exit_index].mean()),
        full_cost=costs.full,
        unit=costs.unit,
        certificate=certificate,
    )
    return Calibration(ExitPolicy(order.score, thresholds, temperatures, survival), report)


def _sign(score: PolicyScore) -> float:
    """The search lets low scores leave."""
    return 1.0 if is_low_when_sure(score) else -1.0


def _warn(report: CalibrationReport) -> None:
    if report.warning is not None:
        warnings.warn(report.warning, stacklevel=3)


def _check_order(
    max_drop: Any,
    confidence: Any,
    guarantee: Any,
    has_groups: bool,
    split: bool,
    seed: int,
    score: Any,
    metric: Any,
    class_weights: Any,
    num_classes: int,
    mean_budget: Any = None,
    worst_budget: Any = None,
) -> _Order:
    """Refuse what cannot be asked for, before any compute."""
    budget = Budget.of(mean_budget, worst_budget)
    if budget and guarantee is None:
        raise ValueError("budgets are for a guarantee, and guarantee is None; leave one of them out")
    if max_drop is None and not budget:
        raise TypeError("max_accuracy_drop is None, and there is no budget; give one of them")
    if max_drop is not None:
        _check_fraction("max_accuracy_drop", max_drop)
        if not 0 <= max_drop < 1:
            raise ValueError(f"max_accuracy_drop is {max_drop}; give a fraction in [0, 1), 0.01 for one point")
        max_drop = float(max_drop)
    if confidence is not None:
        _check_fraction("confidence", confidence)
        if not 0 < confidence < 1:
            raise ValueError(f"confidence is {confidence}; give a level in (0, 1)")
    check_score(score)
    if score == "patience":
        split = False
        if budget:
            raise ValueError("a budget chooses exits, and patience counts all of them; leave one of the two out")
    elif isinstance(score, ScoreFunction) and not split:
        raise ValueError(
            f"split is False, which tries thresholds all over the score's range, and that of {score.name!r} is "
            "unknown; leave it out"
        )
    check_metric(metric, class_weights, num_classes)
    level = 0.95 if confidence is None else float(confidence)
    if guarantee is None:
        if has_groups:
            raise ValueError("groups are for a guarantee, and guarantee is None; leave one of them out")
        return _Order(None, max_drop, level, score, metric, num_classes)
    if guarantee not in GUARANTEES:
        raise ValueError(f"guarantee {guarantee!r} is unknown; choose one of {', '.join(GUARANTEES)}, or None")
    if callable(metric):
        raise ValueError(
            "metric is a function of all samples together, whose value on new samples nothing bounds; give a "
            "cet.BoundedLoss of single samples, or guarantee=None"
        )
    one_by_one = metric in ("accuracy", "per_class", "disagreement") and class_weights is None and not has_groups
    if guarantee == "exact" and not one_by_one:
        raise ValueError(
            "guarantee is 'exact', which is for right-or-wrong answers of independent samples that count alike; give "
            "'betting', or leave out groups, class_weights or the metric"
        )
    if guarantee == "auto":
        by_parts = (
            metric == "balanced" and not has_groups
        )  # of which those of a single class are answers that count alike
        guarantee = "exact" if one_by_one or by_parts else "betting"
    weights = None if class_weights is None else np.array([float(weight) for weight in class_weights])
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed is {seed!r}; give a whole number >= 0")
    certain = None if confidence is None else level
    terms = Terms(metric, weights, max_drop, certain, guarantee, bool(split), seed, budget)
    return _Order(terms, max_drop, level, score, metric, num_classes)


def _check_perturb(perturb: Any) -> dict[str, Perturb]:
    """The perturbations by name, the clean inputs first."""
    if perturb is None:
        return {}
    if isinstance(perturb, Mapping):
        named = {str(name): function for name, function in perturb.items()}
    else:
        named = {"perturbed": perturb}
    for name, function in named.items():
        if not callable(function):
            raise TypeError(f"perturb[{name!r}] is {function!r}; give a function of the inputs of a batch")
        if name == "clean":
            raise ValueError("perturb names a perturbation 'clean', as the samples as they are; give it another name")
    return named


def _fit_temperatures(
    collected: Mapping[str, Sequence[Tensor]], labels: Tensor, is_fit: NDArray[np.bool_]
) -> tuple[float, ...]:
    """One per exit, from the samples that fit, under all conditions; 1 where there is none."""
    rows = torch.from_numpy(np.flatnonzero(is_fit))
    if not len(rows):
        return tuple(1.0 for _ in next(iter(collected.values())))
    of_rows = labels[rows].repeat(len(collected))
    return tuple(
        fit_temperature(torch.cat([logits[rows] for logits in of_exit]), of_rows)
        for of_exit in zip(*collected.values(), strict=True)
    )


def _finite_notes(collected: Mapping[str, Sequence[Tensor]], exit_names: Sequence[str]) -> list[str]:
    """How many samples have logits that are not finite, and at which exits; a final exit of which none has finite ones
    is refused."""
    notes = []
    for name, exit_logits in collected.items():
        finite = torch.stack([logits.isfinite().all(dim=1) for logits in exit_logits])
        if not finite[-1].any():
            raise ValueError(
                f"no {name} sample has finite logits at the final exit; check the weights and the inputs for NaN"
            )
        broken = int((~finite.all(dim=0)).sum())
        if broken:
            where = ", ".join(
                exit_name for exit_name, fine in zip(exit_names, finite.all(dim=1), strict=True) if not fine
            )
            notes.append(
                f"{broken} of {counted(finite.shape[1], f'{name} sample')} {'has' if broken == 1 else 'have'} logits "
                f"that are not finite at an exit ({where}); such do not leave there"
            )
    return notes


def _class_array(name: str, values: ArrayLike, num_classes: int) -> Ints:
    array = np.asarray(values)
    if array.size and array.dtype.kind not in "iu":
        raise TypeError(f"{name} is {array.dtype}; give class indices")
    if array.size and not (array.min() >= 0 and array.max() < num_classes):
        raise ValueError(
            f"{name} holds classes from {array.min()} to {array.max()}; give indices in [0, {num_classes})"
        )
    return array.astype(np.int64, copy=False)


def _early_exit(model: Any) -> EarlyExit | ExitAnswers:
    """The model inside the wrappers of data parallelism and compilation, or a file."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, wrappers) else model._orig_mod
    if isinstance(model, EarlyExit | ExitAnswers):
        return model
    if isinstance(model, torch.jit.ScriptModule | torch.export.ExportedProgram | torch.fx.GraphModule):
        raise TypeError(f"model is {type(model).__name__}, a recording; give the cet.EarlyExit that it was made from")
    fix = "wrap it first: cet.EarlyExit(net, exits, example_inputs)" if isinstance(model, nn.Module) else "give one"
    raise TypeError(f"model is {type(model).__name__}, which is no cet.EarlyExit; {fix}")


def _check_fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; give a number as a fraction, 0.01 for 1 %")


def _device(model: EarlyExit | ExitAnswers) -> torch.device:
    parameters = model.parameters() if isinstance(model, EarlyExit) else ()
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def _collect(
    model: EarlyExit | ExitAnswers,
    batches_read: Iterable[tuple[Inputs, Tensor]],
    perturbations: Mapping[str, Perturb],
    seed: int,
) -> tuple[dict[str, list[Tensor]], Tensor, Tensor]:
    """Logits of each exit, ``E`` tensors ``(n, K)`` as `predict` computes them, by condition, and labels ``(n,)``, of
    the labelled rows, on the CPU; and which of all rows are labelled."""
    device = _device(model)
    batches: dict[str, list[list[Tensor]]] = {name: [] for name in ("clean", *perturbations)}
    labels: list[Tensor] = []
    labelled: list[Tensor] = []
    with torch.no_grad(), evaluating(model) if isinstance(model, EarlyExit) else nullcontext():
        for index, (x, y) in enumerate(batches_read):
            is_labelled = y != UNLABELLED
            labelled.append(is_labelled)
            if not is_labelled.any():
                continue
            for name in batches:
                given = x if name == "clean" else _perturbed(x, name, perturbations[name], seed + index)
                args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), as_call(given))
                if isinstance(model, EarlyExit) and not labels and not batches[name]:
                    model.check(*args, **kwargs)
                answers = model.exit_answers(*args, **kwargs)
                if name != "clean" and len(answers[0][0]) != len(y):
                    raise ValueError(
                        f"perturb[{name!r}] makes {counted(len(answers[0][0]), 'row')} of {len(y)}; return every row "
                        "of the batch, in its order"
                    )
                batches[name].append([logits.cpu()[is_labelled] for logits, _ in answers])
            labels.append(y[is_labelled])
    if not labels:
        raise ValueError("loader yields no labelled rows; give it held-out samples with class indices as labels")
    collected = {name: [torch.cat(parts) for parts in zip(*rows, strict=True)] for name, rows in batches.items()}
    return collected, torch.cat(labels), torch.cat(labelled)


def _perturbed(x: Inputs, name: str, perturb: Perturb, seed: int) -> Inputs:
    """A copy of the inputs of one batch, perturbed by draws that are the same in every calibration."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        perturbed = perturb(pytree.tree_map_only(Tensor, torch.clone, x))
    if perturbed is None:
        raise TypeError(f"perturb[{name!r}] returns nothing; return the perturbed inputs")
    return perturbed


def _scores(
    exit_logits: Sequence[Tensor], score: PolicyScore, temperatures: Sequence[float], device: torch.device
) -> NDArray[np.float32]:
    """What the gate compares at each early exit, ``(n, E - 1)``: from logits in their own dtype, on their device."""
    parts = []
    for of_rows in zip(*(torch.split(logits, _SCORED_AT_ONCE) for logits in exit_logits), strict=True):
        scorer = Scorer(score)
        columns = [scorer(logits.to(device), t).cpu() for logits, t in zip(of_rows, temperatures, strict=False)]
        parts.append(torch.stack(columns, dim=1))
    scores: NDArray[np.float32] = torch.cat(parts).numpy()
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
