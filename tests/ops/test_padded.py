"""The exit step on padded batches, against loops over the rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.rehearsal import NoWaiting
from cet import ops
from cet.ops.backend import preferring_triton
from cet.ops.definitions import SCORE_NAMES, ScoreName, pool_features
from cet.ops.padded import (
    Answers,
    PaddedExit,
    gather_and_scatter_rows,
    padded_exit_step,
    padded_gate,
    padded_scores,
    padded_step_of_logits,
)

NAN, INF = float("nan"), float("inf")
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
on_devices = pytest.mark.parametrize("device", DEVICES)


def int32(values: object, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@on_devices
def test_order_by_example(device: str) -> None:
    sure, unsure, lost = [9.0, 0.0], [0.1, 0.0], [NAN, 0.0]
    logits = torch.tensor([unsure, sure, lost, sure, unsure, sure], device=device)
    num_kept = int32(-1, device)
    decision = torch.tensor([0.9, 1.0], device=device)
    scores, order = padded_gate(logits, decision, int32(5, device), num_kept, score="confidence")
    assert order.dtype is torch.int32
    assert num_kept.item() == 3
    assert order[0, :3].tolist() == [0, 2, 4]
    assert order[1, :2].tolist() == [1, 3]
    assert scores.dtype is torch.float32


@on_devices
@given(
    rows=st.integers(1, 300),
    classes=st.sampled_from([2, 7, 33]),
    real=st.floats(0, 1),
    quantile=st.floats(0, 1),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    score=st.sampled_from(SCORE_NAMES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 2**31),
)
def test_any_padded_batch_is_gated_as_its_real_rows_are(
    device: str,
    rows: int,
    classes: int,
    real: float,
    quantile: float,
    temperature: float,
    score: ScoreName,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    features = torch.randn(rows, 6, 5).to(dtype)
    features[torch.rand(rows) < 0.1] = NAN
    weight, bias = torch.randn(classes, 6).to(dtype), torch.randn(classes).to(dtype)
    features, weight, bias = (tensor.to(device) for tensor in (features, weight, bias))
    count = round(real * rows)
    with ops.use_backend("reference"):
        scores = ops.exit_gate(features, weight, bias, threshold=0.0, score=score, temperature=temperature)[1]
        ascending = scores.nan_to_num(0).sort().values
        place = round(quantile * (rows - 1))
        threshold = float(ascending[place : place + 2].mean())  # between two rows, where rounding decides nothing
        exit_mask = ops.exit_gate(features, weight, bias, threshold=threshold, score=score, temperature=temperature)[2]
    on_the_edge = (scores - threshold).abs() < 1e-5
    if on_the_edge[:count].any():
        return
    at = padded_exit(device, rows, count, threshold, temperature)
    answers = Answers(*(value.to(device) for value in (torch.zeros(rows, classes).to(dtype), *torch.zeros(2, rows))))
    answers = answers._replace(exits=answers.exits.long())
    target = torch.zeros_like(features)
    padded_exit_step(
        features, weight, bias, at, [(features, target)], answers, layout="channels_first", pool="mean", score=score
    )
    flags = exit_mask[:count].tolist()
    stay, leave = ([row for row in range(count) if flags[row] is flag] for flag in (False, True))
    assert at.num_kept.item() == len(stay)
    assert torch.equal(target[: len(stay)].isnan(), features[stay].isnan())
    assert torch.equal(target[: len(stay)].nan_to_num(), features[stay].nan_to_num())
    home = at.positions[leave].long()
    torch.testing.assert_close(answers.scores[home], scores[leave], rtol=1e-3, atol=1e-4)
    assert answers.exits.count_nonzero().item() == len(leave)
    with ops.use_backend("reference"):
        logits = ops.exit_gate(features, weight, bias, threshold=0.0)[0]
    torch.testing.assert_close(answers.logits[home], logits[leave], rtol=2e-2, atol=2e-2)


def padded_exit(device: str, rows: int, count: int, threshold: float, temperature: float) -> PaddedExit:
    """Exit 1, to which rows came in any order."""
    return PaddedExit(
        torch.tensor([threshold, temperature], device=device),
        torch.tensor(1, device=device),
        int32(count, device),
        int32(-1, device),
        torch.randperm(rows).int().to(device),
        torch.zeros(2 + 2 * rows, dtype=torch.int64, device=device),
    )


@on_devices
@pytest.mark.parametrize("score", SCORE_NAMES)
def test_nothing_waits_for_the_device(device: str, score: ScoreName) -> None:
    features, weight = torch.randn(6, 4, 5, device=device), torch.randn(3, 4, device=device)
    mask = torch.rand(6, 5, device=device) < 0.5
    at = padded_exit(device, 6, 5, 0.5, 0.7)
    answers = Answers(
        torch.zeros(6, 3, device=device),
        torch.zeros(6, device=device),
        torch.zeros(6, dtype=torch.int64, device=device),
    )
    kept = [(features, torch.empty_like(features))]
    with ops.use_backend("reference"), NoWaiting():
        padded_exit_step(features, weight, None, at, kept, answers, layout="channels_first", pool="mean", score=score)
        logits = F.linear(pool_features(features, "channels_first", "mean", mask), weight)
        padded_step_of_logits(logits, at, kept, answers, score=score)
        padded_scores(logits, at.decision, at.num_real, score=score)


@pytest.mark.usefixtures("triton_backend")
@pytest.mark.parametrize("lazy", [lambda z: z.conj(), lambda z: z.conj().imag])
def test_the_fused_step_moves_no_bytes_of_what_is_conjugated_or_negated_lazily(lazy: Any) -> None:
    features, weight = torch.randn(6, 4, 5), torch.randn(3, 4)
    wave = lazy(torch.randn(6, 3, dtype=torch.complex64))
    target = torch.zeros(6, 3, dtype=wave.dtype)
    device = str(features.device)
    answers = Answers(torch.zeros(6, 3), torch.zeros(6), torch.zeros(6, dtype=torch.int64))
    at, options = padded_exit(device, 6, 6, 0.0, 1.0), {"layout": "channels_first", "pool": "mean", "score": "entropy"}
    with pytest.raises(ValueError, match="gather_and_scatter_rows: backend 'triton' cannot take"):  # asked for by name
        padded_exit_step(features, weight, None, at, [(wave, target)], answers, **options)
    with ops.use_backend(None), pytest.MonkeyPatch.context() as patch:
        patch.setattr("cet.ops.backend.why_no_triton", lambda device: None)
        with preferring_triton(features.device):
            padded_exit_step(features, weight, None, at, [(wave, target)], answers, **options)
    torch.testing.assert_close(target, wave.resolve_conj().resolve_neg())


LAYOUTS = {
    "vectors": lambda rows: torch.randn(rows, 12),
    "odd": lambda rows: torch.randn(rows, 7).half(),
    "bytes": lambda rows: torch.randint(0, 99, (rows, 5), dtype=torch.uint8),
    "flags": lambda rows: torch.rand(rows) < 0.5,
    "long": lambda rows: torch.randint(0, 9, (rows, 2, 3)),
    "wide": lambda rows: torch.randn(rows, 1100).bfloat16(),
    "channels_last": lambda rows: torch.randn(rows, 4, 3, 2).to(memory_format=torch.channels_last),
    "one_for_all": lambda rows: torch.randn(3).expand(rows, 3),
    "within": lambda rows: torch.randn(rows, 9)[:, 1:5],
    "empty": lambda rows: torch.randn(rows, 0),
}


def poisoned_like(source: Tensor, rows: int) -> Tensor:
    dense = torch.empty_like(source[:1].clone().expand(rows, *source.shape[1:]).clone(memory_format=_format(source)))
    return dense.fill_(77) if source.dtype is not torch.bool else dense.fill_(True)


def _format(source: Tensor) -> torch.memory_format:
    plain = source.ndim != 4
    return torch.contiguous_format if plain else torch.channels_last


@on_devices
@given(
    rows=st.integers(1, 70),
    batch=st.integers(0, 30),
    real=st.floats(0, 1),
    going_on=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_rows_move_where_they_belong_and_nothing_else_is_written(
    device: str, rows: int, batch: int, real: float, going_on: float, seed: int
) -> None:
    torch.manual_seed(seed)
    count = round(real * rows)
    num_kept = round(going_on * count)
    who = torch.randperm(count)
    order = torch.randint(0, rows, (2, rows))  # behind the rows that move is anything
    order[0, :num_kept], order[1, : count - num_kept] = who[:num_kept], who[num_kept:]
    capacity = rows + batch
    positions = torch.cat([torch.randperm(capacity)[:count], torch.randint(0, capacity, (rows - count,))])
    sources = [make(rows).to(device) for make in LAYOUTS.values()]
    stay = [(source, poisoned_like(source, capacity)) for source in sources]
    leave = [(source, poisoned_like(source, capacity)) for source in sources]
    expected_stay, expected_leave = ([target.clone() for _, target in pairs] for pairs in (stay, leave))
    before = [source.clone() for source in sources]
    for index, source in enumerate(sources):
        for j in range(count):
            if j < num_kept:
                expected_stay[index][j] = source[who[j]]
            else:
                expected_leave[index][positions[who[j]]] = source[who[j]]

    on_device = [tensor.int().to(device) for tensor in (order, positions, torch.tensor(num_kept), torch.tensor(count))]
    gather_and_scatter_rows(*on_device, stay, leave)

    for (_, target), expected in zip([*stay, *leave], [*expected_stay, *expected_leave], strict=True):
        assert torch.equal(target, expected)
    assert all(torch.equal(source, copy) for source, copy in zip(sources, before, strict=True))
