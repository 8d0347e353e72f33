"""Heads pool over what is real: a row's early logits do not depend on how far its batch was padded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cet
from graph_backends import run_by
from oracle import answers_of, policy_that_parts
from thinned import kept, slow

R = torch.randn
K = 5
WIDTH = 16
Inputs = dict[str, Tensor]


class Encoder(nn.Module):
    """A transformer encoder that knows its padding under one of the names in use."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True) for _ in range(3)
        )
        self.top = nn.Linear(WIDTH, K)

    def run(self, x: Tensor, is_padding: Tensor) -> Tensor:
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=is_padding)
        real = (~is_padding)[..., None].to(h.dtype)
        return self.top((h * real).sum(1) / real.sum(1))


class PaddingEncoder(Encoder):
    def forward(self, x: Tensor, padding_mask: Tensor) -> Tensor:
        return self.run(x, padding_mask)


class KeyPaddingEncoder(Encoder):
    def forward(self, x: Tensor, key_padding_mask: Tensor) -> Tensor:
        return self.run(x, key_padding_mask)


class SourceKeyPaddingEncoder(Encoder):
    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return self.run(x, src_key_padding_mask)


class AttentionEncoder(Encoder):
    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.run(x, attention_mask == 0)


class LengthsEncoder(Encoder):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.run(x, torch.arange(x.shape[1], device=x.device) >= lengths[:, None])


class ValidEncoder(Encoder):
    """Under a name of its own."""

    def forward(self, x: Tensor, valid_mask: Tensor) -> Tensor:
        return self.run(x, ~valid_mask)


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder`` as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.top = nn.Linear(WIDTH, K)

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        h = self.encoder(self.embed(x), src_key_padding_mask=src_key_padding_mask)
        real = (~src_key_padding_mask)[..., None].to(h.dtype)
        return self.top((h * real).sum(1) / real.sum(1))


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=K
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def wav2vec2() -> nn.Module:
    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        feat_extract_norm="layer",
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        num_labels=K,
    )
    model: nn.Module = transformers.Wav2Vec2ForSequenceClassification(config)
    return model


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    exits: list[str]
    lengths: list[int]
    make: Callable[[list[Tensor], int], Inputs]
    """Inputs from samples of many lengths, padded to a length."""
    sample: Callable[[int], Tensor]
    spec: cet.HeadSpec | None = None


def padded(samples: list[Tensor], length: int, *, garbage: bool = True) -> Tensor:
    """``(B, length, ...)``, with anything at all behind the end of a sample."""
    rows = []
    for sample in samples:
        shape = (length - len(sample), *sample.shape[1:])
        rows.append(torch.cat([sample, 100 * R(shape) if garbage else sample.new_zeros(shape)]))
    return torch.stack(rows)


