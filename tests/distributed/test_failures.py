"""Uneven data and failures on one rank: no rank waits for another that does not come."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_memsink import LossTracker, MemorizationDetector, SampleGradientMask
from lightning_memsink.detection.verdicts import Verdict
from tests.distributed.launching import Failed, forked, together
from tests.distributed.runs import VISITS, DeepLM, are_canaries, crew, differences, ranks, train
from tests.support.small_runs import CANARIES, CONTROLS, TRAIN, Rows

TWO = {"strategy": "ddp_fork", "devices": 2}


class Parts:
    """A batch sampler by hand: each rank its own list of batches."""

    def __init__(self, *of_ranks: list[list[int]]) -> None:
        self.of_ranks = of_ranks

    def _mine(self) -> list[list[int]]:
        return self.of_ranks[dist.get_rank() if dist.is_initialized() else 0]

    def __len__(self) -> int:
        return len(self._mine())

    def __iter__(self) -> Any:
        return iter(self._mine())


def loader(tokens: Tensor, *of_ranks: list[list[int]]) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Rows(tokens), batch_sampler=Parts(*of_ranks))  # type: ignore[arg-type]


def two_ranks(folder: Path, callbacks: list[Any], **options: Any) -> dict[str, Any]:
    forked(lambda: train(folder, callbacks, **TWO, **options), folder)
    first, other = ranks(folder)
    assert differences(first, other) == []
    return first


def test_padding_is_a_visit_in_training_and_no_second_control(tmp_path):
    """75 samples on two ranks are 76 visits: the sampler repeats one, and it is trained on twice. Of 121 controls one
    is shown twice, and counts once."""
    data, controls = DataLoader(Rows(TRAIN[:75]), 5), DataLoader(Rows(torch.cat([CONTROLS, CANARIES[:1]])), 10)
    options = {
        "train": data,
        "controls": controls,
        "use_distributed_sampler": True,
        "max_epochs": 2,
        "val_check_interval": 4,
    }
    found = two_ranks(tmp_path, crew("hold"), **options)
    exposures = found["losses"]["columns"]["exposures"]
    assert len(exposures) == 75 and int(exposures.sum()) == 2 * 76
    assert int(exposures.min()) == 2, "the repeats are two visits more, one a pass"
    assert len(found["controls"]["ids"]) == len(found["controls"]["ids"].unique()) == 121


def test_batches_may_differ_in_size_and_ranks_in_number_of_controls(tmp_path):
    rows = list(range(len(TRAIN)))
    first, second = rows[:200], rows[200:320]
    data = loader(
        TRAIN, [first[n : n + 20] for n in range(0, 200, 20)], [second[n : n + 12] for n in range(0, 120, 12)]
    )
    mine, its = list(range(70)), list(range(70, 120))
    controls = loader(CONTROLS, [mine[n : n + 10] for n in range(0, 70, 10)], [its])
    found = two_ranks(tmp_path, crew("skip"), train=data, controls=controls, val_check_interval=5, max_epochs=2)
    assert int(found["losses"]["columns"]["exposures"].sum()) == 2 * 320
    assert len(found["controls"]["ids"]) == len(found["controls"]["ids"].unique()) == 120
    assert [row["step"] for row in found["flags"]["evaluations"]] == [5, 10, 15, 20]


class SometimesEmpty(DeepLM):
    """Rank 1 gets a batch without samples, or one with an unreadable loss, at some steps."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.what == "empty" and self._hit() and self.trainer.training:
            return {"input_ids": batch["input_ids"][:0]}
        return batch

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        tokens = batch["input_ids"]
        if not len(tokens):
            return sum(weight.sum() for weight in self.parameters()) * 0
        if self.what == "unreadable" and self._hit():
            return Fused.apply(self(tokens)[:, 1:-1].flatten(0, 1), tokens[:, 2:].flatten())
        return super().training_step(batch, batch_idx)

    def _hit(self) -> bool:
        return self.global_rank == 1 and self.trainer.global_step % 3 == 1


