"""`EarlyExit`: any classifier as a multi-exit model whose samples leave when they are sure."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cet.model.checkpoint import read_checkpoint, write_checkpoint
from cet.model.heads import ExitHead, HeadSpec
from cet.ops.backend import is_tracing
from cet.partition.cache import TRACE_LOCK, Staging
from cet.partition.inputs import Call, InputFormat, copies
from cet.partition.stages import StagedProgram, evaluating, first_tensor, logits_of
from cet.runtime import Capture, GraphRunner, RunnerName, check_runner, runner_for
from cet.runtime.eager import run_batch
from cet.runtime.graphs import Request
from cet.runtime.policy import ExitPolicy

FINAL = "final"


@dataclass(frozen=True)
class ExitOutput:
    """One answer per row of the batch, in the order of the input.

    Attributes:
        logits: ``(B, K)``, from the exit that the row took.
        exit_index: ``(B,)`` int64, that exit; ``E - 1`` is the final one.
        score: ``(B,)`` float32, the policy's score of the row at that exit.
    """

    logits: Tensor
    exit_index: Tensor
    score: Tensor

    @property
    def labels(self) -> Tensor:
        """``(B,)`` int64, the most likely class of each row."""
        return self.logits.argmax(dim=1)


class EarlyExit(nn.Module):
    """A classifier whose samples may leave after chosen submodules.

    In train mode a call returns the logits of all ``E`` exits, a tuple of tensors ``(B, K)``, shallow first; the last
    is the backbone's own output. In eval mode it returns ``(B, K)``: each row from the first open exit whose score
    passes the policy's threshold, else from the last, in the order of the input. A row's answer does not depend on the
    other rows, and a row whose score is NaN never leaves early.

    The backbone stays the user's own module: its parameters are shared, never copied, and whatever changes them
    (an optimiser, ``load_state_dict``, ``.to()``, ``.half()``) shows in the next call. Its forward hooks and plain
    attributes, such as a stride, are in the stages as they were when these were cut: set them before.

    Args:
        backbone: a module that returns logits ``(B, K)`` or an object with ``.logits``, or :class:`cet.Stages`.
        exits: the paths of the submodules after which a sample may leave, in the order of execution; or a mapping from
            path to head: an ``nn.Module`` that turns the first tensor that the submodule returns into ``(B, K)``, a
            :class:`cet.HeadSpec`, or ``None`` for the default, mean pooling and a linear layer.
        example_inputs: what one call of the backbone takes, with ``B >= 2`` rows: a tuple of positional inputs or a
            dict of keyword inputs. Sizes other than the batch may differ later; the stages are then cut again.
        policy: when samples leave; every exit is closed when not given.
        runner: how batches run in eval mode, see :mod:`cet.runtime`: ``"eager"`` anywhere, ``"graphs"`` or ``"device"``
            on CUDA devices, not measured yet. ``None`` is ``"eager"``. Calls that need gradients run eagerly. It can be
            assigned later, and is not saved: it belongs to the machine.

    Raises:
        ValueError: for an exit that is unknown, repeated, out of order or whose features the head cannot pool, for a
            value that crosses an exit without the batch as a dimension, and for a backbone that cannot be exported.
        TypeError: for inputs that do not fit the backbone and a backbone that returns no logits.
        RuntimeError: for ``runner="device"`` where it cannot run, with the reason. Whether inputs are on a CUDA device
            shows when they come.
    """

    def __init__(
        self,
        backbone: nn.Module,
        exits: Sequence[str] | Mapping[str, nn.Module | HeadSpec | None],
        example_inputs: Any,
        *,
        policy: ExitPolicy | None = None,
        runner: RunnerName | None = None,
    ) -> None:
        super().__init__()
        self.runner = runner
        requested = _requested_heads(exits)
        modules = [_submodule(backbone, path) for path in requested]
        self.backbone = backbone
        self.exit_names = (*requested, FINAL)
        self._graphs = GraphRunner(self.exit_names)
        self._inputs = InputFormat(backbone, example_inputs)
        features, logits = self._run_example()
        self.num_classes = logits.shape[1]
        self.heads = nn.ModuleList(
            _build_head(head, path, module, feature, self.num_classes)
            for (path, head), module, feature in zip(requested.items(), modules, features, strict=True)
        )
        self.policy = policy or ExitPolicy.closed(self.num_exits)
        self._staging = Staging(backbone, tuple(requested), self._inputs)
        self._staging.program(backbone, self._inputs.example_for(next(backbone.parameters(), None)))

    @property
    def num_exits(self) -> int:
        """``E``, the final exit counted."""
        return len(self.exit_names)

    @property
    def policy(self) -> ExitPolicy:
        """When samples leave. Assigning a policy with another number of thresholds is refused."""
        return self._policy

    @policy.setter
    def policy(self, policy: ExitPolicy) -> None:
        if not isinstance(policy, ExitPolicy):
            raise TypeError(f"policy is {policy!r}; give a cet.ExitPolicy")
        policy.check_num_exits(self.num_exits)
        self._policy = policy

    @property
    def runner(self) -> RunnerName | None:
        """How batches run in eval mode, see :mod:`cet.runtime`; ``None`` is ``"eager"``."""
        return self._runner

    @runner.setter
    def runner(self, runner: RunnerName | None) -> None:
        check_runner(runner)
        self._runner = runner

    @property
    def captures(self) -> tuple[Capture, ...]:
        """The CUDA graphs that are kept, with their buckets and memory; latest first."""
        return self._graphs.captures

    def free_graphs(self) -> None:
        """Give the memory of the CUDA graphs back; the next call captures them again."""
        self._graphs.forget()

    @property
    def example_inputs(self) -> Call:
        """The example call ``(args, kwargs)``, on the device and in the dtype that the weights have now."""
        weight = next(self.backbone.parameters(), None)
        return self._inputs.unflatten(self._inputs.example_for(weight))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        """Logits of every exit in train mode; one answer per row in eval mode."""
        if self.training:
            return self.exit_logits(*args, **kwargs)
        return self._answer(args, kwargs, with_scores=False)[0]

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> ExitOutput:
        """Answers with the exit that each row took and its score there, without gradients.

        Raises:
            RuntimeError: in train mode.
        """
        if self.training:
            raise RuntimeError("model is in train mode; call model.eval() before predict")
        logits, exit_index, score = self._answer(args, kwargs, with_scores=True)
        assert exit_index is not None
        assert score is not None
        return ExitOutput(logits, exit_index, score)

    def exit_logits(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The logits of all ``E`` exits, tensors ``(B, K)``, shallow first, in either mode; no sample leaves."""
        logits: list[Tensor | None] = [None] * (self.num_exits - 1)

        def classify(k: int, module_output: Any) -> None:
            # At once, before the backbone may change the features in place.
            feature = first_tensor(module_output)
            logits[k] = self.heads[k](feature.clone() if k in self._rewritten else feature)

        if self._changes_inputs:
            args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        output = self._run_backbone(args, kwargs, classify)
        for path, value in zip(self.exit_names, logits, strict=False):
            if value is None:
                raise RuntimeError(
                    f"exit {path!r} was not reached in this forward pass; name a submodule that every pass calls"
                )
        return (*(value for value in logits if value is not None), logits_of(output))

    def stages_for(self, *args: Any, **kwargs: Any) -> StagedProgram:
        """The stages that a call with such inputs runs, at least one row; for those who time or export them."""
        return self._staging.program(self.backbone, self._inputs.flatten(args, kwargs))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, heads, policy and input format to one safetensors file, atomically; the runner is not saved.

        Tensors go to the CPU; of the example inputs only shapes and dtypes are kept.

        Raises:
            OSError: when the file cannot be written; an older file of this name is then untouched.
        """
        heads = {
            name: head.to_dict() if type(head) is ExitHead else None
            for name, head in zip(self.exit_names, self.heads, strict=False)
        }
        description = {
            "heads": heads,
            "policy": self.policy.to_dict(),
            "inputs": self._inputs.to_dict(),
        }
        write_checkpoint(path, self.state_dict(), description)

    def extra_repr(self) -> str:
        return f"exits={self.exit_names}, policy={self.policy}"

    def _answer(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, with_scores: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        leaves = self._inputs.flatten(args, kwargs)
        batch_size = self._inputs.num_rows(leaves)
        if batch_size == 0:
            weight = next(self.heads.parameters(), leaves[0])
            empty = weight.new_empty((0, self.num_classes))
            return empty, empty.new_empty((0,), dtype=torch.int64), empty.new_empty((0,), dtype=torch.float32)
        for may_have_changed in (True, False):
            program = self._staging.program(self.backbone, leaves)
            try:
                with TRACE_LOCK:
                    return self._run_batch(program, leaves, batch_size, with_scores=with_scores)
            except KeyError:
                # A weight has another name since the cut: pruning and parametrizations rename them.
                if not may_have_changed:
                    raise
                self._staging.forget()
        raise AssertionError("unreachable: the second turn returns or raises")

    def _run_batch(
        self, program: StagedProgram, leaves: Sequence[Any], batch_size: int, *, with_scores: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        heads = list(self.heads)
        runner = runner_for(self._inputs.device(leaves), self._runner)
        if runner != "eager" and not is_tracing():
            inputs = self._inputs
            request = Request(
                program, (self.backbone, *heads), self._policy, leaves, inputs.is_batched, inputs.names, batch_size
            )
            answers = self._graphs.run(request, linked=runner == "device", with_scores=with_scores)
            if answers is not None:
                return answers
        given = copies(leaves) if self._changes_inputs else leaves
        return run_batch(program, heads, self._policy, given, batch_size, with_scores=with_scores)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``.to()`` and the like call: the weights move, so that graphs which read them are of no more use."""
        self.free_graphs()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _run_backbone(self, args: tuple[Any, ...], kwargs: dict[str, Any], at_exit: Callable[[int, Any], None]) -> Any:
        """Run the eager backbone and hand the output of each exit's submodule to ``at_exit``."""
        with TRACE_LOCK, ExitStack() as hooks:
            for k, path in enumerate(self.exit_names[:-1]):

                def hook(_module: nn.Module, _inputs: Any, output: Any, k: int = k) -> None:
                    at_exit(k, output)

                hooks.callback(self.backbone.get_submodule(path).register_forward_hook(hook).remove)
            return self.backbone(*args, **kwargs)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _run_example(self) -> tuple[list[Tensor], Tensor]:
        """Features of the early exits and logits for the example inputs; notes whether the backbone changes them."""
        features: dict[int, Tensor] = {}
        written: dict[int, tuple[Tensor, int]] = {}

        def keep(k: int, module_output: Any) -> None:
            feature = first_tensor(module_output)
            if feature.is_nested:
                raise ValueError(
                    f"exit {self.exit_names[k]!r} gives a nested tensor; build nn.TransformerEncoder with "
                    "enable_nested_tensor=False"
                )
            features[k] = feature.clone()
            written[k] = feature, feature._version

        given = copies(self._inputs.example_for(next(self.backbone.parameters(), None)))
        versions = [leaf._version if isinstance(leaf, Tensor) else None for leaf in given]
        args, kwargs = self._inputs.unflatten(given)
        with evaluating(self.backbone):
            try:
                output = self._run_backbone(args, kwargs, keep)
            except (RuntimeError, IndexError) as error:
                batched = zip(self._inputs.names, self._inputs.is_batched, strict=True)
                raise ValueError(
                    f"the backbone fails on {self._inputs.batch_size} rows of example_inputs ({error}), where "
                    f"{', '.join(name for name, held in batched if held)} were taken to hold one row per sample; "
                    "give an example that the backbone takes"
                ) from error
        self._changes_inputs = any(
            isinstance(leaf, Tensor) and leaf._version != version for leaf, version in zip(given, versions, strict=True)
        )
        self._rewritten = {k for k, (feature, version) in written.items() if feature._version != version}
        logits = logits_of(output)
        if logits.ndim != 2 or logits.shape[0] != self._inputs.batch_size or logits.shape[1] < 2:
            raise ValueError(
                f"the backbone returns logits of shape {tuple(logits.shape)} for {self._inputs.batch_size} rows; "
                "it must return (B, K) with at least two classes"
            )
        for k, path in enumerate(self.exit_names[:-1]):
            if k not in features:
                raise ValueError(
                    f"exit {path!r} is not called in the forward pass; name a submodule that every pass calls"
                )
        return [features[k] for k in range(self.num_exits - 1)], logits


