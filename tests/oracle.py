"""The reference answers: every row alone through the eager backbone, and what tests of them share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import cet
from cet.ops.definitions import ScoreName
from families import Inputs

CONTRACT = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@dataclass
class Answers:
    logits: Tensor
    exit_index: Tensor
    score: Tensor


def score_by_definition(logits: Tensor, score: ScoreName, temperature: float) -> float:
    """In double precision and plain arithmetic."""
    values = [v / temperature for v in logits.double().tolist()]
    if any(math.isnan(v) or v == math.inf for v in values):
        return math.nan
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    p = sorted((w / sum(weights) for w in weights), reverse=True)
    if score == "entropy":
        return -sum(q * math.log(q) for q in p if q > 0)
    return {"confidence": p[0], "margin": p[0] - p[1]}[score]


def patience_by_definition(named: list[int]) -> float:
    """How many classes before the last are the same as it, without a break."""
    count = 0
    for before in reversed(named[:-1]):
        if before != named[-1]:
            break
        count += 1
    return float(count)


@torch.no_grad()
def answer_each_row_alone(model: cet.EarlyExit, inputs: Inputs, policy: cet.ExitPolicy) -> Answers:
    rows = len(next(iter(inputs.values())))
    alone = [model.exit_logits(**{name: value[row : row + 1] for name, value in inputs.items()}) for row in range(rows)]
    return answers_of([torch.cat(logits) for logits in zip(*alone, strict=True)], policy)


@torch.no_grad()
def policy_between_scores(
    model: cet.EarlyExit, inputs: Inputs, score: ScoreName, quantiles: list[float | None], temperatures: Any = None
) -> cet.ExitPolicy:
    """Thresholds in the widest gap near a quantile of the scores, where rounding decides nothing."""
    thresholds: list[float | None] = []
    for k, (quantile, logits) in enumerate(zip(quantiles, model.exit_logits(**inputs), strict=False)):
        if quantile is None:
            thresholds.append(None)
            continue
        temperature = 1.0 if temperatures is None else temperatures[k]
        scores = sorted(score_by_definition(row, score, temperature) for row in logits)
        edges = [-math.inf, *scores, math.inf]
        at = round(quantile * len(scores))
        gaps = range(max(0, at - 1), min(len(scores), at + 1) + 1)
        widest = max(gaps, key=lambda g: edges[g + 1] - edges[g])
        thresholds.append((edges[widest] + edges[widest + 1]) / 2)
    return cet.ExitPolicy(score, tuple(thresholds), temperatures)


def assert_same_answers(got: cet.ExitOutput, expected: Answers) -> None:
    assert got.exit_index.dtype == torch.int64
    assert got.score.dtype == torch.float32
    device = got.logits.device
    assert torch.equal(got.exit_index, expected.exit_index.to(device))
    torch.testing.assert_close(got.logits, expected.logits.to(device), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.score, expected.score.float().to(device), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def exit_logits_of_eager_backbone(model: cet.EarlyExit, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Logits of all exits from the backbone as it is now, read by forward hooks that belong to the test."""
    features: dict[int, Tensor] = {}
    handles = []
    for k, path in enumerate(model.exit_names[:-1]):

        def keep(_module: nn.Module, _inputs: Any, output: Any, k: int = k) -> None:
            features[k] = next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)).clone()

        handles.append(model.backbone.get_submodule(path).register_forward_hook(keep))
    try:
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        output = model.backbone(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return [*(head(features[k]) for k, head in enumerate(model.heads)), logits]


@torch.no_grad()
def exit_logits_of_each_row_alone(model: cet.EarlyExit, *args: Any, **kwargs: Any) -> list[Tensor]:
    """The same for each row in a call of its own; every tensor among the inputs holds one row per sample."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    alone = []
    for row in range(len(tensors[0])):
        row_args, row_kwargs = pytree.tree_map_only(Tensor, lambda t, r=row: t[r : r + 1], (args, kwargs))
        alone.append(exit_logits_of_eager_backbone(model, *row_args, **row_kwargs))
    return [torch.cat(rows) for rows in zip(*alone, strict=True)]


def answers_of(exit_logits: list[Tensor], policy: cet.ExitPolicy) -> Answers:
    """What the policy makes of the logits of all exits, row by row."""
    logits, exits, scores = [], [], []
    for row in range(len(exit_logits[0])):
        named: list[int] = []
        for k, candidates in enumerate(exit_logits):
            threshold = policy.thresholds[k] if k < len(policy.thresholds) else None
            is_final = k == len(exit_logits) - 1
            if policy.score == "patience":
                if threshold is not None or is_final:
                    is_broken = any(math.isnan(v) or v == math.inf for v in candidates[row].tolist())
                    named.append(-1 if is_broken else int(candidates[row].argmax()))
                score = patience_by_definition(named)
            elif isinstance(policy.score, cet.ScoreFunction):
                score = float(policy.score.function(candidates[row : row + 1].float() / policy.temperature(k))[0])
            else:
                score = score_by_definition(candidates[row], policy.score, policy.temperature(k))
            if any(math.isnan(v) or v == math.inf for v in candidates[row].tolist()):
                score = math.nan
            low = policy.score == "entropy" or getattr(policy.score, "is_low_when_sure", False)
            leaves = threshold is not None and (score <= threshold if low else score >= threshold)
            if leaves or k == len(exit_logits) - 1:
                logits.append(candidates[row])
                exits.append(k)
                scores.append(score)
                break
    return Answers(torch.stack(logits), torch.tensor(exits), torch.tensor(scores))


def policy_that_parts(exit_logits: list[Tensor], quantile: float = 0.5) -> cet.ExitPolicy:
    """Thresholds in the gap of the entropies at a quantile, so that some rows leave at an exit and some do not."""
    thresholds = []
    for logits in exit_logits[:-1]:
        scores = sorted(score_by_definition(row, "entropy", 1.0) for row in logits)
        at = round(quantile * (len(scores) - 1))
        gaps = [(scores[i + 1] - scores[i], i) for i in range(max(0, at - 1), min(len(scores) - 1, at + 2))]
        i = max(gaps)[1]
        thresholds.append((scores[i] + scores[i + 1]) / 2)
    return cet.ExitPolicy("entropy", tuple(thresholds))


def assert_answers_of_eager_backbone(
    model: cet.EarlyExit, *args: Any, atol: float = 1e-4, **kwargs: Any
) -> list[Tensor]:
    """``predict`` and ``exit_logits`` give what the backbone, as it is now, gives for each row alone; with all exits
    closed, and with thresholds that some rows pass. Returns the logits of all exits."""
    expected = exit_logits_of_each_row_alone(model, *args, **kwargs)
    model.policy = cet.ExitPolicy.closed(model.num_exits)
    torch.testing.assert_close(model.predict(*args, **kwargs).logits, expected[-1], rtol=atol, atol=atol)
    with torch.no_grad():
        for got, wanted in zip(model.exit_logits(*args, **kwargs), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=atol, atol=atol)
    model.policy = policy_that_parts(expected)
    answers = answers_of(expected, model.policy)
    assert len(answers.exit_index.unique()) > 1
    got_answers = model.predict(*args, **kwargs)
    assert torch.equal(got_answers.exit_index, answers.exit_index)
    torch.testing.assert_close(got_answers.logits, answers.logits, rtol=atol, atol=atol)
    return expected


@torch.no_grad()
def spread_logits(model: cet.EarlyExit, inputs: Inputs) -> None:
    """Give the heads of a model logits by which scores differ between rows."""
    for head, logits in zip(model.heads, model.exit_logits(**inputs), strict=False):
        spread = logits.std(dim=0).mean()
        head.linear.bias.sub_(logits.mean(dim=0)).div_(spread)
        head.linear.weight.div_(spread)


def all_leave(model: cet.EarlyExit) -> cet.ExitPolicy:
    return cet.ExitPolicy("confidence", (0.0,) * (model.num_exits - 1))


@contextmanager
def poisoned_row(model: cet.EarlyExit, inputs: Inputs, row: int, poison: float) -> Iterator[Inputs]:
    """The inputs with one row replaced: by the value itself, or by a token whose embedding holds it."""
    name, value = next(iter(inputs.items()))
    if value.is_floating_point():
        yield {**inputs, name: value.index_fill(0, torch.tensor(row, device=value.device), poison)}
        return
    token = int(value.max()) + 1
    embedding = model.backbone.get_input_embeddings().weight.data
    original = embedding[token].clone()
    embedding[token] = poison
    yield {**inputs, name: value.index_fill(0, torch.tensor(row, device=value.device), token)}
    embedding[token] = original
