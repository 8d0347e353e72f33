"""A model with a ``.tflite`` file per stage as C99: constants in a header, the files in a source. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from cet.deploy.description import Description
from cet.deploy.manifest import StageEntry

HEADER, SOURCE = "model.h", "model.c"
_ALIGNMENT = 16
_TYPES = {"float32": "float", "bool": "bool"}
_IN_A_LINE = 24


class Held(NamedTuple):
    """A tensor as a stage holds it: of one row, or common to all rows."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def c_files(
    description: Description, stages: Sequence[StageEntry], models: Mapping[str, bytes], held: Mapping[str, Held]
) -> dict[str, bytes]:
    """The header and the source, by name.

    Args:
        description: of the model.
        stages: with the arena of each.
        models: the file of each, by its name.
        held: the tensors that stages take or make besides logits and score, by name.
    """
    inputs = [tensor.name for tensor in description.inputs]
    made = [name for stage in stages for name in stage.outputs]
    tensors = [*inputs, *made]
    offsets, scratch = placed(stages, {name: held[name].num_bytes for name in made})
    arenas = [stage.arena_bytes or 0 for stage in stages]
    numbers = {
        "STAGES": len(stages),
        "EXITS": len(description.exits),
        "CLASSES": description.num_classes,
        "INPUTS": len(inputs),
        "TENSORS": len(tensors),
        "MOST_TENSORS": max(max(len(stage.inputs), 2 + len(stage.outputs)) for stage in stages),
        "SCRATCH_BYTES": scratch,
        "ALL_ARENA_BYTES": sum(arenas),
        "MOST_ARENA_BYTES": max(arenas),
        "LEAVES_AT_OR_BELOW": int(description.is_low_when_sure),
    }
    said = [
        *(f"Input {index}: {_said(name)}, {_type(held[name])}." for index, name in enumerate(inputs)),
        *(f"Exit {index}: {_said(name)}." for index, name in enumerate(description.exits)),
        *(f"Class {index}: {_said(name)}." for index, name in enumerate(description.class_labels or ())),
    ]
    defines = [f"#define CET_{name} {number}" for name, number in numbers.items()]
    header = [_BEGIN, *(f"/* {line} */" for line in said), "", *defines, _TYPES_AND_END]
    source = [f'#include "{HEADER}"', "", "#include <math.h>"]
    for index, stage in enumerate(stages):
        source += [
            "",
            f"static const unsigned char file_{index}[] CET_ALIGNED = {{",
            *_lines(models[stage.file]),
            "};",
            f"static const uint16_t inputs_{index}[] = {{{_places(stage.inputs, tensors)}}};",
            f"static const uint16_t outputs_{index}[] = {{{_places(stage.outputs, tensors)}}};",
        ]
    source += ["", "const CetStage cet_stages[CET_STAGES] = {"]
    for index, stage in enumerate(stages):
        early = stage.exit_index < len(description.thresholds)
        threshold = c_number(description.thresholds[stage.exit_index] if early else None)
        source.append(
            f"  {{file_{index}, inputs_{index}, outputs_{index}, sizeof file_{index}, {arenas[index]}, {threshold}, "
            f"{stage.exit_index}, {len(stage.inputs)}, {len(stage.outputs)}}},"
        )
    source += ["};", "", "const CetTensor cet_tensors[CET_TENSORS] = {"]
    source += [f"  {{{held[name].num_bytes}, {offsets.get(name, 0)}}}, /* {_said(name)} */" for name in tensors]
    return {HEADER: "\n".join(header).encode(), SOURCE: "\n".join([*source, "};", ""]).encode()}


def placed(stages: Sequence[StageEntry], sizes: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Where each tensor lies in memory that those share which are not needed at once, and how much that is."""
    last = {name: index for index, stage in enumerate(stages) for name in stage.inputs}
    places: dict[str, tuple[int, int]] = {}  # of those that a later stage takes: first and last byte
    offsets: dict[str, int] = {}
    for index, stage in enumerate(stages):
        places = {name: place for name, place in places.items() if last.get(name, -1) >= index}
        for name in stage.outputs:
            size = -(-sizes[name] // _ALIGNMENT) * _ALIGNMENT
            starts = sorted({0, *(end for _, end in places.values())})
            offsets[name] = next(
                at for at in starts if all(at + size <= begin or at >= end for begin, end in places.values())
            )
            places[name] = offsets[name], offsets[name] + size
    return offsets, max((offsets[name] + size for name, size in sizes.items()), default=0)


def _lines(content: bytes) -> Iterable[str]:
    for at in range(0, len(content), _IN_A_LINE):
        yield "  " + ",".join(map(str, content[at : at + _IN_A_LINE])) + ","


def _places(names: Iterable[str], tensors: Sequence[str]) -> str:
    """C has no empty arrays."""
    return ", ".join(str(tensors.index(name)) for name in names) or "0"


def c_number(threshold: float | None) -> str:
    """Of a closed exit NaN, which no score passes."""
    if threshold is None:
        return "NAN"
    if math.isinf(threshold):
        return "INFINITY" if threshold > 0 else "-INFINITY"
    text = f"{np.float32(threshold):.9g}"
    return f"{text}f" if "." in text or "e" in text else f"{text}.0f"


def _type(tensor: Held) -> str:
    return f"{_TYPES.get(tensor.dtype, f'{tensor.dtype}_t')} {' x '.join(map(str, tensor.shape))}".rstrip()


def _said(name: str) -> str:
    """A name within a comment."""
    return json.dumps(name).replace("*", r"\u002a")


_BEGIN = """\
/* A model with early exits for TFLite Micro, written by cet.export: an interpreter for each stage, which
   examples/microcontroller/early_exit.c runs one after the other until a score lets the row leave. */
#ifndef CET_MODEL_H
#define CET_MODEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
"""

_TYPES_AND_END = """
/* TFLite Micro reads weights in place. */
#ifndef CET_ALIGNED
#ifdef __GNUC__ /* and Clang, Arm's compilers, IAR */
#define CET_ALIGNED __attribute__((aligned(16)))
#else
#error "define CET_ALIGNED as what aligns an array to 16 bytes"
#endif
#endif

/* A tensor that a stage takes or makes, besides logits and score: an input, or one that goes from stage to stage and
   has its place in CET_SCRATCH_BYTES of memory. */
typedef struct {
  uint32_t bytes, offset;
} CetTensor;

/* A stage takes the tensors `inputs`, and makes logits, score and the tensors `outputs`, in this order. */
typedef struct {
  const unsigned char *file; /* .tflite */
  const uint16_t *inputs, *outputs; /* indices of cet_tensors */
  uint32_t file_bytes;
  uint32_t arena_bytes; /* the least, at a multiple of 16, in which it ran: 64-bit pointers, reference kernels */
  float threshold; /* NAN: nobody leaves */
  uint16_t exit_index, num_inputs, num_outputs;
} CetStage;

extern const CetStage cet_stages[CET_STAGES];
extern const CetTensor cet_tensors[CET_TENSORS]; /* the inputs first */

#ifdef __cplusplus
}
#endif
#endif
"""
