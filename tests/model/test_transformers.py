"""Models of transformers: exits found by themselves, `labels=`, and the dicts that collators and trainers give."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import cet
from oracle import answers_of, policy_that_parts
from thinned import kept, sampled

transformers = pytest.importorskip("transformers")

K = 5
ROWS = 8
SIZES = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": K}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def bert(layers: int = 6) -> nn.Module:
    config = transformers.BertConfig(vocab_size=60, num_hidden_layers=layers, **SIZES)
    model: nn.Module = transformers.BertForSequenceClassification(config).eval()
    return model


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(vocab_size=60, dim=24, n_layers=4, n_heads=2, hidden_dim=32, num_labels=K)
    model: nn.Module = transformers.DistilBertForSequenceClassification(config).eval()
    return model


def vit() -> nn.Module:
    config = transformers.ViTConfig(image_size=32, patch_size=8, num_hidden_layers=4, **SIZES)
    model: nn.Module = transformers.ViTForImageClassification(config).eval()
    return model


def wav2vec2() -> nn.Module:
    config = transformers.Wav2Vec2Config(
        num_hidden_layers=4,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        feat_extract_norm="layer",
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
        **SIZES,
    )
    model: nn.Module = transformers.Wav2Vec2ForSequenceClassification(config).eval()
    return model


def gpt2() -> nn.Module:
    """Returns a cache of keys and values beside its logits."""
    sizes = {"n_embd": 24, "n_head": 2, "n_layer": 4, "num_labels": K, "n_positions": 16}
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    model: nn.Module = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(vocab_size=60, **sizes, **special)
    ).eval()
    return model


def text(rows: int = ROWS) -> dict[str, Tensor]:
    mask = (torch.arange(12) < torch.randint(3, 13, (rows, 1))).long()
    return {"input_ids": torch.randint(0, 60, (rows, 12)), "attention_mask": mask}


def images(rows: int = ROWS) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 32, 32)}


def audio(rows: int = ROWS) -> dict[str, Tensor]:
    return {"input_values": torch.randn(rows, 400), "attention_mask": torch.ones(rows, 400, dtype=torch.int64)}


FOUND: dict[str, tuple[Callable[[], nn.Module], Callable[[int], dict[str, Tensor]], tuple[str, ...]]] = {
    "bert": (bert, text, ("bert.encoder.layer.1", "bert.encoder.layer.3")),
    "distilbert": (distilbert, text, ("distilbert.transformer.layer.1",)),
    "gpt2": (gpt2, text, ("transformer.h.1",)),
    "vit": (vit, images, ("vit.layers.1",)),
    "wav2vec2": (wav2vec2, audio, ("wav2vec2.encoder.layers.1",)),
}


def assert_right(model: cet.EarlyExit, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected = list(model.exit_logits(**inputs))
        torch.testing.assert_close(expected[-1], model.backbone(**inputs).logits, rtol=1e-4, atol=1e-4)
    model.policy = policy_that_parts(expected)
    answers = answers_of(expected, model.policy)
    got = model.predict(**inputs)
    assert torch.equal(got.exit_index, answers.exit_index)
    torch.testing.assert_close(got.logits, answers.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "given"),
    kept(
        [(name, given) for name in FOUND for given in (False, True)], ("bert", False), ("gpt2", False), ("vit", False)
    ),
)
def test_exits_are_found_behind_every_second_layer_but_the_last(name: str, given: bool) -> None:
    build, inputs, exits = FOUND[name]
    model = cet.EarlyExit.from_transformers(build(), every=2, example_inputs=inputs(4) if given else None)
    assert isinstance(model, cet.EarlyExit)
    assert model.exit_names == (*exits, "final")
    assert model.num_classes == K
    assert not model.training
    assert_right(model, inputs(ROWS))


@pytest.mark.parametrize("name", kept(FOUND, "gpt2"))
def test_stages_answer_also_once_hidden_states_were_asked_for(name: str) -> None:
    """transformers leaves hooks behind that collect them."""
    build, inputs, _ = FOUND[name]
    given = inputs(ROWS)
    model = cet.EarlyExit.from_transformers(build(), every=2, example_inputs=inputs(4))
    model.predict(**given)
    hidden = model.backbone(**given, output_hidden_states=True).hidden_states
    assert len(hidden) > 2
    assert_right(model, given)
    assert model.explain(**given).reason is None


@pytest.mark.parametrize(
    ("every", "exits"), sampled([(2, [1, 3]), (1, [0, 1, 2, 3, 4]), (4, [3]), (3, [2]), (5, [4])], 2)
)
def test_every_counts_layers(every: int, exits: list[int]) -> None:
    model = cet.EarlyExit.from_transformers(bert(), every=every)
    assert model.exit_names == (*(f"bert.encoder.layer.{index}" for index in exits), "final")


@pytest.mark.parametrize("every", [0, -1, 6, 100, 1.5, "2"])
def test_an_every_that_leaves_no_exit_is_refused(every: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="every") as refused:
        cet.EarlyExit.from_transformers(bert(), every=every)
    assert "\n" not in str(refused.value)


def test_a_model_without_layers_or_without_classes_is_refused() -> None:
    with pytest.raises((ValueError, TypeError), match=r"(?i)layer|transformers") as refused:
        cet.EarlyExit.from_transformers(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5)))
    assert "\n" not in str(refused.value)
    config = transformers.BertConfig(vocab_size=60, num_hidden_layers=4, **SIZES)
    with pytest.raises((ValueError, TypeError), match="logits"):
        cet.EarlyExit.from_transformers(transformers.BertModel(config).eval())


# ---- labels ---------------------------------------------------------------------------------------------------------


def test_labels_in_train_mode_give_loss_and_logits() -> None:
    model = cet.EarlyExit.from_transformers(bert(), every=2).train()
    model.backbone.eval()  # without dropout, so that the value is known
    inputs, y = text(), torch.randint(K, (ROWS,))
    out = model(**inputs, labels=y)
    expected = torch.stack([F.cross_entropy(logits, y) for logits in model.exit_logits(**inputs)]).mean()
    torch.testing.assert_close(out.loss, expected)
    assert out[0] is out.loss
    assert out["loss"] is out.loss
    assert out.logits.shape == (ROWS, K)
    assert out[1] is out["logits"]
    torch.testing.assert_close(out.logits, model.exit_logits(**inputs)[-1])
    out.loss.backward()
    assert all(head.linear.weight.grad is not None for head in model.heads)
    assert model.backbone.classifier.weight.grad.abs().sum() > 0


def test_labels_in_eval_mode_give_the_answers_and_a_loss() -> None:
    model = cet.EarlyExit.from_transformers(bert(), every=2).eval()
    inputs, y = text(), torch.randint(K, (ROWS,))
    with torch.no_grad():
        model.policy = policy_that_parts(list(model.exit_logits(**inputs)))
        out = model(**inputs, labels=y)
    assert torch.equal(out.logits, model.predict(**inputs).logits)
    torch.testing.assert_close(out["loss"], F.cross_entropy(out.logits, y))
    assert isinstance(model(**inputs), Tensor), "without labels nothing has changed"


def test_labels_also_for_a_backbone_that_knows_none() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.top = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(torch.tanh(self.b(torch.tanh(self.a(x)))))

    model = cet.EarlyExit(Plain().train(), ["a", "b"], (torch.randn(4, 6),)).train()
    y = torch.randint(K, (ROWS,))
    out = model(x=torch.randn(ROWS, 6), labels=y)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_ignored_labels_add_no_loss() -> None:
    model = cet.EarlyExit.from_transformers(bert(), every=2).train()
    model.backbone.eval()
    inputs, y = text(), torch.randint(K, (ROWS,))
    y[2:] = -100
    some = model(**{name: value[:2] for name, value in inputs.items()}, labels=y[:2]).loss
    torch.testing.assert_close(model(**inputs, labels=y).loss, some, rtol=1e-4, atol=1e-5)


# ---- keys -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_keys_that_the_backbone_does_not_take_are_let_go(training: bool) -> None:
    model = cet.EarlyExit.from_transformers(distilbert(), every=2, example_inputs=text(4)).train(training)
    model.backbone.eval()
    inputs = text()
    surplus = {"token_type_ids": torch.zeros(ROWS, 12, dtype=torch.int64), "idx": torch.arange(ROWS)}
    got, expected = model(**inputs, **surplus), model(**inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_optional_keys_may_be_missing_or_new() -> None:
    types = torch.randint(2, (ROWS, 12))
    inputs = text()
    with_types = {**inputs, "token_type_ids": types}
    model = cet.EarlyExit(bert(4), ["bert.encoder.layer.1"], {k: v[:4] for k, v in with_types.items()}).eval()
    for given in (with_types, inputs, {"input_ids": inputs["input_ids"]}, with_types):
        model.policy = cet.ExitPolicy.closed(2)
        with torch.no_grad():
            expected = model.backbone(**given).logits
        torch.testing.assert_close(model.predict(**given).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "length"), [(ROWS, 12), (10, 16), (1, 5)])
@pytest.mark.parametrize("new", ["token_type_ids", "inputs_embeds"])
def test_the_first_call_may_have_a_key_and_sizes_that_the_example_had_not(new: str, rows: int, length: int) -> None:
    model = cet.EarlyExit.from_transformers(bert(4))  # whose example is made up, without either
    mask = torch.ones(rows, length, dtype=torch.long)
    given: dict[str, Tensor] = {"attention_mask": mask}
    if new == "token_type_ids":
        given |= {"input_ids": torch.randint(2, 40, (rows, length)), "token_type_ids": torch.randint(2, (rows, length))}
    else:
        given["inputs_embeds"] = torch.randn(rows, length, model.backbone.config.hidden_size)
    for wrapped in (model, copy.deepcopy(model)):
        with torch.no_grad():
            expected = wrapped.backbone(**given).logits
        with torch.inference_mode():
            torch.testing.assert_close(wrapped.predict(**given).logits, expected, rtol=1e-4, atol=1e-4)
        answer = wrapped(**given)  # whose gradients the example of the call before must not be in the way of
        answer.sum().backward()
        torch.testing.assert_close(answer, expected, rtol=1e-4, atol=1e-4)


def test_a_key_that_is_needed_is_named_where_it_is_missing() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.top = nn.Linear(6, 8), nn.Linear(8, K)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.top(torch.tanh(self.a(x)) + context)

    model = cet.EarlyExit(Two().eval(), ["a"], {"x": torch.randn(4, 6), "context": torch.randn(4, 8)}).eval()
    with pytest.raises(TypeError, match="context"):
        model(x=torch.randn(ROWS, 6))
    with pytest.raises(TypeError, match="context"):
        model(x=torch.randn(ROWS, 6), contxt=torch.randn(ROWS, 8))


def test_the_signature_of_forward_names_the_backbones_inputs_and_labels() -> None:
    """Trainers keep of a batch what the signature names."""
    model = cet.EarlyExit.from_transformers(bert(4), every=2)
    names = set(inspect.signature(model.forward).parameters)
    assert {"input_ids", "attention_mask", "labels"} <= names


class Samples(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self, rows: int) -> None:
        self.batch = {**text(rows), "labels": torch.randint(K, (rows,)), "idx": torch.arange(rows)}

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[index] for name, value in self.batch.items()}


@pytest.mark.slow  # of test_hf_trainer.py on a model that found its exits by itself
def test_a_trainer_of_transformers_trains_evaluates_and_stores(tmp_path: Any) -> None:
    pytest.importorskip("accelerate")
    model = cet.EarlyExit.from_transformers(bert(4), every=2)
    model.policy = cet.ExitPolicy("confidence", (0.3,))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, learning_rate=0.05,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Samples(8), eval_dataset=Samples(8))
    trainer.train()
    for name in ("heads.0.linear.weight", "backbone.classifier.weight"):
        assert not torch.equal(before[name], dict(model.named_parameters())[name])
    predictions = trainer.predict(Samples(6)).predictions
    assert predictions.shape == (6, K)
    assert torch.isfinite(torch.tensor(trainer.evaluate()["eval_loss"]))
    trainer.save_model(str(tmp_path / "saved"))
    other = cet.EarlyExit.from_transformers(bert(4), every=2)
    file = next((tmp_path / "saved").glob("*.safetensors"))
    from safetensors.torch import load_file

    other.load_state_dict(load_file(file))
    assert other.policy == model.policy


def test_a_collators_dict_goes_through_loss_and_calibration() -> None:
    model = cet.EarlyExit.from_transformers(bert(4), every=2, example_inputs=text(4))
    batches = [({**text(32)}, torch.randint(K, (32,))) for _ in range(2)]
    cet.calibrate(model, batches, 0.2)
    loss, _ = cet.ConsistentExitLoss(None, consistency_weight=0)(model.train(), *batches[0])
    loss.backward()
    assert model.heads[0].linear.weight.grad.abs().sum() > 0
    encoding = transformers.BatchEncoding({**batches[0][0]})
    cet.calibrate(model.eval(), [(encoding, batches[0][1])], 0.2)
