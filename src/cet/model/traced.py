"""A model's answer as one operator of a traced graph: what `torch.compile` sees of a model in eval mode.

Where samples leave decides at run time which stages run, on how many rows, and whether the backbone has to be cut anew.
No graph holds that, so a graph holds the call: one node for any number of rows, whatever becomes of the backbone.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    get_eval_frame_callback,
    set_code_exec_strategy,
)
from torch.utils import _pytree as pytree

from cet.ops.backend import constant_in_graphs
from cet.partition.inputs import Call

Function = TypeVar("Function", bound=Callable[..., Any])

_numbers = itertools.count()
_models: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
"""By the number under which graphs know them: operators take no modules."""
_calls: list[Call] = []
"""Calls that were traced, with a slot where a tensor was: operators take no nested inputs."""


class _Slot(int):
    """Stands in a call for the tensor of this number."""


def number_of(model: nn.Module) -> int:
    """A number for a model, which it keeps; a copy gets another."""
    number = next(_numbers)
    _models[number] = model
    return number


def entered_outside_of_graphs(method: Function) -> Function:
    """Let a method run as it is where `torch.compile` would begin a graph with it, and the graph begin behind it."""
    # As torch._dynamo.eval_frame.skip_code, without the import.
    set_code_exec_strategy(method.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))
    return method


def outside_of_graphs(function: Function) -> Function:
    """As :func:`torch.compiler.disable`, which imports all of torch.compile, at the first call."""

    made: list[Any] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return made[0](*args, **kwargs)

    return entered_outside_of_graphs(call)  # type: ignore[return-value]


@entered_outside_of_graphs
def may_begin_a_graph() -> bool:
    """Whether `torch.compile` looks at calls in this thread, and has begun no graph yet."""
    # In this order: a graph that has begun takes no such question.
    return not torch.compiler.is_compiling() and get_eval_frame_callback() not in (None, False)


@outside_of_graphs
def before_a_graph(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Bring up to date what a graph reads of a model, and return aliases of the call's tensors that tell
    `torch.compile` not to fix the graph to their sizes."""
    model.weight_tables = weight_tables(model)
    if not kwargs and all(isinstance(value, Tensor) for value in args):
        return tuple([_of_any_size(value) for value in args]), kwargs
    aliases: Call = pytree.tree_map_only(Tensor, _of_any_size, (args, kwargs))
    return aliases


def _of_any_size(tensor: Tensor) -> Tensor:
    from torch._dynamo.decorators import mark_unbacked

    alias = tensor.view_as(tensor)
    mark_unbacked(alias, [*range(alias.ndim)])
    return alias


