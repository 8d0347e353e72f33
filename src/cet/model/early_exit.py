"""`EarlyExit`: any classifier as a multi-exit model whose samples leave when they are sure."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cet.callers import level_of_caller
from cet.data.batches import class_indices
from cet.model.building import (
    CheckedHeads,
    build_head,
    check_backbone,
    check_head,
    check_logits,
    check_train_output,
    refuse_second_names,
    requested_heads,
    submodule,
    warn_of_unused_mask,
    warn_of_unused_masks,
)
from cet.model.checkpoint import write_checkpoint
from cet.model.heads import ExitHead, HeadSpec
from cet.model.masks import looks_like_mask
from cet.model.output import ExitOutput, Explanation, LossOutput
from cet.model.taps import is_inside_reentrant_checkpoint, observing
from cet.model.traced import before_a_graph, entered_outside_of_graphs, may_begin_a_graph, number_of, traced_answer
from cet.model.transformers import SignedForward, example_inputs_for, layer_paths
from cet.ops.backend import is_tracing
from cet.partition.cache import StageCache
from cet.partition.inputs import Call, InputFormat, OtherInputsError, copied
from cet.partition.obstacles import is_sharded, obstacle_to_cutting
from cet.partition.stages import CutError, Program, check_classes, evaluating, first_tensor, logits_of
from cet.runtime import Capture, GraphRunner, RunnerName, check_runner, runner_for
from cet.runtime.eager import Answers, choose_answers, every_exit, run_batch
from cet.runtime.exits import head_logits
from cet.runtime.graphs import Request
from cet.runtime.policy import ExitPolicy, policy_from_tensor, policy_to_tensor
from cet.runtime.scores import Scorer, has_kernel, require_kernel

FINAL = "final"

_ATTEMPTS = 5
"""How often a call is begun at most, where it fails and the backbone has changed meanwhile."""

_EXTRA_STATE = "_extra_state"  # the name that PyTorch gives to what get_extra_state returns


class StagedBatch(NamedTuple):
    """The inputs of a call as the stages take them.

    Attributes:
        program: the stages.
        inputs: in the order of the backbone's signature; copies where the backbone changes its inputs.
        num_rows: of the batch.
        input_format: of such calls.
    """

    program: Program
    inputs: Sequence[Any]
    num_rows: int
    input_format: InputFormat


class InputWay(NamedTuple):
    """How calls with one set of inputs are answered."""

    input_format: InputFormat
    cache: StageCache


class EarlyExit(nn.Module):
    """A classifier whose samples may leave after chosen submodules.

    In train mode a call returns the logits of all ``E`` exits, a tuple of tensors ``(B, K)``, shallow first; the last
    is the backbone's own output. In eval mode it returns ``(B, K)``: each row from the first open exit whose score
    passes the policy's threshold, else from the last, in the order of the input. A row's answer does not depend on the
    other rows, and a row whose score is NaN never leaves early.

    The backbone stays the user's own module: its parameters are shared, never copied, and whatever changes it shows in
    the next call: an optimiser, ``load_state_dict``, ``.to()``, adapters, parametrizations, added or replaced
    submodules, the mode of one submodule, a hook, an attribute (:mod:`cet.partition.fingerprint` lists what is followed
    and what is not). Where it cannot be cut into stages any more, or not for the sizes of an input, the uncut backbone
    answers, with the same exits and nothing saved, and :class:`cet.UncutWarning` gives the reason once; :meth:`explain`
    gives it at any time. Any number of threads may call one model.

    Args:
        backbone: a module that returns logits ``(B, K)`` or an object with ``.logits``, or :class:`cet.Stages`. A
            single logit ``(B, 1)`` or ``(B,)`` counts as two classes
            with logits 0 and itself. The model takes over its mode.
        exits: the paths of the submodules after which a sample may leave, in the order of execution; or a mapping from
            path to head: an ``nn.Module`` that turns the first tensor that the submodule returns into ``(B, K)``, a
            :class:`cet.HeadSpec`, or ``None`` for the default, mean pooling and a linear layer.
        example_inputs: what one call of the backbone takes, with ``B >= 2`` rows: a tuple of positional inputs or a
            dict of keyword inputs. Sizes other than the batch may differ later.
        policy: when samples leave; every exit is closed when not given.
        runner: how batches run in eval mode, see :mod:`cet.runtime`: ``"eager"`` or ``"auto"`` anywhere, ``"graphs"``
            or ``"device"`` on CUDA devices, not measured yet. ``None`` is ``"eager"``. Calls that need gradients run
            eagerly. It can be assigned later, and is not saved: it belongs to the machine.

    Raises:
        ValueError: for an exit that is unknown, repeated, out of order or whose features the head cannot pool, for a
            value that crosses an exit without the batch as a dimension, and for a backbone that cannot be exported.
        TypeError: for inputs that do not fit the backbone, a backbone that returns no logits in train or eval mode, and
            one that is compiled, scripted or exported.
        RuntimeError: for ``runner="device"`` where it cannot run, with the reason. Whether inputs are on a CUDA device
            shows when they come.
    """

    accepts_loss_kwargs = False
    """Tells the Trainer of transformers that the loss is a mean, which it divides when it accumulates gradients."""

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
        self.number = number_of(self)
        self.weight_tables: list[dict[str, Any]] = []
        self.runner = runner
        requested = requested_heads(exits)
        modules = [submodule(check_backbone(backbone), path) for path in requested]
        refuse_second_names(requested, modules)
        self.exit_names = (*requested, FINAL)
        self._graphs = GraphRunner(self.exit_names)
        self._ignored_inputs: set[str] = set()
        self._ways: list[InputWay] = []
        self._without_mask: list[str] = []
        self._checked_heads = CheckedHeads()
        self.backbone = backbone
        input_format = InputFormat(backbone, example_inputs)
        with evaluating(backbone), torch.inference_mode(False):
            obstacle_to_cutting(backbone)  # first, for its refusals
            features, logits = self._run_example(input_format)
            self.num_classes = logits.shape[1]
            self.heads = nn.ModuleList(
                build_head(head, path, module, feature, self.num_classes, backbone, input_format)
                for (path, head), module, feature in zip(requested.items(), modules, features, strict=True)
            )
            self._without_mask = warn_of_unused_masks(requested, list(self.heads), features, input_format)
            self.policy = policy or ExitPolicy.closed(self.num_exits)
            self._ways = [self._way(input_format)]
            try:
                self._ways[0].cache.cut_now(self._example_values(input_format))
            except CutError:
                if self._ways[0].cache.obstacle is None:
                    raise
        self.training = backbone.training
        self.heads.train(backbone.training)

    @classmethod
    def from_transformers(cls, model: nn.Module, every: int = 2, example_inputs: Any = None, **more: Any) -> Self:
        """Wrap a classifier of Hugging Face transformers, with an exit behind every ``every``-th layer but the last.

        Args:
            model: such as ``AutoModelForSequenceClassification.from_pretrained(...)``.
            every: from 1 on, fewer than the layers.
            example_inputs: see :class:`EarlyExit`; made up from the model's config when not given.
            more: further arguments of :class:`EarlyExit`.

        Raises:
            TypeError, ValueError: for a model without a list of layers or without logits, one of whose inputs no
                example can be made up, and an ``every`` that leaves no exit.
        """
        exits = layer_paths(check_backbone(model), every)
        wrapped = cls(model, exits, example_inputs_for(model) if example_inputs is None else example_inputs, **more)
        wrapped.__dict__["forward"] = SignedForward(wrapped)
        return wrapped

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__.pop("forward", None)  # it calls the original
        replica.number = number_of(replica)
        return replica

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.number, self.weight_tables = number_of(self), []

    @entered_outside_of_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training and may_begin_a_graph():
            args, kwargs = before_a_graph(self, args, kwargs)
        return super().__call__(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "backbone":
            if isinstance(value, EarlyExit):
                raise ValueError(
                    "backbone is a cet.EarlyExit already; give its .backbone, with all exits that you want"
                )
            check_backbone(value)
        super().__setattr__(name, value)

    @property
    def num_exits(self) -> int:
        """``E``, the final exit counted."""
        return len(self.exit_names)

    @property
    def input_format(self) -> InputFormat:
        """The inputs of the example: their names, and which of them hold one row per sample."""
        return self._ways[0].input_format

    @property
    def policy(self) -> ExitPolicy:
        """When samples leave; part of ``state_dict()``. A :class:`cet.Calibration` may be assigned too.

        A policy with another number of thresholds is refused.
        """
        return self._policy

    @policy.setter
    def policy(self, policy: Any) -> None:
        policy = getattr(policy, "policy", policy)
        if not isinstance(policy, ExitPolicy):
            raise TypeError(f"policy is {policy!r}; give a cet.ExitPolicy or a cet.Calibration")
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

    def capture(self, batch_size: int) -> tuple[Capture, ...]:
        """Capture the graphs for batches of up to so many rows now, rather than in the first call.

        The example inputs, repeated, are run once, in the current autocast mode. Other kinds of inputs are captured
        when they come.

        Returns:
            What is captured, see :attr:`captures`; nothing where batches run eagerly.

        Raises:
            ValueError: for a batch size below 1.
            RuntimeError: in train mode.
        """
        self._require_eval("capture")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give at least 1")
        values = [
            value[torch.arange(batch_size, device=value.device) % len(value)] if batched else value
            for value, batched in zip(
                self._example_values(self.input_format), self.input_format.is_batched, strict=True
            )
        ]
        args, kwargs = self.input_format.unflatten(values)
        self.predict(*args, **kwargs)
        return self.captures

    def free_graphs(self) -> None:
        """Give the memory of the CUDA graphs back; the next call captures them again."""
        self._graphs.forget()

    @property
    def example_inputs(self) -> Call:
        """The example call ``(args, kwargs)``, on the device and in the dtype that the weights have now."""
        return self.input_format.unflatten(self._example_values(self.input_format))

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Logits of every exit in train mode; one answer per row in eval mode.

        With ``labels``, ``(B,)`` int64, -100 for rows to ignore, a :class:`cet.model.output.LossOutput` with the
        cross-entropy too: in train mode the mean over all exits, and the logits of the final one, else of the answers.
        """
        if labels is not None and "labels" in self.input_format.names:
            kwargs["labels"], labels = labels, None
        if labels is None:
            return self.exit_logits(*args, **kwargs) if self.training else self._answered(args, kwargs)
        labels = class_indices(args or kwargs, labels, self.num_classes)
        exits = self.exit_logits(*args, **kwargs) if self.training else (self._answered(args, kwargs),)
        losses = [F.cross_entropy(logits.float(), labels) for logits in exits]
        return LossOutput(loss=torch.stack(losses).mean(), logits=exits[-1])

    @torch.no_grad()
    def predict(self, *args: Any, **kwargs: Any) -> ExitOutput:
        """Answers with the exit that each row took and its score there, without gradients.

        Raises:
            RuntimeError: in train mode.
        """
        self._require_eval("predict")
        logits, exit_index, score = self.answer(args, kwargs)
        assert exit_index is not None
        assert score is not None
        return ExitOutput(logits, exit_index, score)

    def exit_logits(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """The logits of all ``E`` exits, tensors ``(B, K)``, shallow first, in either mode; no sample leaves.

        They are computed by the backbone itself, and carry gradients. An exit inside a reentrant
        ``torch.utils.checkpoint``, which would hide them, is refused.
        """
        way, inputs = self.bind(args, kwargs)
        with self._naming_unlike(way, inputs):
            return self._exit_logits(way, inputs)

    @torch.no_grad()
    def exit_answers(self, *args: Any, **kwargs: Any) -> tuple[tuple[Tensor, Tensor], ...]:
        """Logits ``(B, K)`` and scores ``(B,)`` of all ``E`` exits, computed as :meth:`predict` computes them.

        Raises:
            RuntimeError: in train mode.
        """
        self._require_eval("exit_answers")
        way, inputs = self.bind(args, kwargs)
        rows = way.input_format.num_rows(inputs)
        with self._naming_unlike(way, inputs):
            program = way.cache.program(inputs) if rows else None
            if program is not None:
                given = copied(inputs) if self._changes_inputs else inputs
                return tuple(every_exit(program, list(self.heads), self._policy, given, rows))
            exit_logits = self._exit_logits(way, inputs)
        scorer, temperature = Scorer(self._policy.score), self._policy.temperature
        return tuple((logits, scorer(logits, temperature(k))) for k, logits in enumerate(exit_logits))

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Compare the stages, which :meth:`predict` runs, with the backbone itself, at every exit and for such inputs.

        Raises:
            AnswerMismatchError: naming the first exit whose logits differ by more than rounding.
            RuntimeError: in train mode.
        """
        from cet.model.check import check_answers

        self._require_eval("check")
        check_answers(self, args, kwargs)

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """How a call with such inputs is answered now: by which stages, or why by the uncut backbone.

        Raises:
            RuntimeError: in train mode.
        """
        self._require_eval("explain")
        (input_format, cache), inputs = self.bind(args, kwargs)
        reason = cache.reason(inputs)
        programs = cache.programs
        program = next((program for program in programs if program.matches(inputs)), None)
        sizes = program.sizes if program else ()
        return Explanation(
            stages=self.exit_names if reason is None else (),
            dynamic_sizes=tuple(f"{input_format.names[index]}[{dim}]" for index, dim in sizes),
            num_programs=len(programs),
            reason=reason,
        )

    def stages_for(self, *args: Any, **kwargs: Any) -> Program:
        """The stages for such inputs, see :meth:`staged`."""
        return self.staged(*args, **kwargs).program

    def staged(self, *args: Any, **kwargs: Any) -> StagedBatch:
        """A batch of at least one row with its stages, which are cut now if need be: that may take seconds.

        Raises:
            CutError: where the uncut backbone has to answer, with the reason.
            RuntimeError: in train mode.
        """
        self._require_eval("staged")
        way, inputs = self.bind(args, kwargs)
        program = way.cache.cut_now(inputs)
        given = copied(inputs) if self._changes_inputs else inputs
        return StagedBatch(program, given, way.input_format.num_rows(inputs), way.input_format)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, heads, policy and input format to one safetensors file, atomically; the runner is not saved.

        Tensors go to the CPU; of the example inputs only shapes and dtypes are kept. Weights that torchao has quantised
        stay so, and the backbone that :func:`cet.load` is given has to be quantised alike.

        Raises:
            OSError: when the file cannot be written; an older file of this name is then untouched.
            TypeError: for weights that are no tensors, as those that torch.ao packs, or that several devices share.
        """
        heads = {
            name: head.to_dict() if type(head) is ExitHead else None
            for name, head in zip(self.exit_names, self.heads, strict=False)
        }
        description = {"heads": heads, "policy": self.policy.to_dict(), "inputs": self.input_format.to_dict()}
        tensors = {name: value for name, value in self.state_dict().items() if name != _EXTRA_STATE}
        write_checkpoint(path, tensors, description)

    def get_extra_state(self) -> Tensor:
        """The policy, as a tensor: every way to save a state dict takes tensors."""
        return policy_to_tensor(self.policy)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the policy out of a state dict.

        Raises:
            ValueError: when it is for other exits, or damaged.
        """
        self.policy = policy_from_tensor(state, self.policy.score)

    def extra_repr(self) -> str:
        return f"exits={self.exit_names}, policy={self.policy}"

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all submodules; in eval mode the next call compares the whole backbone with its stages."""
        for way in self._ways:
            way.cache.revalidate()
        return super().train(mode)

    def _require_eval(self, method: str) -> None:
        if self.training:
            raise RuntimeError(f"model is in train mode; call model.eval() before {method}")

    def _answered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return self.answer(args, kwargs, with_scores=False)[0]

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, with_scores: bool = True) -> Answers:
        """The answers of a call in eval mode, with gradients where they are recorded."""
        if torch.compiler.is_exporting() and is_tracing():  # the first is so in every thread, the second in this one
            return self._exported_answer(args, kwargs, with_scores=with_scores)
        if torch.compiler.is_dynamo_compiling():
            return traced_answer(self, args, kwargs)
        way, inputs = self.bind(args, kwargs)
        changes = way.cache.num_changes
        try:
            return self._answer(way, inputs, with_scores=with_scores)
        except (RuntimeError, ValueError) as error:
            failure, attempts = error, 1
        # Another thread may have changed the backbone in the midst of this call.
        while attempts < _ATTEMPTS and not (way.cache.num_changes == changes and way.cache.is_current()):
            changes = way.cache.num_changes
            try:
                return self._answer(way, inputs, with_scores=with_scores)
            except (RuntimeError, ValueError) as error:
                failure, attempts = error, attempts + 1
        try:
            with self._naming_unlike(way, inputs):
                raise failure
        finally:
            del failure  # its traceback holds this frame, and so the tensors of the call

    def _exported_answer(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, with_scores: bool) -> Answers:
        """What ``torch.export`` records, where every exit is closed: the backbone."""
        if any(threshold is not None for threshold in self._policy.thresholds):
            raise RuntimeError(
                "torch.export records no exits that samples take; write a file by cet.export(model, path), or export "
                "model.backbone"
            )
        logits = logits_of(self.backbone(*args, **kwargs))
        return choose_answers([logits] * self.num_exits, self._policy, with_scores=with_scores)

    @contextmanager
    def _naming_unlike(self, way: InputWay, inputs: Sequence[Any]) -> Iterator[None]:
        """Where PyTorch fails within, name an input that is of another dtype or other sizes than the example's."""
        try:
            yield
        except RuntimeError as error:
            unlike = way.input_format.unlike(inputs, next(self.backbone.parameters(), None))
            if type(error) is not RuntimeError or unlike is None:
                raise
            why = str(error).partition("\n")[0]
            raise RuntimeError(f"{unlike}, and the backbone fails on it ({why}); give what it takes") from error

    def _answer(self, way: InputWay, inputs: Sequence[Any], *, with_scores: bool) -> Answers:
        batch_size = way.input_format.num_rows(inputs)
        if batch_size == 0:
            weight = next(self.heads.parameters(), inputs[0])
            empty = weight.new_empty((0, self.num_classes))
            return empty, empty.new_empty((0,), dtype=torch.int64), empty.new_empty((0,), dtype=torch.float32)
        _refuse_recording()
        runner = runner_for(way.input_format.device(inputs), self._runner)
        if runner != "eager" and not has_kernel(self._policy.score):
            if self._runner != "auto":
                require_kernel(self._policy.score, f"the runner {runner!r}")
            runner = "eager"
        program = way.cache.program(inputs)
        if not self._checked_heads.are_current(self.heads):
            self._check_heads(way)
        records = torch.is_grad_enabled() and not is_tracing()
        if program is not None and records and not way.cache.has_gradients(program, inputs):
            program = None
        if program is None:
            if any(is_sharded(parameter) for parameter in self.heads.parameters()):
                raise RuntimeError(
                    "the heads' weights are sharded over processes and not gathered; call model(x), which gathers "
                    "them, rather than a method of it"
                )
            with way.cache.timed(inputs):
                return choose_answers(self._exit_logits(way, inputs), self._policy, with_scores=with_scores)
        heads = list(self.heads)
        if runner != "eager" and not is_tracing():
            is_batched, names = way.input_format.is_batched, way.input_format.names
            modules = (self.backbone, *heads)
            request = Request(program, modules, self._policy, inputs, is_batched, names, batch_size)
            answers = self._graphs.run(request, linked=runner == "device", with_scores=with_scores)
            if answers is not None:
                return answers
        given = copied(inputs) if self._changes_inputs else inputs
        return run_batch(program, heads, self._policy, given, batch_size, with_scores=with_scores)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _check_heads(self, way: InputWay) -> None:
        """See whether heads that were changed since they were checked still answer each row on its own."""
        if len(self.heads) != self.num_exits - 1:
            raise ValueError(
                f"the model has {len(self.heads)} heads for {self.num_exits - 1} early exits; give one each"
            )
        refuse_second_names(self.exit_names[:-1], [*map(self.backbone.get_submodule, self.exit_names[:-1])])
        if any(is_sharded(parameter) for parameter in self.parameters()):
            return
        inputs = self._example_values(way.input_format)
        features: dict[int, Tensor] = {}

        def keep(k: int, module_output: Any) -> None:
            features[k] = first_tensor(module_output).clone()

        args, kwargs = way.input_format.unflatten(copied(inputs))
        self.observe(args, kwargs, keep)
        self._require_all(features)
        for k, head in enumerate(self.heads):
            index = way.cache.masks[k]
            check_head(
                head, self.exit_names[k], features[k], self.num_classes, None if index is None else inputs[index]
            )
        self._checked_heads.accept(self.heads)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[InputWay, Sequence[Any]]:
        """How to answer a call, and its inputs in the order of the backbone's signature.

        A call may leave out optional inputs that the example had, or add some. Of a call by keywords alone, as a dict
        from a data collator, names that the backbone does not take are ignored with a warning.
        """
        ways = self._ways
        if ways[0].cache.backbone is not self._modules["backbone"]:
            for path in self.exit_names[:-1]:
                submodule(self.backbone, path)
            ways = self._ways = [self._way(way.input_format) for way in ways]
        try:
            return ways[0], ways[0].input_format.flatten(args, kwargs)
        except TypeError as error:
            if kwargs and not args:
                ignored = ways[0].input_format.unknown(kwargs)
                if ignored and len(ignored) < len(kwargs):
                    self._warn_of_ignored(ignored)
                    return self.bind((), {name: value for name, value in kwargs.items() if name not in ignored})
            if not isinstance(error, OtherInputsError):
                raise
            return self._bind_variant(args, kwargs, error)

    def _bind_variant(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], error: OtherInputsError
    ) -> tuple[InputWay, Sequence[Any]]:
        for way in self._ways[1:]:
            try:
                return way, way.input_format.flatten(args, kwargs)
            except OtherInputsError:
                continue
            except ValueError:
                if way.cache.is_used:
                    raise
                # Constants that no stages were cut with bind nobody.
                self._ways = [other for other in self._ways if other is not way]
        variant = self.input_format.variant(args, kwargs)
        if variant is None:
            raise error
        way = self._way(variant)
        inputs = variant.flatten(args, kwargs)
        self._warn_of_late_masks(variant)
        self._ways = [*self._ways, way]
        return way, inputs

    def _warn_of_late_masks(self, variant: InputFormat) -> None:
        known = {name for way in self._ways for name in way.input_format.names}
        for name in variant.names:
            if self._without_mask and name not in known and looks_like_mask(name):
                warn_of_unused_mask(name, self._without_mask)
        specs = [head.spec if isinstance(head, ExitHead) else None for head in self.heads]
        lacking = [
            path
            for path, spec in zip(self.exit_names, specs, strict=False)
            if spec is not None and spec.mask and spec.mask not in variant.names
        ]
        for name, value in zip(variant.names, variant.example, strict=True):
            if lacking and (looks_like_mask(name) or getattr(value, "dtype", None) == torch.bool):
                warn_of_unused_mask(name, lacking)

    def _warn_of_ignored(self, names: Iterable[str]) -> None:
        new = [name for name in names if name not in self._ignored_inputs]
        if new:
            self._ignored_inputs.update(new)
            warnings.warn(
                f"the backbone's forward takes no {', '.join(map(repr, new))}, which is ignored",
                stacklevel=level_of_caller(),
            )

    def first_batched(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The first of a call's inputs that holds one row per sample, by its name alone."""
        formats = [way.input_format for way in self._ways]
        batched = {name for f in formats for name, held in zip(f.names, f.is_batched, strict=True) if held}
        return next(value for name, value in self.input_format.by_name(args, kwargs) if name in batched)

    def _way(self, input_format: InputFormat) -> InputWay:
        masks, exits = self._masks(input_format), self.exit_names[:-1]
        return InputWay(input_format, StageCache(self.backbone, exits, input_format, masks, self.num_classes))

    def _masks(self, input_format: InputFormat) -> list[int | None]:
        """For each early exit which of the inputs is the mask of its head."""
        wanted = [head.spec.mask if isinstance(head, ExitHead) else False for head in self.heads]
        return [input_format.names.index(name) if name in input_format.names else None for name in wanted]

    def _example_values(self, input_format: InputFormat) -> list[Any]:
        return input_format.example_for(next(self.backbone.parameters(), None))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``.to()`` and the like call: the weights move, so that graphs which read them are of no more use."""
        self.free_graphs()
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        *more: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *more)
        if prefix + _EXTRA_STATE in missing_keys:  # saved before the policy was part of the state
            missing_keys.remove(prefix + _EXTRA_STATE)

    def observe(self, args: tuple[Any, ...], kwargs: dict[str, Any], at_exit: Callable[[int, Any], None]) -> Any:
        """Run the backbone, and call ``at_exit(k, output)`` with what the submodule of each early exit returns."""
        observers = {
            self.backbone.get_submodule(path): partial(at_exit, k) for k, path in enumerate(self.exit_names[:-1])
        }
        with observing(observers):
            return self.backbone(*args, **kwargs)

    def _exit_logits(self, way: InputWay, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
        features: dict[int, Tensor] = {}
        records = torch.is_grad_enabled()

        def keep(k: int, module_output: Any) -> None:
            if k in features:
                raise RuntimeError(
                    f"exit {self.exit_names[k]!r} is called twice in this forward pass, so it does not say where to "
                    "leave; name a submodule that is called once"
                )
            feature = first_tensor(module_output)
            if records and not torch.is_grad_enabled() and is_inside_reentrant_checkpoint():
                raise RuntimeError(
                    f"exit {self.exit_names[k]!r} is inside of torch.utils.checkpoint with use_reentrant=True, which "
                    "hides its gradients from the head; give use_reentrant=False"
                )
            features[k] = feature.clone() if k in self._rewritten else feature

        args, kwargs = way.input_format.unflatten(copied(inputs) if self._changes_inputs else inputs)
        output = self.observe(args, kwargs, keep)
        self._require_all(features)
        # Behind the backbone, so that what it checkpoints or compiles holds the backbone alone.
        masks = [None if index is None else inputs[index] for index in way.cache.masks]
        early = [head_logits(head, features[k], masks[k]) for k, head in enumerate(self.heads)]
        return (*early, check_classes(logits_of(output), self.num_classes))

    def _require_all(self, features: Mapping[int, Tensor]) -> None:
        for k, path in enumerate(self.exit_names[:-1]):
            if k not in features:
                raise RuntimeError(
                    f"exit {path!r} was not reached in this forward pass; name a submodule that every pass calls"
                )

    @torch.inference_mode(False)
    @torch.no_grad()
    def _run_example(self, input_format: InputFormat) -> tuple[list[Tensor], Tensor]:
        """Features of the early exits and logits for the example inputs; notes whether the backbone changes them."""
        features: dict[int, Tensor] = {}
        versions: dict[int, tuple[Tensor, int]] = {}
        num_calls = [0] * (self.num_exits - 1)

        def keep(k: int, module_output: Any) -> None:
            num_calls[k] += 1
            feature = first_tensor(module_output)
            if feature.is_nested:
                raise ValueError(
                    f"exit {self.exit_names[k]!r} gives a nested tensor; build nn.TransformerEncoder with "
                    "enable_nested_tensor=False"
                )
            features[k] = feature.clone()
            versions[k] = feature, feature._version

        given = copied(self._example_values(input_format))
        before = [value._version if isinstance(value, Tensor) else None for value in given]
        args, kwargs = input_format.unflatten(given)
        try:
            output = self.observe(args, kwargs, keep)
        except (RuntimeError, IndexError) as error:
            batched = zip(input_format.names, input_format.is_batched, strict=True)
            raise ValueError(
                f"the backbone fails on {input_format.batch_size} rows of example_inputs ({error}), where "
                f"{', '.join(name for name, held in batched if held)} were taken to hold one row per sample; "
                "give an example that the backbone takes"
            ) from error
        self._changes_inputs = any(
            isinstance(value, Tensor) and value._version != version
            for value, version in zip(given, before, strict=True)
        )
        self._rewritten = {k for k, (feature, version) in versions.items() if feature._version != version}
        logits = logits_of(output)
        check_logits(logits, input_format.batch_size)
        for path, calls in zip(self.exit_names, num_calls, strict=False):
            if calls == 0:
                raise ValueError(
                    f"exit {path!r} is not called in the forward pass; name a submodule that every pass calls"
                )
            if calls > 1:
                raise ValueError(
                    f"exit {path!r} is called {calls} times in one forward pass, so it does not say where to leave; "
                    "name a submodule that is called once"
                )
        args, kwargs = input_format.unflatten(copied(self._example_values(input_format)))
        check_train_output(self.backbone, args, kwargs)
        return [features[k] for k in range(self.num_exits - 1)], logits


def _refuse_recording() -> None:
    """Refuse ways to record or to map a call that cannot see where its samples leave."""
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "torch.jit.trace would record the exits that its example takes, for all inputs; trace model.backbone"
        )
    transforms = () if is_tracing() else torch._C._functorch.get_interpreter_stack() or ()
    if any(transform.key() == torch._C._functorch.TransformType.Vmap for transform in transforms):
        raise RuntimeError(
            "in eval mode samples cannot leave inside of torch.func.vmap; give all rows as one batch, or map "
            "model.exit_logits"
        )
