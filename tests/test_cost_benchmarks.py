"""Growth of cost, and the page that tells all costs."""

import json
import math
import os
from functools import partial

import pytest

from benchmarks import all as everything
from benchmarks import growth
from benchmarks.growth import PLAIN, WAYS, Cost, Point, in_a_fork, slope


def cost(plain, factor):
    return Cost({way: [plain * (1 if way == PLAIN else factor)] * 4 for way in WAYS}, {way: [1.0] * 4 for way in WAYS})


def test_slopes_are_powers():
    assert slope([1, 2, 4, 8], [5, 10, 20, 40]) == 1.0
    assert slope([1, 2, 4], [3, 3, 3]) == 0.0
    assert math.isnan(slope([1, 2], [0.1, -0.1]))


def test_a_fork_tells_what_it_measured_and_leaves_this_process_alone():
    before = os.getcwd()
    assert in_a_fork(partial(pair, 3.0)) == (3.0, 1.0)
    assert os.getcwd() == before
    with pytest.raises(RuntimeError, match="A fit failed"):
        in_a_fork(partial(pair, None))


def pair(value):
    os.chdir("/")
    return value + 0.0, 1.0


def test_each_way_is_timed_there_and_back(monkeypatch):
    turns = []
    monkeypatch.setattr(growth, "in_a_fork", lambda work: (turns.append(work.args[-1]), (1.0, 2.0))[1])
    found = growth.measure(Point(), [5, 6], 30)
    assert turns == [*WAYS, *reversed(WAYS)] * 2
    assert found.ratio("default set") == 1.0
    assert found.extra_memory("default set") == 0.0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_small_fit_is_really_timed():
    point = Point(batch=4, sequence=8, width=32, depth=1, samples=64)
    for way in (PLAIN, "units and norms, every step"):
        seconds, memory = in_a_fork(partial(growth.timed, point, 0, 10, way))
        assert seconds > 0 and memory > 0


def test_growth_is_told_with_slopes(capsys):
    told = growth.report({"batch": {size: cost(size, 1.02) for size in (8, 16)}}, [1])
    assert [each.holds for each in told.criteria] == [True]
    assert told.criteria[0].value == pytest.approx(1.02)
    told.tell()
    printed = capsys.readouterr().out
    assert "1.00" in printed and "batch: time of a step against plain" in printed


def test_the_page_has_every_part_and_what_failed(tmp_path, monkeypatch, capsys):
    def ran(title, words, quick):
        fine = {"criteria": [{"holds": True}, {"holds": words[0] != "growth"}]}
        return everything.Part(title, "python -m " + words[0], "a table", {} if words[0] == "scale" else fine, 60.0)

    monkeypatch.setattr(everything, "run_part", ran)
    assert everything.main(["--to", str(tmp_path / "page.md")]) == 1
    page = (tmp_path / "page.md").read_text()
    assert page.count("a table") == len(everything.PARTS)
    assert "| [Watching](#watching) | 2 of 2 | 1.0 |" in page
    assert "| 1 of 2 | 1.0 |" in page and "**it failed**" in page
    assert everything.main(["--to", str(tmp_path / "page.md"), "--only", "tracking", "mitigation"]) == 0


def test_a_part_is_run_and_what_it_says_kept(monkeypatch):
    class Ran:
        stdout, stderr = "table\n", "why"

    def run(command, **options):
        file = command[-1]
        if "growth" in command[2]:
            with open(file, "w") as told:
                json.dump({"criteria": [{"holds": True}]}, told)
        return Ran

    monkeypatch.setattr(everything.subprocess, "run", run)
    part = everything.run_part("Growth", ("growth",), quick=True)
    assert part.holds and part.printed == "table\n" and part.command == "python -m benchmarks.growth --quick"
    failed = everything.run_part("Scale", ("scale",), quick=False)
    assert not failed.holds and failed.printed.endswith("why")
