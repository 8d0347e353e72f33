"""Coverage in small: promises about known distributions hold as often as they must, and a broken one is seen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import guarantees
from benchmarks.guarantees import Large, Row, Trial, main, read, run, to_markdown, trials
from cet.calibration.bounds import PairedTest
from cet.calibration.certify import Terms
from thinned import slow

DRAWS = 120


@pytest.fixture(autouse=True)
def _small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarantees, "POOL", 6000)
    guarantees.make_pool.cache_clear()
    guarantees._best.cache_clear()


@pytest.mark.parametrize(
    "trial",
    [
        Trial("hard", 1000),
        slow(Trial("rare classes", 1000, method="exact, no split")),
        slow(Trial("rare classes", 1000, method="betting", weighted=True)),
        slow(Trial("rare classes", 1000, "per_class", bound=0.15)),
        slow(Trial("rare classes", 1000, "balanced", bound=0.08)),
        Trial("hard", 1000, "disagreement", bound=0.05),
        Trial("groups", 120, bound=0.06, method="betting"),
        Trial("hard", 1000, method="risk control"),
        Trial("hard", 1000, bound=None, budget=0.6),
        slow(Trial("easy", 1000, bound=0.05, budget=0.6)),
    ],
    ids=lambda trial: f"{trial.setting}, {trial.metric}, {trial.method}, {trial.budget}",
)
def test_promises_are_kept(trial: Trial) -> None:
    draws = DRAWS // 4 if trial.metric == "balanced" else DRAWS  # exact tests of every class are dear
    row = run(trial, draws, compare=False)
    assert row.kept, row
    assert row.closed < draws / 2  # an empty promise is kept as well
    assert row.saved > 0.05


def test_fitted_thresholds_promise_nothing() -> None:
    row = run(Trial("hard", 1000, method="fitted"), 40, compare=False)
    assert row.broken > row.allowed


def test_a_test_that_is_too_lenient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rejects = PairedTest.rejects
    monkeypatch.setattr(PairedTest, "rejects", lambda self, statistic, level: rejects(self, statistic, 3 * level))
    assert not run(Trial("hard", 1000), DRAWS, compare=False).kept


def test_a_test_of_a_larger_bound_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Terms.asked
    monkeypatch.setattr(
        Terms, "asked", lambda self, *given: [replace(q, bound=1.5 * q.bound) for q in asked(self, *given)]
    )
    assert not run(Trial("groups", 200, bound=0.04, method="betting"), 60, compare=False).kept


def test_rows_tell_whether_promises_were_kept() -> None:
    row = Row("hard", 1500, "accuracy", 0.02, 0.9, "exact", 1000, 131, 130, 0.01, 0.4, 0.9, 0, 0.1)
    assert not row.kept
    text = to_markdown([row], [Large(10, 50_000, 1000, "accuracy", 5.0, 0.4)])
    assert (
        "| hard | 1500 | accuracy | 0.02 | - | 0.9 | exact | 1000 | 131 | 130 | 0.0100 | 40.0% | 90.0% | - | 0 |"
        in text
    )


def test_it_writes_its_results_and_fails_where_a_promise_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarantees, "large", list)
    monkeypatch.setattr(guarantees, "trials", lambda: iter([Trial("groups", 150, bound=0.03, method="betting")]))
    done = CliRunner().invoke(main, ["--draws", "3", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {f"guarantees.{kind}" for kind in ("csv", "json", "md")}
    rejects = PairedTest.rejects
    monkeypatch.setattr(PairedTest, "rejects", lambda self, statistic, level: rejects(self, statistic, 0.7))
    monkeypatch.setattr(guarantees, "trials", lambda: iter([Trial("hard", 1000)]))
    done = CliRunner().invoke(main, ["--draws", "40", "--output", str(tmp_path)])
    assert done.exit_code == 1
    assert "broken too often" in done.output


def test_a_run_goes_on_where_rows_are_missing_and_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = [Trial("easy", 200), Trial("easy", 200, bound=None, budget=0.5), Trial("hard", 200, method="Bonferroni")]
    monkeypatch.setattr(guarantees, "large", lambda: [Large(10, 50_000, 1000, "accuracy", 5.0, 0.4)])
    monkeypatch.setattr(guarantees, "trials", lambda: iter(tried))
    assert CliRunner().invoke(main, ["--draws", "3", "--settings", "easy", "--output", str(tmp_path)]).exit_code == 0
    before, big = read(tmp_path)
    assert [row.key for row in before] == [trial.key for trial in tried[:2]]
    monkeypatch.setattr(guarantees, "large", list)
    assert CliRunner().invoke(main, ["--draws", "3", "--missing", "--output", str(tmp_path)]).exit_code == 0
    after, kept = read(tmp_path)
    assert [row.key for row in after] == [trial.key for trial in tried]
    assert (str(after[:2]), kept) == (str(before), big)  # timings included; as text, for NaN is not itself
    assert all(row.draws == 3 and row.commit for row in after)


def test_the_best_thresholds_are_within_the_bound_and_the_budget_on_the_pool() -> None:
    for metric in ("accuracy", "per_class", "disagreement", "brier"):
        few, many = (guarantees._best(Trial("hard", 0, metric, bound=bound)) for bound in (0.02, 0.05))
        assert 0 < few < many
    little, much = (guarantees._best(Trial("hard", 0, bound=None, budget=budget)) for budget in (0.4, 0.7))
    assert much < little
    [grouped] = [guarantees._best(Trial("groups", 0, bound=0.03))]
    assert run(Trial("groups", 60, bound=0.03, method="betting"), 5).of_best == pytest.approx(
        run(Trial("groups", 60, bound=0.03, method="betting"), 5, compare=False).saved / grouped
    )


def test_a_grid_at_shares_of_the_level_is_no_bolder_than_the_walk_for_any_metric() -> None:
    for trial in (Trial("hard", 1000), Trial("hard", 1500, "per_class", bound=0.1)):
        assert run(replace(trial, method="Bonferroni"), 5, compare=False).saved < run(trial, 5, compare=False).saved


def test_every_setting_and_method_is_tried() -> None:
    tried = list(trials())
    assert {trial.setting for trial in tried} == guarantees.SETTINGS.keys()
    methods = {"exact", "betting", "bentkus", "risk control", "exact, no split", "fitted"}
    grids = {"Bonferroni", "Bonferroni, betting", "Bonferroni, no split"}
    assert {trial.method for trial in tried} == methods | grids
    assert {trial.metric for trial in tried} == {"accuracy", "balanced", "per_class", "disagreement", "brier"}
    assert len(tried) == len(set(tried))
