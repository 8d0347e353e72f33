"""Compaction on Triton: the tests of every backend, and the moves that only padded batches make."""

from __future__ import annotations

import pytest
import test_compact
import torch
from test_compact import (  # noqa: F401
    DTYPES,
    LAYOUTS,
    assert_compacted,
    numbered,
    same_bits,
    test_any_dtype_in_one_call,
    test_any_shape_and_strides,
    test_compiled_calls_give_the_same,
    test_gradients_flow_through_the_rows_that_stay,
    test_scatter_rows_is_seen_by_autograd,
    test_the_custom_operators_keep_their_promises,
    test_the_same_tensor_twice_and_views_of_one,
    test_what_could_be_viewed_can_still_be_viewed,
)
from torch import Tensor

from cet import ops
from cet.kernels import compact
from cet.ops.padded import gather_and_scatter_rows
from conftest import triton_backend as backend  # noqa: F401
from thinned import kept


@pytest.mark.parametrize("rows", kept([0, 1, 2, 17, 1023, 1024, 1025, 2049], 0, 2, 17, 1024, 2049))
@pytest.mark.parametrize("which", kept(["none", "all", "half", "but one"], "half", "but one"))
def test_rows_that_stay_keep_their_order(backend: str, rows: int, which: str) -> None:  # noqa: F811
    test_compact.test_rows_that_stay_keep_their_order(backend, rows, which)


def on_default_device(tensor: Tensor) -> Tensor:
    """Copied with its strides."""
    storage = torch.empty(0, dtype=tensor.dtype, device="cpu").set_(tensor.untyped_storage())
    copy = storage.to(torch.get_default_device())
    return copy.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_stays_what_it_is(backend: str, name: str) -> None:  # noqa: F811
    tensor, dim = LAYOUTS[name]
    tensor = on_default_device(tensor)
    exit_mask = torch.rand(30) < 0.5
    assert_compacted(exit_mask, [tensor], [dim])
    moved = ops.compact(exit_mask, [tensor], [dim]).tensors[0]
    with ops.use_backend("reference"):
        assert moved.stride() == ops.compact(exit_mask, [tensor], [dim]).tensors[0].stride()


def test_more_tensors_than_a_launch_takes(backend: str) -> None:  # noqa: F811
    assert_compacted(torch.rand(40) < 0.5, [numbered(40, 1 + i) for i in range(19)])


def test_rows_longer_than_a_tile(backend: str) -> None:  # noqa: F811
    x = numbered(5, 2, 5003)
    assert_compacted(torch.tensor([False, True, False, False, True]), [x, x[:, 1], x[:, :, 1:5001]])


def test_nothing_is_written_behind_the_rows_that_stay(backend: str) -> None:  # noqa: F811
    exit_mask = torch.tensor([False, True, False, True, True])
    order, num_kept = torch.full((2, 5), -7), torch.tensor(-7)
    compact.order_rows_into(exit_mask, order, num_kept)
    assert order.tolist() == [[0, 2, -7, -7, -7], [1, 3, 4, -7, -7]]
    assert num_kept.item() == 2
    for columns in (1, 3, 16, 257):
        source, target = torch.randn(5, columns), torch.full((5, columns), -1.0)
        gather_and_scatter_rows(order, order[0], num_kept, num_kept, [(source, target)], [])
        assert torch.equal(target[:2], source[[0, 2]])
        assert (target[2:] == -1).all()


def test_the_host_waits_once_and_few_rows_hold_no_memory_of_many(
    backend: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[Tensor] = []
    number = Tensor.__int__
    monkeypatch.setattr(Tensor, "__int__", lambda self: (waits.append(self), number(self))[1])
    int(torch.tensor(1))
    once = len(waits)  # as the default device is a mode that calls again
    waits.clear()
    exit_mask = torch.arange(64) > 3
    rows, transposed = torch.randn(64, 6), torch.randn(6, 64)
    moved, moved_too = ops.compact(exit_mask, [rows, transposed], [0, 1]).tensors
    assert len(waits) == once
    assert torch.equal(moved, rows[:4])
    assert torch.equal(moved_too, transposed[:, :4])
    assert moved.untyped_storage().nbytes() == moved_too.untyped_storage().nbytes() == 4 * 6 * 4


@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scatter_rows_writes_where_they_belong(
    backend: str,  # noqa: F811
    with_positions: bool,
    dtype: torch.dtype,
) -> None:
    positions = torch.tensor([7, 0, 3, 5]) if with_positions else None
    rows, output = numbered(4, 3, dtype=dtype), torch.zeros(8, 3, dtype=dtype)
    ops.scatter_rows(output, rows, torch.tensor([1, 3]), positions)
    at = [0, 5] if with_positions else [1, 3]
    assert same_bits(output[at], rows[[1, 3]])
    assert same_bits(output[[row for row in range(8) if row not in at]], torch.zeros(6, 3, dtype=dtype))


def ones_for(rows: int, source: Tensor) -> Tensor:
    """Laid out as the source."""
    target = torch.ones(rows, *source.shape[1:], dtype=source.dtype)
    return target.to(memory_format=torch.channels_last) if source.ndim == 4 else target


@pytest.mark.parametrize(("num_kept", "count"), [(0, 0), (0, 30), (30, 30), (9, 30), (9, 21), (0, 7), (7, 7)])
def test_padded_rows_go_on_or_home(backend: str, num_kept: int, count: int) -> None:  # noqa: F811
    who = torch.randperm(count)
    order = torch.randint(0, 30, (2, 30))  # behind the rows that move is anything
    order[0, :num_kept], order[1, : count - num_kept] = who[:num_kept], who[num_kept:]
    order = order.int()
    positions = torch.randperm(50)[:30].int()
    sources = [
        torch.randn(30, 12),
        torch.randn(30, 7).half(),
        torch.randint(0, 99, (30, 5), dtype=torch.uint8),
        torch.rand(30) < 0.5,
        torch.randn(30, 4, 3, 2).to(memory_format=torch.channels_last),
        torch.randn(3).expand(30, 3),
        torch.randn(30, 9)[:, 1:5],
        torch.randn(30, 0),
    ]
    stay, leave = ([(x, ones_for(50, x)) for x in sources] for _ in range(2))
    wanted = [[target.clone() for _, target in pairs] for pairs in (stay, leave)]
    for x, stayed, put in zip(sources, *wanted, strict=True):
        stayed[:num_kept] = x[who[:num_kept]]
        put[positions[who[num_kept:]]] = x[who[num_kept:]]
    gather_and_scatter_rows(order, positions, torch.tensor(num_kept).int(), torch.tensor(count).int(), stay, leave)
    for pairs, targets in zip((stay, leave), wanted, strict=True):
        for (_, target), expected in zip(pairs, targets, strict=True):
            assert same_bits(target, expected)


@pytest.mark.parametrize("with_positions", [True, False])
def test_scatter_rows_leaves_out_what_is_out_of_range(backend: str, with_positions: bool) -> None:  # noqa: F811
    """A GPU cannot be asked before without waiting for it; so nothing is read or written elsewhere."""
    rows, memory = torch.randn(6, 3), torch.full((20, 3), -7.0)
    output = memory[7:12]  # poisoned on both sides
    index = torch.tensor([0, -1, 2, 6, 4, 2**40, 5])
    positions = torch.tensor([3, 0, 5, 1, 1, -1]) if with_positions else None
    ops.scatter_rows(output, rows, index, positions)
    expected = torch.full((20, 3), -7.0)
    places = {0: 3, 4: 1} if with_positions else {0: 0, 2: 2, 4: 4}
    for row, place in places.items():
        expected[7 + place] = rows[row]
    assert torch.equal(memory, expected)
