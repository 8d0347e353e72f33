"""`cet train`, `cet calibrate` and `cet predict` on tiny data, from the arrays to the answers."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_interruptions import heed_ctrl_c, obey_permissions, small_disk

import cet
from cet.cli import main, train
from cet.cli.runs import Settings, TrainingFolder, load_run
from cet.report.schema import Report
from commands import CET, ctrl_c_once_there_is
from thinned import slow

LABELS = ("sit", "stand", "walk")
FAST = ("--epochs", "2", "--batch-size", "32", "--threads", "1")
Arrays = dict[str, NDArray[Any]]


def arrays(samples: int, seed: int, people: str = "abcdef", labels: Any = LABELS) -> Arrays:
    """Waves of a frequency per class, far from zero; each person has every class."""
    rng = np.random.default_rng(seed)
    group = np.array([people[i % len(people)] for i in range(samples)])
    index = np.arange(samples) // len(people) % len(labels)
    phase, noise = 6.3 * rng.random((samples, 1, 1)), 0.5 * rng.normal(size=(samples, 4, 40))
    x = 1e3 + 20 * (np.sin((index[:, None, None] + 1) * np.arange(40) / 4 + phase) + noise)
    return {"x": x, "y": np.array(labels)[index], "group": group}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*args: object) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of ``cet ARGS``."""
        with pytest.raises(SystemExit) as stop:
            main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    np.savez(folder / "all.npz", **arrays(288, 0))
    np.savez(folder / "val.npz", **arrays(108, 1, people="uvw"))
    np.savez(folder / "new.npz", x=arrays(30, 2)["x"])
    return folder


