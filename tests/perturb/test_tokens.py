"""Perturbations of text: what is dropped, masked and noised, and what never is."""

from __future__ import annotations

import math
from collections import UserDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cet import perturb as P

PAD, CLS, SEP, MASK = 0, 1, 2, 3
SPECIAL = (PAD, CLS, SEP, MASK)
ROWS, LENGTH = 64, 24

EVERY = [
    P.TokenDropout(special_ids=SPECIAL),
    P.TokenMask(MASK, special_ids=SPECIAL),
    P.EmbeddingNoise(),
    P.text(mask_id=MASK, special_ids=SPECIAL),
]
every = pytest.mark.parametrize("perturb", EVERY, ids=lambda perturb: type(perturb).__name__)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sentences(rows: int = ROWS, length: int = LENGTH) -> dict[str, Any]:
    """As a tokenizer gives them: CLS, 1 to length - 2 words, SEP, padding; and the same as embeddings."""
    draw = seeded(rows + length)
    words = torch.randint(1, length - 1, (rows, 1), generator=draw)
    position = torch.arange(length).expand(rows, length)
    ids = torch.randint(len(SPECIAL), 100, (rows, length), generator=draw)
    ids[:, 0] = CLS
    ids = torch.where(position == words + 1, SEP, ids).masked_fill(position > words + 1, PAD)
    return {
        "input_ids": ids,
        "attention_mask": (position <= words + 1).long(),
        "special_tokens_mask": ((position == 0) | (position == words + 1) | (position > words + 1)).long(),
        "inputs_embeds": torch.randn(rows, length, 8, generator=draw),
        "name": "a constant",
    }


def words_of(x: dict[str, Any]) -> Tensor:
    return x["special_tokens_mask"] == 0


@every
@pytest.mark.parametrize("severity", [0.5, 1.0, 100.0])
def test_special_tokens_and_padding_are_never_touched(perturb: P.Perturbation, severity: float) -> None:
    x = sentences()
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in x.items()}
    y = perturb.with_severity(severity)(UserDict(x), generator=seeded())
    assert type(y) is dict
    assert y.keys() == x.keys()
    changed = False
    for key, value in before.items():
        if not isinstance(value, Tensor):
            assert y[key] == value
            continue
        assert torch.equal(x[key], value)  # the input is left alone
        assert (y[key].shape, y[key].dtype) == (value.shape, value.dtype)
        assert torch.equal(y[key][~words_of(x)], value[~words_of(x)])
        changed |= not torch.equal(y[key], value)
    assert changed


