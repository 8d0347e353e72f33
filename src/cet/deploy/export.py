"""`cet.export`: a model with exits as one file that skips work where Python and PyTorch are not."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from cet.data.batches import read_batches
from cet.deploy.c_source import HEADER, SOURCE
from cet.deploy.check import Agreement, Comparison, agreement, compare, of_right_sizes
from cet.deploy.description import Description, ExportError, Input
from cet.deploy.host_loop import Method
from cet.deploy.loaded import LoadedModel
from cet.deploy.loading import FORMATS, format_of
from cet.deploy.manifest import Manifest
from cet.deploy.report import ExportReport, time_exits
from cet.deploy.segments import ExportedStages, export_segments
from cet.deploy.stage_modules import StageModule, stage_modules, whole_module
from cet.deploy.stage_samples import Taken, taken_of
from cet.deploy.stages import MANIFEST
from cet.files import OutputError, check_file, check_replaceable, write_atomically, write_folder_atomically
from cet.measure.host import require, versions
from cet.measure.rounds import Timings
from cet.model.early_exit import EarlyExit
from cet.ops.definitions import SCORE_NAMES
from cet.partition.inputs import Call
from cet.runtime.policy import ExitPolicy
from cet.runtime.scores import ScoreFunction, has_kernel, score_name

if TYPE_CHECKING:
    from cet.deploy.onnx_writer import OnnxWriter

Samples = Sequence[tuple[Any, Tensor]]
Written = tuple[bytes | dict[str, bytes], Comparison | Agreement, Timings[str]]

_NUMPY_DTYPES = {
    getattr(torch, name): name
    for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
}


def export(
    model: EarlyExit,
    path: str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    format: str | None = None,
    batch: Literal["dynamic", 1] = "dynamic",
    thresholds: Literal["baked", "input"] = "baked",
    quantize: Iterable[Any] | None = None,
    class_labels: Sequence[str] | None = None,
) -> ExportReport:
    """Write a model with its exits and policy as one file for another runtime, in which rows that leave skip the rest.

    The file is compared with the model, row by row, before it takes its name; on any fault nothing is written, and an
    older file stays. Read it by :func:`cet.load_exported`, or by the runtime alone: its outputs are ``logits``
    ``(B, K)``, ``exit_index`` ``(B,)`` int64 and ``score`` ``(B,)`` float32.

    Args:
        model: in eval mode.
        path: of the file. ``.onnx``: one file of standard operators, with an ``If`` behind each exit. For runtimes that
            cannot branch, where a loop on the host, as in :mod:`cet.deploy.host_loop`, lets rows leave between two
            stages: ``.pte``, an ExecuTorch program with a method per stage; ``.tflite``, a LiteRT model with a
            signature per stage; ``.pt2``, a package of machine code with a model per stage, by AOTInductor, for one
            row with one model that branches; ``.stages``, a folder with one ``.onnx`` file per stage and
            ``manifest.json``; ``.tflm``, such a folder for TFLite Micro, with one ``.tflite`` file per stage, and all
            of them as C sources for a firmware.
        example_inputs: what one call takes, with at least one row, as for :class:`cet.EarlyExit`; its own example when
            not given. Sizes besides the batch may vary later where the model's stages allow it, in ONNX alone.
        format: ``"onnx"``, ``"stages"``, ``"aoti"``, ``"executorch"``, ``"litert"`` or ``"tflite-micro"``, where the
            suffix of ``path`` does not tell.
        batch: ``"dynamic"`` for any number of rows, which are compacted at each exit; 1 for one row at a time, which
            is faster for that. AOTInductor takes 512 rows at once, ExecuTorch 64, LiteRT and TFLite Micro one: the loop
            answers more in parts.
        thresholds: ``"baked"`` into the file, without the exits that are closed; or ``"input"``: an input named
            ``thresholds`` ``(E - 1,)`` float32, whose default is the policy's; of stages, which thresholds the loop may
            be given.
        quantize: batches of samples like those to come, as for :func:`cet.calibrate`; labels may be -100. The stages
            become int8, by the quantiser of the runtime, for ``.onnx``, ``.stages``, ``.pte`` and ``.tflite``; the
            report says how many answers stay the same. What they hand on stays float32 in the last two. The thresholds
            are the policy's, which was chosen by float32 scores: calibrate those of the file, by other samples, as
            docs/howto/deploy.md shows. Values that are not finite become numbers, so that such a row may leave early.
        class_labels: a name for each class, to be kept in the file.

    Returns:
        What was compared, and how fast the file is beside the model without exits in the same runtime.

    Raises:
        ExportError: where the model has no form in this format, with the stage or input and the reason.
        AnswerMismatchError: where the file would answer otherwise than the model.
        ValueError, TypeError: for other arguments than these; for a policy whose exits are all closed, or whose score
            is a function, or patience, in another format than ONNX.
        RuntimeError: in train mode, and within ``torch.autocast``.
        ModuleNotFoundError: where a package that writes the format is not installed.
        OSError: where the file cannot be written.
    """
    if not isinstance(model, EarlyExit):
        raise TypeError(f"model is {type(model).__name__}; give a cet.EarlyExit")
    if model.training:
        raise RuntimeError("model is in train mode; call model.eval() before export")
    if model._forward_hooks or model._forward_pre_hooks:
        raise ExportError("a hook stands on the EarlyExit itself, which no file would run; remove it before export")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise RuntimeError("export runs within torch.autocast, whose dtypes no file would have; leave it before export")
    name = format_of(path, format)
    if batch not in ("dynamic", 1):
        raise ValueError(f"batch is {batch!r}; give 'dynamic' or 1")
    if thresholds not in ("baked", "input"):
        raise ValueError(f"thresholds is {thresholds!r}; give 'baked' or 'input'")
    if thresholds == "baked" and all(threshold is None for threshold in model.policy.thresholds):
        raise ValueError(
            "every exit of model.policy is closed, so that no row would leave early; set a policy, as cet.calibrate "
            "gives, or export with thresholds='input'"
        )
    _check_score(model.policy, name, thresholds)
    if class_labels is not None:
        _check_class_labels(class_labels, model.num_classes)
    target = _TARGETS[name]
    if quantize is not None and not target.quantizes:
        taking = ", ".join(suffix for suffix, known in FORMATS.items() if _TARGETS[known].quantizes)
        raise ValueError(f"quantize is for {taking}, and the format is {name!r}; leave it out")
    require(f"export to {target.title}", target.packages, extra=target.extra)
    check_file(Path(os.path.realpath(path)))
    if name in ("stages", "tflite-micro"):
        _check_folder(path)
    call = model.example_inputs if example_inputs is None else as_call(example_inputs)
    rows = None if batch == "dynamic" else batch
    opened = model.policy.thresholds if thresholds == "baked" else (0.0,) * (model.num_exits - 1)

    def write(sizes_vary: bool) -> tuple[Description, Written]:
        stages = export_segments(model, call, opened, rows, sizes_vary=sizes_vary)
        description = describe(stages, rows, thresholds == "input", class_labels, target.packages)
        samples = None if quantize is None else _samples(stages, quantize)
        return description, target.write(stages, description, samples)

    description, (content, comparison, timings) = of_right_sizes(write, target.sizes_vary)
    if isinstance(content, bytes):
        write_atomically(path, content)
    else:
        write_folder_atomically(path, content)
    num_bytes = len(content) if isinstance(content, bytes) else sum(map(len, content.values()))
    return ExportReport(os.fspath(path), name, num_bytes, description, comparison, timings)


def _check_class_labels(labels: Sequence[str], num_classes: int | None) -> None:
    if isinstance(labels, str) or not all(isinstance(label, str) for label in labels):
        raise TypeError(f"class_labels is {labels!r}; give a list of one string for each class")
    if len(labels) != num_classes:
        raise ValueError(f"class_labels has {len(labels)} entries for {num_classes} classes; give one each")
    if twice := [label for label in labels if list(labels).count(label) > 1]:
        raise ValueError(f"class_labels has {twice[0]!r} twice; give each class a name of its own")


def _check_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds what no export wrote: it would be removed with the rest.

    Raises:
        OutputError: then.
    """
    check_replaceable(path, MANIFEST)
    folder = Path(os.path.realpath(path))
    if not (folder / MANIFEST).is_file():
        return
    others = [MANIFEST]
    with suppress(ExportError):
        stages = Manifest.from_json((folder / MANIFEST).read_bytes(), os.fspath(path)).stages
        written = {MANIFEST, HEADER, SOURCE, *(stage.file for stage in stages)}
        others = sorted({entry.name for entry in folder.iterdir()} - written)
    if others:
        raise OutputError.of(path, FileExistsError(errno.EEXIST, f"it holds {others[0]}, which no export wrote"))


