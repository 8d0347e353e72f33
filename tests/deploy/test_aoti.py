"""A package of machine code and the loop over its stages answer as the model does."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import cet
from cet.deploy import aoti_writer
from cet.deploy.check import NEAR
from families import FAMILIES, Family
from oracle import policy_between_scores

EXAMPLE = Path(__file__).parents[2] / "examples" / "cpp"
ROWS = (1, 2, 7, 64, 333, aoti_writer.MOST_ROWS + 1)


def exported(family: Family, path: Path) -> cet.EarlyExit:
    torch.manual_seed(1)
    inputs = family.inputs(64)
    model = cet.EarlyExit(family.build().eval(), family.exits, {key: value[:4] for key, value in inputs.items()})
    fractions = [0.5] * (model.num_exits - 1)
    model.policy = policy_between_scores(model, inputs, "entropy", fractions, (1.5,) * model.num_exits)
    report = cet.export(model, path, thresholds="input")
    assert report.num_bytes == path.stat().st_size
    assert report.comparison.rows > 20
    return model


def check_answers(model: cet.EarlyExit, family: Family, path: Path) -> None:
    loaded = cet.load_exported(path)
    for rows in ROWS:
        inputs = family.inputs(rows)
        near = torch.zeros(rows, dtype=torch.bool)
        for (_, scores), threshold in zip(model.exit_answers(**inputs), model.policy.thresholds, strict=False):
            near |= (scores - threshold).abs() <= NEAR
        expected, got = model.predict(**inputs), loaded.predict(**{key: value.numpy() for key, value in inputs.items()})
        sure = ~near.numpy()
        assert rows < 64 or sure.sum() > rows / 3
        np.testing.assert_array_equal(got.exit_index[sure], expected.exit_index.numpy()[sure])
        np.testing.assert_allclose(got.logits[sure], expected.logits.numpy()[sure], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(got.score[sure], expected.score.numpy()[sure], rtol=1e-3, atol=1e-5)
        assert rows < 64 or set(got.exit_index) == set(range(model.num_exits))
    loaded.thresholds = (None,) * (model.num_exits - 1)
    assert set(loaded.predict(**inputs).exit_index.tolist()) == {model.num_exits - 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of which one is used late, and one exit."""
    return tmp_path_factory.mktemp("aoti") / "m.pt2"


@pytest.fixture(scope="module")
def model(path: Path) -> cet.EarlyExit:
    return exported(FAMILIES["late-fusion"], path)


def test_answers_are_those_of_the_model_at_any_number_of_rows(model: cet.EarlyExit, path: Path) -> None:
    check_answers(model, FAMILIES["late-fusion"], path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "late-fusion"])
def test_answers_are_those_of_the_model_for_every_family(name: str, tmp_path: Path) -> None:
    model = exported(FAMILIES[name], tmp_path / "m.pt2")
    check_answers(model, FAMILIES[name], tmp_path / "m.pt2")


def test_pytorch_alone_reads_it(model: cet.EarlyExit, path: Path) -> None:
    """As the page tells, in a process without ``cet``."""
    code = f"""
import json, sys, zipfile, torch
from torch._inductor.package import load_package
path = {str(path)!r}
manifest = json.loads(zipfile.ZipFile(path).read("archive/extra/cet"))
first = manifest["stages"][0]
torch.manual_seed(5)
given = {{"x": torch.randn(3, 3, 16), "context": torch.randn(3, 4)}}
logits, score, *_ = load_package(path, first["file"])(*[given[name] for name in first["inputs"]])
assert "cet" not in sys.modules
print(json.dumps([logits.tolist(), score.tolist()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(5)
    answers = model.exit_answers(x=torch.randn(3, 3, 16), context=torch.randn(3, 4))
    for got, wanted in zip(json.loads(done.stdout), answers[0], strict=True):
        torch.testing.assert_close(torch.tensor(got), wanted)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs cmake")
def test_a_program_in_cpp_answers_as_the_model_does(tmp_path: Path) -> None:
    """examples/cpp, built against the PyTorch that is installed."""
    configure = [
        "cmake",
        "-S",
        str(EXAMPLE),
        "-B",
        str(tmp_path),
        f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
    ]
    done = subprocess.run(configure, capture_output=True, text=True)
    if "nlohmann_json" in done.stderr and done.returncode:
        pytest.skip("needs nlohmann-json")
    assert done.returncode == 0, done.stderr
    subprocess.run(["cmake", "--build", str(tmp_path)], check=True, capture_output=True)
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)]
    x = 3 * torch.randn(50, 4)
    model = cet.EarlyExit(nn.Sequential(*layers).eval(), ["1", "3"], (x[:4],))
    model.policy = policy_between_scores(model, {"input": x}, "entropy", [0.5, 0.5], (1.0,) * 3)
    cet.export(model, tmp_path / "m.pt2")
    x.numpy().tofile(tmp_path / "rows.f32")
    command = [tmp_path / "early_exit", tmp_path / "m.pt2", tmp_path / "rows.f32"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    out = model.predict(x)
    assert [int(line.split()[0]) for line in lines] == out.exit_index.tolist()
    assert [int(line.split()[1]) for line in lines] == out.labels.tolist()
    assert set(out.exit_index.tolist()) == {0, 1, 2}


def test_what_is_no_such_file_is_refused(path: Path, model: cet.EarlyExit, tmp_path: Path) -> None:
    content = path.read_bytes()
    (tmp_path / "cut.pt2").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.pt2").write_text("none")
    foreign = io.BytesIO(content)
    with zipfile.ZipFile(foreign) as read, zipfile.ZipFile(tmp_path / "foreign.pt2", "w") as written:
        for name in read.namelist():
            if name != "archive/extra/cet":
                written.writestr(name, read.read(name))
    for name, said in (("cut", "cannot read"), ("text", "cannot read"), ("foreign", "not written by cet.export")):
        with pytest.raises(cet.ExportError, match=f"{name}.pt2.*{said}|{said}.*{name}.pt2"):
            cet.load_exported(tmp_path / f"{name}.pt2")
    with pytest.raises(FileNotFoundError, match=r"none\.pt2 is no file"):
        cet.load_exported(tmp_path / "none.pt2")


def test_without_a_compiler_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cet.EarlyExit(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval(), ["0"], (torch.randn(4, 4),))
    model.policy = cet.ExitPolicy(thresholds=(0.3,))
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    with pytest.raises(cet.ExportError, match="there is no g"):
        cet.export(model, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []
