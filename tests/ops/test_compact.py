"""Compaction on every backend: moves are exact, so every comparison is of bits."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cet import ops
from conftest import kernels_only
from thinned import kept, sampled, slow

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
DTYPES += [torch.complex64, torch.complex128, torch.float8_e5m2]


@pytest.fixture(autouse=True, params=["small tensors by torch", "all on the kernels"])
def _split_of_the_work(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous tensors of less than 32 MiB are moved by torch; here the kernels move them too."""
    if request.param == "all on the kernels":
        monkeypatch.setattr(import_module("cet.ops.compact.cpp"), "KEPT_MEMORY", 0)


def numbered(rows: int, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows that differ, in any dtype."""
    values = torch.randint(0, 256, (rows, *sizes, torch.empty((), dtype=dtype).element_size()), dtype=torch.uint8)
    return (values % 2).bool().any(-1) if dtype is torch.bool else values.view(dtype).squeeze(-1)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bytes_of(a), bytes_of(b))


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def assert_compacted(exit_mask: Tensor, tensors: list[Tensor], dims: list[int] | None = None) -> None:
    before = [tensor.clone() for tensor in tensors]
    flags = exit_mask.clone()
    kept, exited, moved = ops.compact(exit_mask, tensors, dims)
    assert kept.tolist() == [row for row, exits in enumerate(flags.tolist()) if not exits]
    assert exited.tolist() == [row for row, exits in enumerate(flags.tolist()) if exits]
    assert torch.equal(exit_mask, flags)
    for tensor, original, result, dim in zip(tensors, before, moved, dims or [0] * len(tensors), strict=True):
        assert same_bits(tensor, original)
        rows = [original.select(dim, row) for row in kept.tolist()]
        if rows:
            assert same_bits(result, torch.stack(rows, dim=dim))
        assert result.shape == (*tensor.shape[:dim], len(rows), *tensor.shape[dim + 1 :])


WHICH = kept(["none", "all", "half", "first", "last", "alternating", "but one"], "none", "all", "half", "but one")
SIZES = [0, 1, 2, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1023, 1024, 1025, 4097]


@pytest.mark.parametrize("rows", sampled(SIZES, 7))
@pytest.mark.parametrize("which", WHICH)
def test_rows_that_stay_keep_their_order(backend: str, rows: int, which: str) -> None:
    row = torch.arange(rows)
    flags = {
        "none": row < 0,
        "all": row >= 0,
        "half": torch.rand(rows) < 0.5,
        "first": row == 0,
        "last": row == rows - 1,
        "alternating": row % 2 == 0,
        "but one": row != rows // 2,
    }
    assert_compacted(flags[which], [row, numbered(rows, 3), numbered(rows, 5, 7)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_dtype_in_one_call(backend: str, dtype: torch.dtype) -> None:
    exit_mask = torch.rand(37) < 0.5
    assert_compacted(
        exit_mask, [numbered(37, *sizes, dtype=dtype) for sizes in ((), (1,), (3,), (64,), (5, 7), (0, 3))]
    )


@pytest.mark.parametrize("exited", [0.2, slow(0.9)])
def test_large_rows(backend: str, exited: float) -> None:
    """More than the last cache: these are written past it, and in huge pages."""
    x = torch.randn(180, 70_001)
    assert_compacted(torch.rand(180) < exited, [x, x[:, 3], x[:, 1:70_000]])


def test_the_same_tensor_twice_and_views_of_one(backend: str) -> None:
    x = numbered(20, 6)
    assert_compacted(torch.rand(20) < 0.5, [x, x, x[:, :3], x[:, 3:], x.view(20, 2, 3)])


LAYOUTS: dict[str, tuple[Tensor, int]] = {
    "rows last": (torch.randn(4, 5, 30), 2),
    "rows in the middle": (torch.randn(4, 30, 5), 1),
    "transposed": (torch.randn(5, 30).T, 0),
    "channels last": (torch.randn(30, 4, 5, 3).contiguous(memory_format=torch.channels_last), 0),
    "every second column": (torch.randn(30, 12)[:, ::2], 0),
    "every second row": (torch.randn(60, 4)[::2], 0),
    "expanded columns": (torch.randn(30, 1, 3).expand(30, 4, 3), 0),
    "expanded columns, permuted": (torch.randn(3, 30, 1).expand(3, 30, 4).permute(1, 2, 0), 0),
    "expanded twice": (torch.randn(30, 1, 1).expand(30, 6, 4), 0),
    "expanded rows": (torch.randn(1, 4).expand(30, 4), 0),
    "sequence first, expanded": (torch.randn(7, 1, 30).expand(7, 6, 30), 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_stays_what_it_is(backend: str, name: str) -> None:
    tensor, dim = LAYOUTS[name]
    exit_mask = torch.rand(30) < 0.5
    assert_compacted(exit_mask, [tensor], [dim])
    moved = ops.compact(exit_mask, [tensor], [dim]).tensors[0]
    with ops.use_backend("reference"):
        assert moved.stride() == ops.compact(exit_mask, [tensor], [dim]).tensors[0].stride()


def test_what_could_be_viewed_can_still_be_viewed(backend: str) -> None:
    tensor = torch.randn(4, 5, 6).permute(0, 2, 1)  # (B, C, T) as a view of (B, T, C)
    kept = ops.compact(torch.tensor([True, False, True, False]), [tensor]).tensors[0]
    assert torch.equal(kept.permute(0, 2, 1).view(10, 6), tensor[[1, 3]].permute(0, 2, 1).reshape(10, 6))


@given(data=st.data())
def test_any_shape_and_strides(backend: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    rows = data.draw(st.integers(0, 70), label="rows")
    tensors, dims = [], []
    for _ in range(data.draw(st.integers(0, 4), label="tensors")):
        shape = data.draw(st.lists(st.integers(0, 9), max_size=3), label="shape")
        dim = data.draw(st.integers(0, len(shape)), label="dim")
        shape.insert(dim, rows)
        order = data.draw(st.permutations(range(len(shape))), label="memory order")
        steps = data.draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)), label="steps")
        dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
        tensor = numbered(1, *[shape[d] * steps[d] for d in order], dtype=dtype)[0]
        tensor = tensor.permute([order.index(d) for d in range(len(shape))])
        for d, step in enumerate(steps):
            tensor = tensor[(slice(None),) * d + (slice(None, None, step),)]
        tensors.append(tensor)
        dims.append(dim)
    exit_mask = torch.rand(rows) < data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), label="leaving")
    assert_compacted(exit_mask, tensors, dims)


@kernels_only
def test_nothing_is_written_behind_the_valid_prefix(backend: str) -> None:
    kernels = import_module("cet.ops.backend").kernels()
    exit_mask = torch.tensor([False, True, False, True, True])
    order = torch.full((9,), -7)
    assert kernels.order_rows(exit_mask.data_ptr(), 5, order.data_ptr()) == 2
    assert order.tolist() == [0, 2, 1, 3, 4, -7, -7, -7, -7]
    for columns in (1, 3, 16, 257):
        source, target = torch.randn(5, columns), torch.full((4, columns), -1.0)
        shape, strides = (2, columns), (columns, 1)
        move = (source.data_ptr(), target.data_ptr(), 4, shape, strides, strides, 0)
        kernels.gather_rows([move], order.data_ptr(), 2)
        assert torch.equal(target[:2], source[[0, 2]])
        assert (target[2:] == -1).all()


def test_gradients_flow_through_the_rows_that_stay(backend: str) -> None:
    x = torch.randn(6, 3, requires_grad=True)
    exit_mask = torch.tensor([True, False, False, True, False, True])
    ops.compact(exit_mask, [x]).tensors[0].sum().backward()
    assert x.grad is not None
    assert x.grad[:, 0].tolist() == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("positions", [None, torch.tensor([7, 0, 3, 5])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_scatter_rows_writes_where_they_belong(backend: str, positions: Tensor | None, dtype: torch.dtype) -> None:
    rows = numbered(4, 3, dtype=dtype)
    output = torch.zeros(8, 3, dtype=dtype)
    ops.scatter_rows(output, rows, torch.tensor([1, 3]), positions)
    at = [1, 3] if positions is None else [0, 5]
    assert same_bits(output[at], rows[[1, 3]])
    assert not output[[row for row in range(8) if row not in at]].any()


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"exit_mask": torch.zeros(3)}, TypeError, "exit_mask is torch.float32; give bool"),
    ({"exit_mask": torch.zeros(3, 1, dtype=torch.bool)}, ValueError, r"exit_mask has shape \(3, 1\); give \(B,\)"),
    ({"tensors": [torch.zeros(3), torch.zeros(4)]}, ValueError, r"tensors\[1\] has shape \(4,\), whose dimension 0"),
    ({"tensors": [torch.zeros(())]}, ValueError, r"tensors\[0\] has shape \(\)"),
    ({"dims": [1]}, ValueError, "whose dimension 1 does not hold 3 rows"),
    ({"dims": [-1]}, ValueError, "whose dimension -1"),
    ({"dims": []}, ValueError, "0 dims for 1 tensors"),
    ({"tensors": [torch.zeros(3, device="meta")]}, ValueError, r"tensors\[0\] is on meta, the exit mask on cpu"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), BAD)
def test_compact_refuses(backend: str, wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^compact: .*{message}"):
        ops.compact(**{"exit_mask": torch.zeros(3, dtype=torch.bool), "tensors": [torch.zeros(3, 2)], **wrong})


def test_scattered_rows_may_be_those_of_the_output(backend: str) -> None:
    output = torch.arange(12.0).view(4, 3)
    expected = output[[1, 0, 2, 3]]
    ops.scatter_rows(output, output[:3], torch.tensor([0, 1]), torch.tensor([1, 0, 2]))
    assert torch.equal(output, expected)


def test_scatter_rows_refuses(backend: str) -> None:
    output, index = torch.zeros(4, 2), torch.tensor([0])
    with pytest.raises(ValueError, match=r"^scatter_rows: rows are \(3, 5\), output is \(4, 2\)"):
        ops.scatter_rows(output, torch.zeros(3, 5), index)
    with pytest.raises(TypeError, match=r"^scatter_rows: index is torch.int32; give int64"):
        ops.scatter_rows(output, torch.zeros(3, 2), index.int())
    with pytest.raises(ValueError, match=r"^scatter_rows: positions are \(1,\) for 3 rows"):
        ops.scatter_rows(output, torch.zeros(3, 2), index, index)


def test_the_custom_operators_keep_their_promises(backend: str) -> None:
    exit_mask = torch.tensor([True, False, False, True])
    channels_last = torch.randn(4, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    tensors = [torch.randn(4, 3), torch.arange(8).view(2, 4), channels_last]
    torch.library.opcheck(torch.ops.cet.compact.default, (exit_mask, tensors, [0, 1, 0]))
    rows = torch.randn(4, 3)
    torch.library.opcheck(torch.ops.cet.scatter_rows.default, (torch.zeros(9, 3), rows, torch.tensor([0, 2]), None))


def test_compiled_calls_give_the_same(backend: str) -> None:
    def step(exit_mask: Tensor, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        kept, exited, (moved,) = ops.compact(exit_mask, [x])
        ops.scatter_rows(output, x, exited)
        return kept, moved * 2

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for exit_mask in (torch.tensor([True, False, True, False, False]), torch.tensor([False, False, True])):
            x, outputs = torch.randn(len(exit_mask), 3), [torch.zeros(len(exit_mask), 3) for _ in range(2)]
            for got, expected in zip(compiled(exit_mask, x, outputs[0]), step(exit_mask, x, outputs[1]), strict=True):
                assert torch.equal(got, expected)
            assert torch.equal(*outputs)


def test_flags_of_any_strides_and_bytes(backend: str) -> None:
    by_exit = torch.rand(1000, 2) < 0.5
    assert_compacted(by_exit[:, 0], [torch.arange(1000)])
    odd = torch.tensor([2, 0, 255, 1, 0, 3, 0, 4], dtype=torch.uint8).view(torch.bool)
    assert ops.compact(odd, [torch.arange(8)]).tensors[0].tolist() == [1, 4, 6]


@pytest.mark.parametrize(
    ("index", "positions"),
    [
        ([-1], None),
        ([4], None),
        ([1], [0, 9, 1, 2]),
        ([1], [0, -1, 1, 2]),
        ([4], [0, 1, 2, 3]),
        ([-1], [0, 1, 2, 3]),
    ],
)
def test_scatter_rows_never_writes_elsewhere(backend: str, index: list[int], positions: list[int] | None) -> None:
    where = None if positions is None else torch.tensor(positions)
    with pytest.raises(IndexError):
        ops.scatter_rows(torch.zeros(4, 3), torch.randn(4, 3), torch.tensor(index), where)


def test_scatter_rows_is_seen_by_autograd(backend: str) -> None:
    exponential = torch.randn(8, 3, requires_grad=True).exp()
    with torch.no_grad():
        ops.scatter_rows(exponential, torch.zeros(8, 3), torch.tensor([1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        exponential.sum().backward()
    with torch.inference_mode():
        inferred = torch.zeros(4, 3)
        ops.scatter_rows(inferred, torch.ones(4, 3), torch.tensor([2]))
    assert inferred.sum() == 3
    with pytest.raises(RuntimeError, match="inference"):
        ops.scatter_rows(inferred, torch.ones(4, 3), torch.tensor([2]))
