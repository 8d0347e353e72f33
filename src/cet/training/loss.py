"""The training objective: the same prediction on clean and perturbed input, at every exit.

An implementation of the objective of "Consistency Training of Multi-exit Architectures for Sensor Data" (arXiv
2109.13192) as far as its abstract states it, with switches for what it leaves open.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cet.data.batches import Inputs, call, check_batch
from cet.ops.consistent_exit_loss import ExitLosses, Target, Teacher, check_loss_config, consistent_exit_loss


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

    Calling it with ``(model, x, y)`` runs the model once, on the clean and the perturbed rows together: batch
    statistics then see both, as they will at inference, and wrappers such as DistributedDataParallel see one pass.
    ``x`` is a tensor, a tuple of positional inputs or a dict of keyword inputs; ``y`` is ``(B,)`` int64, -100 for rows
    without a label. Returns the scalar float32 loss and :class:`cet.ops.ExitLosses` parts.

    Raises:
        ValueError: for switches out of range, labels of wrong shape or range, a perturbation that changes shapes or
            dtypes, or a number of exit weights other than the model's exits.
        TypeError: for labels that are not integers.
    """

    def __init__(
        self,
        perturb: Callable[[Inputs], Inputs] | None,
        consistency_weight: float = 1.0,
        target: Target = "soft",
        teacher: Teacher = "self",
        min_confidence: float = 0.0,
        exit_weights: Sequence[float] | None = None,
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

    def __call__(self, model: nn.Module, x: Inputs, y: Tensor) -> tuple[Tensor, ExitLosses]:
        x = dict(x) if isinstance(x, Mapping) else x
        multi_exit = getattr(model, "module", model)  # inside DistributedDataParallel
        batch = check_batch(x, y, getattr(multi_exit, "num_classes", None))
        self._check_exit_weights(getattr(multi_exit, "num_exits", None))
        if not model.training:
            raise ValueError("model is in eval mode, where it gives one answer per row; call model.train() first")
        if self.consistency_weight == 0:
            clean = perturbed = _check_outputs(call(model, x))
        else:
            assert self.perturb is not None
            versions = [leaf._version for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]
            perturbed_x = self.perturb(x)
            if versions != [leaf._version for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]:
                raise ValueError("perturb changes its input in place, and so the clean input too; return a new tensor")
            outputs = _check_outputs(call(model, _stack(x, perturbed_x)))
            clean = tuple(logits[:batch] for logits in outputs)
            perturbed = tuple(logits[batch:] for logits in outputs)
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


def _check_outputs(outputs: Any) -> tuple[Tensor, ...]:
    if not isinstance(outputs, tuple) or not all(isinstance(o, Tensor) and o.ndim == 2 for o in outputs):
        raise TypeError("model gives no tuple of (B, K) logits in train mode; wrap it in cet.EarlyExit")
    return outputs


def _stack(clean: Inputs, perturbed: Inputs) -> Inputs:
    """Clean rows, then perturbed rows."""
    clean_leaves, structure = pytree.tree_flatten(clean)
    perturbed_leaves, perturbed_structure = pytree.tree_flatten(perturbed)
    if structure != perturbed_structure:
        raise ValueError("perturb changes the structure of its input; return the same tuple or dict of tensors")
    for a, b in zip(clean_leaves, perturbed_leaves, strict=True):
        if isinstance(a, Tensor) and (not isinstance(b, Tensor) or a.shape != b.shape or a.dtype != b.dtype):
            got = f"{tuple(b.shape)} {b.dtype}" if isinstance(b, Tensor) else type(b).__name__
            raise ValueError(f"perturb turns {tuple(a.shape)} {a.dtype} into {got}; keep shape and dtype")
    stacked = [
        torch.cat([a, b]) if isinstance(a, Tensor) else a for a, b in zip(clean_leaves, perturbed_leaves, strict=True)
    ]
    return pytree.tree_unflatten(stacked, structure)