def _samples(stages: ExportedStages, loader: Iterable[Any]) -> Samples:
    """The batches to quantise by.

    Raises:
        ExportError: for stages that are not of float32.
        TypeError, ValueError: for batches that are none, or not such as the model takes.
    """
    if {tensor.dtype for tensor in stages.model.parameters()} != {torch.float32}:
        raise ExportError("the weights are not of float32, which quantize starts from; export model.float()")
    try:
        batches = [(x, y) for x, y in read_batches(loader, stages.model.num_classes) if len(y)]
    except (TypeError, ValueError) as error:
        raise type(error)(f"quantize: {error}") from error
    samples = [(pytree.tree_map_only(Tensor, Tensor.cpu, x), y) for x, y in batches]
    calls = [stages.input_format.flatten(*as_call(x)) for x, _ in samples]  # for its own errors
    if not samples:
        raise ValueError("quantize yields no batches; give samples like those to come")
    numbers = [t for call in calls for t in call if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]
    if numbers and all(bool((t == numbers[0].flatten()[0]).all()) for t in numbers):
        raise ValueError("quantize yields one number everywhere, which sets no scale; give samples like those to come")
    return samples


def _check_score(policy: ExitPolicy, format: str, thresholds: str) -> None:
    """Refuse a score that a format cannot have."""
    if has_kernel(policy.score):
        return
    if format != "onnx":
        raise ValueError(
            f"the format {format!r} cannot have the score {score_name(policy.score)!r}; export to one .onnx file, or "
            f"set a policy whose score is one of {', '.join(SCORE_NAMES)}"
        )
    if policy.score != "patience":
        return
    if thresholds == "input" or None in policy.thresholds:
        raise ValueError(
            "patience counts the exits that are open, so that a file needs all of them open and its thresholds baked; "
            "set a policy with a threshold for every exit, as cet.calibrate gives, and leave thresholds out"
        )


