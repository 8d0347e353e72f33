"""Stages as modules of their own, run by the loop without any runtime, and their scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

import cet
from cet.deploy.export import describe
from cet.deploy.host_loop import Method, MethodsModel
from cet.deploy.loaded import Array
from cet.deploy.manifest import Manifest
from cet.deploy.segments import export_segments
from cet.deploy.stage_modules import StageModule, _score, stage_modules, whole_module
from cet.ops.definitions import SCORE_NAMES, ScoreName
from cet.ops.exit_gate.definition import log_probabilities, score_definition
from families import FAMILIES
from oracle import policy_between_scores

MOST_ROWS = 5


@pytest.mark.parametrize("name", ["skip", "late-fusion"])
def test_the_loop_over_modules_answers_as_the_model_does_in_parts(name: str) -> None:
    """Skips, inputs that are used late; batches of more rows than the stages take at once."""
    family = FAMILIES[name]
    torch.manual_seed(1)
    inputs, example = family.inputs(32), family.inputs(4)
    model = cet.EarlyExit(family.build().eval(), family.exits, example).eval()
    model.policy = policy_between_scores(model, inputs, "entropy", [0.5] * (model.num_exits - 1))
    stages = export_segments(model, ((), example), model.policy.thresholds, None, sizes_vary=False)
    description = describe(stages, None, True, None)
    modules = {module.entry.file: module for module in stage_modules(stages, description, MOST_ROWS)}

    def method_of(name: str) -> Method:
        def run(arrays: Sequence[Array]) -> list[Array]:
            assert len(arrays[0]) <= MOST_ROWS
            with torch.no_grad():
                return [made.numpy() for made in modules[name].module(*map(torch.from_numpy, arrays))]

        return run

    manifest = Manifest(description, tuple(module.entry for module in modules.values()), MOST_ROWS)
    loaded = MethodsModel(Manifest.from_json(manifest.to_json(), "the manifest"), method_of)
    expected = model.predict(**inputs)
    got = loaded.predict(**{key: value.numpy() for key, value in inputs.items()})
    assert len(expected.exit_index.unique()) == model.num_exits
    np.testing.assert_array_equal(got.exit_index, expected.exit_index.numpy())
    np.testing.assert_allclose(got.logits, expected.logits.numpy(), rtol=1e-4, atol=1e-5)

    for module in modules.values():
        sizes = {
            value.shape[dim] for value, dims in zip(module.example, module.dynamic_shapes, strict=True) for dim in dims
        }
        assert sizes == {MOST_ROWS}
        assert len(module.entry.inputs) == len(module.example)
    with torch.no_grad():
        whole: StageModule = whole_module(stages, 1)
        alone = model.exit_logits(**{key: value[:1] for key, value in example.items()})
        torch.testing.assert_close(whole.module(*whole.example), alone[-1])


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_scores_are_those_of_the_definition(score: ScoreName) -> None:
    logits = torch.randn(20, 4) * 5
    logits[3, 1], logits[4, 2], logits[5], logits[6] = torch.nan, torch.inf, torch.nan, 1e38
    logits[7, 2], logits[8, :2], logits[9] = -torch.inf, 7.0, 2.0
    got = _score(log_probabilities(logits, 1.5), score)
    torch.testing.assert_close(got, score_definition(logits, score, 1.5), equal_nan=True)
    assert got[3:6].isnan().all()
