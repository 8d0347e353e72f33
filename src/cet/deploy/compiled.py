"""`cet.compile`: a model in the fastest runtime of this process, found by measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from cet.deploy.check import compare, of_right_sizes
from cet.deploy.description import ExportError
from cet.deploy.export import as_call, describe
from cet.deploy.loaded import LoadedModel
from cet.deploy.segments import export_segments
from cet.measure.host import installed_version
from cet.measure.rounds import Timings, time_calls
from cet.measure.timers import wall_clock
from cet.model.check import AnswerMismatchError
from cet.model.early_exit import EarlyExit
from cet.model.output import ExitOutput
from cet.model.traced import weight_tables
from cet.partition.fingerprint import Fingerprint
from cet.partition.inputs import Call, InputFormat

PYTORCH, ONNX = "pytorch", "onnxruntime"

_SECONDS = 0.5


class CompiledModel:
    """What :func:`cet.compile` returns. As text it says which runtime answers, and why.

    Attributes:
        runtime: ``"onnxruntime"``, or ``"pytorch"``: the model itself.
        timings: of one call with the example, by runtime.
        reasons: why a runtime was not measured, by its name.
        num_rows: how many rows a call must have for the runtime to answer it, None for any number; other calls are
            answered by the model itself.
    """

    def __init__(
        self,
        model: EarlyExit,
        loaded: LoadedModel | None,
        input_format: InputFormat,
        timings: Timings[str],
        reasons: Mapping[str, str],
    ) -> None:
        self.model = model
        self.runtime = PYTORCH if loaded is None else ONNX
        self.timings, self.reasons = timings, reasons
        self.num_rows = None if loaded is None else loaded.description.batch
        self._loaded, self._format = loaded, input_format
        self._seal = None if loaded is None else Seal(model)
        self._checked: list[Any] = []
        self._plain: list[Any] = []
        self._taken = [] if loaded is None else [given.name for given in loaded.description.inputs]

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The logits ``(B, K)`` of :meth:`predict`."""
        return self.predict(*args, **kwargs).logits

    def predict(self, *args: Any, **kwargs: Any) -> ExitOutput:
        """Answer every row of a batch, as :meth:`cet.EarlyExit.predict` does.

        Raises:
            RuntimeError: where the model has changed since it was compiled: its weights, policy or mode, or its code.
            TypeError, ValueError: for inputs that the model does not take.
        """
        loaded = self._loaded
        if loaded is None or self._seal is None:
            return self.model.predict(*args, **kwargs)
        self._seal.check()
        if not kwargs and self._plain and _kinds(args) == self._plain:  # calls of one kind are looked at once
            return self._run(args)
        way, given = self.model.bind(args, kwargs)
        if way.input_format is not self._format:  # with an optional input more or less
            return self.model.predict(*args, **kwargs)
        inputs = given
        if len(self._taken) != len(given):
            inputs = [value for name, value in zip(way.input_format.names, given, strict=True) if name in self._taken]
        kinds = _kinds(inputs)
        if kinds == self._checked:
            return self._run(inputs)
        rows = way.input_format.num_rows(given)
        if rows == 0 or (self.num_rows is not None and rows != self.num_rows):
            return self.model.predict(*args, **kwargs)
        answer = loaded.answer(inputs)
        self._checked = kinds
        as_given = not kwargs and len(args) == len(inputs) and all(map(is_, args, inputs))
        self._plain = kinds if as_given else []
        return answer

    def _run(self, inputs: Sequence[Any]) -> ExitOutput:
        """Answer a call whose inputs are of the kinds that were checked."""
        loaded = self._loaded
        assert loaded is not None
        logits, exit_index, score = loaded.run([value.detach().numpy() for value in inputs], loaded.thresholds)
        from_numpy = torch.from_numpy
        return ExitOutput(from_numpy(logits), from_numpy(exit_index), from_numpy(score))

    def __str__(self) -> str:
        times = {name: self.timings.time(name).median * 1e3 for name in self.timings.seconds}
        lines = [f"{self.runtime} answers, the fastest for the example:"]
        lines += [f"  {name}: {time:.3f} ms" for name, time in sorted(times.items(), key=lambda item: item[1])]
        return "\n".join([*lines, *(f"  {name}: {reason}" for name, reason in self.reasons.items())])


def _kinds(inputs: Sequence[Any]) -> list[Any]:
    return [(value.shape, value.dtype, value.device) if isinstance(value, Tensor) else None for value in inputs]


