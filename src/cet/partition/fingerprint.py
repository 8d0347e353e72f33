"""Everything about a backbone that its programs depend on, and whether it has changed.

Followed are: which submodules there are, and their modes; forward hooks; a ``forward`` that was set on an instance, and
the ``forward`` of every class; the names and types of parameters and buffers, and the dtypes of all parameters (their
values are read at each call, so they need not be followed); every other attribute, those in lists, dictionaries and
plain objects such as a config included. Numbers, strings and the like are compared by value, anything else by identity,
plain tensors by identity and version, NumPy arrays by identity and entries. Hooks on all modules are followed too.

Not followed are: what the forward pass itself changes, such as a counter of calls; global variables and closures; the
entries of NumPy arrays of more than 65,536 elements.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cet.partition.stages import Stages

Path = tuple[Any, ...]

GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
)
_MAX_DEPTH = 6
_MAX_ARRAY = 1 << 16
_SIMPLE = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_OPAQUE = (nn.Module, Tensor, type, ModuleType, FunctionType, BuiltinFunctionType, MethodType)
# Bookkeeping of nn.Module that no forward pass reads.
_UNREAD = {"_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_state_dict_hooks"} | {
    *("_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
    "_non_persistent_buffers_set",
}


class ExitHook:
    """Base of the hooks that observe exits for the length of a call: they change nothing, and are not followed."""


class Fingerprint:
    """The state of a backbone at one moment.

    Args:
        backbone: the module.
        volatile: the paths of entries that the forward pass itself changes; these are not followed.
    """

    def __init__(self, backbone: nn.Module, volatile: frozenset[Path] = frozenset()) -> None:
        self._backbone = backbone
        self.volatile = volatile
        self.entries: dict[Path, Any] = {}
        """What is followed, by path. Holding the values keeps their addresses from being used again."""
        self.containers: dict[Path, Any] = {}
        """The dictionaries and lists that hold the entries."""
        self.tensors: list[Tensor] = []
        """Plain tensors among the attributes."""
        self.classes: dict[type[nn.Module], Any] = {}
        seen: set[int] = set()
        explicit = isinstance(backbone, Stages)
        self._arrays: list[NDArray[Any]] = []
        self._modules = list(backbone.modules())
        self._types = [type(module) for module in self._modules]
        self._hooks: list[dict[int, Any]] = list(GLOBAL_HOOKS)
        for index, hooks in enumerate(GLOBAL_HOOKS):
            self.entries["", "hooks on all modules", index] = followed_hooks(hooks)
        for name, module in backbone.named_modules():
            self.entries[name, "__class__"] = type(module)
            self._hooks.append(module._forward_hooks)
            self.classes.setdefault(type(module), type(module).forward)
            if explicit:  # its stages call the submodules, which so need not be followed any further
                self._walk((name, "_modules"), module._modules, 1, seen)
            else:
                self._walk((name,), module.__dict__, 0, seen)
        self._parameters = list(backbone.parameters())
        self._dtypes = [parameter.dtype for parameter in self._parameters]
        weight = self._parameters[0] if self._parameters else None
        self.device = None if weight is None else weight.device
        self._versions = [tensor._version for tensor in self.tensors]
        self._hooks_before = [followed_hooks(hooks) for hooks in self._hooks]
        self._has_hooks = any(self._hooks_before)
        self._array_copies = [array.copy() for array in self._arrays]
        self._forwards = list(self.classes.values())
        self._expired = False
        self._watch = _watch([(c, self._skipped(path)) for path, c in self.containers.items()])

    def is_current(self) -> bool:
        """Whether the backbone is certainly in this state still; a false alarm is possible. Takes microseconds."""
        return (
            not self._expired
            and bool(self._watch.unchanged())
            and self._has_same_hooks()
            and [parameter.dtype for parameter in self._parameters] == self._dtypes
            and (not self._parameters or self._parameters[0].device == self.device)
            and (not self.tensors or [tensor._version for tensor in self.tensors] == self._versions)
            and [type(module) for module in self._modules] == self._types
            and [cls.forward for cls in self.classes] == self._forwards
            and (not self._arrays or _are_equal(self._arrays, self._array_copies))
        )

    def _has_same_hooks(self) -> bool:
        if not self._has_hooks and not any(self._hooks):
            return True
        return [followed_hooks(hooks) for hooks in self._hooks] == self._hooks_before

    def expire(self) -> None:
        """Believe nothing until the whole state has been compared again."""
        self._expired = True

    def matches(self, other: Fingerprint) -> bool:
        """Whether two states are one and the same to a program."""
        return (
            self.device == other.device
            and self._dtypes == other._dtypes
            and self._versions == other._versions
            and _are_equal(self._array_copies, other._array_copies)
            and self.entries.keys() - self.volatile == other.entries.keys() - other.volatile
            and all(_is_same(value, other.entries[path]) for path, value in self.entries.items())
            and self.classes == other.classes
        )

    def _skipped(self, path: Path) -> frozenset[Any] | None:
        keys = frozenset(v[-1] for v in self.volatile if v[:-1] == path)
        return keys or None

    def _walk(self, path: Path, value: Any, depth: int, seen: set[int]) -> None:
        """Record a dictionary or a list, and what is in it."""
        if id(value) in seen:
            return
        seen.add(id(value))
        self.containers[path] = value
        items: Iterator[tuple[Any, Any]] = iter(value.items()) if isinstance(value, dict) else enumerate(list(value))
        is_module = depth == 0
        for key, item in list(items):
            where = (*path, key)
            if where in self.volatile or (is_module and key in _UNREAD):
                continue
            if is_module and key == "_forward_hooks":
                self.entries[where] = followed_hooks(item)
                continue
            if is_module and key in ("_parameters", "_buffers"):
                self.entries[where] = {name: type(tensor) for name, tensor in item.items()}
                self.containers[where] = item
                continue
            self._record(where, item, depth, seen)

    def _record(self, path: Path, value: Any, depth: int, seen: set[int]) -> None:
        if isinstance(value, (list, dict)):
            self.entries[path] = type(value)
            inner = value
        elif isinstance(value, (tuple, set, frozenset)) and not isinstance(value, torch.Size):
            self.entries[path] = type(value)
            inner = None
            for index, item in enumerate(sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value):
                if depth < _MAX_DEPTH:
                    self._record((*path, index), item, depth + 1, seen)
        else:
            self.entries[path] = value
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.tensors.append(value)
            if isinstance(value, np.ndarray) and value.size <= _MAX_ARRAY:
                self._arrays.append(value)
            has_attributes = not isinstance(value, (*_SIMPLE, *_OPAQUE))
            inner = getattr(value, "__dict__", None) if has_attributes else None
        if isinstance(inner, (list, dict)) and depth < _MAX_DEPTH:
            self._walk(path, inner, depth + 1, seen)


def followed_hooks(hooks: dict[int, Any]) -> dict[int, Any]:
    """Those that may change what passes."""
    return {number: hook for number, hook in hooks.items() if not (isinstance(hook, ExitHook) or _is_tracker(hook))}


def _is_tracker(hook: Any) -> bool:
    """Whether a hook is one by which PyTorch's own counters notice where they are."""
    return type(getattr(hook, "__self__", None)).__module__ == "torch.utils.module_tracker"


