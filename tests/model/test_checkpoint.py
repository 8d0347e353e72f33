"""Saving and loading: nothing lost, nothing executed, every difference named."""

import copy
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cet
from cet.model.checkpoint import write_atomically


class Net(nn.Module):
    def __init__(self, width=6, classes=4):
        super().__init__()
        self.block = nn.Sequential(nn.Conv1d(3, width, 3), nn.BatchNorm1d(width), nn.ReLU())
        self.top = nn.Conv1d(width, width, 3)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x, scale=1.0):
        return self.classifier(torch.relu(self.top(self.block(x))).mean(2)) * scale


POLICY = cet.ExitPolicy("margin", (0.2, None), (1.5, 1.0, 0.5))
EXITS = {"block": cet.HeadSpec(norm=True, hidden=5), "top": None}
X = torch.linspace(-3, 3, 5 * 3 * 12).view(5, 3, 12)


def build(**options):
    torch.manual_seed(1)
    model = cet.EarlyExit(Net(**options), EXITS, (torch.randn(2, 3, 12),), policy=POLICY)
    model(torch.randn(8, 3, 12))  # statistics of the batch norm
    return model.eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    model = build()
    path = tmp_path_factory.mktemp("written") / "model.safetensors"
    model.save(path)
    return model, path


@pytest.fixture
def saved(written, tmp_path):
    """A model and a copy of its file."""
    model, path = written
    return model, shutil.copy(path, tmp_path / path.name)


def assert_equal(loaded, model, *args, **kwargs):
    assert not loaded.training
    assert loaded.exit_names == model.exit_names
    assert loaded.policy == model.policy
    state = loaded.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value), name
    got, expected = loaded.predict(*args, **kwargs), model.predict(*args, **kwargs)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.exit_index, expected.exit_index)
    assert torch.equal(got.score, expected.score)


def test_a_model_comes_back_as_it_was(saved):
    model, path = saved
    assert_equal(cet.load(path, Net()), model, X)
    assert_equal(cet.load(str(path), Net()), model, X)


@pytest.mark.parametrize("thresholds", [(math.inf, -math.inf), (None, 0.1 + 0.2)])
def test_any_policy_comes_back(tmp_path, thresholds):
    model = build()
    model.policy = cet.ExitPolicy("entropy", thresholds)
    model.save(tmp_path / "m")
    assert cet.load(tmp_path / "m", Net()).policy == model.policy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_that_were_cast_come_back(tmp_path, dtype):
    model = build().to(dtype)
    model.save(tmp_path / "m")
    assert_equal(cet.load(tmp_path / "m", Net().to(dtype)), model, X.to(dtype))


def test_a_backbone_built_in_double_precision_comes_back(tmp_path):
    model = cet.EarlyExit(Net().double(), EXITS, (X.double(),)).eval()
    model.save(tmp_path / "m")
    assert_equal(cet.load(tmp_path / "m", Net().double()), model, X.double())


def test_weights_take_the_dtype_of_the_backbone_that_they_are_loaded_into(saved):
    model, path = saved
    loaded = cet.load(path, Net().double())
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    torch.testing.assert_close(loaded(X.double()), copy.deepcopy(model).double()(X.double()))


def test_own_heads_come_back(tmp_path):
    def own():
        return nn.Sequential(nn.Flatten(), nn.Linear(6 * 10, 4))

    model = cet.EarlyExit(Net(), {"block": own(), "top": None}, (X,), policy=POLICY).eval()
    model.save(tmp_path / "m")
    assert_equal(cet.load(tmp_path / "m", Net(), heads={"block": own()}), model, X)
    with pytest.raises(ValueError, match=r"the head of exit 'block' was a module of your own; pass it as heads="):
        cet.load(tmp_path / "m", Net())


@pytest.mark.parametrize("heads", [{"blok": nn.Linear(6, 4)}, {"block": nn.Linear(6, 4)}], ids=["unknown", "built in"])
def test_heads_that_the_file_does_not_ask_for_are_refused(saved, heads):
    with pytest.raises(ValueError, match=next(iter(heads))):
        cet.load(saved[1], Net(), heads=heads)


def test_tied_weights_stay_tied(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = nn.Linear(4, 4)
            self.b.weight = self.a.weight
            self.c = nn.Linear(4, 3)

        def forward(self, x):
            return self.c(self.b(torch.relu(self.a(x))))

    model = cet.EarlyExit(Tied(), ["a"], (torch.randn(3, 4),)).eval()
    model.save(tmp_path / "m")
    loaded = cet.load(tmp_path / "m", Tied())
    assert_equal(loaded, model, torch.randn(5, 4))
    assert loaded.backbone.a.weight is loaded.backbone.b.weight


class Inputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3, 4)
        self.kind = nn.Embedding(1, 4)
        self.top = nn.Linear(4, 3)

    def forward(self, batch, flags=None, power=1, *, gain=None):
        h = self.embed(batch["ids"]) + self.kind(batch["kinds"][0])
        return self.top(h.mean(1)) ** power * (1 if gain is None else gain) + flags[:, None]


