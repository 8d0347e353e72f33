"""The training objective: the same prediction on clean and perturbed input, at every exit.

An implementation of the objective of "Consistency Training of Multi-exit Architectures for Sensor Data" (arXiv
2109.13192) as far as its abstract states it, with arguments for what it leaves open.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cet.data.batches import Inputs, as_call, call, class_indices
from cet.model.early_exit import EarlyExit
from cet.ops.consistent_exit_loss import ExitLosses, Target, Teacher, check_loss_config, consistent_exit_loss
from cet.partition.inputs import Call


class ConsistentExitLoss:
    """Supervised and consistency loss of a multi-exit model.

    Args:
        perturb: maps the input of the model to a perturbed one of the same structure, shapes and dtypes; see
            :mod:`cet.perturb`.
        consistency_weight: weight of the consistency term; 0 leaves joint training of all exits on clean input, and
            the perturbed input is then never computed.
        target: ``"soft"`` matches the teacher's distribution, ``"hard"`` its most likely class.
        teacher: ``"self"``, each exit teaches itself, or ``"final"``, the last exit teaches all.
        min_confidence: rows whose teacher is less sure than this add no consistency term.
        exit_weights: one weight per exit, shallow first, the final one included; ``1 / E`` each when not given.

        allow_eval: whether layers that do something else in train mode, such as BatchNorm and Dropout, may be in eval
            mode while the model is in train mode. A part of the model all of whose parameters are frozen may be anyway.

    A call ``loss(model, x, y)`` runs the model once, on the clean and the perturbed rows together: batch statistics
    then see both, as they will at inference, and wrappers such as DistributedDataParallel see one pass. Inputs that all
    rows share, such as an adjacency matrix, are given once; :class:`cet.EarlyExit` knows them from its example, and of
    other models those are shared that do not have as many rows as ``y``. ``x`` is a tensor, a tuple of positional
    inputs or a dict of keyword inputs, and ``y`` the class indices, ``(B,)`` int64, -100 for rows without a label;
    :func:`cet.data.batches.split_batch` takes other batches apart, and :func:`cet.data.batches.class_indices` tells
    which other labels are taken. Returns the scalar float32 loss and :class:`cet.ops.ExitLosses` parts.

    Raises:
        ValueError: for arguments out of range, labels of wrong shape or range, a model in eval mode or partly so, a
            perturbation that changes shapes, dtypes or shared inputs, or a number of exit weights other than the
            model's exits.
        TypeError: for labels that name no class, and a model that does not return a tuple of logits.
    """

    def __init__(
        self,
        perturb: Callable[[Inputs], Inputs] | None,
        consistency_weight: float = 1.0,
        target: Target = "soft",
        teacher: Teacher = "self",
        min_confidence: float = 0.0,
        exit_weights: Sequence[float] | None = None,
        allow_eval: bool = False,
    ) -> None:
        check_loss_config(consistency_weight, target, teacher, min_confidence, exit_weights)
        if consistency_weight > 0 and not callable(perturb):
            raise TypeError(f"perturb is {perturb!r}; give a callable, or consistency_weight=0 for none")
        self.perturb = perturb
        self.consistency_weight = consistency_weight
        self.target: Target = target
        self.teacher: Teacher = teacher
        self.min_confidence = min_confidence
        self.exit_weights = None if exit_weights is None else tuple(exit_weights)
        self.allow_eval = allow_eval

    def __call__(self, model: nn.Module, x: Inputs, y: Tensor) -> tuple[Tensor, ExitLosses]:
        x = dict(x) if isinstance(x, Mapping) else x
        multi_exit = getattr(model, "module", model)  # inside DistributedDataParallel
        multi_exit = getattr(multi_exit, "_orig_mod", multi_exit)  # compiled
        y = class_indices(x, y, getattr(multi_exit, "num_classes", None))
        self._check_exit_weights(getattr(multi_exit, "num_exits", None))
        if not model.training:
            raise ValueError("model is in eval mode, where it gives one answer per row; call model.train() first")
        if not self.allow_eval:
            _check_modes(multi_exit)
        if self.consistency_weight == 0:
            clean = perturbed = _check_outputs(call(model, x), len(y))
        else:
            assert self.perturb is not None
            versions = [leaf._version for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
            perturbed_x = self.perturb(x)
            if versions != [leaf._version for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]:
                raise ValueError("perturb changes its input in place, and so the clean input too; return a new tensor")
            _check_same_kind(x, perturbed_x)
            args, kwargs = _stack(x, perturbed_x, len(y), multi_exit)
            outputs = _check_outputs(model(*args, **kwargs), 2 * len(y))
            clean = tuple(logits[: len(y)] for logits in outputs)
            perturbed = tuple(logits[len(y) :] for logits in outputs)
        self._check_exit_weights(len(clean))
        parts = consistent_exit_loss(
            clean,
            perturbed,
            y,
            consistency_weight=self.consistency_weight,
            target=self.target,
            teacher=self.teacher,
            min_confidence=self.min_confidence,
            exit_weights=self.exit_weights,
        )
        return parts.loss, parts

    def _check_exit_weights(self, num_exits: int | None) -> None:
        if self.exit_weights is not None and num_exits is not None and len(self.exit_weights) != num_exits:
            raise ValueError(
                f"exit_weights has {len(self.exit_weights)} entries but the model has {num_exits} exits; "
                "give one per exit, the final one included"
            )


def _check_outputs(outputs: Any, num_rows: int) -> tuple[Tensor, ...]:
    if not isinstance(outputs, tuple) or not all(isinstance(o, Tensor) and o.ndim == 2 for o in outputs):
        raise TypeError("model gives no tuple of (B, K) logits in train mode; wrap it in cet.EarlyExit")
    for logits in outputs:
        if len(logits) != num_rows:
            raise ValueError(
                f"model gives logits for {len(logits)} rows of {num_rows}; give one row of logits per sample"
            )
    return outputs


def _check_same_kind(clean: Inputs, perturbed: Inputs) -> None:
    clean_leaves, structure = pytree.tree_flatten(clean)
    perturbed_leaves, perturbed_structure = pytree.tree_flatten(perturbed)
    if structure != perturbed_structure:
        raise ValueError("perturb changes the structure of its input; return the same tuple or dict of tensors")
    for a, b in zip(clean_leaves, perturbed_leaves, strict=True):
        if isinstance(a, Tensor) and (not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype):
            got = f"{tuple(b.shape)} {b.dtype}" if isinstance(b, Tensor) else type(b).__name__
            raise ValueError(f"perturb turns {tuple(a.shape)} {a.dtype} into {got}; keep shape and dtype")


def _stack(clean: Inputs, perturbed: Inputs, num_rows: int, model: nn.Module) -> Call:
    """One call on the clean rows, then the perturbed rows; what is not batched is given once."""
    if isinstance(model, EarlyExit):
        (inputs, _), clean_values = model.bind(*as_call(clean))
        _, perturbed_values = model.bind(*as_call(perturbed))
        if inputs.num_rows(clean_values) != num_rows:
            raise ValueError(
                f"y has {num_rows} rows for {inputs.num_rows(clean_values)} rows of x; give one label per row"
            )
        return inputs.unflatten(_stacked(clean_values, perturbed_values, inputs.is_batched, inputs.names))
    leaves, structure = pytree.tree_flatten(as_call(clean))
    is_batched = [isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == num_rows for leaf in leaves]
    names = [f"input {index}" for index in range(len(leaves))]
    stacked = _stacked(leaves, pytree.tree_leaves(as_call(perturbed)), is_batched, names)
    args, kwargs = pytree.tree_unflatten(stacked, structure)
    return args, kwargs


def _stacked(
    clean: Sequence[Any], perturbed: Sequence[Any], is_batched: Sequence[bool], names: Sequence[str]
) -> list[Any]:
    stacked: list[Any] = []
    for a, b, batched, name in zip(clean, perturbed, is_batched, names, strict=True):
        if isinstance(a, Tensor) and batched:
            stacked.append(torch.cat([a, b]))
            continue
        if isinstance(a, Tensor) and a is not b and not bool(((a == b) | ((a != a) & (b != b))).all()):
            raise ValueError(f"perturb changes {name}, which all rows share; leave it as it is")
        stacked.append(a)
    return stacked


def _check_modes(model: nn.Module) -> None:
    """Refuse a model in train mode of which a layer that does something else there is in eval mode."""
    if all(module.training for module in model.modules()):
        return
    frozen: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module.training or module in frozen:
            continue
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            frozen.update(module.modules())
        elif _depends_on_mode(module):
            raise ValueError(
                f"{name} ({type(module).__name__}) is in eval mode while the model is in train mode; call "
                "model.train() on the whole model, or give allow_eval=True where that is meant"
            )


def _depends_on_mode(module: nn.Module) -> bool:
    """Whether a layer, its submodules aside, does something else in train mode."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return module.track_running_stats
    if type(module).__module__.startswith("torch.nn."):
        kinds = nn.modules.dropout._DropoutNd, nn.RNNBase, nn.MultiheadAttention
        return isinstance(module, nn.RReLU) or (isinstance(module, kinds) and any(_rates(module)))
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "training" in code.co_names and (any(_rates(module)) or not _rates(module))


def _rates(module: nn.Module) -> list[float]:
    """The probabilities of a layer that drops something."""
    values = (getattr(module, name, None) for name in ("p", "dropout", "drop_prob"))
    return [rate for value in values if isinstance(rate := getattr(value, "p", value), int | float)]