@every
def test_draws_are_seeded_and_differ_between_rows(perturb: P.Perturbation) -> None:
    x = sentences()
    y, same, other = (perturb(x, generator=seeded(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(y[key], same[key]) for key in y if key != "name")
    assert not all(torch.equal(y[key], other[key]) for key in y if key != "name")
    torch.manual_seed(3)
    unseeded = perturb(x)
    assert all(torch.equal(unseeded[key], perturb(x, generator=seeded(3))[key]) for key in x if key != "name")
    row = {key: value[:1].expand(32, *value.shape[1:]) for key, value in sentences(length=40).items() if key != "name"}
    assert any(len(perturb(row, generator=seeded())[key].unique(dim=0)) > 1 for key in row)


@every
def test_severity_zero_is_the_identity_in_new_storage(perturb: P.Perturbation) -> None:
    x = sentences()
    y = perturb.with_severity(0)(x, generator=seeded())
    tensors = [key for key in x if key != "name"]
    assert all(torch.equal(y[key], x[key]) for key in tensors)
    assert any(y[key].data_ptr() != x[key].data_ptr() for key in tensors)


@every
@pytest.mark.parametrize(("rows", "length"), [(0, 5), (1, 3), (3, 0)])
def test_smallest_batches(perturb: P.Perturbation, rows: int, length: int) -> None:
    x = {key: value[:rows, :length] for key, value in sentences(3, 5).items() if key != "name"}
    assert perturb(x, generator=seeded())["input_ids"].shape == (rows, length)


@every
def test_everything_happens_on_the_device_of_x_without_a_host_sync(perturb: P.Perturbation) -> None:
    """Fake tensors refuse mixed devices and values the host would wait for; x is off the default device."""
    with FakeTensorMode() as mode:
        x = {key: mode.from_tensor(value) for key, value in sentences().items() if key != "name"}
        with torch.device("cuda"):
            y = perturb(x)
    assert all(value.device.type == "cpu" for value in y.values())


def test_tokens_are_dropped_with_the_probability_by_their_attention_mask_alone() -> None:
    x = sentences(2000)
    y = P.TokenDropout(0.2, special_ids=SPECIAL).with_severity(1.5)(x, generator=seeded())
    assert torch.equal(y["input_ids"], x["input_ids"])
    long = words_of(x).sum(1) > 10
    dropped = (y["attention_mask"] == 0) & words_of(x)
    assert (dropped[long].sum() / words_of(x)[long].sum()).item() == pytest.approx(0.3, abs=0.01)


def test_one_word_is_always_left() -> None:
    x = sentences()
    y = P.TokenDropout(1.0, special_ids=SPECIAL)(x, generator=seeded())
    left = (y["attention_mask"] == 1) & words_of(x)
    assert torch.equal(left.sum(1), torch.ones(ROWS, dtype=torch.int64))
    nothing = {**x, "input_ids": torch.full_like(x["input_ids"], PAD)}
    assert torch.equal(P.TokenDropout(1.0, special_ids=SPECIAL)(nothing)["attention_mask"], x["attention_mask"])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32], ids=str)
def test_attention_masks_of_any_dtype(dtype: torch.dtype) -> None:
    x = sentences()
    expected = P.TokenDropout(special_ids=SPECIAL)(x, generator=seeded())["attention_mask"]
    x["attention_mask"] = x["attention_mask"].to(dtype)
    y = P.TokenDropout(special_ids=SPECIAL)(x, generator=seeded())["attention_mask"]
    assert y.dtype == dtype
    assert torch.equal(y.long(), expected)


def test_tokens_are_masked_with_the_probability() -> None:
    x = sentences(2000)
    y = P.TokenMask(MASK, 0.2, special_ids=SPECIAL).with_severity(2.0)(x, generator=seeded())
    masked = y["input_ids"] == MASK
    assert torch.equal(y["input_ids"][~masked], x["input_ids"][~masked])
    assert (masked.sum() / words_of(x).sum()).item() == pytest.approx(0.4, abs=0.01)


def test_without_an_attention_mask_the_special_ids_tell() -> None:
    x = sentences()
    whole = P.TokenMask(MASK, 1.0, special_ids=SPECIAL)(x)["input_ids"]
    assert torch.equal(P.TokenMask(MASK, 1.0, special_ids=SPECIAL)({"input_ids": x["input_ids"]})["input_ids"], whole)
    assert torch.equal(whole == MASK, words_of(x))


def test_the_special_tokens_mask_of_a_tokenizer_serves_too() -> None:
    x = sentences()
    x["special_tokens_mask"][:, 3] = 1
    y = P.TokenMask(MASK, 1.0, special_ids=())(x)["input_ids"]
    assert torch.equal(y == MASK, words_of(x) & (x["attention_mask"] == 1))


def test_embedding_noise_is_uniform_and_as_large_as_neftune_says() -> None:
    x = sentences(2000)
    noise = P.EmbeddingNoise(5.0).with_severity(2.0)(x, generator=seeded())["inputs_embeds"] - x["inputs_embeds"]
    bound = 10.0 / (x["attention_mask"].sum(1) * 8).sqrt()
    relative = (noise / bound[:, None, None])[words_of(x)]
    assert relative.abs().max() <= 1 + 1e-5
    assert relative.std().item() == pytest.approx(1 / math.sqrt(3), abs=0.01)
    assert relative.mean().item() == pytest.approx(0.0, abs=0.01)