def test_inputs_of_every_kind_come_back(tmp_path):
    def call(rows):
        kinds = torch.zeros(rows, 5, dtype=torch.int64)
        return {
            "batch": {"ids": torch.randint(0, 3, (rows, 5)), "kinds": [kinds]},
            "flags": torch.rand(rows) > 0.5,
            "power": 3,
            "gain": torch.tensor(0.5),
        }

    model = cet.EarlyExit(Inputs(), ["embed"], call(3)).eval()
    model.save(tmp_path / "m")
    assert_equal(cet.load(tmp_path / "m", Inputs()), model, **call(6))


def test_no_value_of_the_example_is_written(tmp_path):
    secret = torch.full((2, 3, 12), 0.123456789)
    cet.EarlyExit(Net(), EXITS, (secret,)).save(tmp_path / "m")
    assert secret[0, 0, :2].numpy().tobytes() not in (tmp_path / "m").read_bytes()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: Net(width=7), r"backbone.block.0.bias is \(6,\) in the file and \(7,\) in the model.* and \d+ more"),
        (lambda: Net(classes=5), r"backbone.classifier.bias is \(4,\) in the file and \(5,\) in the model"),
        (lambda: nn.Linear(3, 4), "backbone.bias is not in the file; .*backbone.block.0.bias is not in the model"),
    ],
)
def test_another_architecture_is_refused_and_left_alone(saved, other, message):
    backbone = other()
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(ValueError, match=f"was saved from another architecture: .*{message}.*; pass the backbone"):
        cet.load(saved[1], backbone)
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("kept", [0, 1, 8, 100, 0.5, 0.99, -1])
def test_a_truncated_file_is_refused(saved, kept):
    _, path = saved
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=r"model.safetensors is damaged or no safetensors file"):
        cet.load(path, Net())


class Bomb:
    def __reduce__(self):
        return os.abort, ()


FOREIGN = {
    "text": lambda path: path.write_text("not a model"),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "torch.save": lambda path: torch.save(nn.Linear(2, 2).state_dict(), path),
    "safetensors": lambda path: save_file({"a": torch.zeros(2)}, path),
    "other metadata": lambda path: save_file({"a": torch.zeros(2)}, path, metadata={"cet": "[1]"}),
    "no JSON": lambda path: save_file({"a": torch.zeros(2)}, path, metadata={"cet": "{"}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_refused_and_never_executed(tmp_path, kind):
    path = tmp_path / "foreign"
    FOREIGN[kind](path)
    with pytest.raises(
        ValueError, match=r"foreign (is damaged or no safetensors file|was not written by EarlyExit.save)"
    ):
        cet.load(path, Net())


def rewrite_header(path, change):
    tensors = load_file(path)
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]["cet"])
    change(header)
    save_file(tensors, path, metadata={"cet": json.dumps(header)})


def test_a_newer_version_is_refused(saved):
    rewrite_header(saved[1], lambda header: header.update(version=99))
    with pytest.raises(ValueError, match="has format 99, and this cet reads up to 1; update it"):
        cet.load(saved[1], Net())


DAMAGED = {
    "no version": lambda h: h.pop("version"),
    "version is text": lambda h: h.update(version="1"),
    "no heads": lambda h: h.pop("heads"),
    "unknown option of a head": lambda h: h["heads"]["block"].update(colour=1),
    "no policy": lambda h: h.pop("policy"),
    "unknown entry of the policy": lambda h: h["policy"].update(colour=1),
    "policy of other exits": lambda h: h["policy"].update(thresholds=[0.1], temperatures=None),
    "no inputs": lambda h: h.update(inputs={}),
    "dtype that is none": lambda h: h["inputs"]["args"][0].update(dtype="load"),
    "unknown kind of input": lambda h: h["inputs"].update(args=[{"set": []}]),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_description_is_refused(saved, kind):
    rewrite_header(saved[1], DAMAGED[kind])
    with pytest.raises(ValueError, match=r"model.safetensors"):
        cet.load(saved[1], Net())


@pytest.mark.parametrize("path", ["missing", "."])
def test_what_is_no_file_is_refused(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"is no file; give the path that EarlyExit.save wrote"):
        cet.load(tmp_path / path, Net())


@pytest.mark.parametrize("target", ["missing/model", "file/model", "folder"])
def test_a_place_that_cannot_be_written_is_named_and_nothing_is_left_behind(tmp_path, target):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match=target):
        build().save(tmp_path / target)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        model.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_kill_during_the_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    script = (
        "import os, signal, sys\n"
        "from cet.model.checkpoint import write_atomically\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(sys.argv[1], b'new' * 10000)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, path], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"


def test_the_file_has_the_permissions_that_the_umask_gives(saved):
    mask = os.umask(0)
    os.umask(mask)
    assert saved[1].stat().st_mode & 0o777 == 0o666 & ~mask


def test_constants_that_no_file_can_hold_are_refused(tmp_path):
    class Cast(Net):
        def forward(self, x, dtype=None):
            return super().forward(x).to(dtype)

    model = cet.EarlyExit(Cast(), EXITS, (X, torch.float32))
    with pytest.raises(TypeError, match="example_inputs holds a dtype, which no checkpoint can describe"):
        model.save(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_signal_after_the_file_is_in_place_is_passed_on(tmp_path, monkeypatch):
    replace = os.replace

    def replace_and_stop(source, target):
        replace(source, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace_and_stop)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"whole")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"whole"]
