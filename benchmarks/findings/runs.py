"""One run for the five findings: text repeated up a ladder, and then either repeated on or not shown again.

B  samples in a batch      T  tokens      n  sequences of a rung      E  evaluations
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.common.planted_text import documentation, split_background
from benchmarks.mitigation.runs import Learner, Visits, gpt
from lightning_memsink._evaluation import without_trace
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.extraction.canaries import CanaryGroup, plant_canaries
from lightning_memsink.extraction.probe import ExtractionResults, ProbeConfig, logits_of, probe
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.history import EvaluationProfile

SCHEME = ProbeConfig(prefix=16, n=1000, p=0.5)
GOES_ON, STOPS = "goes on", "stops"
"""What becomes of the repetition in the second half."""


@dataclass(frozen=True)
class Sizes:
    """Of each half of a run: ``background`` sequences once, and the ladder."""

    background: int = 3072
    rungs: tuple[int, ...] = (1, 4, 16, 64)
    per_rung: int = 12
    canaries: int = 6
    easy: int = 6
    controls: int = 192
    twins: int = 48
    every: int = 10
    """Steps between two looks."""


@dataclass(frozen=True)
class Look:
    """At one step: by rung, losses ``[n]`` of its sequences and of their twins, and which come word for word."""

    step: int
    losses: dict[str, Tensor]
    twins: dict[str, Tensor]
    exact: dict[str, Tensor]
    held_out: float
    memorized: int
    """Samples that stand as memorized."""


@dataclass(frozen=True)
class Run:
    """``turn``: the step at which the first half ended. ``flagged``: by rung, ``[n]``, the step at which a sample was
    first flagged, -1 if never."""

    seed: int
    then: str
    turn: int
    rungs: dict[str, tuple[str, int]]
    """Kind and repeats by name."""
    looks: list[Look]
    flagged: dict[str, Tensor]
    spreads: list[EvaluationProfile]

    def at_turn(self) -> Look:
        """The last look of the first half."""
        return [look for look in self.looks if look.step <= self.turn][-1]

    def gap(self, look: Look, kind: str, repeats: int) -> Tensor:
        """``[n]`` nats that sequences of a rung lie below the mean of their twins."""
        name = next(name for name, rung in self.rungs.items() if rung == (kind, repeats))
        return look.twins[name].mean() - look.losses[name]


class Onlooker(Callback):
    """Asks for all planted sequences and their twins at every validation's end."""

    def __init__(self, rungs: tuple[CanaryGroup, ...], held_out: Tensor) -> None:
        self.rungs, self.held_out = rungs, held_out
        self.looks: list[Look] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with without_trace(pl_module):
            shown = {rung.name: self._ask(pl_module, rung.sequences) for rung in self.rungs}
            twins = {rung.name: self._ask(pl_module, rung.twins).loss for rung in self.rungs}
            held_out = float(self._ask(pl_module, self.held_out).loss.mean())
        ledger = Ledger.of(trainer)
        memorized = int(ledger.flags.memorized.sum()) if ledger.flags.evaluations else 0
        losses, exact = ({name: getattr(each, of) for name, each in shown.items()} for of in ("loss", "exact"))
        self.looks.append(Look(trainer.global_step, losses, twins, exact, held_out, memorized))

    @staticmethod
    def _ask(module: Any, tokens: Tensor) -> ExtractionResults:
        return probe(logits_of(module), tokens, torch.ones_like(tokens), SCHEME, 128)


def run(then: str, seed: int, sizes: Sizes) -> Run:
    """One run of two halves."""
    torch.set_num_threads(1)
    corpus = documentation(seed)
    background, held_out, rest = split_background(corpus, 2 * sizes.background, 2 * sizes.controls, seed)
    vocab_size = corpus.tokenizer.get_vocab_size()
    first, second = background.split(sizes.background)
    planted = plant_canaries(
        first, held_out[: sizes.controls], rest, vocab_size=vocab_size, repeats=sizes.rungs, per_rung=sizes.per_rung,
        canaries=sizes.canaries, easy=sizes.easy, easy_repeats=max(sizes.rungs), twins=sizes.twins, seed=seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    again = planted.train if then == GOES_ON else first[:0]
    new = torch.cat([second, again[~_among(again, first)]])
    rows = torch.cat([planted.train, new[torch.randperm(len(new), generator=generator)]])
    seed_everything(seed, verbose=False)
    module, onlooker = Learner(gpt(vocab_size, rows.shape[1])), Onlooker(planted.groups, held_out[sizes.controls :])
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, val_check_interval=sizes.every, num_sanity_val_steps=0, gradient_clip_val=1.0,
        callbacks=[LossTracker(identity="content"), MemorizationDetector(), SinkLocalizer(norms=False), onlooker],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    controls = Visits(planted.controls, torch.arange(len(planted.controls)))
    trainer.fit(
        module,
        DataLoader(Visits(rows, torch.arange(len(rows)), seed=seed), 32, drop_last=True),
        DataLoader(controls, 128),
    )
    ledger = Ledger.of(trainer)
    known = {rung.name: ledger.losses.index.find(rung.ids) for rung in planted.groups}
    return Run(
        seed, then, len(planted.train) // 32,
        {rung.name: (rung.kind, rung.repeats) for rung in planted.groups},
        onlooker.looks,
        {name: ledger.flags.onset_step[places.clamp(min=0)].where(places >= 0, -1) for name, places in known.items()},
        list(ledger.attribution.rows),
    )  # fmt: skip


def _among(rows: Tensor, others: Tensor) -> Tensor:
    """Bool: which of ``rows`` ``[R, T]`` are rows of ``others``."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.bool)
    known = {tuple(row) for row in others.tolist()}
    return torch.tensor([tuple(row) in known for row in rows.tolist()])
