"""How costs grow, interleaved timing, and the page of all costs."""

import json
import math
import multiprocessing
import os
import resource
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from benchmarks import all as everything
from benchmarks import growth
from benchmarks.common.interleaving import UNTIMED_STEPS, interleave, seconds_per_step, time_ratio
from benchmarks.common.memory import keep_freed_memory
from benchmarks.growth import PLAIN, SETUPS, Cost, Point, fork, slope


def cost(plain, factor):
    steps = [99.0] * UNTIMED_STEPS + [plain] * 2
    return Cost(
        {setup: [[second * (1 if setup == PLAIN else factor) for second in steps]] * 3 for setup in SETUPS},
        dict.fromkeys(SETUPS, 1.0),
    )


def test_a_slope_is_the_exponent_of_a_power_law():
    assert slope([1, 2, 4, 8], [5, 10, 20, 40]) == 1.0
    assert slope([1, 2, 4], [3, 3, 3]) == 0.0
    assert math.isnan(slope([1, 2], [0.1, -0.1]))


def test_a_fork_returns_its_result_and_does_not_change_this_process():
    before = os.getcwd()
    assert fork(partial(pair, 3.0)) == [3.0, 1.0]
    assert os.getcwd() == before
    with pytest.raises(RuntimeError, match="A fit failed"):
        fork(partial(pair, None))


def pair(value):
    os.chdir("/")
    return value + 0.0, 1.0


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_setup_is_measured_at_a_small_point():
    found = growth.measure(Point(batch=4, sequence=8, width=32, depth=1, samples=64), [0, 1], 10)
    assert set(found.seconds) == set(found.memory) == set(SETUPS)
    assert all([len(fit) for fit in fits] == [10, 10] for fits in found.seconds.values())
    assert all(found.ratio(setup) > 0 and found.memory[setup] > 0 for setup in SETUPS)


class Walk(LightningModule):
    """Records the name of the fit at each step."""

    def __init__(self, name, steps):
        super().__init__()
        self.name, self.steps, self.weight = name, steps, torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        self.steps.append((self.name, batch_idx))
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def walk(name, steps, length, turn):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=length, enable_model_summary=False, callbacks=[turn], **options)
    trainer.fit(Walk(name, steps), DataLoader(range(10)))


def test_fits_take_their_steps_in_turn_until_each_has_ended():
    steps = []
    fits = {name: partial(walk, name, steps, length) for name, length in (("a", 4), ("b", 4), ("c", 2))}
    seconds = interleave(fits, seed=0)
    assert {name: len(each) for name, each in seconds.items()} == {"a": 4, "b": 4, "c": 2}
    assert all(second > 0 for each in seconds.values() for second in each)
    rounds = [step for _, step in steps]
    assert rounds == sorted(rounds) and len({name for name, _ in steps[:3]}) == 3
    assert steps != sorted(steps, key=lambda each: (each[1], each[0])), "the order changes from round to round"


def test_the_error_of_an_interleaved_fit_is_raised():
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda turn: 1 / 0}, seed=0)


def test_an_interruption_of_one_fit_does_not_count_and_work_of_every_fit_does():
    quiet, evaluating = [9.0] * UNTIMED_STEPS + [1.0, 1.0, 1.0], [9.0] * UNTIMED_STEPS + [1.0, 4.0, 1.0]
    hiccup = [9.0] * UNTIMED_STEPS + [1.0, 4.0, 70.0]
    assert seconds_per_step([quiet] * 3) == 1.0
    assert time_ratio([evaluating, hiccup, evaluating], [quiet] * 3) == 2.0


def test_the_report_of_growth_has_slopes(capsys):
    report = growth.report({"batch": {size: cost(size, 1.02) for size in (8, 16)}}, [1])
    assert [each.holds for each in report.criteria] == [True]
    assert report.criteria[0].value == pytest.approx(1.02)
    report.publish()
    printed = capsys.readouterr().out
    assert "1.00" in printed and "batch: time of a step against plain" in printed


