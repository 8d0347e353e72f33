"""How much memory do the stages of a model need in TFLite Micro, and the same model without exits?

``python -m benchmarks.micro``, in the environment of ``make edge``. Files are what a firmware keeps in flash; an arena
is the least memory in which the reference kernels ran on this machine, whose pointers are twice as long as those of a
microcontroller.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import cet
from benchmarks.models import Net, sensor_cnn
from cet.deploy import tflite_micro_writer as writer
from cet.deploy.arena import arena_of
from cet.deploy.export import describe
from cet.deploy.manifest import Manifest
from cet.deploy.segments import export_segments
from cet.deploy.stage_modules import stage_modules, whole_module
from cet.deploy.tflite_micro import model_of
from cet.measure.host import versions

RESULTS = Path(__file__).parent / "results/micro.md"
_WRITTEN_BY = ("torch", "litert-torch", "ai-edge-litert", "tflite-micro")


def mlp() -> Net:
    layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)]
    return Net(nn.Sequential(*layers), {"1": None, "3": None}, (16,), ())


def conv_2d() -> Net:
    layers = [
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 3 * 3, 10)),
    ]
    return Net(nn.Sequential(*layers), {"2": None, "6": None}, (1, 28, 28), ())


NETS: dict[str, Callable[[], Net]] = {"mlp": mlp, "sensor_cnn": sensor_cnn, "conv_2d": conv_2d}


class Needed(NamedTuple):
    """Bytes of the files of all stages and of their arenas, and of those of the model without exits."""

    files: tuple[int, ...]
    arenas: tuple[int, ...]
    full_file: int
    full_arena: int


def needed(name: str) -> Needed:
    torch.manual_seed(0)
    net = NETS[name]()
    model = cet.EarlyExit(net.backbone.eval(), net.exits, (torch.randn(2, *net.sample_shape),)).eval()
    opened = (0.0,) * (model.num_exits - 1)
    stages = export_segments(model, model.example_inputs, opened, 1, sizes_vary=False)
    description = describe(stages, 1, True, None)
    modules = stage_modules(stages, description, None)
    contents = writer.write(modules, Manifest(description, tuple(module.entry for module in modules)))
    files = tuple(len(content) for file, content in contents.items() if file.endswith(".tflite"))
    [whole] = writer.write([whole_module(stages, None)]).values()
    return Needed(files, model_of(contents, name).arena_bytes, len(whole), arena_of(whole, "the backbone"))


def main() -> None:
    rows = [
        "| net | files of its stages | without exits | arenas of its stages | without exits |",
        "|---|---|---|---|---|",
    ]
    for name in NETS:
        found = needed(name)
        files, arenas = (" + ".join(f"{size:,}" for size in sizes) for sizes in (found.files, found.arenas))
        rows.append(f"| {name} | {files} | {found.full_file:,} | {arenas} | {found.full_arena:,} |")
    known = ", ".join(f"{package} {number}" for package, number in versions(_WRITTEN_BY).items())
    text = "\n".join(["`python -m benchmarks.micro`, bytes, float32", "", *rows, "", f"{known}, x86-64", ""])
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