def is_real(samples: list[Tensor], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor([len(sample) for sample in samples])[:, None]


def encoder(backbone: type[nn.Module], name: str, mask: Callable[[Tensor], Tensor], spec: Any = None) -> Case:
    return Case(
        lambda: backbone(),
        ["layers.0", "layers.1"] if issubclass(backbone, Encoder) else ["encoder.layers.0", "encoder.layers.1"],
        [4, 9, 12, 5, 7, 12, 3, 8],
        lambda samples, length: {"x": padded(samples, length), name: mask(is_real(samples, length))},
        lambda length: R(length, 3),
        spec,
    )


def words(samples: list[Tensor], length: int) -> Inputs:
    ids = [torch.cat([s, torch.randint(0, 60, (length - len(s),))]) for s in samples]
    return {"input_ids": torch.stack(ids), "attention_mask": is_real(samples, length).long()}


CASES = {
    "padding_mask": encoder(PaddingEncoder, "padding_mask", lambda real: ~real),
    "key_padding_mask": encoder(KeyPaddingEncoder, "key_padding_mask", lambda real: ~real),
    "src_key_padding_mask": encoder(SourceKeyPaddingEncoder, "src_key_padding_mask", lambda real: ~real),
    "nn.TransformerEncoder": encoder(TorchEncoder, "src_key_padding_mask", lambda real: ~real),
    "attention_mask of integers": encoder(AttentionEncoder, "attention_mask", lambda real: real.long()),
    "attention_mask of floats": encoder(AttentionEncoder, "attention_mask", lambda real: real.float()),
    "attention_mask of booleans": encoder(AttentionEncoder, "attention_mask", lambda real: real),
    "lengths": encoder(LengthsEncoder, "lengths", lambda real: real.sum(1)),
    "a name that is given": encoder(ValidEncoder, "valid_mask", lambda real: real, cet.HeadSpec(mask="valid_mask")),
    "BERT": Case(
        bert,
        ["bert.encoder.layer.0", "bert.encoder.layer.1"],
        [4, 9, 12, 5, 7, 12, 3, 8],
        words,
        lambda length: torch.randint(0, 60, (length,)),
    ),
    "wav2vec2": Case(
        wav2vec2,
        ["wav2vec2.encoder.layers.0", "wav2vec2.encoder.layers.1"],
        [200, 300, 400, 250, 330, 400, 220, 270],
        # Its convolutions see the padding, which the library's own processor fills with zeros.
        lambda samples, length: {
            "input_values": padded(samples, length, garbage=False),
            "attention_mask": is_real(samples, length).long(),
        },
        lambda length: R(length),
    ),
}


def build(case: Case, *, spec: cet.HeadSpec | None = None) -> tuple[cet.EarlyExit, list[Tensor]]:
    samples = [case.sample(length) for length in case.lengths]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        exits = dict.fromkeys(case.exits, spec or case.spec)
        backbone = case.build().eval()
        model = cet.EarlyExit(backbone, exits, case.make(samples[:4], max(case.lengths))).eval()
    with torch.no_grad():  # logits that differ between rows by more than rounding
        for head in model.heads:
            head.linear.weight.mul_(5)
    return model, samples


@torch.no_grad()
def logits_of_samples_alone(model: cet.EarlyExit, case: Case, samples: list[Tensor]) -> list[Tensor]:
    """Each sample in a batch of its own, without padding."""
    alone = [model.exit_logits(**case.make([sample], len(sample))) for sample in samples]
    return [torch.cat(rows) for rows in zip(*alone, strict=True)]


@pytest.mark.parametrize("name", kept(CASES, "padding_mask", "attention_mask of integers", "lengths", "BERT"))
def test_a_padded_row_gets_the_answers_that_it_gets_alone(name: str) -> None:
    """With thresholds that some rows pass, so that masks are compacted with the rows; and nothing is told of masks that
    are used."""
    case = CASES[name]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, samples = build(case)
    assert not [w for w in caught if issubclass(w.category, UserWarning) and "mask" in str(w.message)]
    expected = logits_of_samples_alone(model, case, samples)
    model.policy = policy_that_parts(expected)
    answers = answers_of(expected, model.policy)
    assert len(answers.exit_index.unique()) > 1
    longest = max(case.lengths)
    for length in (longest, longest + longest // 2):
        inputs = case.make(samples, length)
        with torch.no_grad():
            for k, (got, wanted) in enumerate(zip(model.exit_logits(**inputs), expected, strict=True)):
                torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3, msg=lambda m, k=k: f"exit {k}: {m}")
        answer = model.predict(**inputs)
        assert torch.equal(answer.exit_index, answers.exit_index)
        torch.testing.assert_close(answer.logits, answers.logits, rtol=1e-3, atol=1e-3)
        assert model.check(**inputs) is None


@pytest.mark.parametrize(
    ("name", "runner"),
    kept(
        [(name, runner) for name in ("padding_mask", "lengths", "BERT") for runner in ("graphs", "device")],
        ("lengths", "graphs"),
        ("BERT", "device"),
    ),
)
def test_the_graph_runners_carry_masks_too(name: str, runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model, samples = build(case)
    expected = logits_of_samples_alone(model, case, samples)
    run_by(model, runner, monkeypatch)
    model.policy = policy_that_parts(expected)
    answers = answers_of(expected, model.policy)
    for _ in range(2):
        got = model.predict(**case.make(samples, max(case.lengths)))
        assert torch.equal(got.exit_index, answers.exit_index)
        torch.testing.assert_close(got.logits, answers.logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", kept(["padding_mask", "lengths", "attention_mask of integers", "wav2vec2"], "padding_mask")
)
def test_training_sees_masks_too(name: str) -> None:
    case = CASES[name]
    model, samples = build(case)
    expected = logits_of_samples_alone(model, case, samples)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout) or hasattr(module, "layerdrop"):
            module.eval()
    model.backbone.eval()  # dropout aside
    logits = model(**case.make(samples, max(case.lengths)))
    torch.testing.assert_close(logits[0], expected[0], rtol=1e-3, atol=1e-3)
    logits[0].sum().backward()
    assert model.heads[0].linear.weight.grad.abs().sum() > 0


def test_pooling_the_first_position_needs_no_mask() -> None:
    case = CASES["padding_mask"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, samples = build(case, spec=cet.HeadSpec(pool="first"))
    expected = logits_of_samples_alone(model, case, samples)
    with torch.no_grad():
        got = model.exit_logits(**case.make(samples, max(case.lengths)))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", [slow({"norm": True}), slow({"hidden": 7}), {"norm": True, "hidden": 7}])
def test_heads_with_more_layers_pool_over_what_is_real(options: dict[str, Any]) -> None:
    case = CASES["attention_mask of integers"]
    model, samples = build(case, spec=cet.HeadSpec(**options))
    expected = logits_of_samples_alone(model, case, samples)
    with torch.no_grad():
        got = model.exit_logits(**case.make(samples, max(case.lengths)))
    torch.testing.assert_close(got[1], expected[1], rtol=1e-3, atol=1e-3)


class MaskedConvolutions(nn.Module):
    """Features ``(B, C, T)`` at half the input's rate."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(3, 8, 3, stride=2, padding=1)
        self.b = nn.Conv1d(8, 8, 3, padding=1)
        self.top = nn.Linear(8, K)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        real = attention_mask[:, None, ::2].to(h.dtype)
        h = torch.tanh(self.b(h * real)) * real
        return self.top(h.sum(2) / real.sum(2))


@pytest.mark.parametrize("length", [20, 24, 40])
def test_a_mask_is_resampled_to_the_length_of_the_features(length: int) -> None:
    samples = [R(n, 3) for n in (12, 20, 8, 16)]
    inputs = {
        "x": padded(samples, length, garbage=False).transpose(1, 2),
        "attention_mask": is_real(samples, length).long(),
    }
    model = cet.EarlyExit(MaskedConvolutions().eval(), ["a"], inputs).eval()
    with torch.no_grad():
        got = model.exit_logits(**inputs)[0]
        alone = [
            model.exit_logits(x=s.T[None], attention_mask=torch.ones(1, len(s), dtype=torch.int64))[0] for s in samples
        ]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_a_row_without_anything_real_touches_no_other() -> None:
    case = CASES["attention_mask of integers"]
    model, samples = build(case)
    inputs = case.make(samples, 12)
    before = model.predict(**inputs)
    inputs["attention_mask"][3] = 0
    model.policy = cet.ExitPolicy("confidence", (0.0, None))
    got = model.predict(**inputs)
    inputs["attention_mask"][3, 0] = 1
    wanted = model.predict(**inputs)
    others = [0, 1, 2, 4, 5, 6, 7]
    assert torch.equal(got.logits[others], wanted.logits[others])
    assert before.logits.isfinite().all()


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_an_input_that_looks_like_a_mask_and_is_not_used_is_named() -> None:
    case = CASES["a name that is given"]
    samples = [case.sample(length) for length in case.lengths]
    inputs = case.make(samples[:4], 12)
    with pytest.warns(UserWarning, match=r"valid_mask.*HeadSpec\(.*mask=") as caught:
        cet.EarlyExit(case.build().eval(), case.exits, inputs)
    told = [w for w in caught if "valid_mask" in str(w.message)]
    assert len(told) == 1, "once, not once per exit"
    assert told[0].filename == __file__
    assert all(path in str(told[0].message) for path in case.exits)


def test_a_mask_that_means_the_opposite_of_its_name_is_told() -> None:
    case = CASES["a name that is given"]
    inputs = case.make([case.sample(12) for _ in range(4)], 12)
    exits = dict.fromkeys(case.exits, cet.HeadSpec(mask="valid_mask"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cet.EarlyExit(case.build().eval(), exits, inputs)
    with pytest.warns(UserWarning, match=r"'valid_mask' of exit .* leaves nothing real"):
        cet.EarlyExit(case.build().eval(), exits, {**inputs, "valid_mask": torch.zeros_like(inputs["valid_mask"])})


def test_a_head_of_ones_own_that_never_sees_the_mask_is_named() -> None:
    case = CASES["padding_mask"]
    samples = [case.sample(length) for length in case.lengths]

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, K)

        def forward(self, feature: Tensor) -> Tensor:
            return self.linear(feature.mean(1))

    with pytest.warns(UserWarning, match=r"padding_mask.*layers\.0"):
        cet.EarlyExit(case.build().eval(), {"layers.0": Last(), "layers.1": None}, case.make(samples[:4], 12))


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ("nope", ValueError, r"nope.*padding_mask"),
        ("x", ValueError, r"'x'.*mask"),
        (3, (TypeError, ValueError), "mask"),
    ],
)
def test_a_mask_that_is_none_is_refused(mask: Any, error: Any, message: str) -> None:
    case = CASES["padding_mask"]
    samples = [case.sample(length) for length in case.lengths]

    def make() -> cet.EarlyExit:
        exits = dict.fromkeys(case.exits, cet.HeadSpec(mask=mask))
        return cet.EarlyExit(case.build().eval(), exits, case.make(samples[:4], 12))

    with pytest.raises(error, match=message) as refused:
        make()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["a name that is given", slow("padding_mask"), slow("lengths")])
def test_a_saved_model_keeps_its_masks(name: str, tmp_path: Any) -> None:
    case = CASES[name]
    model, samples = build(case)
    expected = logits_of_samples_alone(model, case, samples)
    model.policy = policy_that_parts(expected)
    model.save(tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = cet.load(tmp_path / "m", case.build())
    inputs = case.make(samples, max(case.lengths))
    got, wanted = loaded.predict(**inputs), model.predict(**inputs)
    assert torch.equal(got.exit_index, wanted.exit_index)
    assert torch.equal(got.logits, wanted.logits)
    if case.spec is not None:
        assert loaded.heads[0].spec.mask == case.spec.mask


class OneOfTwoMasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.top = nn.Linear(3, WIDTH), nn.Linear(WIDTH, K)

    def forward(self, x: Tensor, ok: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None:
            ok = torch.arange(x.shape[1]) < lengths[:, None]
        h, real = self.a(x), ok[..., None].float()
        return self.top((h * real).sum(1) / real.sum(1))


@pytest.mark.parametrize("given", ["ok", "lengths"])
def test_a_call_with_another_mask_than_the_example_is_told(given: str) -> None:
    lengths = torch.tensor([2, 5, 9, 4])
    masks = {"ok": torch.arange(9) < lengths[:, None], "lengths": lengths}
    x, (other,) = R(4, 9, 3), masks.keys() - {given}
    spec = cet.HeadSpec(mask=given)
    model = cet.EarlyExit(OneOfTwoMasks().eval(), {"a": spec}, {"x": x, given: masks[given]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.exit_logits(x=x, **{given: masks[given]})
    with pytest.warns(UserWarning, match=f"input '{other}' looks like a mask, but the heads of 'a' do not get it"):
        model.exit_logits(x=x, **{other: masks[other]})
