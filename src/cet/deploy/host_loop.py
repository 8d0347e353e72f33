"""The loop over stages that a host runs where a runtime cannot branch. Nothing here imports torch.

One model per stage answers all rows that it is given; between two stages the loop lets rows leave. What a stage is
run by is left to the format: see :class:`StagesModel`.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cet.deploy.description import BATCH
from cet.deploy.loaded import Array, LoadedModel, Thresholds
from cet.deploy.manifest import Manifest


class StagesModel(LoadedModel):
    """A model whose stages are run one after another, and whose rows leave between them."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest.description)
        self.stages, self._most_rows = manifest.stages, manifest.most_rows
        self._names = [given.name for given in self.description.inputs]
        self._batched = [given.shape[:1] == (BATCH,) for given in self.description.inputs]
        later: dict[str, int | None] = {}
        self._needed: list[dict[str, int | None]] = []  # behind each stage, by later ones
        for stage in reversed(self.stages):
            self._needed.insert(0, dict(later))
            later = {name: dim for name, dim in later.items() if name not in stage.outputs} | dict(stage.inputs)

    @abstractmethod
    def run_stage(self, index: int, values: Mapping[str, Array]) -> Sequence[Array]:
        """Logits, scores and the other outputs of a stage, in its order, of the tensors that it takes."""

    def run(self, arrays: Sequence[Array], thresholds: Thresholds) -> tuple[Array, Array, Array]:
        most, rows = self._most_rows, 1
        if most is not None and True in self._batched:
            rows = len(arrays[self._batched.index(True)])
        if most is None or rows <= most:
            return self._run(arrays, thresholds)
        parts = [
            self._run([a[at : at + most] if b else a for a, b in zip(arrays, self._batched, strict=True)], thresholds)
            for at in range(0, rows, most)
        ]
        logits, exit_index, score = (np.concatenate(answers) for answers in zip(*parts, strict=True))
        return logits, exit_index, score

    def _run(self, arrays: Sequence[Array], thresholds: Thresholds) -> tuple[Array, Array, Array]:
        """The same of as many rows as the stages take at once."""
        values = dict(zip(self._names, arrays, strict=True))
        rows: Array | None = None  # which rows go on; None: all of them
        for index, stage in enumerate(self.stages):
            logits, score, *made = self.run_stage(index, values)
            if index == 0:
                answers, exits, scores = logits, np.full(len(logits), stage.exit_index), score
            else:
                where = slice(None) if rows is None else rows
                answers[where], exits[where], scores[where] = logits, stage.exit_index, score
            if index + 1 == len(self.stages):
                break
            values |= zip(stage.outputs, made, strict=True)
            threshold = thresholds[stage.exit_index]
            if threshold is None:
                continue
            leaves = score <= threshold if self.description.is_low_when_sure else score >= threshold  # false for NaN
            if leaves.all():
                break
            if leaves.any():
                kept = np.flatnonzero(~leaves)
                rows = kept if rows is None else rows[kept]
                values = {
                    name: values[name] if dim is None else values[name].take(kept, axis=dim)
                    for name, dim in self._needed[index].items()
                }
        return answers, exits, scores


Method = Callable[[Sequence[Array]], Sequence[Array]]


class MethodsModel(StagesModel):
    """Stages that are methods of one program.

    Args:
        manifest: of the program.
        method_of: the method of a name, which takes and returns arrays.
    """

    def __init__(self, manifest: Manifest, method_of: Callable[[str], Method]) -> None:
        super().__init__(manifest)
        self._methods = [method_of(stage.file) for stage in self.stages]
        self._lock = threading.Lock()  # the methods of a program share its memory

    def run_stage(self, index: int, values: Mapping[str, Array]) -> Sequence[Array]:
        arrays = [values[name] for name in self.stages[index].inputs]
        with self._lock:
            return self._methods[index](arrays)
