"""One seed of a setting: a run for each of three groups of samples, each the others' twin.

U  samples of a group      M  controls      E  evaluations
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.common.training import Sequences, exact_match, token_nll
from benchmarks.detection import adapter, scores
from benchmarks.detection.corpus import documentation
from benchmarks.detection.groups import Group, Groups, GroupSizes, draw_groups
from benchmarks.detection.settings import Setting, VariedText
from benchmarks.detection.verdict_log import VerdictLog
from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.ledger import Ledger

NEGATIVE = 0.3
UNPLANTED = ("background", "near")
"""Ordinary text shown once an epoch, and near-duplicates: the table shows them, bounds are on the others."""


@dataclass(frozen=True)
class GroupFindings:
    """What one run found on its group. Verdicts are the detector's own at the end of training."""

    kind: list[str]
    repeats: Tensor
    """``[U]`` times an epoch."""
    memorization: Tensor
    """``[U]``: the truth, nats per token."""
    gap: Tensor
    """``[U]``, as all below; NaN if never measured."""
    p: Tensor
    flagged: Tensor
    """Bool: memorized when training ended."""
    verdict: Tensor
    last_step: Tensor
    """Optimizer step before the last visit; -1 if it was never visited."""
    exposures: Tensor
    flag_step: Tensor
    """Optimizer step of the first evaluation at which it was memorized; infinite if it never was."""
    exact_step: Tensor
    """Optimizer step of the first evaluation at which it could be extracted verbatim; infinite if never."""

    def of(self, *kinds: str) -> Tensor:
        """Bool ``[U]``."""
        return torch.tensor([kind in kinds for kind in self.kind])

    @property
    def planted(self) -> Tensor:
        """Bool ``[U]``: visited, and neither ordinary text nor a near-duplicate."""
        return ~self.of(*UNPLANTED) & (self.exposures > 0)

    @property
    def negative(self) -> Tensor:
        return (self.memorization < NEGATIVE) & (self.exposures > 0)

    @property
    def seen_twice(self) -> Tensor:
        """Bool ``[U]``: two visits, and no near-duplicates among the other samples."""
        return (self.exposures == 2) & ~self.of("near", "noise")

    @property
    def extracted(self) -> Tensor:
        """Bool ``[U]``: memorized, and extracted verbatim at some evaluation."""
        return self.exact_step.isfinite() & (self.memorization > 1)


class Extraction(Callback):
    """The step of the first evaluation at which each sample of a group can be extracted verbatim.

    Without a validation set it looks ``every`` so many steps.
    """

    def __init__(self, group: Group, every: int) -> None:
        self.tokens, self.every = group.tokens, every
        self.extractable = (group.of("natural", "canary") & (group.repeats > 1)).nonzero().flatten()
        self.first_step = torch.full((len(group.tokens),), math.inf)
        """``[U]`` optimizer steps; infinite for a sample that never could."""

    def on_validation_end(self, trainer: Trainer, pl_module: VariedText) -> None:
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: VariedText, *args: Any) -> None:
        if not trainer.enable_validation and trainer.global_step % self.every == 0:
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: VariedText) -> None:
        was_training = pl_module.training
        pl_module.eval()
        exact = self.extractable[exact_match(pl_module, self.tokens[self.extractable])]
        pl_module.train(was_training)
        self.first_step[exact] = self.first_step[exact].clamp(max=trainer.global_step)


@dataclass(frozen=True)
class _Fit:
    """A finished run of one group."""

    module: LightningModule
    ledger: Ledger
    flag_step: Tensor
    exact_step: Tensor


def investigate_groups(setting: Setting, sizes: GroupSizes, seed: int) -> list[GroupFindings]:
    """Trains a run for each group of one seed, and compares verdicts with true memorization."""
    corpus = documentation(seed)
    vocab_size = corpus.tokenizer.get_vocab_size()
    drawn = draw_groups(corpus, vocab_size, sizes, seed)
    fits = [_fit(setting, drawn, number, vocab_size, seed) for number in range(len(drawn.groups))]
    return [_findings(drawn, fits, number, vocab_size, seed) for number in range(len(fits))]


def _fit(setting: Setting, drawn: Groups, number: int, vocab_size: int, seed: int) -> _Fit:
    """An ordinary fit on one group, validated on the controls that the setting has."""
    group = drawn.groups[number]
    seed_everything(seed + number, verbose=False)
    data = Sequences(group.tokens, group.rows(setting.times), group.of("noise").nonzero().flatten(), vocab_size, seed)
    every = setting.evaluate_every
    steps = setting.epochs * (len(data) // setting.batch_size) // every * every
    module = VariedText(setting, vocab_size, group.tokens.shape[1], steps)
    verdicts, extraction = VerdictLog(torch.arange(len(group.tokens))), Extraction(group, every)
    callbacks = adapter.watching(has_controls=setting.controls != "none", every=every)
    validated: dict[str, Any] = {"val_check_interval": every, "check_val_every_n_epoch": None}
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,  # the last step is evaluated
        num_sanity_val_steps=0,
        callbacks=[*callbacks, verdicts, extraction],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({} if setting.controls == "none" else validated),
    )
    loader = DataLoader(data, setting.batch_size, shuffle=True, drop_last=True)
    if setting.controls == "none":
        trainer.fit(module, loader)
    else:
        controls = drawn.controls if setting.controls == "all" else drawn.controls[drawn.controls_of("natural")]
        held_out = Sequences(controls, torch.arange(len(controls)), torch.empty(0), vocab_size, seed)
        trainer.fit(module, loader, DataLoader(held_out, 128))
    return _Fit(module.eval(), Ledger.of(trainer), verdicts.first_step, extraction.first_step)


def _findings(drawn: Groups, fits: list[_Fit], number: int, vocab_size: int, seed: int) -> GroupFindings:
    group, own = drawn.groups[number], fits[number]
    # A noise sample has new tokens at every visit: measure it on the next ones.
    anew = torch.randint(vocab_size, group.tokens.shape, generator=torch.Generator().manual_seed(seed))
    texts = torch.where(group.of("noise")[:, None], anew, group.tokens)
    losses = [token_nll(fit.module, texts).mean(1) for fit in fits]
    of_controls = [token_nll(fit.module, drawn.controls).mean(1) for fit in fits]
    others = [other for other in range(len(fits)) if other != number]
    twin, twin_controls = (torch.stack([each[other] for other in others]).mean(0) for each in (losses, of_controls))
    memorization = torch.empty(len(texts))
    for kind in set(group.kind):
        of, like = group.of(kind), drawn.controls_of(kind)
        memorization[of] = scores.counterfactual(
            losses[number][of], twin[of], of_controls[number][like], twin_controls[like]
        )
    live = adapter.verdicts_of(own.ledger, torch.arange(len(texts)))
    return GroupFindings(
        kind=group.kind,
        repeats=group.repeats,
        memorization=memorization,
        gap=live.gap,
        p=live.p,
        flagged=live.verdict == Verdict.MEMORIZED,
        verdict=live.verdict,
        last_step=live.last_step,
        exposures=live.exposures,
        flag_step=own.flag_step,
        exact_step=own.exact_step,
    )