def load(
    path: str | os.PathLike[str],
    backbone: nn.Module,
    *,
    heads: Mapping[str, nn.Module] | None = None,
) -> EarlyExit:
    """Read what :meth:`EarlyExit.save` wrote, into a backbone of the same architecture.

    Args:
        path: the file.
        backbone: a module whose parameters and buffers have the names and shapes of the saved ones; they are
            overwritten.
        heads: the modules of those exits whose heads were the user's own, by exit path.

    Returns:
        The model in eval mode, with its policy.

    Raises:
        ValueError: when the file is damaged or of another kind, or backbone or heads differ from the saved ones; the
            differences are named and ``backbone`` is unchanged.
        OSError: when the file cannot be read.
    """
    tensors, description = read_checkpoint(path)
    weight = next(backbone.parameters(), None)
    try:
        with torch.random.fork_rng(devices=[]):
            saved_heads = {name: head and ExitHead(**head) for name, head in description["heads"].items()}
            example = InputFormat.example_from(description["inputs"], weight)
        policy = ExitPolicy(**description["policy"])
        policy.check_num_exits(len(saved_heads) + 1)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged: its header cannot be read ({error}); save it again") from error
    exits = _with_own_heads(path, saved_heads, heads or {})
    wanted = {"backbone." + name: value for name, value in backbone.state_dict().items()}
    for index, head in enumerate(exits.values()):
        wanted |= {f"heads.{index}.{name}": value for name, value in head.state_dict().items()}
    _check_same_tensors(path, wanted, tensors)
    if weight is not None:
        for head in exits.values():
            head.to(device=weight.device, dtype=weight.dtype)
    model = EarlyExit(backbone, exits, example)
    model.load_state_dict(tensors)
    model.policy = policy
    return model.eval()