class Seal:
    """The state of a model for which something was made."""

    def __init__(self, model: EarlyExit) -> None:
        self._model = model
        self._policy = model.policy
        args, kwargs = model.example_inputs
        self._cache = model.bind(args, kwargs)[0].cache
        self._state, self._fingerprint = self._cache.state
        self._heads = Fingerprint(model.heads)
        self._tensors = _tensors(model)  # held, so that no other tensor gets their addresses
        self._storages = [tensor.detach() for tensor in self._tensors]
        self._versions = [*map(_VERSION, self._tensors)]
        self._addresses = [*map(_ADDRESS, self._tensors)]

    def check(self) -> None:
        """Refuse a model that has changed.

        Raises:
            RuntimeError: then, naming what changed.
        """
        model = self._model
        if model.training:
            raise RuntimeError("model is in train mode; call model.eval() before predict")
        if model.policy is not self._policy and model.policy != self._policy:
            raise RuntimeError(f"the policy of the model {_AGAIN}")
        if not self._heads.is_current():
            heads = Fingerprint(model.heads)
            if not self._heads.matches(heads):
                raise RuntimeError(f"the heads of the model {_AGAIN}")
            self._compare_tensors()
            self._heads = heads
        state, fingerprint = self._cache.state
        if self._cache.backbone is not model.backbone or state is not self._state:
            raise RuntimeError(f"the backbone {_AGAIN}")
        if fingerprint is not self._fingerprint:
            self._compare_tensors()
            self._fingerprint = fingerprint
        if [*map(_VERSION, self._tensors)] != self._versions or [*map(_ADDRESS, self._tensors)] != self._addresses:
            raise RuntimeError(f"the weights of the model {_AGAIN}")

    def _compare_tensors(self) -> None:
        """Refuse parameters and buffers that are others than those that are held."""
        if [*map(id, _tensors(self._model))] != [*map(id, self._tensors)]:
            raise RuntimeError(f"the weights of the model {_AGAIN}")


def _tensors(model: EarlyExit) -> list[Tensor]:
    return [tensor for table in weight_tables(model) for tensor in table.values() if tensor is not None]


_VERSION, _ADDRESS = attrgetter("_version"), Tensor.data_ptr
_AGAIN = "changed since cet.compile; call cet.compile again"


def compile(model: EarlyExit, example_inputs: Any = None) -> CompiledModel:
    """The model in the runtime of this process that answers the example fastest, by measurement.

    Measured are PyTorch, which is the model itself, and, where the extra ``onnx`` is installed, ONNX Runtime, whose
    graph is compared with the model row by row first. Their answers differ by rounding alone, so that a row whose
    score is within that of a threshold may leave elsewhere.

    What ONNX Runtime answers from is fixed: where weights, policy, heads or the backbone have changed, a call is
    refused. A change of a weight through ``.data`` alone, of which PyTorch keeps no version, is not seen.

    Args:
        model: in eval mode, on the CPU for ONNX Runtime to be a choice.
        example_inputs: what one call takes, as for :class:`cet.EarlyExit`, its own example when not given; with as many
            rows as calls will have. With one row the runtime answers single rows alone, without any compaction, and
            other calls go to the model itself.

    Raises:
        RuntimeError: in train mode.
        TypeError, ValueError: for what is no model, and for inputs that it does not take.
    """
    if not isinstance(model, EarlyExit):
        raise TypeError(f"model is {type(model).__name__}; give a cet.EarlyExit")
    if model.training:
        raise RuntimeError("model is in train mode; call model.eval() before cet.compile")
    args, kwargs = call = model.example_inputs if example_inputs is None else as_call(example_inputs)
    model.predict(*args, **kwargs)  # first, for its own error on a wrong input
    input_format = model.bind(args, kwargs)[0].input_format
    calls: dict[str, Callable[[], object]] = {PYTORCH: partial(model.predict, *args, **kwargs)}
    reasons: dict[str, str] = {}
    loaded: LoadedModel | None = None
    no_timings = Timings[str]({})
    try:
        loaded = _in_onnx_runtime(model, call)
        calls[ONNX] = partial(CompiledModel(model, loaded, input_format, no_timings, {}).predict, *args, **kwargs)
    except (ExportError, AnswerMismatchError, ModuleNotFoundError) as error:
        reasons[ONNX] = str(error)
    timings = time_calls(calls, wall_clock, seconds=_SECONDS)
    if loaded is not None and timings.ratio(ONNX, PYTORCH).median >= 1:
        loaded = None
    return CompiledModel(model, loaded, input_format, timings, reasons)


def _in_onnx_runtime(model: EarlyExit, call: Call) -> LoadedModel:
    """The model in a session of ONNX Runtime, compared with the model.

    Raises:
        ExportError, AnswerMismatchError, ModuleNotFoundError: where there is none, with the reason.
    """
    if any(weight.device.type != "cpu" for weight in model.parameters()):
        raise ExportError("the model is not on the CPU")
    if any(tensor.is_inference() for tensor in _tensors(model)):
        raise ExportError("weights made within torch.inference_mode keep no count of their changes; clone them outside")
    missing = [package for package in ("onnx", "onnxscript", "onnxruntime") if installed_version(package) is None]
    if missing:
        raise ModuleNotFoundError(f"{' and '.join(missing)} is not installed; pip install 'cet[onnx]'")
    from cet.deploy.onnx import OnnxModel, session_of
    from cet.deploy.onnx_writer import OnnxWriter

    way, inputs = model.bind(*call)
    rows = 1 if way.input_format.num_rows(inputs) == 1 else None
    opened = model.policy.thresholds

    def write(sizes_vary: bool) -> OnnxModel:
        stages = export_segments(model, call, opened, rows, sizes_vary=sizes_vary)
        description = describe(stages, rows, False, None)
        writer = OnnxWriter(stages)
        movable = OnnxModel(session_of(writer.with_exits(replace(description, thresholds_are_input=True))), "the model")
        compare(movable, stages)
        return OnnxModel(session_of(writer.with_exits(description), torch.get_num_threads()), "the model")

    return of_right_sizes(write, True)