def _are_equal(arrays: Sequence[NDArray[Any]], others: Sequence[NDArray[Any]]) -> bool:
    return len(arrays) == len(others) and all(
        a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in zip(arrays, others, strict=True)
    )


def _is_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (*_SIMPLE, dict)):
        return bool(a == b) or (a != a and b != b)
    return isinstance(a, MethodType) and a == b


class _Comparison:
    """What the compiled watch does, by comparison of whole dictionaries."""

    def __init__(self, entries: list[tuple[Any, frozenset[Any] | None]]) -> None:
        self._containers = [container for container, _ in entries]
        self._copies = [container.copy() for container in self._containers]
        self._skipped = [skipped or frozenset() for _, skipped in entries]

    def unchanged(self) -> bool:
        for now, before, skipped in zip(self._containers, self._copies, self._skipped, strict=True):
            if len(now) != len(before):
                return False
            if isinstance(now, dict):
                pairs: Iterator[Any] = ((now.get(k), v) for k, v in before.items() if k not in skipped)
            else:
                pairs = zip(now, before, strict=True)
            if not all(a is b for a, b in pairs):
                return False
        return True


def _watch(entries: list[tuple[Any, frozenset[Any] | None]]) -> Any:
    if importlib.util.find_spec("cet._C") is None:
        return _Comparison(entries)
    return importlib.import_module("cet._C").Watch(entries)


def changed_paths(before: Mapping[Path, Any], after: Mapping[Path, Any]) -> frozenset[Path]:
    """The paths whose entries differ."""
    missing = object()
    return frozenset(
        path
        for path in before.keys() | after.keys()
        if not _is_same(before.get(path, missing), after.get(path, missing))
    )