@pytest.fixture(scope="module")
def trained(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs; tests that write to it copy it."""
    folder = tmp_path_factory.mktemp("runs") / "deep" / "mine"
    args = ["train", "--data", files / "all.npz", "--output", folder, *FAST, "--epochs", "4"]
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, args)))
    assert not stop.value.code
    return folder


@pytest.fixture
def mine(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "mine"))


def check_one_sentence(done: tuple[int, str, str], *named: str, code: int | None = None) -> None:
    assert done[0] == code if code is not None else done[0] != 0
    assert done[2].startswith("Error: ")
    assert done[2].count("\n") == 1
    for name in named:
        assert name in done[2]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


class TestTrain:
    def test_the_folder_holds_every_option_and_the_model(self, trained: Path, files: Path) -> None:
        assert {path.name for path in trained.iterdir()} == {"run.json", "model.safetensors"}
        content = json.loads((trained / "run.json").read_text())
        options = {parameter.name for parameter in train.command.params}
        assert options == {*content["settings"], "output", "config", "resume", "overwrite", "debug"}
        assert content["settings"]["data"] == str(files / "all.npz")
        assert content["settings"]["epochs"] == 4
        assert content["facts"]["classes"] == list(LABELS)

    def test_people_are_in_one_part_each(self, trained: Path) -> None:
        groups = json.loads((trained / "run.json").read_text())["facts"]["groups"]
        assert sorted(person for part in groups.values() for person in part) == list("abcdef")
        assert [len(groups[part]) for part in ("train", "calibration", "test")] == [4, 1, 1]

    def test_channels_are_standardised_with_the_model(self, trained: Path, files: Path) -> None:
        run = load_run(TrainingFolder(trained))
        assert isinstance(run.model, cet.EarlyExit)
        x = np.load(files / "all.npz")["x"]
        chosen = np.isin(np.load(files / "all.npz")["group"], run.facts["groups"]["train"])
        state = run.model.state_dict()
        assert state["backbone.mean"].tolist() == pytest.approx(x[chosen].mean((0, 2)).tolist())
        assert state["backbone.scale"].tolist() == pytest.approx(x[chosen].std((0, 2)).tolist())

    def test_it_learns(self, trained: Path) -> None:
        run = load_run(TrainingFolder(trained))
        held_out = arrays(120, 7)
        labels = [run.classes[i] for i in run.model.predict(torch.tensor(held_out["x"]).float()).labels.tolist()]
        assert np.mean(np.array(labels) == held_out["y"]) > 0.6

    def test_its_options_make_the_same_run_again(self, run: Any, trained: Path, tmp_path: Path) -> None:
        code, out, err = run("train", "--config", trained / "run.json", "--output", tmp_path / "again")
        assert (code, err) == (0, "")
        assert f"In {tmp_path / 'again'}: run.json, model.safetensors. Next: cet calibrate {tmp_path / 'again'}" in out
        for name in ("run.json", "model.safetensors"):
            assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()
        code, _, _ = run(
            "train", "--config", trained / "run.json", "--seed", 1, "--epochs", 1, "--output", tmp_path / "b"
        )
        assert code == 0
        settings = json.loads((tmp_path / "b" / "run.json").read_text())["settings"]
        assert (settings["seed"], settings["epochs"], settings["batch_size"]) == (1, 1, 32)

    def test_a_stopped_run_goes_on_and_ends_with_the_same_weights(
        self, files: Path, trained: Path, tmp_path: Path, run: Any
    ) -> None:
        folder = tmp_path / "stopped"
        args = ["train", "--data", files / "all.npz", "--output", folder, *FAST, "--epochs", "4"]
        with ctrl_c_once_there_is(folder / "checkpoints" / "last.ckpt"):
            code, _, err = run(*args)
        assert code == 130
        assert err == f"Interrupted; go on with: cet train --resume --output {folder}\n"
        assert not (folder / "model.safetensors").exists()
        check_one_sentence(run("train", *args[1:]), "holds an unfinished run; go on with --resume", code=1)
        check_one_sentence(run("calibrate", folder), "holds no trained model yet; go on with: cet train --resume")

        code, out, err = run("train", "--resume", "--output", folder)
        assert (code, err) == (0, "")
        assert "epoch 1/4" not in out
        assert (folder / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
        assert {path.name for path in folder.iterdir()} == {"run.json", "model.safetensors"}
        code, out, _ = run("train", "--resume", "--output", folder)
        assert (code, out) == (0, f"{folder} is trained already; go on with: cet calibrate {folder}\n")

    def test_resume_refuses_other_options_and_other_data(
        self, mine: Path, run: Any, files: Path, tmp_path: Path
    ) -> None:
        done = run("train", "--resume", "--output", mine, "--batch-size", 8)
        check_one_sentence(
            done, "--resume goes on with the options the run began with; leave out --batch-size.", code=2
        )
        check_one_sentence(
            run("train", "--resume", "--output", tmp_path / "none"), "holds no run; make one with", code=1
        )
        (mine / "model.safetensors").unlink()
        state = json.loads((mine / "run.json").read_text())
        shutil.copy(files / "val.npz", tmp_path / "other.npz")
        state["settings"]["data"] = str(tmp_path / "other.npz")
        (mine / "run.json").write_text(json.dumps(state))
        done = run("train", "--resume", "--output", mine)
        check_one_sentence(done, "was started with recordings_sha256", "cannot go on with", code=1)
        (mine / "run.json").write_text('{"settings": 3}')
        check_one_sentence(run("train", "--resume", "--output", mine), "run.json is damaged", code=1)

    def test_a_finished_run_is_replaced_only_if_asked_for(self, mine: Path, run: Any, files: Path) -> None:
        (mine / "notes.txt").write_text("mine")
        args = ("train", "--data", files / "all.npz", "--output", mine, *FAST, "--epochs", 1)
        check_one_sentence(run(*args), "holds a finished run; replace it with --overwrite", code=1)
        assert run(*args, "--overwrite")[0] == 0
        assert json.loads((mine / "run.json").read_text())["settings"]["epochs"] == 1
        assert (mine / "notes.txt").read_text() == "mine"

    def test_recipes_and_what_options_change_of_them(self) -> None:
        options = dict.fromkeys(("consistency_weight", "supervise_perturbed", "target", "teacher"))
        options |= {"min_confidence": None, "labelled_share": None, "perturb": "sensor", "recipe": "noisy-labels"}
        fixed = {"severity": 1.0, "epochs": 3, "batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.0, "seed": 0}
        rest = {"calibration_data": None, "test_data": None, "calibration_share": 0.2, "test_share": 0.2, "threads": 1}
        settings = Settings(data="x.npz", augment=False, **{**options, **fixed, **rest})
        assert (settings.training.consistency_weight, settings.training.epochs) == (3.0, 3)
        changed = replace(settings, consistency_weight=0.5, teacher="final").loss()
        assert (changed.consistency_weight, changed.teacher, changed.supervise_perturbed) == (0.5, "final", 1.0)
        assert replace(settings, perturb="none", recipe="joint").loss().perturb is None

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                ("--perturb", "none", "--recipe", "consistent"),
                "there is no perturbation; give --perturb, or leave out what compares",
            ),
            (("--target", "hard"), "target 'hard' with min_confidence 0 teaches guesses as if they were certain"),
        ],
    )
    def test_recipes_that_cannot_be_are_refused_before_data_are_read(
        self, run: Any, tmp_path: Path, options: tuple[str, ...], message: str
    ) -> None:
        done = run("train", "--data", tmp_path / "none.npz", "--output", tmp_path / "r", *options)
        check_one_sentence(done, message)
        assert not (tmp_path / "r").exists()

    def test_samples_without_a_label_train_and_do_nothing_else(self, run: Any, tmp_path: Path) -> None:
        few = arrays(288, 0)
        few["y"][np.arange(288) % 24 >= 12] = ""
        np.savez(tmp_path / "few.npz", **few)
        more = ("--recipe", "noisy-labels", "--epochs", 1)
        assert run("train", "--data", tmp_path / "few.npz", "--output", tmp_path / "r", *FAST, *more)[0] == 0
        facts = json.loads((tmp_path / "r" / "run.json").read_text())["facts"]
        assert facts["classes"] == list(LABELS)
        assert facts["samples"] == {"train": 192, "calibration": 24, "test": 24}
        assert run("calibrate", tmp_path / "r", "--quick")[0] == 0
        few["y"][:] = ""
        np.savez(tmp_path / "none.npz", **few)
        done = run("train", "--data", tmp_path / "none.npz", "--output", tmp_path / "s", *FAST)
        check_one_sentence(done, "none.npz: no sample has a label in y", code=1)

    def test_files_of_their_own_calibrate_and_test(self, run: Any, files: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "test.npz", **arrays(36, 3, people="xyz"))
        more = ("--calibration-data", files / "val.npz", "--test-data", tmp_path / "test.npz", "--epochs", 1)
        assert run("train", "--data", files / "all.npz", "--output", tmp_path / "r", *FAST, *more)[0] == 0
        facts = json.loads((tmp_path / "r" / "run.json").read_text())["facts"]
        assert facts["groups"] == {"train": list("abcdef"), "calibration": list("uvw"), "test": list("xyz")}
        assert facts["samples"] == {"train": 288, "calibration": 108, "test": 36}

    @pytest.mark.parametrize(
        ("change", "options", "named"),
        [
            ({"x": None}, (), "all.npz holds no x"),
            ({"y": None}, (), "all.npz holds no y; add one label per sample"),
            ({"x": np.full((288, 4, 40), np.nan)}, (), "x is not finite in 288 of 288 samples"),
            ({"x": np.zeros((288, 40))}, (), "x has shape (288, 40); give (samples, channels, length)"),
            ({"x": np.zeros((3, 4, 40))}, (), "y has shape (288,) for 3 samples"),
            ({"y": np.array([None] * 288, dtype=object)}, (), "it holds objects, not numbers or strings"),
            ({"y": np.zeros(288, dtype=int)}, (), "y holds the label 0 alone; give samples of two classes"),
            ({"y": np.where(np.arange(288) == 0, 9, 1)}, (), "no calibration sample has the label 9"),
            ({"y": np.where(np.arange(288) % 6 == 0, 9, 1)}, ("--seed", 4), "sample has the label 9; split with"),
            ({"group": np.arange(288) % 2}, (), "group names 2 with a label, too few for 3 parts that share none"),
            ({"group": np.arange(288) / 2}, (), "group is float64; give whole numbers or strings"),
            ({}, ("--calibration-data", "VAL", "--test-data", "VAL"), "is in the samples for calibration and for test"),
            ({}, ("--calibration-share", 0), "there are no samples to calibrate on; give --calibration-data"),
            ({}, ("--perturb", "rotated-sensor"), "x has 4 channels, not a multiple of 3"),
            ({}, ("--perturb", "image"), "x must"),
        ],
    )
    def test_what_cannot_be_trained_on_is_refused_and_leaves_nothing(
        self, run: Any, files: Path, tmp_path: Path, change: dict[str, Any], options: tuple[Any, ...], named: str
    ) -> None:
        content = {name: value for name, value in {**arrays(288, 0), **change}.items() if value is not None}
        np.savez(tmp_path / "all.npz", **content)
        given = [files / "val.npz" if option == "VAL" else option for option in options]
        done = run("train", "--data", tmp_path / "all.npz", "--output", tmp_path / "new" / "run", *FAST, *given)
        check_one_sentence(done, named, code=1)
        assert {path.name for path in tmp_path.iterdir()} == {"all.npz"}

    @pytest.mark.parametrize(
        ("args", "named"),
        [
            ((), "Missing option '--data'"),
            (("--data", "x.npz", "--epochs", 0), "--epochs"),
            (("--data", "x.npz", "--learning-rate", "nan"), "--learning-rate"),
            (("--data", "x.npz", "--output", ""), "the path is empty"),
            (("--config", "none.json"), "none.json holds no options (No such file or directory)"),
            (("--data", "own_net:build", "--test-data", "a.npz"), "leave out --calibration-data and --test-data"),
        ],
    )
    def test_bad_usage(self, run: Any, tmp_path: Path, args: tuple[Any, ...], named: str) -> None:
        check_one_sentence(run("train", "--output", tmp_path / "new", *args), named, code=2)
        assert list(tmp_path.iterdir()) == []

    def test_a_config_with_other_options_is_refused(self, run: Any, tmp_path: Path) -> None:
        (tmp_path / "c.json").write_text('{"settings": {"epoch": 3}}')
        done = run("train", "--config", tmp_path / "c.json", "--output", tmp_path / "new")
        check_one_sentence(done, "holds 'epoch', which is no option of cet train", code=2)
        (tmp_path / "c.json").write_text('{"settings": {"epochs": "many", "data": "x.npz"}}')
        done = run("train", "--config", tmp_path / "c.json", "--output", tmp_path / "new")
        check_one_sentence(done, "'many' is not a valid integer", code=2)


class TestCalibrate:
    def test_it_reports_as_the_demonstration_does(self, run: Any, mine: Path) -> None:
        code, out, err = run("calibrate", mine, "--quick", "--max-drop", 0.05, "--severity", 1, "--no-guarantee")
        assert (code, err) == (0, "")
        results = "model.safetensors, calibration.json, report.md, report.json, accuracy.png, exits.png"
        assert out.endswith(f"In {mine}: {results}\n")
        assert {path.name for path in mine.iterdir()} == {"run.json", *results.split(", ")}
        report = json.loads((mine / "report.json").read_text())
        assert report.keys() == Report.__annotations__.keys()
        assert report["exits"] == ["block1", "block2", "block3", "final"]
        assert report["conditions"] == {"clean": 0.0, "perturbed": 1.0}
        facts = json.loads((mine / "run.json").read_text())["facts"]
        assert report["data"]["persons"] == facts["groups"]
        (recipe,) = report["recipes"].values()
        calibration = json.loads((mine / "calibration.json").read_text())
        assert calibration.pop("classes") == recipe["calibration"].pop("classes") or True
        assert calibration["num_samples"] == 2 * facts["samples"]["calibration"]
        assert calibration["max_drop"] == 0.05
        policy = load_run(TrainingFolder(mine)).model.policy
        assert policy == cet.ExitPolicy(**recipe["policy"])
        assert any(threshold is not None for threshold in policy.thresholds)
        text = (mine / "report.md").read_text()
        assert text.startswith("# Early exit on all.npz\n")
        assert "of test persons" in text
        for name in ("accuracy.png", "exits.png"):
            assert (mine / name).read_bytes().startswith(b"\x89PNG")

    def test_few_people_can_promise_nothing_about_new_ones(self, run: Any, mine: Path, files: Path) -> None:
        code, out, err = run("calibrate", mine, "--quick", "--data", files / "val.npz", "--max-drop", 0.1)
        assert (code, err) == (0, "")
        assert "nothing is certified, and all exits are closed: accuracy has 3 groups to test on" in out
        assert "--no-guarantee fits thresholds on these samples, without a promise" in out
        assert out.endswith("calibration.json, front.png, report.md, report.json, accuracy.png, exits.png\n")
        certificate = json.loads((mine / "calibration.json").read_text())["certificate"]
        assert (certificate["certified"], certificate["unit"], certificate["bound"]) == (False, "groups", 0.1)
        assert load_run(TrainingFolder(mine)).model.policy.thresholds == (None, None, None)
        assert certificate["promise"] in (mine / "report.md").read_text()
        assert "No sample leaves early: " in (mine / "report.md").read_text()
        _, out, _ = run("predict", mine, "--data", files / "new.npz", "--output", mine / "a.csv")
        assert f"every exit is closed, as calibration found best; {mine / 'calibration.json'} says why" in out

    def test_a_budget_in_measured_milliseconds(self, run: Any, mine: Path, files: Path) -> None:
        options = ("--quick", "--data", files / "val.npz", "--cost", "ms", "--any-drop")
        code, out, err = run("calibrate", mine, *options, "--worst-budget", 1000, "--mean-budget", 1000)
        assert (code, err) == (0, "")
        assert "the mean cost on new groups of the same kind is within 1000 ms" in out
        assert "       cost ms      loss  thresholds\n *" in out
        assert (mine / "front.png").read_bytes().startswith(b"\x89PNG")
        flops = ("--any-drop", "--mean-budget", 1e3)
        check_one_sentence(run("calibrate", mine, *flops), "mean_budget is 1000 FLOPs, and no exit costs less", code=1)

    def test_it_takes_other_samples(self, run: Any, mine: Path, files: Path) -> None:
        options = ("--metric", "per_class", "--score", "margin", "--max-drop", 0.02, "--no-guarantee")
        code, out, err = run("calibrate", mine, "--quick", "--data", files / "val.npz", *options)
        assert (code, err) == (0, "")
        calibration = json.loads((mine / "calibration.json").read_text())
        assert (calibration["num_samples"], calibration["metric"]) == (108, "per_class")
        assert calibration["metric_drop"] <= 0.02
        assert load_run(TrainingFolder(mine)).model.policy.score == "margin"
        assert "of the classes, 0 is sit, 1 is stand, 2 is walk" in out
        assert "per_class drops by" in out

    def test_a_class_without_samples_is_told(self, run: Any, mine: Path, files: Path, tmp_path: Path) -> None:
        content = np.load(files / "val.npz")
        np.savez(tmp_path / "some.npz", **{name: value[content["y"] != "sit"] for name, value in content.items()})
        code, out, _ = run("calibrate", mine, "--quick", "--data", tmp_path / "some.npz")
        assert code == 0
        assert "warning: no sample of 'sit': nothing is known of their recall" in out

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            slow({"x": np.zeros((36, 3, 40))}, "x has shape (36, 3, 40) for a model of 4 channels; give (samples, 4, "),
            ({"y": np.array(["run"] * 36)}, "y holds the label 'run', which is none of the 3 classes"),
            slow({"y": None}, "holds no y"),
            ({"group": np.array(list("abcdef") * 6)}, "is in the samples for training and for calibration"),
        ],
    )
    def test_samples_that_do_not_fit_are_refused(
        self, run: Any, mine: Path, tmp_path: Path, change: dict[str, Any], named: str
    ) -> None:
        content = {name: v for name, v in {**arrays(36, 5, people="uvw"), **change}.items() if v is not None}
        np.savez(tmp_path / "bad.npz", **content)
        before = {path.name: path.read_bytes() for path in mine.iterdir()}
        check_one_sentence(run("calibrate", mine, "--data", tmp_path / "bad.npz"), named, code=1)
        assert {path.name: path.read_bytes() for path in mine.iterdir()} == before

    def test_the_samples_must_be_those_of_the_training(self, run: Any, mine: Path, files: Path, tmp_path: Path) -> None:
        state = json.loads((mine / "run.json").read_text())
        shutil.copy(files / "val.npz", tmp_path / "other.npz")
        state["settings"]["data"] = str(tmp_path / "other.npz")
        (mine / "run.json").write_text(json.dumps(state))
        check_one_sentence(run("calibrate", mine), "was started with recordings_sha256", code=1)

    def test_bad_usage(self, run: Any, mine: Path, tmp_path: Path) -> None:
        check_one_sentence(run("calibrate", mine, "--max-drop", "1%"), "'1%' is not a valid float", code=2)
        check_one_sentence(run("calibrate", mine, "--max-drop", 1), "--max-drop", code=2)
        check_one_sentence(run("calibrate", tmp_path), "holds no run; make one with: cet train --output", code=1)


class TestPredict:
    def test_answers_are_those_of_the_model(self, run: Any, mine: Path, files: Path, tmp_path: Path) -> None:
        assert run("calibrate", mine, "--quick", "--max-drop", 0.05)[0] == 0
        code, out, err = run("predict", mine, "--data", files / "val.npz", "--output", tmp_path / "answers.csv")
        assert (code, err) == (0, "")
        trained = load_run(TrainingFolder(mine))
        content = np.load(files / "val.npz")
        expected = trained.model.predict(torch.tensor(content["x"]).float())
        rows = rows_of(tmp_path / "answers.csv")
        assert [int(row["sample"]) for row in rows] == list(range(108))
        assert [row["label"] for row in rows] == [LABELS[i] for i in expected.labels.tolist()]
        names = ["block1", "block2", "block3", "final"]
        assert [row["exit"] for row in rows] == [names[i] for i in expected.exit_index.tolist()]
        assert [float(row["score"]) for row in rows] == pytest.approx(expected.score.tolist(), rel=1e-5)
        assert [row["group"] for row in rows] == content["group"].tolist()
        accuracy = np.mean([row["label"] == label for row, label in zip(rows, content["y"], strict=True)])
        assert f"accuracy {accuracy:.2%}" in out
        assert f"108 answers in {tmp_path / 'answers.csv'}; samples left: " in out

    def test_without_labels_and_before_calibration(self, run: Any, mine: Path, files: Path, tmp_path: Path) -> None:
        code, out, _ = run("predict", mine, "--data", files / "new.npz", "--output", tmp_path / "a.csv")
        assert code == 0
        assert {row["exit"] for row in rows_of(tmp_path / "a.csv")} == {"final"}
        assert list(rows_of(tmp_path / "a.csv")[0]) == ["sample", "label", "exit", "score"]
        assert "accuracy" not in out
        assert f"every exit is closed: the run is not calibrated; cet calibrate {mine}" in out

    def test_a_file_is_replaced_only_if_asked_for(self, run: Any, mine: Path, files: Path, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("mine")
        args = ("predict", mine, "--data", files / "new.npz", "--output", tmp_path / "a.csv")
        check_one_sentence(run(*args), "a.csv exists; give another file, or replace it with --overwrite", code=20)
        assert (tmp_path / "a.csv").read_text() == "mine"
        assert run(*args, "--overwrite")[0] == 0
        assert len(rows_of(tmp_path / "a.csv")) == 30
        check_one_sentence(run(*args[:-1], tmp_path), "is a folder; give a file", code=20)

    @pytest.mark.parametrize(
        ("change", "named"),
        [
            slow({"x": np.zeros((2, 40))}, "x has shape (2, 40); give (samples, channels, length)"),
            ({"x": np.zeros((2, 5, 40))}, "for a model of 4 channels"),
            ({"x": np.full((2, 4, 40), np.inf)}, "x is not finite in 2 of 2 samples"),
            slow({"z": np.zeros(2)}, "holds 'z' beside nothing else"),
        ],
    )
    def test_samples_that_do_not_fit_are_refused(
        self, run: Any, mine: Path, tmp_path: Path, change: dict[str, Any], named: str
    ) -> None:
        np.savez(tmp_path / "bad.npz", **change)
        done = run("predict", mine, "--data", tmp_path / "bad.npz", "--output", tmp_path / "a.csv")
        check_one_sentence(done, named, code=1)
        assert not (tmp_path / "a.csv").exists()

    @pytest.mark.parametrize("damage", ["model.safetensors", "run.json"])
    def test_a_damaged_run_is_refused(self, run: Any, mine: Path, files: Path, tmp_path: Path, damage: str) -> None:
        (mine / damage).write_bytes((mine / damage).read_bytes()[:-30])
        done = run("predict", mine, "--data", files / "new.npz", "--output", tmp_path / "a.csv")
        check_one_sentence(done, f"{damage} is damaged", code=1)


class TestFunction:
    """A model and batches of one's own."""

    def test_from_training_to_answers(self, run: Any, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        code, out, err = run(
            "train", "--data", "own_net:build", "--output", folder, *FAST, "--epochs", 20, "--learning-rate", 0.02
        )
        assert (code, err) == (0, "")
        assert "epoch 20/20" in out
        code, out, err = run("calibrate", folder, "--max-drop", 0.05)
        assert (code, err) == (0, "")
        assert out.endswith(f"In {folder}: model.safetensors, calibration.json, front.png\n")
        assert json.loads((folder / "calibration.json").read_text())["num_samples"] == 64
        code, out, err = run("predict", folder, "--data", "own_net:new", "--output", tmp_path / "a.csv")
        assert (code, err) == (0, "")
        assert float(out.split("accuracy ")[1].split("%")[0]) > 60
        assert {row["label"] for row in rows_of(tmp_path / "a.csv")} <= {"0", "1", "2"}
        np.savez(tmp_path / "new.npz", x=np.eye(5)[:3])
        code, out, err = run("predict", folder, "--data", tmp_path / "new.npz", "--output", tmp_path / "b.csv")
        assert (code, err) == (0, "")
        assert len(rows_of(tmp_path / "b.csv")) == 3

    @pytest.mark.parametrize(
        ("spec", "named"),
        [
            (
                "own_net:only_a_model",
                "own_net:only_a_model gives EarlyExit; return a cet.EarlyExit, an iterable of batch",
            ),
            ("own_net:no_batches", "gives int for batches; return a cet.EarlyExit"),
            ("own_net:biuld", "did you mean 'build'?"),
            ("no_such_module:build", "no_such_module:build cannot be loaded"),
        ],
    )
    def test_what_is_no_model_with_batches_is_refused(self, run: Any, tmp_path: Path, spec: str, named: str) -> None:
        check_one_sentence(run("train", "--data", spec, "--output", tmp_path / "run", *FAST), named, code=21)
        assert list(tmp_path.iterdir()) == []


class TestExport:
    def test_a_run_in_int8_has_thresholds_of_its_own(self, run: Any, tmp_path: Path) -> None:
        mine = tmp_path / "mine"
        options = (*FAST, "--epochs", 20, "--learning-rate", 0.02)
        assert run("train", "--data", "own_net:build", "--output", mine, *options)[0] == 0
        before = (mine / "model.safetensors").read_bytes()
        small = tmp_path / "small.onnx"
        code, out, err = run("export", mine, "--output", small, "--int8", "--no-guarantee", "--max-drop", "0.2")
        assert (code, err) == (0, "")
        assert "int8 beside float32 on" in out
        assert "mean cost" in out
        assert any(threshold is not None for threshold in cet.load_exported(small).thresholds)
        assert (mine / "model.safetensors").read_bytes() == before
        code, _, err = run("export", mine, "--output", tmp_path / "b.onnx", "--max-drop", "0.2")
        assert code == 2
        assert "--max-drop and --no-guarantee are for --int8" in err
        done = run("export", mine, "--output", tmp_path / "a.pt2", "--int8")
        check_one_sentence(done, "quantize is for .onnx, .stages, .pte, .tflite, and the format is 'aoti'")
        assert {path.name for path in tmp_path.iterdir()} == {"mine", "small.onnx"}

    def test_a_run_that_is_not_calibrated_or_not_there(self, run: Any, mine: Path, tmp_path: Path) -> None:
        done = run("export", mine, "--output", tmp_path / "a.onnx")
        check_one_sentence(done, f"the run is not calibrated; cet calibrate {mine}, or give --thresholds input", code=2)
        done = run("export", tmp_path / "nobody", "--output", tmp_path / "a.onnx", "--int8")
        check_one_sentence(done, f"nobody is not there; make a run with: cet train --output {tmp_path}/nobody", code=1)
        done = run("export", mine, "--output", tmp_path / "nowhere" / "a.onnx", "--thresholds", "input")
        check_one_sentence(done, "a.onnx cannot be written", "give another path, or make the folder first", code=20)
        assert {path.name for path in tmp_path.iterdir()} == {"mine"}


class TestInterruptions:
    """Ctrl-C, a full disk, and a folder that cannot be written."""

    def start(self, *args: object, **more: Any) -> tuple[int, str, str]:
        done = subprocess.run(
            [CET, *map(str, args)],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            **more,
        )
        return done.returncode, done.stdout, done.stderr

    def test_a_file_that_cannot_be_finished_leaves_no_run(
        self, run: Any, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def replace(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.replace", replace)
        done = run("train", "--data", files / "all.npz", "--output", tmp_path / "run", *FAST)
        check_one_sentence(done, "run/run.json cannot be written (No space left on device)", code=20)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_a_full_disk_leaves_no_run(self, files: Path, tmp_path: Path) -> None:
        args = ("train", "--data", files / "all.npz", "--output", tmp_path / "run", *FAST)
        done = self.start(*args, preexec_fn=small_disk)
        check_one_sentence(done, "run/run.json cannot be written (File too large)", code=20)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_a_full_disk_leaves_a_run_as_it_was(self, files: Path, mine: Path, tmp_path: Path) -> None:
        before = {path.name: path.read_bytes() for path in mine.iterdir()}
        done = self.start("calibrate", mine, "--quick", preexec_fn=small_disk)
        check_one_sentence(done, "cannot be written (File too large)", code=20)
        assert {path.name: path.read_bytes() for path in mine.iterdir()} == before
        done = self.start(
            "predict", mine, "--data", files / "new.npz", "--output", tmp_path / "a.csv", preexec_fn=small_disk
        )
        check_one_sentence(done, "a.csv cannot be written (File too large)", code=20)
        assert {path.name for path in tmp_path.iterdir()} == {"mine"}

    @pytest.mark.slow
    def test_a_folder_that_cannot_be_written(self, files: Path, mine: Path, tmp_path: Path) -> None:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o555)
        mine.chmod(0o555)
        new = files / "new.npz"
        for args, named in (
            (("train", "--data", files / "all.npz", "--output", locked / "run", *FAST), "locked/run cannot be written"),
            (("calibrate", mine, "--quick"), "mine cannot be written"),
            (("predict", mine, "--data", new, "--output", locked / "a.csv"), "locked/a.csv cannot be written"),
        ):
            check_one_sentence(self.start(*args, preexec_fn=obey_permissions), f"{named} (Permission denied)", code=20)
        mine.chmod(0o755)

    def test_ctrl_c_while_the_data_are_loaded(self, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(_seconds: float) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("own_net.time.sleep", interrupt)
        code, _, err = run("train", "--data", "own_net:slow", "--output", tmp_path / "run")
        assert (code, err) == (130, "building\nInterrupted; nothing was kept\n")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.slow
    def test_ctrl_c_before_anything_was_done(self, tmp_path: Path) -> None:
        args = ["train", "--data", "own_net:slow", "--output", str(tmp_path / "run")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
        with subprocess.Popen(
            [CET, *args], stdout=-1, stderr=-1, text=True, env=environment, preexec_fn=heed_ctrl_c
        ) as process:
            assert process.stderr is not None
            assert process.stderr.readline() == "building\n"
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert err == "Interrupted; nothing was kept\n"
        assert list(tmp_path.iterdir()) == []


def test_what_the_page_tells_runs(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of docs/howto/own-data.md, in their order; the measurements are cut short."""
    page = (Path(__file__).parents[2] / "docs" / "howto" / "own-data.md").read_text()
    blocks = re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "console", "python"]
    monkeypatch.chdir(tmp_path)
    exec(blocks[0][1], {})
    commands = blocks[1][1].splitlines()
    for line in commands:
        _, *args = shlex.split(line)
        code, _, err = run(*args, *(["--quick"] if args[0] == "calibrate" else []))
        assert (code, err) == (0, "")
    assert len(rows_of(tmp_path / "answers.csv")) == 600
    (tmp_path / "mynet.py").write_text(blocks[2][1])
    monkeypatch.syspath_prepend(tmp_path)
    assert "cet train --data mynet:build --output runs/mynet`" in page
    assert run("train", "--data", "mynet:build", "--output", "runs/mynet", "--epochs", 1)[0] == 0
