"""The benchmark of kills detects a difference of one bit and resumes from intact checkpoints."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.faults import benchmark as faults
from benchmarks.faults.benchmark import KilledRun, Reference, bits, compare, kill_when_ready
from benchmarks.faults.runs import newest_intact
from lightning_memsink.examples.resumable import EpochShuffledSampler, ResumableBatchSampler


def test_values_are_equal_only_if_every_bit_is():
    value = {"a": torch.tensor([1.0, float("nan"), 0.0]), "b": [1, float("nan")], "c": {"d": None}}
    assert bits(value) == bits({"a": value["a"].clone(), "b": [1, float("nan")], "c": {"d": None}})
    others = [
        value | {"a": torch.tensor([1.0, float("nan"), -0.0])},
        value | {"a": value["a"].double()},
        value | {"a": value["a"][None]},
        value | {"b": [1, 2.0]},
        value | {"c": {}},
    ]
    assert len({bits(each) for each in [value, *others]}) == 6


def test_batches_resume_at_their_position_and_the_next_epoch_is_complete():
    sampler = EpochShuffledSampler(40)
    whole = list(ResumableBatchSampler(sampler, 16, drop_last=False))
    interrupted, resumed = (ResumableBatchSampler(sampler, 16, drop_last=False) for _ in range(2))
    first = next(iter(interrupted))
    resumed.start = interrupted.taken
    assert [first, *resumed] == whole == list(resumed)
    sampler.set_epoch(1)
    assert list(resumed) != whole


def test_a_truncated_checkpoint_is_skipped(tmp_path):
    assert newest_intact(tmp_path) == (None, 0)
    for step in (9, 10, 20):
        torch.save({"step": torch.arange(step)}, tmp_path / f"step={step}.ckpt")
    newest = tmp_path / "step=20.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    assert newest_intact(tmp_path) == (tmp_path / "step=10.ckpt", 1)


@pytest.fixture
def reference(tmp_path):
    folder = tmp_path / "whole"
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "run.md").write_text("a text")
    facts = {"losses": {"ids": torch.arange(3)}, "controls": {"ids": torch.arange(2)}, "weights": torch.ones(2)}
    return Reference(folder, tmp_path / "data.pt", {"facts": facts})


def test_a_run_that_lost_something_is_reported_as_different(reference, tmp_path):
    folder, run = tmp_path / "run", KilledRun(0, 0)
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "run.md").write_text("another text")
    (folder / "report" / "run.json.part").write_text("{")
    facts = reference.end["facts"] | {"weights": torch.tensor([1.0, 1.0000001])}
    torch.save({"facts": facts}, folder / "end.pt")
    compare(run, folder, reference)
    assert run.differs == ["weights"]
    assert {"run.json.part is left over", "run.md differs"} <= set(run.files)
    assert "samples.parquet has missing or double rows" in run.files


def test_a_process_is_killed_after_it_prints_ready_unless_it_ends_before():
    def child(script):
        return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)

    assert kill_when_ready(child("print('now', flush=True); import time; time.sleep(60)"), 0.0)
    assert not kill_when_ready(child("print('never')"), 0.0)
    assert not kill_when_ready(child("print('now')"), 60.0)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, capsys):
    faults.main(["--kills", "4", "--quick", "--first-seed", "3", "--json", str(tmp_path / "faults.json")])
    output = capsys.readouterr().out
    assert "resumed runs equal to the uninterrupted one: 1 " in output
    assert os.path.getsize(tmp_path / "faults.json") > 100
