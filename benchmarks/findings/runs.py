"""A run for the five findings: sequences repeated different numbers of times, and repeated again or not afterwards.

B  samples in a batch      T  tokens      n  sequences of a canary group      E  evaluations
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

PROBE = ProbeConfig(prefix=16, n=1000, p=0.5)
GOES_ON, STOPS = "goes on", "stops"
"""Whether the planted sequences are repeated in the second half of a run too."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of sequences in each half of a run: ``background`` is shown once, the others as in `plant_canaries`."""

    background: int = 3072
    repeats: tuple[int, ...] = (1, 4, 16, 64)
    per_rung: int = 12
    canaries: int = 6
    easy: int = 6
    controls: int = 192
    twins: int = 48
    every: int = 10
    """Steps between two snapshots."""


@dataclass(frozen=True)
class Snapshot:
    """The model at one step: by canary group the losses ``[n]`` of its sequences, of their twins, and which of the
    sequences are extracted word for word."""

    step: int
    losses: dict[str, Tensor]
    twins: dict[str, Tensor]
    exact: dict[str, Tensor]
    held_out: float
    """Mean loss of held-out sequences."""
    memorized: int
    """Number of memorized samples."""


@dataclass(frozen=True)
class Run:
    """The result of a run."""

    seed: int
    then: str
    half: int
    """The step at which the first half ended."""
    groups: dict[str, tuple[str, int]]
    """Kind and repeats by name of canary group."""
    snapshots: list[Snapshot]
    flagged: dict[str, Tensor]
    """By canary group, ``[n]``: the step at which each sequence was first flagged, -1 if never."""
    profiles: list[EvaluationProfile]

    def at_half(self) -> Snapshot:
        """The last snapshot of the first half."""
        return [snapshot for snapshot in self.snapshots if snapshot.step <= self.half][-1]

    def gap(self, snapshot: Snapshot, kind: str, repeats: int) -> Tensor:
        """The mean loss of the twins minus the loss of each sequence, ``[n]`` in nats."""
        name = next(name for name, group in self.groups.items() if group == (kind, repeats))
        return snapshot.twins[name].mean() - snapshot.losses[name]


class SequenceProbe(Callback):
    """Measures loss and extraction of all planted sequences and their twins at every validation."""

    def __init__(self, groups: tuple[CanaryGroup, ...], held_out: Tensor) -> None:
        self.groups, self.held_out = groups, held_out
        self.snapshots: list[Snapshot] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with without_trace(pl_module):
            results = {group.name: self._probe(pl_module, group.sequences) for group in self.groups}
            twins = {group.name: self._probe(pl_module, group.twins).loss for group in self.groups}
            held_out = float(self._probe(pl_module, self.held_out).loss.mean())
        ledger = Ledger.of(trainer)
        memorized = int(ledger.flags.memorized.sum()) if ledger.flags.evaluations else 0
        losses, exact = ({name: getattr(each, of) for name, each in results.items()} for of in ("loss", "exact"))
        self.snapshots.append(Snapshot(trainer.global_step, losses, twins, exact, held_out, memorized))

    @staticmethod
    def _probe(module: Any, tokens: Tensor) -> ExtractionResults:
        return probe(logits_of(module), tokens, torch.ones_like(tokens), PROBE, 128)


def run(then: str, seed: int, sizes: Sizes) -> Run:
    """Trains a GPT in two halves; in the second the planted sequences are repeated again if ``then`` is `GOES_ON`."""
    torch.set_num_threads(1)
    corpus = documentation(seed)
    background, held_out, rest = split_background(corpus, 2 * sizes.background, 2 * sizes.controls, seed)
    vocab_size = corpus.tokenizer.get_vocab_size()
    first, second = background.split(sizes.background)
    planted = plant_canaries(
        first, held_out[: sizes.controls], rest, vocab_size=vocab_size, repeats=sizes.repeats, per_rung=sizes.per_rung,
        canaries=sizes.canaries, easy=sizes.easy, easy_repeats=max(sizes.repeats), twins=sizes.twins, seed=seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    repeated = planted.train if then == GOES_ON else first[:0]
    new = torch.cat([second, repeated[~_is_row_of(repeated, first)]])
    rows = torch.cat([planted.train, new[torch.randperm(len(new), generator=generator)]])
    seed_everything(seed, verbose=False)
    module = Learner(gpt(vocab_size, rows.shape[1]))
    sequence_probe = SequenceProbe(planted.groups, held_out[sizes.controls :])
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, val_check_interval=sizes.every, num_sanity_val_steps=0, gradient_clip_val=1.0,
        callbacks=[LossTracker(identity="content"), MemorizationDetector(), SinkLocalizer(norms=False), sequence_probe],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    controls = Visits(planted.controls, torch.arange(len(planted.controls)))
    trainer.fit(
        module,
        DataLoader(Visits(rows, torch.arange(len(rows)), seed=seed), 32, drop_last=True),
        DataLoader(controls, 128),
    )
    ledger = Ledger.of(trainer)
    rows_of = {group.name: ledger.losses.index.find(group.ids) for group in planted.groups}
    return Run(
        seed, then, len(planted.train) // 32,
        {group.name: (group.kind, group.repeats) for group in planted.groups},
        sequence_probe.snapshots,
        {name: ledger.flags.onset_step[places.clamp(min=0)].where(places >= 0, -1) for name, places in rows_of.items()},
        list(ledger.attribution.rows),
    )  # fmt: skip


def _is_row_of(rows: Tensor, others: Tensor) -> Tensor:
    """Whether each of ``rows`` ``[R, T]`` is a row of ``others``: bool ``[R]``."""
    if not len(rows):
        return torch.zeros(0, dtype=torch.bool)
    known = {tuple(row) for row in others.tolist()}
    return torch.tensor([tuple(row) in known for row in rows.tolist()])
