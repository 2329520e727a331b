"""The price of each mitigation is measured while it acts."""

from __future__ import annotations

import json
from dataclasses import replace
from math import isnan

import pytest

from benchmarks.common.interleaving import UNTIMED_STEPS
from benchmarks.common.training import TextModel
from benchmarks.common.workloads import CONTEXT, VOCABULARY, Workload, cnn, images, texts
from benchmarks.overhead import benchmark as overhead
from benchmarks.overhead import mitigation as mitigation_cost
from benchmarks.overhead.mitigation import AGAIN, PLAIN, WATCHED, WAYS, Measured, Way
from lightning_memsink.callbacks.sink_gradient_mask import SinkGradientMask

SMALL = {
    "texts": Workload("texts", lambda: TextModel(VOCABULARY, CONTEXT, 1, 32), texts, batch_size=8, steps=20),
    "images": Workload("images", lambda: cnn(4), images, batch_size=8, steps=20),
}


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """Enough for one control evaluation between two visits of each."""
    monkeypatch.setattr(mitigation_cost, "SAMPLES", 32)
    monkeypatch.setattr("benchmarks.overhead.runs.CONTROLS", 24)


def steps(seconds):
    """Of three fits."""
    return [[99.0] * UNTIMED_STEPS + [seconds] * 4] * 3


def test_a_mitigation_that_does_not_apply_has_no_ratio():
    found = Measured("any", {"ours": steps(3.0), PLAIN: steps(1.0), AGAIN: steps(2.0)})
    assert found.ratio("ours") == 2.0 and isnan(found.ratio("another")) and found.ratio(AGAIN) == 2.0


@pytest.mark.parametrize("name", SMALL)
def test_every_mitigation_acts_on_the_workloads_it_is_timed_on(name):
    found = mitigation_cost.measure(SMALL[name], [0], WAYS)
    ways = [way for way in WAYS if name == "texts" or not way.texts_only]
    assert set(found.seconds) == {PLAIN, AGAIN, WATCHED, *(way.name for way in ways)}
    assert all(len(fit) == 20 and min(fit) > 0 for (fit,) in found.seconds.values())
    assert all(found.acted[way.name] >= mitigation_cost.ACTED for way in ways)


def test_a_mitigation_that_never_acts_falls_short_and_one_that_does_not_apply_does_not():
    bases = {name: steps(1.0) for name in (PLAIN, AGAIN, WATCHED)}
    idle = Measured("any", bases | {"idle": steps(1.0)}, {"idle": 0.0})
    ways = [Way("idle", lambda module: SinkGradientMask(), 0, 1.05)]
    report = mitigation_cost.report([idle], [0], ways)
    assert [criterion.holds for criterion in report.criteria] == [True, False]
    other = Measured("images", bases)
    busy = replace(idle, acted={"idle": 1.0})
    assert mitigation_cost.report([busy, other], [0], ways).holds


def test_overhead_mitigation_prints_and_writes_its_report(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mitigation_cost, "configure_process", lambda: None)  # other tests read what libraries log
    monkeypatch.setattr(mitigation_cost, "keep_freed_memory", lambda reserve: None)
    monkeypatch.setattr(mitigation_cost, "WORKLOADS", [replace(SMALL["images"], steps=60)])
    monkeypatch.setattr(mitigation_cost, "WAYS", WAYS[2:3])
    options = ["--mitigation", "--quick", "--seeds", "1", "--first-seed", "0", "--json", str(tmp_path / "out")]
    code = overhead.main(options)
    written = json.loads((tmp_path / "out").read_text())
    assert code == (0 if all(each["holds"] for each in written["criteria"]) else 1)
    assert capsys.readouterr().out.splitlines()[-1].startswith("mitigation against plain: ")