class Fused(torch.autograd.Function):
    """A cross entropy that makes its gradient itself: autograd saves nothing of it to be read."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        chances = logits.softmax(-1)
        ctx.save_for_backward((chances - F.one_hot(targets, logits.shape[-1])) / len(targets))
        return -chances.gather(1, targets[:, None]).log().mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.saved_tensors[0], None


@pytest.mark.filterwarnings("default::UserWarning")  # each warns once that it can read nothing
@pytest.mark.parametrize("what", ["empty", "unreadable"])
@pytest.mark.parametrize("mitigation", ["hold", "MemSinks", "LossTruncation", "Goldfish"])
def test_a_batch_that_is_empty_or_unreadable_on_one_rank_does_not_end_the_run(what, mitigation, tmp_path):
    found = two_ranks(tmp_path, crew(mitigation), model=SometimesEmpty(what), max_epochs=2)
    lost = 18 * 6  # of 54 steps, each third has none of rank 1's six samples
    visits, losses = found["losses"]["columns"]["exposures"], found["losses"]["columns"]["recent"].isfinite().sum(1)
    assert int(visits.sum()) == 2 * len(VISITS) - (lost if what == "empty" else 0)
    assert bool((losses < visits.clamp(max=2)).any()) == (what == "unreadable"), "a visit, and no loss of it"
    assert torch.isfinite(found["weights"]["head.weight"]).all()


class FailsOnce(Callback):
    """Fails on rank 1, and nowhere else."""

    def __init__(self, hook: str, step: int) -> None:
        self.step = step
        setattr(self, hook, self._fail)

    def _fail(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step >= self.step:
            raise ZeroDivisionError("the user's own")


@pytest.mark.parametrize("start", [forked, together], ids=["ddp_fork", "torchrun"])
@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_before_backward", "on_train_batch_end", "on_validation_end"]
)
@pytest.mark.parametrize("place", [0, 99], ids=["before ours", "after ours"])
def test_an_exception_on_one_rank_ends_all_with_the_users_error(start, hook, place, tmp_path):
    callbacks = crew("hold", "SinkGradientMask")
    callbacks.insert(place, FailsOnce(hook, step=20))
    strategy = "ddp_fork" if start is forked else "ddp"
    work = lambda: train(tmp_path, callbacks, strategy=strategy, devices=2)  # noqa: E731
    with pytest.raises(Failed, match="ZeroDivisionError: the user's own"):
        forked(work, tmp_path) if start is forked else together(work, tmp_path, 2)
    assert not ranks(tmp_path), "no rank came to the end"


@pytest.mark.filterwarnings("default::UserWarning")  # each warns once that it failed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_measurement_that_fails_on_one_rank_does_not_end_the_run(rank, tmp_path, monkeypatch):
    """Localizer, probe, chart and certificate each fail on one rank only."""

    def fails(real: Any) -> Any:
        def on_one_rank(*args: Any, **kwargs: Any) -> Any:
            if dist.is_initialized() and dist.get_rank() == rank:
                raise OSError("only here")
            return real(*args, **kwargs)

        return on_one_rank

    for owner, name in (
        ("lightning_memsink.callbacks.sink_localizer:", "shares"),
        ("lightning_memsink.callbacks.extraction_probe:", "probe"),
        ("lightning_memsink.reporting.loggers.logged_run:", "top_memorized"),
        ("lightning_memsink.reporting.loggers.wandb_run:WandbRun", "evaluation"),  # Lightning logs past it
        ("lightning_memsink.callbacks.runtime.certificate_losses:", "MaskedLosses"),
    ):
        target = pkgutil.resolve_name(owner)
        monkeypatch.setattr(target, name, fails(getattr(target, name)))
    loggers = [CSVLogger(tmp_path), WandbLogger(save_dir=tmp_path, offline=True)]
    forked(lambda: train(tmp_path, crew("MemSinks"), max_epochs=2, logger=loggers, **TWO), tmp_path)
    first, other = ranks(tmp_path)
    for name in ("weights", "losses", "controls", "flags", "actions"):
        assert differences(first[name], other[name]) == []


def test_all_flagged_samples_may_be_on_one_rank(tmp_path):
    """All canaries on rank 1: all ranks decide which samples are flagged, and rank 1 withholds them."""
    canaries, others = list(range(196, 200)) * 4, list(range(196))
    own = [others[n : n + 8] for n in range(0, 192, 8)]
    data = loader(torch.cat([TRAIN[:196], CANARIES]), own, [canaries[:8]] * len(own))
    found = two_ranks(tmp_path, crew("skip", "route", "SinkDropout")[:-2], train=data, val_check_interval=6)
    assert found["flags"]["verdict"][are_canaries(found["losses"]["ids"])].eq(Verdict.MEMORIZED).any() or any(
        record["acted"] for record in found["actions"]["SampleGradientMask"]["records"]
    )


def test_own_controls_are_evaluated_on_every_rank_and_counted_once(tmp_path):
    own = [LossTracker(controls=DataLoader(Rows(CONTROLS), 20), control_every=9), MemorizationDetector(k=4)]
    found = two_ranks(tmp_path, [*own, SampleGradientMask("skip")], controls="none")
    assert len(found["controls"]["ids"]) == 120
    assert found["flags"]["verdict"][are_canaries(found["losses"]["ids"])].ne(0).all()


def test_a_share_of_the_training_set_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(Failed, match="Hold the controls out yourself"):
        forked(lambda: train(tmp_path, [LossTracker(control_fraction=0.1)], **TWO), tmp_path)