def _writer(stages: ExportedStages, description: Description, samples: Samples | None) -> OnnxWriter:
    from cet.deploy.onnx_writer import OnnxWriter

    writer = OnnxWriter(stages)
    if samples is not None:
        writer.quantize([x for x, _ in samples], description.batch)
    return writer


def _onnx(
    stages: ExportedStages, description: Description, samples: Samples | None
) -> tuple[bytes, Comparison | Agreement, Timings[str]]:
    """The file, what came of comparing it, and its speed."""
    from cet.deploy.onnx import BEFORE_SEAL, OnnxModel, session_of
    from cet.deploy.seal import sealed

    writer = _writer(stages, description, samples)
    content = writer.with_exits(description)
    # Only where thresholds can be moved can every way through the file be taken.
    movable = replace(description, thresholds_are_input=True)
    if movable != description and samples is None:  # first: each session of a large model takes gigabytes
        compare(OnnxModel(session_of(content), "the model"), stages)
    loaded = OnnxModel(session_of(content if movable == description else writer.with_exits(movable)), "the model")
    comparison = compare(loaded, stages) if samples is None else agreement(loaded, stages, samples)
    full = session_of(writer.without_exits(description))
    return sealed(content, BEFORE_SEAL), comparison, time_exits(loaded, partial(full.run, None), stages)


def _onnx_stages(
    stages: ExportedStages, description: Description, samples: Samples | None
) -> tuple[dict[str, bytes], Comparison | Agreement, Timings[str]]:
    """The files of the folder, what came of comparing them, and their speed."""
    from cet.deploy.onnx import session_of
    from cet.deploy.stages import OnnxStages, with_manifest

    writer = _writer(stages, description, samples)
    written = writer.each_stage(description)
    movable = replace(description, thresholds_are_input=True)  # they are the loop's
    loaded = OnnxStages(with_manifest(movable, written), "the model")
    comparison = compare(loaded, stages) if samples is None else agreement(loaded, stages, samples)
    full = session_of(writer.without_exits(description))
    return with_manifest(description, written), comparison, time_exits(loaded, partial(full.run, None), stages)


def _one_file_of_stages(
    name: str, stages: ExportedStages, description: Description, samples: Samples | None
) -> tuple[bytes | dict[str, bytes], Comparison | Agreement, Timings[str]]:
    """The file or folder of a format with a program per stage, what came of comparing it, and its speed."""
    content, loaded, full = in_runtime(name, stages, description, samples=samples)
    comparison = compare(loaded, stages) if samples is None else agreement(loaded, stages, samples)
    return content, comparison, time_exits(loaded, lambda named: full([*named.values()]), stages)


def in_runtime(
    name: str,
    stages: ExportedStages,
    description: Description,
    threads: int | None = None,
    samples: Samples | None = None,
) -> tuple[bytes | dict[str, bytes], LoadedModel, Method]:
    """The file or folder of such a format, what is read from it, with thresholds that move, and the backbone alone; in
    int8 where there are samples."""
    writer, reader = import_module(f"cet.deploy.{name}_writer"), import_module(f"cet.deploy.{name}")
    most_rows = None if description.batch is not None else writer.MOST_ROWS
    modules = stage_modules(stages, description, most_rows)
    manifest = Manifest(description, tuple(module.entry for module in modules), most_rows)
    content = writer.write(modules, manifest, *_feeds(modules, stages, samples, most_rows or description.batch))
    loaded = reader.model_of(content, "the model", threads)
    loaded.description = replace(description, thresholds_are_input=True)  # they are the loop's
    whole = whole_module(stages, most_rows)
    whole_feeds = _feeds([whole], stages, samples, most_rows or description.batch)
    program = reader.read(writer.write([whole], None, *whole_feeds), "the model", threads)
    full = reader.StageMethod(program, whole.entry.file, "the model")
    return content, loaded, full


