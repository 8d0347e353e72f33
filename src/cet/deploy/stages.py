"""A model as a folder of one ``.onnx`` file per stage and a manifest, for runtimes that cannot branch.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path

from cet.deploy.description import OUTPUTS, Description, ExportError
from cet.deploy.host_loop import StageEntry, StagesModel
from cet.deploy.loaded import Array
from cet.deploy.onnx import read_session

MANIFEST = "manifest.json"


class OnnxStages(StagesModel):
    """Stages in ONNX Runtime.

    Attributes:
        sessions: an ``onnxruntime.InferenceSession`` for each stage.
    """

    def __init__(self, contents: Mapping[str, bytes], path: str, threads: int | None = None) -> None:
        description, entries = read_manifest(contents[MANIFEST], path)
        super().__init__(description, entries)
        self.sessions = [read_session(contents[stage.file], f"{path}/{stage.file}", threads) for stage in entries]
        self._wanted = [[OUTPUTS[0], OUTPUTS[2], *stage.outputs] for stage in entries]

    def run_stage(self, index: int, values: Mapping[str, Array]) -> Sequence[Array]:
        feeds = {name: values[name] for name in self.stages[index].inputs}
        outputs: list[Array] = self.sessions[index].run(self._wanted[index], feeds)
        return outputs


def with_manifest(description: Description, written: Sequence[tuple[StageEntry, bytes]]) -> dict[str, bytes]:
    """The files of a folder by name."""
    entries = [replace(entry, sha256=sha256(content).hexdigest()) for entry, content in written]
    manifest = {
        "model": json.loads(description.to_json()),
        "leaves": "at or below" if description.is_low_when_sure else "at or above",
        "stages": [asdict(entry) for entry in entries],
    }
    contents = {entry.file: content for entry, content in written}
    return {**contents, MANIFEST: (json.dumps(manifest, indent=1) + "\n").encode()}


def read_manifest(content: bytes, path: str) -> tuple[Description, list[StageEntry]]:
    """What a manifest says of the model and its stages.

    Raises:
        ExportError: where it is damaged, of another kind or of a newer format, naming ``path``.
    """
    name = f"{path}/{MANIFEST}"
    try:
        manifest = json.loads(content)
        description = Description.from_json(json.dumps(manifest["model"]), name)
        entries = [StageEntry(**entry) for entry in manifest["stages"]]
        entries = [replace(entry, outputs=tuple(entry.outputs), inputs=dict(entry.inputs)) for entry in entries]
        _check(entries, description)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ExportError):
            raise
        raise ExportError(f"{name} is damaged ({error}); export the model again") from error
    return description, entries


def _check(entries: Sequence[StageEntry], description: Description) -> None:
    """Refuse stages from which some row would get no answer, or that of the wrong exit."""
    exits = [entry.exit_index for entry in entries]
    wanted = [*(k for k in range(len(description.thresholds)) if k in exits), len(description.exits) - 1]
    if exits != wanted:
        raise ValueError(f"its stages end at the exits {exits}, not in order and up to the last")
    known = {given.name for given in description.inputs}
    for entry in entries:
        if not isinstance(entry.file, str) or not entry.inputs.keys() <= known:
            raise ValueError(f"stage {entry.file} takes what no stage before it makes")
        known |= {*entry.outputs}


def load(path: str | os.PathLike[str], threads: int | None = None) -> OnnxStages:
    """Read a folder of stages that :func:`cet.export` wrote.

    Args:
        path: the folder.
        threads: how many threads ONNX Runtime may use within an operator; None: as many as it likes.

    Raises:
        ExportError: where a file is damaged or missing, of another kind or of a newer format.
        ModuleNotFoundError: where ONNX Runtime is not installed.
        OSError: where a file cannot be read.
    """
    folder, name = Path(path), os.fspath(path)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{name} holds no {MANIFEST}; give the folder that cet.export wrote")
    contents = {MANIFEST: (folder / MANIFEST).read_bytes()}
    for stage in read_manifest(contents[MANIFEST], name)[1]:
        if Path(stage.file).name != stage.file or not (folder / stage.file).is_file():
            raise ExportError(f"{name} lacks {stage.file}, which its manifest names; copy the folder whole")
        contents[stage.file] = (folder / stage.file).read_bytes()
        if sha256(contents[stage.file]).hexdigest() != stage.sha256:
            raise ExportError(f"{name}/{stage.file} is not the file of its manifest; copy the folder whole")
    return OnnxStages(contents, name, threads)
