"""Documents, CSV, metrics and plots of energy measurements."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import asdict, replace
from typing import Any

import matplotlib.image
import pytest
import torch
from rich.console import Console

import cet
from cet.cli.energy.tables import Scale
from cet.cli.energy.text import of_comparison, of_profile, of_run
from cet.energy import DomainEnergy, EnergyMeter, EnergyReading, Flag, Unavailable, plots, report
from cet.energy.comparison import compare
from cet.energy.figures import (
    POLICY,
    Figure,
    Figures,
    comparison_figures,
    profile_figures,
    si_prefix,
    window_figures,
)
from cet.energy.measurement import Measurement, Settings
from cet.energy.profile import profile
from nvml.simulation import Simulation
from simulated_net import backbone, data
from simulated_work import work

SETTINGS = Settings(rounds=4, window=0.5, warmup=0.1)
ABOUT: dict[str, Any] = {"settings": report.plain(replace(SETTINGS, assume_watts=50))}


def gpu(joules: float | None, **more: Any) -> DomainEnergy:
    domain = DomainEnergy("gpu:0", "NVIDIA Simulated GPU", "board", True, joules, None if joules is None else "counter")
    return replace(domain, **more)


def window(*domains: DomainEnergy, seconds: float = 2.0, unavailable: tuple[Unavailable, ...] = ()) -> EnergyReading:
    return EnergyReading(0.0, seconds, domains, unavailable)


def of_window(reading: EnergyReading, *idle: EnergyReading) -> report.Document:
    return report.document("run", window_figures(reading, idle), [], about={})


@pytest.fixture
def compared(simulation: Simulation) -> report.Document:
    """A measured comparison of 100 W with 110 W."""
    simulation.gpu(0, leakage=0)
    with EnergyMeter(rapl=False, clock=simulation.clock).opened() as meter:
        pair = (work(simulation, "A", 100, items=10), work(simulation, "B", 110, items=10))
        comparison = compare(*pair, meter, SETTINGS)
    return of_measurement("compare", comparison_figures(comparison), comparison.measurement)


@pytest.fixture(scope="module")
def profiled() -> report.Document:
    """A profile where no energy can be measured, with assumed watts."""
    model = cet.EarlyExit(backbone(), ["0", "1"], (torch.zeros(2, 6),))
    model.policy = cet.ExitPolicy("entropy", (1.3, 1.35))
    settings = replace(SETTINGS, window=0.01, warmup=0.005, assume_watts=50)
    with EnergyMeter([], rapl=False).opened() as meter:
        result = profile(model, list(data()), meter, settings)
    return of_measurement("profile", profile_figures(result), result.measurement, batch_size=8)


def of_measurement(kind: report.Kind, figures: Any, measurement: Measurement, **labels: Any) -> report.Document:
    plain = [report.plain_measurement(measurement, **labels)]
    return report.document(kind, figures, plain, flags=measurement.flags, stopped=measurement.stopped, about={})


class TestDocument:
    def test_it_is_json_with_a_version_and_raw_counters(self, compared: report.Document) -> None:
        document = json.loads(report.to_json(compared))
        assert (document["schema"], document["schema_version"]) == ("cet-energy", 1)
        assert (document["status"], document["stopped"]) == ("complete", None)
        (measurement,) = document["measurements"]
        assert len(measurement["blocks"]) == 2 + 4 * 3
        for block in measurement["blocks"]:
            (domain,) = block["reading"]["domains"]
            assert domain["start"]["unit"] == "mJ"
            assert (domain["end"]["raw"] - domain["start"]["raw"]) / 1e3 == pytest.approx(domain["joules"])
            assert block["watts"] == pytest.approx(domain["joules"] / block["seconds"])

    def test_its_keys_are_those_of_schema_1(self, profiled: report.Document) -> None:
        (measurement,) = profiled["measurements"]
        window = next(block for block in measurement["blocks"] if block["workload"] != "idle")
        found = {
            "measurement": measurement,
            "settings": measurement["settings"],
            "unavailable": measurement["unavailable"][0],
            "block": window,
            "domain": window["reading"]["domains"][0],
        }
        expected = {
            "measurement": "batch_size settings workloads window domains unavailable ticks preflight blocks status"
            " stopped exit_code flags",
            "settings": "blocks window ticks warmup warmup_limit seed confidence estimate_watts",
            "unavailable": "domain reason mend lost",
            "block": "workload round calls items reading before after flags void seconds watts",
            "domain": "domain device scope in_total joules source reason counter_joules integral_joules start end"
            " samples tick flags",
        }
        assert {name: set(row) for name, row in found.items()} == {n: {*keys.split()} for n, keys in expected.items()}

    def test_flags_are_explained(self) -> None:
        document = report.document("run", [], [], flags=[Flag.THROTTLED], stopped="SIGINT", about={})
        assert document["flags"] == {"throttled": Flag.THROTTLED.explanation}
        assert (document["status"], document["stopped"]) == ("partial", "SIGINT")

    def test_nan_is_refused(self) -> None:
        with pytest.raises(ValueError, match="nan"):
            report.to_json(report.document("run", [Figure("joules", "J", float("nan"))], [], about={}))


class TestWindow:
    def test_joules_above_idle_take_the_mean_idle_power_off(self) -> None:
        idle = (window(gpu(60.0), seconds=1.0), window(gpu(140.0), seconds=2.0))
        figures = Figures(of_window(window(gpu(300.0)), *idle))
        for domain in ("gpu:0", None):
            assert figures("joules", domain=domain)["value"] == 300.0
            assert figures("watts", domain=domain)["value"] == 150.0
            assert figures("net_joules", domain=domain)["value"] == 300.0 - 65.0 * 2.0
            assert figures("joules", domain=domain)["source"] == "counter"

    def test_the_ticks_at_both_ends_and_the_gain_are_its_errors(self) -> None:
        idle = (window(gpu(60.0, update_period=0.1), seconds=1.0), window(gpu(140.0, update_period=0.1), seconds=2.0))
        figures = Figures(of_window(window(gpu(300.0, update_period=0.1)), *idle))
        for domain in ("gpu:0", None):
            joules, watts, net = (figures(name, domain=domain) for name in ("joules", "watts", "net_joules"))
            assert (joules["low"], joules["high"], joules["systematic"]) == (285.0, 315.0, 15.0)
            assert (watts["low"], watts["high"], watts["systematic"]) == (142.5, 157.5, 7.5)
            assert net["high"] - net["value"] == pytest.approx(15.0 + 2.0 * (60 * 0.1 / 1 + 140 * 0.1 / 4) / 2)
            assert net["systematic"] == pytest.approx(0.05 * 170.0)
            assert (joules["reason"], net["reason"]) == (None, None)

    @pytest.mark.parametrize(("source", "systematic"), [("counter", 15.0), ("integral", 15.0), ("model", None)])
    def test_without_a_known_tick_it_says_why_it_has_no_interval(self, source: str, systematic: float | None) -> None:
        figure = Figures(of_window(window(gpu(300.0, source=source))))("joules")
        assert (figure["low"], figure["high"], figure["systematic"]) == (None, None, systematic)
        assert figure["reason"] == "no counter of gpu:0 has a known update period"

    def test_without_idle_it_says_so(self) -> None:
        figure = Figures(of_window(window(gpu(300.0))))("net_joules")
        assert (figure["value"], figure["reason"]) == (None, "the idle machine was not measured")
        assert figure["source"] is None

    def test_the_unknown_is_none_with_its_reason(self) -> None:
        missing = Unavailable("rapl", "there is no RAPL zone")
        figures = Figures(of_window(window(gpu(None, reason="it stood still"), unavailable=(missing,))))
        assert figures("joules", domain="gpu:0")["reason"] == "it stood still"
        assert figures("watts", domain="rapl")["reason"] == "there is no RAPL zone"
        assert figures("joules")["reason"] == "gpu:0: it stood still"
        for name in ("joules", "watts", "net_joules"):
            assert [figures(name, domain=domain)["value"] for domain in ("gpu:0", "rapl", None)] == [None] * 3

    def test_parts_of_other_domains_do_not_add(self) -> None:
        core = gpu(5.0, domain="rapl:core-0", in_total=False)
        assert Figures(of_window(window(gpu(300.0), core)))("joules")["value"] == 300.0


class TestComparison:
    def test_ratio_and_verdict(self, compared: report.Document) -> None:
        figures = Figures(compared)
        ratio = figures("net_joules", part="ratio", workload="A/B")
        assert ratio["low"] < 100 / 110 < ratio["high"]
        assert ratio["verdict"] == "less"
        assert figures("seconds", part="ratio", workload="A/B")["verdict"] == "not distinguishable"
        assert figures("joules", workload="A")["per"] == "sample"


class TestProfile:
    def test_every_figure_is_found_by_its_labels(self, profiled: report.Document) -> None:
        figures = Figures(profiled)
        exits = ["0", "1", "final"]
        assert figures.values("exit") == [*exits, POLICY]
        assert sum(figures("rate", batch=8, exit=name)["value"] for name in exits) == pytest.approx(1)
        for name in exits:
            parts = {
                part: figures("seconds", batch=8, exit=name, part=part)["value"]
                for part in ("marginal", "backbone", "head", "gate")
            }
            assert parts["marginal"] == pytest.approx(parts["backbone"] + parts["head"] + parts["gate"])
        policy = {part: figures("joules", batch=8, exit=POLICY, part=part) for part in ("predicted", "measured")}
        residual = figures("joules", batch=8, exit=POLICY, part="residual")
        assert residual["value"] == pytest.approx(policy["measured"]["value"] - policy["predicted"]["value"])

    def test_modelled_joules_are_marked(self, profiled: report.Document) -> None:
        assert Figures(profiled).modelled
        joules = [figure for figure in profiled["figures"] if figure["name"] == "joules"]
        assert {figure["source"] for figure in joules} == {"model"}
        assert {figure["systematic"] for figure in joules if figure["part"] != "ratio"} == {None}
        assert "modelled" in profiled["flags"]
        assert 'source="model"' in report.to_prometheus(profiled)


class TestCsv:
    def test_one_line_per_figure(self, compared: report.Document) -> None:
        rows = list(csv.DictReader(io.StringIO(report.to_csv(compared))))
        assert len(rows) == len(compared["figures"])
        for row, figure in zip(rows, compared["figures"], strict=True):
            assert row["kind"] == "compare"
            assert float(row["value"]) == figure["value"]

    def test_the_unknown_is_empty(self) -> None:
        document = of_window(window(gpu(None, reason="it stood still")))
        joules = next(row for row in csv.DictReader(io.StringIO(report.to_csv(document))) if row["name"] == "joules")
        assert (joules["value"], joules["reason"]) == ("", "it stood still")


SAMPLE = re.compile(r'cet_energy_(\w+)\{((?:\w+="(?:[^"\\\n]|\\.)*",?)*)\} (\S+)')


class TestPrometheus:
    def test_each_line_is_of_the_format_and_each_metric_is_announced_once(self, compared: report.Document) -> None:
        announced: list[str] = []
        for line in report.to_prometheus(compared).splitlines():
            if line.startswith("# TYPE "):
                assert line.endswith(" gauge")
                announced.append(line.split()[2])
            elif not line.startswith("# HELP "):
                sample = SAMPLE.fullmatch(line)
                assert sample, line
                assert f"cet_energy_{sample[1]}" == announced[-1]
                float(sample[3])
        assert len(set(announced)) == len(announced)

    def test_values_and_intervals(self, compared: report.Document) -> None:
        samples = SAMPLE.findall(report.to_prometheus(compared))
        ratio = Figures(compared)("net_joules", part="ratio", workload="A/B")
        labels = 'kind="compare",of="net_joules",part="ratio",source="counter",workload="A/B"'
        assert ("ratio", labels, repr(ratio["value"])) in samples
        assert ("ratio_low", labels, repr(ratio["low"])) in samples
        assert ("complete", 'kind="compare"', "1.0") in samples

    def test_the_unknown_has_a_reason_and_no_value(self) -> None:
        text = report.to_prometheus(of_window(window(gpu(None, reason='a "quoted" \\ reason\n'))))
        assert "cet_energy_joules{" not in text
        assert r'of="joules",per="window",reason="a \"quoted\" \\ reason\n"} 1.0' in text

    def test_partial_is_not_complete(self) -> None:
        text = report.to_prometheus(report.document("run", [], [], stopped="SIGTERM", about={}))
        assert 'cet_energy_complete{kind="run"} 0.0\n' in text


@pytest.mark.parametrize(
    ("value", "power", "prefix"),
    [(0.0, 0, ""), (1.0, 0, ""), (-999.0, 0, ""), (1000.0, 3, "k"), (0.02, -3, "m"), (1e-15, -9, "n"), (1e20, 12, "T")],
)
def test_si_prefix(value: float, power: int, prefix: str) -> None:
    assert si_prefix(value) == (power, prefix)


class TestText:
    @staticmethod
    def printed(parts: Any) -> str:
        console = Console(width=80, file=io.StringIO(), highlight=False)
        for part in parts:
            console.print(part, markup=False)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    def test_verdicts(self, compared: report.Document) -> None:
        text = self.printed(of_comparison({**compared, "models": {"A": "small", "B": "large"}, **ABOUT}))
        assert "A: small\nB: large\n" in text
        assert "time: A and B are not distinguishable\n" in text
        assert "energy: A takes less than B\n" in text
        assert "Joules are from the counter, and all share an error of about ±5 % besides." in " ".join(text.split())

    def test_the_modelled_is_marked_in_every_table(self, profiled: report.Document) -> None:
        text = " ".join(self.printed(of_profile({**profiled, **ABOUT})).split())
        assert text.count("MODELLED") == 3
        assert "Joules are NOT measured: they are an assumed 50 W times the time." in text
        assert "! modelled: Joules are assumed watts times measured time, not a measurement." in text

    def test_the_unknown_is_a_dash_never_0(self) -> None:
        missing = Unavailable("rapl", "there is no RAPL zone", "run on bare metal")
        document = of_window(window(gpu(None, reason="gpu:0: it stood still"), unavailable=(missing,)))
        plain = {"window": report.plain_reading(window(gpu(None, reason="gpu:0: it stood still")))}
        measurements = [{**plain, "unavailable": [{"domain": "rapl", "reason": "no zone", "mend": "bare metal"}]}]
        text = self.printed(of_run({**document, "command": ["a b"], "exit_code": 0, "measurements": measurements}))
        assert text.startswith("'a b': 2.00 s, exit code 0")
        rows = [line.split() for line in text.splitlines()]
        for name in ("gpu:0", "rapl", "total"):
            assert [name, "–", "–", "–", "–"] in rows
        assert "gpu:0: it stood still\n– rapl: no zone; bare metal\n" in text


class TestScale:
    @pytest.mark.parametrize(
        ("values", "unit", "texts"),
        [
            ([(0.00123456, 0.00002)], "mJ", ["1.235 ±0.020"]),
            ([(12.3, 0.5), (4.0, 0.5)], "J", ["12.30 ±0.50", "4.00 ±0.50"]),
            ([(1500.0, None)], "kJ", ["1.50"]),
            ([(None, None), (3.0, None)], "J", ["–", "3.00"]),
            ([(-0.5, 0.1)], "mJ", ["-500 ±100"]),
            ([(0.0, None)], "J", ["0.00"]),
        ],
    )
    def test_one_unit_for_a_column(
        self, values: list[tuple[float | None, float | None]], unit: str, texts: list[str]
    ) -> None:
        figures = [
            asdict(Figure("joules", "J", value, *(() if half is None else (value - half, value + half))))
            for value, half in values
        ]
        scale = Scale(figures)
        assert scale.unit == unit
        assert list(map(scale, figures)) == texts


class TestPlots:
    def test_of_a_profile(self, profiled: report.Document) -> None:
        drawn = plots.draw(profiled, label="SIMULATED")
        assert set(drawn) == {"per_exit.png", "accuracy.png", "power.png"}
        for content in drawn.values():
            picture = matplotlib.image.imread(io.BytesIO(content))
            assert picture.std() > 0.05

    def test_of_a_comparison(self, compared: report.Document) -> None:
        assert set(plots.draw(compared)) == {"power.png"}

    def test_bars_are_as_high_as_the_figures(self, profiled: report.Document) -> None:
        figures = Figures(profiled)
        axes = plots.plot_exits(figures).axes[0]
        costs = [figures("joules", batch=8, exit=name, part="cumulative")["value"] for name in ("0", "1", "final")]
        heights = [bar.get_height() for bar in axes.containers[0]][:3]
        assert heights == pytest.approx([cost * heights[0] / costs[0] for cost in costs])
        assert "MODELLED" in axes.get_ylabel()

    @pytest.mark.parametrize("batches", [1, 2])
    def test_the_legend_stays_in_the_picture(self, profiled: report.Document, batches: int) -> None:
        more = [{**figure, "batch": 8 + size} for size in range(batches) for figure in profiled["figures"]]
        figure = plots.plot_exits(Figures({**profiled, "figures": more}))
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert figure.bbox.contains(*legend.get_window_extent().min)
        assert figure.bbox.contains(*legend.get_window_extent().max)

    def test_an_unknown_bar_says_so(self, profiled: report.Document) -> None:
        figures = [
            {**figure, "value": None, "low": None, "high": None} if figure["part"] == "predicted" else figure
            for figure in profiled["figures"]
        ]
        axes = plots.plot_exits(Figures({**profiled, "figures": figures})).axes
        assert [[text.get_text() for text in panel.texts] for panel in axes] == [["unknown"], []]

    def test_without_labels_and_joules_there_is_time_per_exit_alone(self, profiled: report.Document) -> None:
        unknown = {"value": None, "low": None, "high": None, "source": None}
        figures = [
            {**figure, **unknown} if figure["name"] in ("joules", "net_joules", "accuracy") else figure
            for figure in profiled["figures"]
        ]
        blocks = [{**block, "watts": None} for block in profiled["measurements"][0]["blocks"]]
        measurements = [{**profiled["measurements"][0], "blocks": blocks}]
        document = {**profiled, "figures": figures, "measurements": measurements}
        assert set(plots.draw(document)) == {"per_exit.png"}
        assert plots.plot_exits(Figures(document)).axes[0].get_ylabel().startswith("time per sample / ")
