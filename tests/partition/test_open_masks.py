"""Attention masks that let every key through are left out of the stages; all others stay."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.nn import functional as F

import cet
from cet.partition.masks import drop_open_masks

LENGTH, OTHER_LENGTH = 6, 9
LEAST = torch.finfo(torch.float32).min
SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    """With the mask that a test makes from x, (rows, heads, length, width), and from an integer for each position."""

    def __init__(self, mask: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        mask = self.mask(x, tokens)
        mask = mask if mask.ndim > 1 else mask[None]
        return F.scaled_dot_product_attention(x.sin(), x, x, attn_mask=mask)


def inputs(length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 2, length, 4), torch.randint(0, 2, (3, length))


def mask_of(net: nn.Module) -> fx.Node | None:
    """The mask that is left after the pass, which gives the right answers at a length that was not traced."""
    example = inputs(LENGTH)
    shapes = ({0: Dim.AUTO, 2: Dim.AUTO}, {0: Dim.AUTO, 1: Dim.AUTO})
    program = torch.export.export(net.eval(), example, dynamic_shapes=shapes, strict=False)
    drop_open_masks(program.graph)
    program.graph.lint()
    program.graph_module.recompile()
    for length in (LENGTH, OTHER_LENGTH):
        x, tokens = inputs(length)
        torch.testing.assert_close(program.module()(x, tokens), net(x, tokens), equal_nan=True)
    (attention,) = (node for node in program.graph.nodes if node.target is SDPA)
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    assert mask is None or isinstance(mask, fx.Node)
    return mask


def positions(x: Tensor, start: int = 0, step: int = 1) -> Tensor:
    return torch.arange(start, start + step * x.shape[2], step)


def as_transformers_does(x: Tensor, _: Tensor) -> Tensor:
    index = (torch.arange(x.shape[2]) + 0)[None, None, :, None]
    is_let_through = index.new_ones((), dtype=torch.bool) & (index >= 0).to(torch.bool)
    return is_let_through.expand(x.shape[0], -1, x.shape[2], x.shape[2])


def trues(x: Tensor) -> Tensor:
    return torch.ones(x.shape[2], dtype=torch.bool)


def allowed(t: Tensor) -> Tensor:
    """Anything, as far as the graph can tell."""
    return t[:, None, None] > 0


OPEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "as transformers does": as_transformers_does,
    "ge": lambda x, t: positions(x, 1) >= 1,
    "gt": lambda x, t: positions(x, 1) > 0,
    "ne": lambda x, t: positions(x) != -1,
    "le": lambda x, t: torch.le(torch.full((1,), 2), positions(x, 2)),
    "lt": lambda x, t: torch.lt(torch.full((1,), 2), positions(x, 3)),
    "eq": lambda x, t: torch.full((x.shape[2],), 2) == 2,
    "from above": lambda x, t: (torch.arange(6) <= 5)[:1].expand(x.shape[2]),
    "subtracted from": lambda x, t: (5 - torch.arange(6) >= 0)[:1].expand(x.shape[2]),
    "negative": lambda x, t: positions(x, -3) >= -3,
    "steps": lambda x, t: positions(x, 0, 2) >= 0,
    "plus": lambda x, t: positions(x) + 3 > 2,
    "minus": lambda x, t: positions(x) - 1 >= -1,
    "times": lambda x, t: (torch.arange(1, 3) * 3 >= 3)[:1].expand(x.shape[2]),
    "two ranges": lambda x, t: positions(x)[:, None] + torch.arange(4)[:1] >= 0,
    "views": lambda x, t: (
        positions(x).view(1, -1, 1).permute(2, 0, 1).transpose(0, 1).reshape(-1, 1).squeeze(1)[None].flatten()[0:] >= 0
    ),
    "as int64": lambda x, t: positions(x).to(torch.int64).clone() >= 0,
    "ones": lambda x, t: trues(x),
    "new_ones": lambda x, t: t.new_ones((x.shape[2],), dtype=torch.bool),
    "ones_like": lambda x, t: torch.ones_like(t[:, None, None], dtype=torch.bool),
    "full": lambda x, t: torch.full((x.shape[2],), True),
    "full_like": lambda x, t: torch.full_like(t[:, None, None], 1, dtype=torch.bool),
    "ones as bool": lambda x, t: torch.ones(x.shape[2]).bool(),
    "not zeros": lambda x, t: ~torch.zeros(x.shape[2], dtype=torch.bool),
    "logical_not": lambda x, t: torch.logical_not(torch.zeros(x.shape[2], dtype=torch.bool)),
    "and": lambda x, t: trues(x) & (positions(x) >= 0),
    "logical_and": lambda x, t: torch.logical_and(trues(x), trues(x)[None]),
    "or": lambda x, t: allowed(t) | trues(x),
    "logical_or": lambda x, t: torch.logical_or(trues(x), allowed(t)),
    "where": lambda x, t: torch.where(trues(x), trues(x), allowed(t)),
    "masked_fill": lambda x, t: allowed(t).masked_fill(trues(x), True),
    "zeros": lambda x, t: torch.zeros(x.shape[2]),
    "new_zeros": lambda x, t: x.new_zeros((1, x.shape[2])),
    "full of zero": lambda x, t: torch.full((x.shape[2],), 0.0),
    "where zero": lambda x, t: torch.where(trues(x), 0.0, x.sum(3, keepdim=True)),
    "one minus ones": lambda x, t: (1.0 - torch.ones(x.shape[2])) * LEAST,
    "nothing filled": lambda x, t: torch.zeros(x.shape[2]).masked_fill(~trues(x), -math.inf),
}


@pytest.mark.parametrize("rule", OPEN)
def test_a_mask_that_is_open_for_any_size_and_input_is_left_out(rule: str) -> None:
    assert mask_of(Attention(OPEN[rule])) is None


def written_by_index(x: Tensor, t: Tensor) -> Tensor:
    mask = torch.ones(x.shape[2], dtype=torch.bool)
    mask[1:3] = False
    return mask


def written_by_a_part(x: Tensor, t: Tensor) -> Tensor:
    mask = torch.ones(x.shape[2], dtype=torch.bool)
    mask.split([2, x.shape[2] - 2])[0].fill_(False)
    return mask


def written_at_its_base(x: Tensor, t: Tensor) -> Tensor:
    base = torch.ones(x.shape[2], dtype=torch.bool)
    mask = base[None].expand(x.shape[2], -1)
    base[2] = False
    return mask


def filled_in_place(x: Tensor, t: Tensor) -> Tensor:
    return torch.zeros(t.shape)[:, None, None].masked_fill_(~allowed(t), -math.inf)


def range_written(x: Tensor, t: Tensor) -> Tensor:
    index = positions(x)
    index.sub_(2)
    return index >= 0


def changed_after_it_was_anded(x: Tensor, t: Tensor) -> Tensor:
    mask = t[:, None, None] > 0
    both = mask & trues(x)
    mask.fill_(True)
    return both


KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ge": lambda x, t: positions(x, -1) >= 0,
    "gt": lambda x, t: positions(x) > 0,
    "ne": lambda x, t: positions(x) != 3,
    "le": lambda x, t: positions(x) <= LENGTH - 1,
    "lt": lambda x, t: torch.lt(torch.full((1,), 2), positions(x, 2)),
    "eq": lambda x, t: torch.full((x.shape[2],), 2) == positions(x),
    "from above": lambda x, t: (torch.arange(6) <= 4)[4:].repeat(x.shape[2])[: x.shape[2]],
    "plus": lambda x, t: positions(x) + 3 > 3,
    "minus": lambda x, t: positions(x) - 1 >= 0,
    "backwards": lambda x, t: torch.arange(2, 2 - x.shape[2], -1) >= 0,
    "wraps around": lambda x, t: (positions(x) + 125).to(torch.int8) >= 0,
    "wraps around later": lambda x, t: positions(x).to(torch.int8) * 60 >= 0,
    "rounds up": lambda x, t: torch.full((x.shape[2],), 127).to(torch.float8_e4m3fn).float() <= 127,
    "unsigned": lambda x, t: torch.zeros(x.shape[2], dtype=torch.uint8) - positions(x).to(torch.uint8) < 1,
    "too large": lambda x, t: (positions(x) + 2**62) * 2 >= 0,
    "a size as bound": lambda x, t: torch.arange(x.shape[2]) >= x.shape[2] - 4,
    "causal": lambda x, t: positions(x)[None] <= positions(x)[:, None],
    "sliding window": lambda x, t: (positions(x)[None] - positions(x)[:, None]).abs() <= 2,
    "padding": lambda x, t: allowed(t),
    "open and padding": lambda x, t: trues(x) & allowed(t),
    "closed or padding": lambda x, t: ~trues(x) | allowed(t),
    "where unknown": lambda x, t: torch.where(allowed(t), trues(x), ~trues(x)),
    "masked_fill": lambda x, t: trues(x).masked_fill(allowed(t), False),
    "half": lambda x, t: torch.full((x.shape[2],), 0.5) * positions(x),
    "ones to add": lambda x, t: torch.ones(x.shape[2]),
    "written by index": written_by_index,
    "written by a part": written_by_a_part,
    "written at its base": written_at_its_base,
    "filled in place": filled_in_place,
    "range written": range_written,
    "changed after it was anded": changed_after_it_was_anded,
}


@pytest.mark.parametrize("rule", KEPT)
def test_a_mask_that_may_hide_a_key_stays(rule: str) -> None:
    assert mask_of(Attention(KEPT[rule])) is not None


def test_a_buffer_may_change() -> None:
    net = Attention(lambda x, t: net.allowed[: x.shape[2]])
    net.register_buffer("allowed", torch.ones(16, dtype=torch.bool))
    assert mask_of(net) is not None


def test_true_beside_another_mask_is_left_out() -> None:
    same = mask_of(Attention(lambda x, t: torch.ones_like(t, dtype=torch.bool)[:, None, None] & allowed(t)))
    smaller = mask_of(Attention(lambda x, t: trues(x)[:, None] & allowed(t)))
    assert same is not None
    assert same.target is torch.ops.aten.gt.Scalar
    assert smaller is not None
    assert smaller.target is torch.ops.aten.__and__.Tensor


def test_a_view_of_two_masks_keeps_their_memory_as_it_was() -> None:
    def mask(x: Tensor, t: Tensor) -> Tensor:
        both = torch.ones_like(t, dtype=torch.bool)[:, None, None] & (t[:, :1] > 0)[:, None, None].expand(
            -1, -1, -1, x.shape[2]
        )
        return both.view(-1).view(x.shape[0], 1, 1, x.shape[2])

    assert mask_of(Attention(mask)) is not None


K = 5
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_labels": K,
}
TOKENS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture
def transformers() -> Iterator[Any]:
    module = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield module


def text(length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 60, (4, length))}


def padded_text(length: int) -> dict[str, Tensor]:
    return {**text(length), "attention_mask": (torch.arange(length) < torch.tensor([[3], [9], [5], [1]])).long()}


def attention_calls(model: cet.EarlyExit, inputs: dict[str, Tensor]) -> list[str]:
    stages = model.stages_for(**inputs).stages
    return [line for stage in stages for line in str(stage.source).splitlines() if "SCALED_DOT_PRODUCT" in line]


def assert_answers_of_the_backbone(model: cet.EarlyExit, inputs: dict[str, Tensor]) -> None:
    model.policy = cet.ExitPolicy(thresholds=[None] * (model.num_exits - 1))
    with torch.no_grad():
        torch.testing.assert_close(
            model.predict(**inputs).logits, model.backbone(**inputs).logits, rtol=1e-4, atol=1e-5
        )


def test_a_vit_runs_without_a_mask(transformers: Any) -> None:
    config = transformers.ViTConfig(image_size=32, patch_size=8, **SIZES)
    images = {"pixel_values": torch.randn(4, 3, 32, 32)}
    net = transformers.ViTForImageClassification(config)
    model = cet.EarlyExit(net, ["vit.layers.0", "vit.layers.1"], images).eval()
    calls = attention_calls(model, images)
    assert len(calls) == 3
    assert all(", None, scale=" in call for call in calls)
    assert [len(stage.row_dims) for stage in model.stages_for(**images).stages] == [1, 1, 0]
    assert_answers_of_the_backbone(model, images)


def test_a_bert_without_padding_runs_without_a_mask_at_any_length(transformers: Any) -> None:
    net = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, **TOKENS))
    model = cet.EarlyExit(net, ["bert.encoder.layer.0", "bert.encoder.layer.1"], text(12)).eval()
    calls = attention_calls(model, text(12))
    assert len(calls) == 3
    assert all(", None, scale=" in call for call in calls)
    for length in (12, 1, 5, 20):
        assert_answers_of_the_backbone(model, text(length))


MASKED: dict[str, tuple[str, str, dict[str, Any], str, Callable[[int], dict[str, Tensor]]]] = {
    "padding": ("BertForSequenceClassification", "BertConfig", {}, "bert.encoder.layer.0", padded_text),
    "causal": (
        "MistralForSequenceClassification",
        "MistralConfig",
        {"num_key_value_heads": 1, "head_dim": 12, "sliding_window": None},
        "model.layers.0",
        text,
    ),
    "causal sliding window": (
        "MistralForSequenceClassification",
        "MistralConfig",
        {"num_key_value_heads": 1, "head_dim": 12, "sliding_window": 4},
        "model.layers.0",
        text,
    ),
    "sliding window": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {"local_attention": 4, "layer_types": ["sliding_attention"] * 3, "cls_token_id": 1, "sep_token_id": 2},
        "model.layers.0",
        text,
    ),
}


@pytest.mark.parametrize("kind", MASKED)
def test_a_mask_that_hides_something_is_kept_and_right_at_any_length(transformers: Any, kind: str) -> None:
    classifier, config, options, path, inputs = MASKED[kind]
    net = getattr(transformers, classifier)(getattr(transformers, config)(**SIZES, **TOKENS, **options))
    model = cet.EarlyExit(net, [path], inputs(12)).eval()
    calls = attention_calls(model, inputs(12))
    assert len(calls) == 3
    assert not any(", None, " in call for call in calls)
    for length in (12, 7, 20):
        assert_answers_of_the_backbone(model, inputs(length))