def traced_answer(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``(B, K)``, exit index ``(B,)`` and scores ``(B,)`` of a call that is being traced."""
    if not kwargs and all(isinstance(value, Tensor) for value in args):  # so plain that few guards see to it
        tensors = list(args)
        template: Call = (...,) * len(args), {}
    else:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        template = pytree.tree_map_only(Tensor, lambda _: ..., (args, kwargs))
    call, rows, dtype, autocast, places = _known_call(model.number, template)
    # For their gradients, and so that a graph that changes them itself is noticed. Not by way of the submodules, of
    # which torch.compile takes no recurrent ones.
    weights = [model.weight_tables[table][name] for table, name in places]
    answer: tuple[Tensor, Tensor, Tensor] = torch.ops.cet.early_exit(
        tensors, weights, model.number, call, rows, model.num_classes, dtype, autocast
    )
    return answer


@constant_in_graphs
def _known_call(
    number: int, template: Call
) -> tuple[int, int, torch.dtype, torch.dtype | None, tuple[tuple[int, str], ...]]:
    """The number of a call; which of its tensors holds the rows; the dtype of the logits; that of autocast, if on; and
    where the weights are in the tables."""
    model = _models[number]
    model.weight_tables = weight_tables(model)
    slots = itertools.count()
    args, kwargs = pytree.tree_map(lambda leaf: _Slot(next(slots)) if leaf is ... else leaf, template)
    _calls.append((args, kwargs))
    example = model.example_inputs
    device_type = next(leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)).device.type
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    with torch.no_grad():
        dtype = model.exit_logits(*example[0], **example[1])[-1].dtype
    places = {
        id(tensor): (index, name)
        for index, table in enumerate(model.weight_tables)
        for name, tensor in table.items()
        if tensor is not None
    }
    weights = tuple(places[id(tensor)] for tensor in _weights(model))
    return len(_calls) - 1, model.first_batched(args, kwargs), dtype, autocast, weights


def weight_tables(model: nn.Module) -> list[dict[str, Any]]:
    """The dictionaries in which submodules keep their parameters and buffers."""
    tables: list[dict[str, Any]] = []
    for module in model.modules():
        tables += [module._parameters, module._buffers]
    return tables


def _weights(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


torch.library.define(
    "cet::early_exit",
    "(Tensor[] tensors, Tensor[] weights, int model, int call, int rows, int num_classes, ScalarType dtype, "
    "ScalarType? autocast) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "cet::early_exit_backward",
    "(Tensor gradient, Tensor[] tensors, Tensor[] weights, int model, int call, ScalarType? autocast) -> Tensor[]",
)


# Not by torch.library.custom_op, whose checks at each call take longer than a small net.
@torch.library.impl("cet::early_exit", "CompositeExplicitAutograd")
@outside_of_graphs
def _run(
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor],
    model: int,
    call: int,
    rows: int,
    num_classes: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    args, kwargs = _filled(call, tensors)
    early_exit = _models[model]
    if [weight.data_ptr() for weight in weights] != [weight.data_ptr() for weight in _weights(early_exit)]:
        raise RuntimeError(
            "the compiled graph has other weights than the model, as it changes them itself or as submodules were "
            "replaced; change weights in another graph, or call torch.compiler.reset()"
        )
    with torch.no_grad(), _autocast(tensors[rows], autocast):
        logits, exit_index, score = early_exit.answer(args, kwargs)
    return logits.to(dtype).contiguous(), exit_index, score


@torch.library.register_fake("cet::early_exit")  # type: ignore[untyped-decorator]
def _(
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor],
    model: int,
    call: int,
    rows: int,
    num_classes: int,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    like, num_rows = tensors[rows], tensors[rows].shape[0]
    return (
        like.new_empty((num_rows, num_classes), dtype=dtype),
        like.new_empty((num_rows,), dtype=torch.int64),
        like.new_empty((num_rows,), dtype=torch.float32),
    )


@torch.library.impl("cet::early_exit_backward", "CompositeExplicitAutograd")
def _run_backward(
    gradient: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor],
    model: int,
    call: int,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    """Gradients of the tensors, then of the weights, by another forward pass."""
    early_exit = _models[model]
    own = _weights(early_exit)
    keys = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        keys = keys.remove(key)
    # An operator runs below autograd, which has to record here.
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), keys), torch.enable_grad():
        given = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
        args, kwargs = _filled(call, given)
        with _autocast(gradient, autocast):
            logits = early_exit.answer(args, kwargs)[0]
        sources = [tensor for tensor in (*given, *own) if tensor.requires_grad]
        found = iter(
            torch.autograd.grad(logits, sources, gradient.to(logits.dtype), allow_unused=True)
            if logits.requires_grad
            else [None] * len(sources)
        )
    gradients = [next(found) if tensor.requires_grad else None for tensor in (*given, *own)]
    return [
        torch.zeros_like(tensor) if gradient is None else gradient.contiguous()
        for tensor, gradient in zip((*given, *own), gradients, strict=True)
    ]


_AUTOGRAD = (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA, torch._C.DispatchKey.AutogradOther)


@torch.library.register_fake("cet::early_exit_backward")  # type: ignore[untyped-decorator]
def _(
    gradient: Tensor,
    tensors: Sequence[Tensor],
    weights: Sequence[Tensor],
    model: int,
    call: int,
    autocast: torch.dtype | None,
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (*tensors, *weights)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    tensors, weights, *ctx.call, _, _, _, ctx.autocast = inputs
    ctx.num_tensors = len(tensors)
    ctx.save_for_backward(*tensors, *weights)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
    saved, split = ctx.saved_tensors, ctx.num_tensors
    gradients = torch.ops.cet.early_exit_backward(gradient, saved[:split], saved[split:], *ctx.call, ctx.autocast)
    return gradients[:split], gradients[split:], *(None,) * 6


torch.library.register_autograd("cet::early_exit", _backward, setup_context=_keep)


def _filled(call: int, tensors: Sequence[Tensor]) -> Call:
    args, kwargs = _calls[call]
    if not kwargs and all(type(value) is _Slot for value in args):  # the most usual, for its speed
        return tuple(tensors), kwargs
    filled: Call = pytree.tree_map_only(_Slot, lambda slot: tensors[slot], (args, kwargs))
    return filled


def _autocast(like: Tensor, dtype: torch.dtype | None) -> Any:
    return nullcontext() if dtype is None else torch.autocast(like.device.type, dtype)