def _feeds(
    modules: Sequence[StageModule], stages: ExportedStages, samples: Samples | None, rows: int | None
) -> list[Iterator[Taken]]:
    """What the stages take of the samples, for a writer that quantises."""
    return [] if samples is None else [taken_of(modules, stages, [x for x, _ in samples], rows)]


class _Target(NamedTuple):
    """How models are written in a format."""

    title: str
    extra: str
    packages: tuple[str, ...]
    sizes_vary: bool
    write: Callable[[ExportedStages, Description, Samples | None], Written]
    quantizes: bool = False


_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_TARGETS = {
    "onnx": _Target("ONNX", "onnx", _ONNX_PACKAGES, True, _onnx, True),
    "stages": _Target("ONNX", "onnx", _ONNX_PACKAGES, True, _onnx_stages, True),
    "aoti": _Target("AOTInductor", "", (), False, partial(_one_file_of_stages, "aoti")),
    "executorch": _Target(
        "ExecuTorch", "executorch", ("executorch",), False, partial(_one_file_of_stages, "executorch"), True
    ),
    "litert": _Target(
        "LiteRT", "litert", ("litert-torch", "ai-edge-litert"), False, partial(_one_file_of_stages, "litert"), True
    ),
    "tflite-micro": _Target(
        "TFLite Micro",
        "tflite-micro",
        ("litert-torch", "ai-edge-litert", "tflite-micro"),
        False,
        partial(_one_file_of_stages, "tflite_micro"),
    ),
}


def describe(
    stages: ExportedStages,
    batch: int | None,
    thresholds_are_input: bool,
    class_labels: Sequence[str] | None,
    writers: Sequence[str] = ("onnxscript",),
) -> Description:
    """What a file that holds these stages, written by these packages, says of itself.

    Raises:
        ExportError: for inputs of a dtype that NumPy lacks, or constants that JSON cannot hold.
    """
    model, names = stages.model, stages.input_format.names
    used = sorted({*stages.entry, *stages.sized})
    inputs, constants, ignored = [], {}, []
    for index, (name, value) in enumerate(zip(names, stages.inputs, strict=True)):
        if not isinstance(value, Tensor):
            if not (value is None or isinstance(value, bool | int | float | str)):
                raise ExportError(
                    f"input {name} is a {type(value).__name__}, which no file can hold; give a plain value"
                )
            constants[name] = value
        elif index in used:
            shape = stages.shapes[index]
            inputs.append(Input(name, dtype_name(name, value.dtype), tuple(value.shape) if shape is None else shape))
        else:
            ignored.append(name)
    return Description(
        exits=model.exit_names,
        num_classes=model.num_classes,
        class_labels=None if class_labels is None else tuple(class_labels),
        score=score_name(model.policy.score),
        thresholds=model.policy.thresholds,
        temperatures=model.policy.temperatures,
        thresholds_are_input=thresholds_are_input,
        batch=batch,
        inputs=tuple(inputs),
        constants=constants,
        ignored=tuple(ignored),
        parameters=_parameters(model.backbone),
        ranges=stages.ranges,
        logits_dtype=dtype_name("the answer", stages.logits_dtype),
        versions={name: number for name, number in versions(("cet", "torch", *writers)).items() if number},
        own_is_low=model.policy.score.is_low_when_sure if isinstance(model.policy.score, ScoreFunction) else None,
    )


def dtype_name(what: str, dtype: torch.dtype) -> str:
    """The name that NumPy has for a dtype.

    Raises:
        ExportError: where it has none.
    """
    if dtype not in _NUMPY_DTYPES:
        raise ExportError(f"{what} has dtype {dtype}, which NumPy lacks; export model.float()")
    return _NUMPY_DTYPES[dtype]


def as_call(example_inputs: Any) -> Call:
    """The call ``(args, kwargs)`` that an example stands for."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def _parameters(backbone: nn.Module) -> tuple[str, ...]:
    """The parameters of forward that take inputs by position, with a star before one that takes the rest."""
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL)
    parameters = signature(backbone.forward).parameters.values()
    return tuple("*" * (p.kind is Parameter.VAR_POSITIONAL) + p.name for p in parameters if p.kind in positional)