def _with_own_heads(
    path: str | os.PathLike[str], saved: Mapping[str, nn.Module | None], own: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """The heads of all exits: those that the file describes, and the user's own for the others."""
    wanted = [name for name, head in saved.items() if head is None]
    for name in wanted:
        if name not in own:
            raise ValueError(
                f"{path}: the head of exit {name!r} was a module of your own; pass it as heads={{{name!r}: ...}}"
            )
    for name in own:
        if name not in wanted:
            raise ValueError(f"{path} asks for no head of exit {name!r}; leave it out of heads")
    return {name: own[name] if head is None else head for name, head in saved.items()}


def _check_same_tensors(path: Any, wanted: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    missing = [f"{name} is not in the file" for name in wanted.keys() - saved.keys()]
    surplus = [f"{name} is not in the model" for name in saved.keys() - wanted.keys()]
    reshaped = [
        f"{name} is {tuple(saved[name].shape)} in the file and {tuple(wanted[name].shape)} in the model"
        for name in wanted.keys() & saved.keys()
        if saved[name].shape != wanted[name].shape
    ]
    differences = sorted(missing + surplus + reshaped)
    if differences:
        more = f" and {len(differences) - 4} more" if len(differences) > 4 else ""
        raise ValueError(
            f"{path} was saved from another architecture: {'; '.join(differences[:4])}{more}; "
            "pass the backbone that it was saved from"
        )


def _requested_heads(
    exits: Sequence[str] | Mapping[str, nn.Module | HeadSpec | None],
) -> dict[str, nn.Module | HeadSpec | None]:
    if isinstance(exits, str):
        raise TypeError(f"exits is the string {exits!r}; give a list of submodule paths")
    requested: dict[str, nn.Module | HeadSpec | None] = {}
    for path in exits:
        if not isinstance(path, str):
            raise TypeError(f"exits holds {path!r}; give submodule paths as strings")
        if path in requested:
            raise ValueError(f"exit {path!r} is repeated; name each submodule once")
        head = exits[path] if isinstance(exits, Mapping) else None
        if not (head is None or isinstance(head, (nn.Module, HeadSpec))):
            raise TypeError(f"exit {path!r} has the head {head!r}; give an nn.Module, a cet.HeadSpec or None")
        requested[path] = head
    if not requested:
        raise ValueError("exits is empty; name at least one submodule after which a sample may leave")
    return requested


def _submodule(backbone: nn.Module, path: str) -> nn.Module:
    try:
        if path:
            return backbone.get_submodule(path)
    except AttributeError:
        pass
    known = [name for name, _ in backbone.named_modules() if name]
    close = difflib.get_close_matches(path, known, n=3) or known[:3]
    raise ValueError(
        f"exit {path!r} is no submodule of {type(backbone).__name__}; did you mean {' or '.join(map(repr, close))}?"
    )


def _build_head(
    head: nn.Module | HeadSpec | None, path: str, module: nn.Module, feature: Tensor, num_classes: int
) -> nn.Module:
    if not isinstance(head, nn.Module):
        return (head or HeadSpec()).build(path, module, feature, num_classes)
    with evaluating(head):
        try:
            logits = head(feature)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"the head of exit {path!r} fails on its features of shape {tuple(feature.shape)}: {error}"
            ) from error
    expected = (feature.shape[0], num_classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the head of exit {path!r} gives {got}; it must give logits of shape {expected}")
    with evaluating(head), torch.no_grad():
        alone = torch.cat([head(feature[row : row + 1]) for row in range(len(feature))])
    logits = logits.detach()
    if not torch.allclose(alone, logits, rtol=1e-2, atol=1e-2 * float(logits.abs().nan_to_num().max()), equal_nan=True):
        raise ValueError(
            f"the head of exit {path!r} mixes the rows of a batch; compute the logits of each row on its own"
        )
    return head