def test_the_page_has_every_part_and_marks_one_that_failed(tmp_path, monkeypatch, capsys):
    def ran(title, words, quick):
        fine = {"criteria": [{"holds": True}, {"holds": words[0] != "growth"}]}
        return everything.Part(title, "python -m " + words[0], "a table", {} if words[0] == "scale" else fine, 60.0)

    monkeypatch.setattr(everything, "run_part", ran)
    monkeypatch.setattr(everything.torch.cuda, "is_available", lambda: True)
    assert everything.main(["--to", str(tmp_path / "page.md")]) == 1
    page = (tmp_path / "page.md").read_text()
    assert page.count("a table") == len(everything.PARTS)
    assert "| [Measuring](#measuring) | 2 of 2 | 1.0 |" in page
    assert "| 1 of 2 | 1.0 |" in page and "**it failed**" in page
    assert everything.page(everything.sections_of(page)) == page


def test_a_machine_without_a_gpu_keeps_the_results_of_one(tmp_path, monkeypatch):
    run = lambda title, words, quick: everything.Part(title, "it", "table of " + words[0], {"criteria": []}, 60.0)  # noqa: E731
    monkeypatch.setattr(everything, "run_part", run)
    monkeypatch.setattr(everything.torch.cuda, "is_available", lambda: False)
    page = tmp_path / "page.md"
    assert everything.main(["--to", str(page)]) == 0
    assert "table of device" not in page.read_text() and "table of growth" in page.read_text()
    assert everything.main(["--to", str(page), "--only", "device"]) == everything.main(["--to", str(page)]) == 0
    assert "table of device" in page.read_text()


def test_parts_that_are_not_run_again_keep_their_results(tmp_path, monkeypatch):
    printed = iter(["first", "second", "third"])
    versions = iter(["1", "2", "3"])

    def run(title, words, quick):
        results = {"criteria": [{"holds": True}], "environment": {"torch": next(versions), "seeds": [5]}}
        return everything.Part(title, "it", next(printed), results, 60.0)

    monkeypatch.setattr(everything, "run_part", run)
    page = tmp_path / "page.md"
    assert everything.main(["--to", str(page), "--only", "mitigation", "tracking"]) == 0
    assert everything.main(["--to", str(page), "--only", "tracking"]) == 0
    lines = page.read_text().splitlines()
    assert [line for line in lines if line in ("first", "second", "third")] == ["third", "second"]
    assert [line for line in lines if line.startswith("torch")] == ["torch 3, seeds [5]", "torch 2, seeds [5]"]


def test_a_part_keeps_the_output_of_its_process(monkeypatch):
    class Ran:
        stdout, stderr = "table\n", "why"

    def run(command, **options):
        file = command[-1]
        if "growth" in command[2]:
            with open(file, "w") as results:
                json.dump({"criteria": [{"holds": True}]}, results)
        return Ran

    monkeypatch.setattr(everything.subprocess, "run", run)
    part = everything.run_part("Growth", ("growth",), quick=True)
    assert part.holds and part.printed == "table\n" and part.command == "python -m benchmarks.growth --quick"
    failed = everything.run_part("Scale", ("scale",), quick=False)
    assert not failed.holds and failed.printed.endswith("why")


def page_faults(keep):
    """Of ten blocks of 64 MiB, which glibc requests from the system each time, if not told otherwise."""
    if keep:
        keep_freed_memory()
    for n in range(20):
        if n == 10:  # by now the heap has room
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(1 << 24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_kept_memory_is_not_requested_again():
    """In new processes: one that ran a benchmark before keeps its memory, and so do its forks."""
    new = multiprocessing.get_context("spawn")
    with new.Pool(1, maxtasksperchild=1) as pool:
        kept, requested = pool.map(page_faults, [True, False], chunksize=1)
    assert kept < 0.05 * requested
