"""The whole exit step on features large enough to be moved on the way, against its definition."""

from __future__ import annotations

import pytest
import torch

from cet.heads import Layout, Pool
from cet.ops import exit_score, use_backend
from cet.ops.exit_step import exit_step

LARGE = (24, 160, 192)  # above the size from which rows are moved right after their gate


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "pool"), [("channels_first", "mean"), ("channels_last", "mean"), ("channels_last", "first")]
)
def test_rows_that_stay_are_whole_and_in_order(layout: Layout, pool: Pool, dtype: torch.dtype, threads: int) -> None:
    features, mask = torch.randn(LARGE).to(dtype), torch.randn(LARGE[0], 3)
    width = features.shape[1 if layout == "channels_first" else 2]
    head = torch.randn(5, width).to(dtype), torch.randn(5).to(dtype)
    options = {"layout": layout, "pool": pool}
    before, available = features.clone(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with use_backend("reference"):
            logits, *_ = exit_step(features, *head, [], threshold=0.0, **options)
            scores = exit_score(logits).sort().values
            threshold = float(scores[11:13].mean())
            expected = exit_step(features, *head, [mask, features], threshold=threshold, **options)
        got = exit_step(features, *head, [mask, features], threshold=threshold, **options)
    finally:
        torch.set_num_threads(available)
    assert torch.equal(got[2][0], expected[2][0])
    assert torch.equal(got[2][1], expected[2][1])
    for ours, theirs in zip(got[2][2], expected[2][2], strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(got[0], expected[0], rtol=2e-2, atol=2e-2)
    assert torch.equal(features, before)
