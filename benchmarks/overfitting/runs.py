"""One seed of a task: fits with the detector, and fits on halves of the data, which give the truth.

N  training samples      K  fits that have not seen a sample      M  held-out samples
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from benchmarks.common.criteria import configure_process
from benchmarks.overfitting.tasks import TASKS, Arm, Size, Task
from benchmarks.overfitting.truth import counterfactual
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.detection.verdicts import Evaluation, Verdict
from lightning_memsink.examples.text import Sequences
from lightning_memsink.ledger import Ledger

PAIRS = 3
"""Times that the data are halved at random. Each half gives a fit that has not seen the other."""
ROW = (1 << 48) - 1
"""The bits of an id that are the row of the data set."""


@dataclass(frozen=True)
class Outcome:
    """One fit with the detector. Losses and gaps in the task's unit."""

    task: str
    arm: str
    seed: int
    unit: str
    must_find: bool
    """Whether the run has enough looks to find what is known by heart, and no rule to learn."""
    knows_nothing: bool
    """Whether the rule is all that there is to learn."""
    truth: Tensor
    """``[N]`` counterfactual memorization."""
    effect: float
    """A truth above this is known by heart."""
    verdict: Tensor
    """``[N]`` codes at the end."""
    gap: Tensor
    """``[N]`` by the detector; NaN: not measured."""
    p: Tensor
    """``[N]``"""
    evaluation: Evaluation | None
    """The last one; None: there was none."""
    share_low: float
    """95 % interval of the share that is memorized, as the run states it; NaN: it states none."""
    share_high: float
    null_share: float
    """Estimated share of samples that are not memorized, which the false-discovery rate adapts to; NaN: none."""
    seconds: float

    @property
    def known(self) -> Tensor:
        """Bool ``[N]``"""
        return self.truth > self.effect

    @property
    def flagged(self) -> Tensor:
        """Bool ``[N]``"""
        return self.verdict == Verdict.MEMORIZED

    @property
    def found(self) -> float:
        """Share of what is known by heart that is called memorized; NaN if nothing is."""
        return float(self.flagged[self.known].float().mean())

    @property
    def covers(self) -> bool:
        """Whether the stated interval holds the true share."""
        return self.share_low <= float(self.known.float().mean()) <= self.share_high


def outcomes(task_name: str, seed: int, size: Size) -> list[Outcome]:
    """All arms of one task with one seed."""
    configure_process()  # again: Lightning, which is loaded by now, has set the level of its messages
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = TASKS[task_name](seed, size)
        halves: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        found = []
        for arm in task.arms:
            length = (arm.epochs, arm.times)
            if length not in halves:
                halves[length] = losses_unseen(task, arm, seed)
            found.append(judged(task, arm, seed, *halves[length]))
    return found


def judged(task: Task, arm: Arm, seed: int, unseen: Tensor, held_out: Tensor) -> Outcome:
    """A fit with the default callbacks. ``unseen`` ``[K, N]``, ``held_out`` ``[M]``: as `losses_unseen` gives them."""
    start = time.perf_counter()
    model, trainer = fit(task, arm, seed, None, [LossTracker(), MemorizationDetector()])
    seconds = time.perf_counter() - start
    own, controls = (in_unit(task, task.losses(model, data)) for data in (task.train, task.held_out))
    ledger = Ledger.of(trainer)
    count, rows = sized(task.train), rows_of(ledger, task)
    flags = ledger.flags
    flags.grow(len(rows))  # where nothing was evaluated
    verdict = torch.full((count,), int(Verdict.UNSEEN))
    gap, p = torch.full((count,), torch.nan), torch.full((count,), torch.nan)
    verdict[rows], gap[rows], p[rows] = flags.verdict.long(), flags.gap.float(), flags.p.float()
    last = flags.evaluations[-1] if flags.evaluations else None
    statement = getattr(last, "statement", None)
    return Outcome(
        task=task.name,
        arm=arm.name,
        seed=seed,
        unit=task.unit,
        must_find=arm.claims and not task.learns_a_rule,
        knows_nothing=task.knows_nothing,
        truth=counterfactual(own, unseen, controls, held_out, task.unit),
        effect=task.effect,
        verdict=verdict,
        gap=gap,
        p=p,
        evaluation=last,
        share_low=getattr(statement, "share_low", torch.nan),
        share_high=getattr(statement, "share_high", torch.nan),
        null_share=getattr(last, "null_share", torch.nan),
        seconds=seconds,
    )


def losses_unseen(task: Task, arm: Arm, seed: int) -> tuple[Tensor, Tensor]:
    """``[K, N]`` losses of samples in fits on the halves that lack them; ``[M]`` of held-out ones, means over fits."""
    count = sized(task.train)
    unseen, held_out = torch.zeros(PAIRS, count), []
    for pair in range(PAIRS):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + pair))
        first, second = order.chunk(2)
        for half, other in ((first, second), (second, first)):
            model, _ = fit(task, arm, 1000 * seed + pair, half.tolist(), [])
            unseen[pair, other] = in_unit(task, task.losses(model, task.train))[other]
            held_out.append(in_unit(task, task.losses(model, task.held_out)))
    return unseen, torch.stack(held_out).mean(0)


def fit(
    task: Task, arm: Arm, seed: int, rows: Sequence[int] | None, callbacks: list[Callback]
) -> tuple[LightningModule, Trainer]:
    """An ordinary fit on the ``rows`` of the training data (None: all), validated only where there are callbacks."""
    seed_everything(seed, verbose=False)
    data: Dataset[Any] = task.train if rows is None else Subset(task.train, rows)
    data = ConcatDataset([data] * arm.times) if arm.times > 1 else data
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=arm.epochs,
        check_val_every_n_epoch=arm.every,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = task.module()
    controls = DataLoader(Subset(task.held_out, range(arm.controls)), 256)
    trainer.fit(model, DataLoader(data, task.batch_size, shuffle=True), controls if callbacks else None)
    return model, trainer


def rows_of(ledger: Ledger, task: Task) -> Tensor:
    """The row of the training data that each row of the loss table is about; of repeats, their first."""
    table = ledger.losses
    rows = table.first_row if isinstance(task.train, Sequences) else table.ids & ROW
    return rows % sized(task.train)


def in_unit(task: Task, losses: Tensor) -> Tensor:
    """Losses in nats as they are; others by their logarithm, so that a difference is a ratio."""
    return losses if task.unit == "nats" else losses.clamp(min=1e-12).log()


def sized(data: Dataset[Any]) -> int:
    return len(data)  # type: ignore[arg-type]