@given(st.floats(0, 8), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
def test_embeddings_of_any_dtype_keep_it_and_stay_missing(severity: float, dtype: torch.dtype) -> None:
    x = sentences(8)
    x["inputs_embeds"] = x["inputs_embeds"].to(dtype)
    x["inputs_embeds"][::2, ::3, 0] = math.nan
    y = P.EmbeddingNoise().with_severity(severity)(x, generator=seeded())["inputs_embeds"]
    assert y.dtype == dtype
    assert torch.equal(y.isnan(), x["inputs_embeds"].isnan())


def test_embeddings_pass_gradients_unchanged() -> None:
    x = sentences(4)
    x["inputs_embeds"].requires_grad_()
    P.EmbeddingNoise()(x)["inputs_embeds"].sum().backward()
    assert torch.equal(x["inputs_embeds"].grad, torch.ones(4, LENGTH, 8))


def test_names_of_the_entries_can_be_given() -> None:
    x = sentences()
    renamed = {"tokens": x["input_ids"], "present": x["attention_mask"]}
    y = P.TokenMask(MASK, special_ids=SPECIAL, key="tokens", mask_key="present")(renamed, generator=seeded())
    assert torch.equal(y["tokens"], P.TokenMask(MASK, special_ids=SPECIAL)(x, generator=seeded())["input_ids"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: P.TokenDropout(1.5, special_ids=()), ValueError, "TokenDropout: probability is 1.5"),
        (lambda: P.TokenMask(-1, special_ids=()), ValueError, "TokenMask: mask_id is -1"),
        (lambda: P.TokenMask("[MASK]", special_ids=()), TypeError, "TokenMask: mask_id must be a plain Python integer"),
        (lambda: P.TokenMask(3, special_ids=7), TypeError, "TokenMask: special_ids is 7; pass the ids of the special"),
        (lambda: P.TokenMask(3, special_ids=("a",)), TypeError, r"special_ids is \('a',\); pass the ids"),
        (lambda: P.TokenDropout(), TypeError, "special_ids"),
        (lambda: P.EmbeddingNoise(-1.0), ValueError, "EmbeddingNoise: alpha is -1.0"),
        (lambda: P.TokenMask(3, special_ids=(), severity=-1.0), ValueError, "TokenMask: severity is -1.0"),
    ],
)
def test_bad_arguments_are_refused_at_construction(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


DROP, HIDE = P.TokenDropout(special_ids=SPECIAL), P.TokenMask(MASK, special_ids=SPECIAL)


@pytest.mark.parametrize(
    ("perturb", "x", "error", "message"),
    [
        (
            HIDE,
            torch.ones(2, 3).long(),
            TypeError,
            "TokenMask: x must be a mapping, got Tensor; give the model's inputs",
        ),
        (HIDE, {"tokens": 1}, ValueError, r"TokenMask: x has no entry 'input_ids'; name one of \['tokens'\] by key="),
        (HIDE, {"input_ids": [1, 2]}, TypeError, "TokenMask: input_ids must be a tensor, got list"),
        (
            HIDE,
            {"input_ids": torch.ones(2, 3)},
            TypeError,
            "TokenMask: input_ids must hold integers, got torch.float32",
        ),
        (
            HIDE,
            {"input_ids": torch.ones(2, 3, 4).long()},
            ValueError,
            r"input_ids must be \(B, T\), got shape \(2, 3, 4\)",
        ),
        (DROP, {"input_ids": torch.ones(2, 3).long()}, ValueError, "TokenDropout: x has no entry 'attention_mask'"),
        (
            DROP,
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 1, 3, 3)},
            ValueError,
            r"attention_mask must have the shape \(2, 3\) of the tokens, got \(2, 1, 3, 3\)",
        ),
        (
            P.EmbeddingNoise(),
            {"inputs_embeds": torch.ones(2, 3)},
            ValueError,
            r"must be \(B, T, C\), got shape \(2, 3\)",
        ),
        (P.EmbeddingNoise(), {"inputs_embeds": torch.ones(2, 3, 4).long()}, TypeError, "must be floating point"),
    ],
)
def test_bad_input_is_refused_at_the_call(perturb: Any, x: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        perturb(x)
