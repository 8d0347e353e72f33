"""The training objective: the same prediction on clean and perturbed input, at every exit.

An implementation of the objective of "Consistency Training of Multi-exit Architectures for Sensor Data" (arXiv
2109.13192) as far as its abstract states it, with arguments for what it leaves open.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cet.data.batches import UNLABELLED, Inputs, as_call, call, class_indices
from cet.model.early_exit import EarlyExit
from cet.ops.consistent_exit_loss import ExitLosses, Target, Teacher, check_loss_config, consistent_exit_loss
from cet.partition.inputs import Call

TEACHERS = (*get_args(Teacher), "ema")


class ConsistentExitLoss:
    """Supervised and consistency loss of a multi-exit model.

    Args:
        perturb: maps the input of the model to a perturbed one of the same structure, shapes and dtypes; see
            :mod:`cet.perturb`. ``None``, with ``consistency_weight=0``, is joint training of all exits on clean input.
        consistency_weight: weight of the consistency term. 1 suits labels that can be trusted, 3 labels that are partly
            wrong or mostly missing; 10 makes exits collapse. 0 leaves the supervised terms alone.
        target: ``"soft"`` matches the teacher's distribution, ``"hard"`` its most likely class.
        teacher: whose answer on clean input counts: ``"mean"``, the average of all exits; ``"self"``, each exit's own,
            which drags a weak first exit down at larger weights; ``"final"``, that of the last exit; ``"ema"``, the
            average of all exits of a model whose weights are a moving average of those at each call so far (Tarvainen &
            Valpola 2017, arXiv 1703.01780), which costs a further pass over the clean rows.
        min_confidence: rows whose teacher is less sure than this add no consistency term. With ``target="hard"`` it
            must be above 0: guesses taught as if they were certain cost the first exit much of its accuracy.
        exit_weights: one weight per exit, shallow first, the final one included; ``1 / E`` each when not given.
        allow_eval: whether layers that do something else in train mode, such as BatchNorm and Dropout, may be in eval
            mode while the model is in train mode. A part of the model all of whose parameters are frozen may be anyway.
        supervise_perturbed: weight of the supervised term on the perturbed input. With ``consistency_weight=0`` the
            loss is data augmentation: cross-entropy on both copies. Where both are 0 the perturbed input is never
            computed.
        ema_decay: in [0, 1), of the moving average; early on it is that of a plain mean, where this is less.

    A call ``loss(model, x, y)`` runs the model once, on the clean and the perturbed rows together: batch statistics
    then see both, as they will at inference, and wrappers such as DistributedDataParallel see one pass. Inputs that all
    rows share, such as an adjacency matrix, are given once; :class:`cet.EarlyExit` knows them from its example, and of
    other models those are shared that do not have as many rows as ``y``. ``x`` is a tensor, a tuple of positional
    inputs or a dict of keyword inputs, and ``y`` the class indices, ``(B,)`` int64, -100 for rows without a label;
    :func:`cet.data.batches.split_batch` takes other batches apart, and :func:`cet.data.batches.class_indices` tells
    which other labels are taken. Returns the scalar float32 loss and its parts, float32 each, as ``ExitLosses``.

    Raises:
        ValueError: for arguments out of range, labels of wrong shape or range, a model in eval mode or partly so, a
            perturbation that changes shapes, dtypes or shared inputs, a number of exit weights other than the
            model's exits, a model of which nothing may be trained, or no exit that counts, a second model with the
            teacher ``"ema"``, and, where labels are on the CPU, a batch without
            any label when ``consistency_weight`` is 0.
        TypeError: for labels that name no class, and a model that does not return a tuple of logits.
    """

    def __init__(
        self,
        perturb: Callable[[Inputs], Inputs] | None,
        consistency_weight: float = 1.0,
        target: Target = "soft",
        teacher: Teacher | Literal["ema"] = "mean",
        min_confidence: float = 0.0,
        exit_weights: Sequence[float] | None = None,
        allow_eval: bool = False,
        *,
        supervise_perturbed: float = 1.0,
        ema_decay: float = 0.99,
    ) -> None:
        check_loss_config(
            consistency_weight, supervise_perturbed, target, teacher, min_confidence, exit_weights, teachers=TEACHERS
        )
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay is {ema_decay}; give a number in [0, 1)")
        if not (callable(perturb) or (perturb is None and consistency_weight == 0)):
            raise TypeError(f"perturb is {perturb!r}; give a callable, or None with consistency_weight=0")
        if target == "hard" and min_confidence == 0 and consistency_weight > 0:
            raise ValueError(
                "target 'hard' with min_confidence 0 teaches guesses as if they were certain; give min_confidence, "
                "such as 0.95, or target='soft'"
            )
        self.perturb = perturb
        self.consistency_weight = consistency_weight
        self.supervise_perturbed = supervise_perturbed
        self.target: Target = target
        self.teacher = teacher
        self.min_confidence = min_confidence
        self.exit_weights = None if exit_weights is None else tuple(exit_weights)
        self.allow_eval = allow_eval
        self._average = MovingAverage(ema_decay) if teacher == "ema" else None

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
        self._check_learnable(multi_exit, y)
        perturbs = self.perturb is not None and (self.consistency_weight > 0 or self.supervise_perturbed > 0)
        if perturbs:
            clean, perturbed = self._clean_and_perturbed(model, multi_exit, x, len(y))
        else:
            clean = perturbed = _check_outputs(call(model, x), len(y))
        self._check_exit_weights(len(clean))
        self._check_reachable((*clean, *perturbed))
        supervise_perturbed = self.supervise_perturbed if perturbs else 0.0
        if not perturbs or self._average is not None:
            parts = consistent_exit_loss(
                *(clean, perturbed, y),
                consistency_weight=0.0,
                supervise_perturbed=supervise_perturbed,
                teacher="self",
                exit_weights=self.exit_weights,
            )
        else:
            parts = self._taught(clean, perturbed, y, supervise_perturbed)
        if perturbs and self._average is not None and self.consistency_weight > 0:
            taught = self._taught(
                self._average.logits(multi_exit, x, len(y)), perturbed, torch.full_like(y, UNLABELLED), 0.0
            )
            parts = parts._replace(
                loss=parts.loss + taught.loss, consistency=taught.consistency, confident=taught.confident
            )
        return parts.loss, parts

    def _taught(
        self, clean: Sequence[Tensor], perturbed: Sequence[Tensor], y: Tensor, supervise_perturbed: float
    ) -> ExitLosses:
        return consistent_exit_loss(
            *(clean, perturbed, y),
            consistency_weight=self.consistency_weight,
            supervise_perturbed=supervise_perturbed,
            target=self.target,
            teacher="mean" if self.teacher == "ema" else self.teacher,
            min_confidence=self.min_confidence,
            exit_weights=self.exit_weights,
        )

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept to go on with training: the teacher ``"ema"``; empty for the others."""
        return {} if self._average is None else self._average.state_dict()

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Go on with what :meth:`state_dict` kept of training this model."""
        if self._average is not None and state:
            self._average.load_state_dict(model, state)

    def _clean_and_perturbed(
        self, model: nn.Module, multi_exit: nn.Module, x: Inputs, num_rows: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The logits of all exits, by one pass."""
        assert self.perturb is not None
        versions = _versions(x)
        perturbed_x = self.perturb(x)
        if versions != _versions(x):
            raise ValueError("perturb changes its input in place, and so the clean input too; return a new tensor")
        _check_same_kind(x, perturbed_x)
        args, kwargs = _stack(x, perturbed_x, num_rows, multi_exit)
        outputs = _check_outputs(model(*args, **kwargs), 2 * num_rows)
        return tuple(logits[:num_rows] for logits in outputs), tuple(logits[num_rows:] for logits in outputs)

    def _check_learnable(self, model: nn.Module, y: Tensor) -> None:
        """Refuse what would train nothing."""
        parameters = list(model.parameters())
        if parameters and torch.is_grad_enabled() and not any(parameter.requires_grad for parameter in parameters):
            raise ValueError("every parameter of the model is frozen, so no exit can learn; call requires_grad_(True)")
        looks = self.consistency_weight == 0 and y.device.type == "cpu" and not torch.compiler.is_dynamo_compiling()
        if looks and len(y) and bool((y == UNLABELLED).all()):
            raise ValueError(
                "no row of the batch has a label, and with consistency_weight 0 nothing else can be learnt from; give "
                "labelled rows in each batch, as cet.training.LabelledShare does, or consistency_weight > 0"
            )

    def _check_reachable(self, logits: Sequence[Tensor]) -> None:
        """Refuse a step in which every exit that counts is frozen, up to its head."""
        weights = self.exit_weights or (1.0,) * (len(logits) // 2)
        learns = [x.requires_grad for x, weight in zip(logits, (*weights, *weights), strict=True) if weight > 0]
        # A model without parameters has no gradients at all.
        if torch.is_grad_enabled() and not any(learns) and any(x.requires_grad for x in logits):
            raise ValueError(
                "every exit with a weight above 0 is frozen, with all that is before it, so nothing can learn; call "
                "requires_grad_(True) on its head, or give exit_weights to the exits that are trained"
            )

    def _check_exit_weights(self, num_exits: int | None) -> None:
        if self.exit_weights is not None and num_exits is not None and len(self.exit_weights) != num_exits:
            raise ValueError(
                f"exit_weights has {len(self.exit_weights)} entries but the model has {num_exits} exits; "
                "give one per exit, the final one included"
            )


class MovingAverage:
    """A model whose weights and buffers are a moving average of another's."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.of: nn.Module | None = None
        self.model: nn.Module | None = None
        self.count = 0

    @torch.no_grad()
    def logits(self, model: nn.Module, x: Inputs, num_rows: int) -> tuple[Tensor, ...]:
        """What the average answers in train mode, the weights that the model has now taken in."""
        if self.of is not None and self.of is not model:
            raise ValueError(
                "teacher 'ema' averages the weights of another model already; make a cet.ConsistentExitLoss per model"
            )
        self.of = model
        average = self.model = self.model or copy.deepcopy(model).requires_grad_(False)
        weight = max(1.0 - self.decay, 1.0 / (self.count + 1))
        self.count += 1
        for mine, theirs in zip(_tensors(average), _tensors(model), strict=True):
            if mine.is_floating_point():
                mine.lerp_(theirs.to(mine.device), weight)
            else:
                mine.copy_(theirs)
        return _check_outputs(call(average.train(), x), num_rows)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.model is None else {"count": self.count, "model": self.model.state_dict()}

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        self.of = model
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.model.load_state_dict(state["model"])
        self.count = state["count"]


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def check_finite(loss: Tensor, x: Inputs) -> None:
    """Refuse to take a step from a loss that is not finite; on the CPU alone, as looking waits for a GPU.

    Raises:
        RuntimeError: then.
    """
    if loss.device.type != "cpu" or bool(loss.isfinite()):
        return
    for leaf in pytree.tree_leaves(x):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim:
            bad = (~leaf.isfinite()).flatten(1).any(dim=1).nonzero() if leaf.ndim > 1 else (~leaf.isfinite()).nonzero()
            if len(bad):
                raise RuntimeError(
                    f"the loss is {loss.item()}, as {len(bad)} of {len(leaf)} rows of the batch are not finite, first "
                    f"row {int(bad[0])}; leave them out, or fill in what is missing"
                )
    raise RuntimeError(
        f"the loss is {loss.item()}, though the batch is finite; give a lower learning_rate, a perturb that gives "
        "finite values, and train float16 models in float32 or bfloat16"
    )


def _versions(x: Inputs) -> list[int]:
    """How often each tensor was changed in place; nothing where a graph is recorded, which does not know."""
    if torch.compiler.is_dynamo_compiling():
        return []
    return [leaf._version for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)]


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
