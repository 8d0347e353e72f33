"""A copy of a module tree that shares all tensors with the original.

``torch.export`` swaps the parameters of the module that it traces for symbolic ones, and a trial run may leave things
behind in attributes. On a copy neither shows to anybody else who calls the original meanwhile.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import CellType, FunctionType
from typing import Any, TypeVar

from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def private_copy(module: Module, tensors: Iterable[Tensor] = ()) -> Module:
    """Copy ``module`` with all that its attributes refer to, except parameters, buffers and ``tensors``.

    Where an attribute cannot be copied, only the modules themselves are, and attributes are shared.
    """
    memo: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers(), *tensors)}
    try:
        copied: Module = copy.deepcopy(module, memo)
        for submodule in copied.modules():
            forward = submodule.__dict__.get("forward")
            if isinstance(forward, FunctionType):
                submodule.__dict__["forward"] = _rebound(forward, memo)
        return copied
    except Exception:  # whatever an attribute's __deepcopy__ may raise
        tree: Module = _copy_of_tree(module, {})
        return tree


def _rebound(function: FunctionType, copies: dict[int, Any]) -> FunctionType:
    """The function with the copies in its closure and defaults: it would go on calling the originals."""

    def copied(value: Any) -> Any:
        return copies.get(id(value), value)

    cells = tuple(CellType(copied(cell.cell_contents)) for cell in function.__closure__ or ())
    defaults = tuple(map(copied, function.__defaults__ or ())) or None
    rebound = FunctionType(function.__code__, function.__globals__, function.__name__, defaults, cells)
    rebound.__kwdefaults__ = {name: copied(value) for name, value in (function.__kwdefaults__ or {}).items()} or None
    return rebound


def _copy_of_tree(module: Any, copies: dict[int, Any]) -> Any:
    if id(module) in copies:
        return copies[id(module)]
    clone = copies[id(module)] = module.__new__(type(module))
    clone.__dict__ = {
        name: copy.copy(value) if isinstance(value, (dict, list)) else value for name, value in module.__dict__.items()
    }
    clone._modules = {name: child and _copy_of_tree(child, copies) for name, child in module._modules.items()}
    return clone
