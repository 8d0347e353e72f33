"""A model as a folder of one ``.onnx`` file per stage and a manifest, for runtimes that cannot branch.

Nothing here imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from cet.deploy.description import OUTPUTS, Description, ExportError
from cet.deploy.host_loop import StagesModel
from cet.deploy.loaded import Array
from cet.deploy.manifest import Manifest, StageEntry
from cet.deploy.onnx import read_session

MANIFEST = "manifest.json"


class OnnxStages(StagesModel):
    """Stages in ONNX Runtime.

    Attributes:
        sessions: an ``onnxruntime.InferenceSession`` for each stage.
    """

    def __init__(self, contents: Mapping[str, bytes], path: str, threads: int | None = None) -> None:
        super().__init__(Manifest.from_json(contents[MANIFEST], f"{path}/{MANIFEST}"))
        self.sessions = [read_session(contents[stage.file], f"{path}/{stage.file}", threads) for stage in self.stages]
        self._wanted = [[OUTPUTS[0], OUTPUTS[2], *stage.outputs] for stage in self.stages]

    def run_stage(self, index: int, values: Mapping[str, Array]) -> Sequence[Array]:
        feeds = {name: values[name] for name in self.stages[index].inputs}
        outputs: list[Array] = self.sessions[index].run(self._wanted[index], feeds)
        return outputs


def with_manifest(
    description: Description, written: Sequence[tuple[StageEntry, bytes]], most_rows: int | None = None
) -> dict[str, bytes]:
    """The files of a folder by name."""
    entries = tuple(replace(entry, sha256=sha256(content).hexdigest()) for entry, content in written)
    contents = {entry.file: content for entry, content in written}
    return {**contents, MANIFEST: Manifest(description, entries, most_rows).to_json().encode()}


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
    return OnnxStages(read_folder(path), os.fspath(path), threads)


def read_folder(path: str | os.PathLike[str]) -> dict[str, bytes]:
    """The manifest of a folder and the files that it names, by name.

    Raises:
        ExportError: where one is damaged or missing.
        OSError: where one cannot be read.
    """
    folder, name = Path(path), os.fspath(path)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{name} holds no {MANIFEST}; give the folder that cet.export wrote")
    contents = {MANIFEST: (folder / MANIFEST).read_bytes()}
    for stage in Manifest.from_json(contents[MANIFEST], f"{name}/{MANIFEST}").stages:
        if Path(stage.file).name != stage.file or not (folder / stage.file).is_file():
            raise ExportError(f"{name} lacks {stage.file}, which its manifest names; copy the folder whole")
        contents[stage.file] = (folder / stage.file).read_bytes()
        if sha256(contents[stage.file]).hexdigest() != stage.sha256:
            raise ExportError(f"{name}/{stage.file} is not the file of its manifest; copy the folder whole")
    return contents
