"""What tests of int8 in files with a method per stage share: answers, scores, thresholds of the file, bad input."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cet
from cet.ops.definitions import SCORES
from waves import samples, trained

WIDTH = 48


@cache
def wide_model() -> cet.EarlyExit:
    """The net, with weights enough to be most of its file."""
    model = trained(WIDTH)
    # A file computes its scores by these temperatures, and calibration by those that it fits.
    model.policy = cet.calibrate(model, [samples(1000, 1)], 0.05, temperature=False, guarantee=None).policy
    return model


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    x, y = samples(400, seed)
    return [*zip(x.split(150), y.split(150), strict=True)]


def check_int8(path: Path) -> cet.ExportReport:
    """The report, the answers at each exit, scores that are float32 by their definition, and thresholds of the file."""
    model, by = wide_model(), batches(1)
    report = cet.export(model, path, thresholds="input", quantize=by)
    assert report.num_bytes == path.stat().st_size
    assert report.num_bytes < 0.6 * 4 * sum(weight.numel() for weight in model.parameters())
    compared: Any = report.comparison
    assert (compared.rows, compared.labelled) == (400, 400)
    assert min(compared.same) > 0.97
    assert "final: the same class for" in str(report)
    y = torch.cat([labels for _, labels in by])
    wanted = torch.stack([logits.argmax(1) == y for logits, _ in model.exit_answers(samples(400, 1)[0])])
    assert [plain for plain, _ in compared.accuracy] == pytest.approx(wanted.double().mean(1).tolist())

    x, _ = samples(300, 2)
    answers = []
    for threads in (1, 2):
        loaded = cet.load_exported(path, threads=threads)
        answers.append(loaded.exit_answers(x))
        for (got, score), (expected, _) in zip(answers[-1], model.exit_answers(x), strict=True):
            spread = expected.std()
            assert 0.0005 * spread < (got - expected).abs().mean() < 0.05 * spread
            assert (got.argmax(1) == expected.argmax(1)).double().mean() > 0.97
            assert len(got[:, 0].unique()) > 280  # and not one of 256 values
            definition = SCORES[model.policy.score].definition(got.log_softmax(1))
            torch.testing.assert_close(score, definition, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(answers[0], answers[1])

    with pytest.raises(ValueError, match="costs"):
        cet.calibrate(loaded, batches(3))
    calibration = cet.calibrate(loaded, [samples(1000, 3)], 0.05, costs=report.costs, temperature=False, guarantee=None)
    loaded.thresholds = calibration.policy.thresholds
    x, y = samples(600, 4)
    got, (final, _) = loaded.predict(x), loaded.exit_answers(x)[-1]
    assert (got.exit_index < 2).double().mean() > 0.2
    assert (final.argmax(1) == y).double().mean() - (got.logits.argmax(1) == y).double().mean() <= 0.1
    return report


def check_one_row_with_baked_thresholds(path: Path) -> None:
    model = wide_model()
    report = cet.export(model, path, batch=1, quantize=batches(1)[:1])
    x, _ = samples(40, 5)
    loaded = cet.load_exported(path)
    got = [loaded.predict(row) for row in x.split(1)]
    expected = model.predict(x)
    assert (torch.cat([answer.exit_index for answer in got]) == expected.exit_index).double().mean() > 0.8
    same = torch.cat([answer.logits for answer in got]).argmax(1) == expected.logits.argmax(1)
    assert same.double().mean() > 0.9
    assert report.description.batch == 1


def check_refusals(folder: Path, suffix: str) -> None:
    """Each in one sentence, and nothing is written."""
    path, model = folder / f"net{suffix}", wide_model()
    rows, labels = samples(8, 6)
    for quantize, error, message in (
        ([], ValueError, "quantize yields no batches; give samples"),
        ([(rows[:0], labels[:0])], ValueError, "quantize yields no batches; give samples"),
        (3, TypeError, "loader is 3; give an iterable of batches"),
        ([(rows[:, 0], labels)], TypeError, r"x has shape \(8, 40\)"),
        ([(torch.rand(4, 3, 40), labels[:4])], cet.ExportError, "the model fails on a batch of quantize"),
        (
            [(rows * torch.nan, labels)],
            cet.ExportError,
            "the stage that ends in exit 'a' answers a batch of quantize with values that are not finite; leave such",
        ),
    ):
        with pytest.raises(error, match=message):
            cet.export(model, path, quantize=quantize)
    x = torch.rand(8, 4)
    policy = cet.ExitPolicy("entropy", (0.5,))
    double = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    last_layers_alone = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Linear(4, 3)).eval()
    for net, x, message in (
        (double, torch.rand(8, 4).double(), "the weights are not of float32, which quantize starts from; export model"),
        (last_layers_alone, torch.rand(8, 4), "so there is nothing to quantise; leave quantize out"),
    ):
        model = cet.EarlyExit(net, ["1"], (x,), policy=policy)
        with pytest.raises(cet.ExportError, match=message):
            cet.export(model, path, quantize=[(x, torch.zeros(8).long())])
    assert not list(folder.iterdir())


def check_a_failing_stage_is_named(folder: Path, suffix: str) -> None:
    """By a quantiser that fails on the second stage."""
    with pytest.raises(
        cet.ExportError, match=r"the stage that ends in exit 'b' cannot be quantised \(no such scale\); leave quantize"
    ):
        cet.export(wide_model(), folder / f"net{suffix}", batch=1, quantize=[samples(8, 7)])
    assert not list(folder.iterdir())


def check_int8_family(name: str, path: Path) -> None:
    """A net of another kind answers nearly as in float32, with an unlabelled loader."""
    from families import FAMILIES
    from oracle import policy_between_scores, spread_logits

    family = FAMILIES[name]
    torch.manual_seed(1)
    inputs = family.inputs(48)
    few = {key: value[:4] for key, value in inputs.items()}
    model = cet.EarlyExit(family.build().eval(), family.exits, few).eval()
    spread_logits(model, inputs)
    model.policy = policy_between_scores(model, inputs, "entropy", [0.5] * (model.num_exits - 1))
    unlabelled = [{**inputs, "labels": torch.full((48,), -100)}]
    report = cet.export(model, path, few, batch=1, thresholds="input", quantize=unlabelled)
    compared: Any = report.comparison
    assert (compared.labelled, compared.accuracy) == (0, ())
    assert min(compared.same) > 0.8
    loaded = cet.load_exported(path)
    parts = [loaded.exit_answers(**{key: value[at : at + 1] for key, value in inputs.items()}) for at in range(12)]
    for k, (expected, _) in enumerate(model.exit_answers(**{key: value[:12] for key, value in inputs.items()})):
        got = torch.cat([part[k][0] for part in parts])
        assert (got - expected).abs().mean() < 0.1 * expected.std()
