"""Compaction is exact: the rows that stay, in their order, in the layout that the tensor had."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cet.ops import compact

LAYOUTS = {
    "contiguous": lambda b: torch.randn(b, 3, 4, 5),
    "channels_last": lambda b: torch.randn(b, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "transposed": lambda b: torch.randn(b, 5, 3).transpose(1, 2),
    "expanded": lambda b: torch.randn(b, 1, 4).expand(b, 6, 4),
    "expanded_twice": lambda b: torch.randn(b, 1, 1).expand(b, 6, 4),
    "rows_expanded": lambda b: torch.randn(1, 4).expand(b, 4),
    "vector": lambda b: torch.randn(b),
    "bool": lambda b: torch.rand(b, 7) > 0.5,
    "int": lambda b: torch.randint(0, 99, (b, 2)),
    "half": lambda b: torch.randn(b, 2).half(),
    "no columns": lambda b: torch.randn(b, 0),
}


@pytest.mark.parametrize("index", [[], [0], [4], [1, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_kept_exactly(layout, index):
    tensor = LAYOUTS[layout](5)
    before = tensor.clone()
    (kept,) = compact(torch.tensor(index, dtype=torch.int64), [tensor])
    assert kept.dtype == tensor.dtype
    assert kept.tolist() == [before[i].tolist() for i in index]
    assert torch.equal(tensor, before)


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    data=st.data(),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_any_dimension_of_any_permuted_or_expanded_tensor(shape, order, data):
    tensor = torch.randn([1 if order.random() < 0.2 else s for s in shape])
    tensor = tensor.expand(shape).permute(order.sample(range(len(shape)), len(shape)))
    dim = data.draw(st.integers(0, len(shape) - 1))
    rows = tensor.shape[dim]
    index = torch.tensor(sorted(data.draw(st.sets(st.integers(0, rows - 1)))), dtype=torch.int64)
    (kept,) = compact(index, [tensor], [dim])
    expected = torch.stack([tensor.select(dim, i) for i in index], dim) if len(index) else tensor.narrow(dim, 0, 0)
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "expanded", "expanded_twice"])
def test_the_layout_is_kept(layout):
    tensor = LAYOUTS[layout](5)
    (kept,) = compact(torch.tensor([0, 2, 4]), [tensor])
    assert kept.stride() == LAYOUTS[layout](3).stride()


def test_what_could_be_viewed_can_still_be_viewed():
    tensor = torch.randn(4, 5, 6).permute(0, 2, 1)  # (B, C, T) as a view of (B, T, C)
    (kept,) = compact(torch.tensor([1, 3]), [tensor])
    assert torch.equal(kept.permute(0, 2, 1).view(10, 6), tensor[[1, 3]].permute(0, 2, 1).reshape(10, 6))


def test_outputs_share_no_memory_with_inputs():
    tensors = [LAYOUTS[name](5) for name in ("contiguous", "channels_last", "expanded")]
    before = [t.clone() for t in tensors]
    for kept in compact(torch.arange(5), tensors):
        kept.untyped_storage().fill_(0)
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def test_several_tensors_each_with_its_own_dimension():
    a, b = torch.randn(4, 2), torch.randn(3, 4)
    kept_a, kept_b = compact(torch.tensor([0, 3]), [a, b], [0, 1])
    assert torch.equal(kept_a, a[[0, 3]])
    assert torch.equal(kept_b, b[:, [0, 3]])
    assert compact(torch.tensor([0]), []) == []


def test_gradients_reach_the_rows_that_stay_only():
    tensor = torch.randn(4, 3, 2).transpose(1, 2).requires_grad_()
    compact(torch.tensor([1, 2]), [tensor])[0].sum().backward()
    assert tensor.grad[:, 0, 0].tolist() == [0.0, 1.0, 1.0, 0.0]
