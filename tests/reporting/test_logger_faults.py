"""Loggers and servers that fail: training goes on, with one warning."""

import sys
from typing import ClassVar

import pytest
import wandb
from lightning.pytorch.loggers import CSVLogger, WandbLogger

from lightning_memsink import SampleGradientMask, memsink
from lightning_memsink.reporting.loggers.wandb import SafeWandbLogger
from tests.support.small_runs import fit
from tests.support.wandb_reader import read_run


class Untouchable:
    """Mixed into a logger: whatever of it this package reads or calls raises; Lightning may."""

    def __getattribute__(self, name):
        frame = sys._getframe(1)
        while frame.f_globals.get("__name__") == __name__:
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith("lightning_memsink") and name != "__class__":
            object.__getattribute__(self, "touched").append(name)
            raise OSError(f"no {name} today")
        return super().__getattribute__(name)


class NoBoard(Untouchable, CSVLogger):
    touched: ClassVar[list] = []


class NoRun(Untouchable, WandbLogger):
    touched: ClassVar[list] = []


@pytest.mark.parametrize("kind", [NoBoard, NoRun])
def test_a_logger_that_always_raises_costs_only_what_it_would_have_logged(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = NoBoard(tmp_path) if kind is NoBoard else NoRun(save_dir=str(tmp_path), offline=True)
    crew = memsink(SampleGradientMask(at=0.2, k=4), identity="content", k=4, path=tmp_path / "report.md")
    with pytest.warns(UserWarning) as warned:
        run, _ = fit(crew, logger=[logger, CSVLogger(tmp_path / "other")], log_every_n_steps=1)
    failed = [
        str(one.message) for one in warned if f"{kind.__name__} failed to log what memsink found" in str(one.message)
    ]
    assert len(failed) == 1 and "no " in failed[0]
    assert kind.touched and run.global_step == 63
    assert (tmp_path / "report.html").exists()
    [board] = (tmp_path / "other").rglob("metrics.csv")
    assert "memsink/gap" in board.read_text(), "the other logger gets its own"


def test_a_server_that_cannot_be_reached_costs_its_waiting_time_once(tmp_path, monkeypatch):
    """A real run in online mode with a key, but without a server: it is recorded offline, and training completes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refused at once
    monkeypatch.setattr("lightning_memsink.reporting.loggers.wandb.SECONDS", 1.0)
    logger = SafeWandbLogger(save_dir=tmp_path)
    crew = memsink(identity="content", k=4, path=tmp_path / "report.md")
    with pytest.warns(UserWarning, match=r"(?s)can't start an online run.*recorded offline") as warned:
        run, _ = fit(crew, logger=logger)
    assert sum("recorded offline" in str(one.message) for one in warned) == 1
    assert run.global_step == 63 and logger.experiment.offline
    wandb.finish()
    assert len(read_run(tmp_path).series("memsink/gap")) > 1
    assert "wandb sync" in (tmp_path / "report.md").read_text()
