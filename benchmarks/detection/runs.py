"""One seed of the detection benchmark: train twice, compute the true memorization, record the detector's verdicts.

N  tested samples      M  controls      E  evaluations
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from benchmarks.common.training import Run, Schedule, Sequences, gradient_norms, token_nll, train
from benchmarks.detection import scores
from benchmarks.detection.population import Population, Sizes, populate
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.detection.evaluate import known_controls, samples_of
from lightning_memsink.detection.matched_controls import (
    Controls,
    DetectionRule,
    Measurement,
    SampleFeatures,
    measure_gaps,
)
from lightning_memsink.detection.ngram_features import compressed_bits
from lightning_memsink.examples.corpora import python_docs, tokenized
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.tokens import Tokens

POSITIVE, NEGATIVE = 1.0, 0.3
"""Above the first a sample is memorized, below the second it is not, nats per token; others are left out."""

FAMILIES = ("canary", "easy", "shuffled", "template")
"""Kinds whose controls are taken away, one at a time."""


@dataclass(frozen=True)
class Findings:
    """One seed: true memorization, scores and verdicts."""

    population: Population
    memorization: Tensor
    """``[N]``: the truth."""
    scores: dict[str, Tensor]
    """``[N]`` each, larger the more it looks memorized; ``knn gap, live`` is the detector's own."""
    flagged: Tensor
    """Bool ``[N]``: memorized when training ended, by losses recorded during training."""
    flagged_after: Tensor
    """Bool ``[N]``: flagged by losses that were computed after training, as an auditor computes them."""
    without_controls: dict[str, tuple[Tensor, Measurement]]
    """By kind whose controls were removed: bool ``[N]`` of its samples, and a measurement without them."""
    twins: Tensor
    """Bool ``[M]``: flagged when half of the controls is measured against the other half."""
    flag_at: Tensor
    """``[N]`` the first evaluation at which a sample was memorized; E if it never was."""
    exact_at: Tensor
    """``[N]`` the first evaluation at which it could be extracted verbatim; E if never."""
    evaluation_step: Tensor
    """``[E]``"""

    @property
    def positive(self) -> Tensor:
        return self.memorization > POSITIVE

    @property
    def negative(self) -> Tensor:
        return self.memorization < NEGATIVE

    def auroc(self, score: str, *kinds: str) -> float:
        """AUROC of a score: memorized samples against all samples that are not, or those of some kinds."""
        rivals = self.negative & self.population.of(*kinds) if kinds else self.negative
        return scores.auroc(self.scores[score], self.positive, rivals)

    def lead_steps(self) -> Tensor:
        """Steps from flag to first extraction, of each memorized sample ever extracted; -inf if never flagged."""
        extracted = (self.exact_at < len(self.evaluation_step)) & self.positive
        steps = torch.cat([self.evaluation_step.float(), torch.tensor([torch.inf])])
        return steps[self.exact_at[extracted]] - steps[self.flag_at[extracted]]


class Verdicts(Callback):
    """Records after every evaluation which samples are memorized."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.memorized: list[Tensor] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        self.memorized.append(torch.isin(self.rows, ledger.losses.ids[ledger.flags.memorized]))


def investigate(sizes: Sizes, schedule: Schedule, rule: DetectionRule, seed: int, save: Path | None = None) -> Findings:
    """Trains both runs of one seed and compares the detector's verdicts with true memorization."""
    corpus = tokenized(python_docs(), seed=seed)
    vocab_size = corpus.tokenizer.get_vocab_size()
    population = populate(corpus, vocab_size, sizes, seed)
    verdicts = Verdicts(population.tested)
    texts = population.tokens[population.tested]
    tracker = LossTracker(identity="key")
    callbacks_of_main = [tracker, MemorizationDetector(**asdict(rule)), verdicts]
    main, twin = (
        train(
            Sequences(population.tokens, rows, population.noise, vocab_size, seed),
            population.controls, texts, callbacks, schedule, seed,
        )
        for rows, callbacks in ((population.main, callbacks_of_main), (population.twin, []))
    )  # fmt: skip
    # A noise sample has new tokens at every visit: measure it on the next ones.
    drawn = torch.randint(vocab_size, texts.shape, generator=torch.Generator().manual_seed(seed))
    texts = torch.where(population.of("noise")[:, None], drawn, texts)
    nll = token_nll(main.module, texts)
    ends = [token_nll(run.module, population.controls).mean(1) for run in (main, twin)]
    memorization = _truth(population, nll.mean(1), token_nll(twin.module, texts).mean(1), *ends)
    _describe_again(tracker, population.tested, texts)
    after = _measure_after(population, main.ledger, nll.mean(1), ends[0])
    found = Findings(
        population=population,
        memorization=memorization,
        scores=_all_scores(population, main, texts, nll, after, rule, schedule),
        flagged=verdicts.memorized[-1],
        flagged_after=measure_gaps(*after, rule).flagged,
        without_controls={kind: _without(kind, population, main.ledger, rule) for kind in FAMILIES},
        twins=_flag_twins(main.ledger, rule),
        flag_at=scores.first_time(torch.stack(verdicts.memorized)),
        exact_at=scores.first_time(main.exact),
        evaluation_step=main.evaluation_step,
    )
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        torch.save(_plain(found, main, twin, texts), save / f"detection_{seed}.pt")
    return found


def _truth(population: Population, main: Tensor, twin: Tensor, main_controls: Tensor, twin_controls: Tensor) -> Tensor:
    truth = torch.empty_like(main)
    for kind in set(population.kind):
        of, like = population.of(kind), population.controls_of(kind)
        truth[of] = scores.counterfactual(main[of], twin[of], main_controls[like], twin_controls[like])
    return truth


def _describe_again(tracker: LossTracker, ids: Tensor, texts: Tensor) -> None:
    """Updates the matching features, which are as old as the last visit of each sample."""
    tokens = Tokens(texts, torch.ones_like(texts, dtype=torch.bool))
    rows = tracker.table.index.find(ids)
    tracker.matching.describe(tracker.table, rows, torch.ones_like(rows, dtype=torch.bool), tokens, None)


def _measure_after(
    population: Population, ledger: Ledger, losses: Tensor, of_controls: Tensor
) -> tuple[SampleFeatures, Controls]:
    """Samples and controls with losses ``[N]`` and ``[M]`` that were computed after training."""
    rows = ledger.losses.index.find(population.tested)
    last = replace(samples_of(ledger.losses, ledger.controls, rows), losses=losses, weight=torch.ones(len(rows)))
    now = of_controls[ledger.controls.ids]
    return last, replace(known_controls(ledger.controls), before=now, after=now)


def _all_scores(
    population: Population,
    main: Run,
    texts: Tensor,
    nll: Tensor,
    after: tuple[SampleFeatures, Controls],
    rule: DetectionRule,
    schedule: Schedule,
) -> dict[str, Tensor]:
    """All other scores come from a forward at the end of the run; the detector's from that and from training."""
    ledger = main.ledger
    rows = ledger.losses.index.find(population.tested)
    confidence, variability = scores.cartography(main.visit_id, main.visit_probability, len(population.tokens))
    return {
        "knn gap": measure_gaps(*after, rule).gap,
        "knn gap, live": ledger.flags.gap[rows].float(),
        "ridge gap": measure_gaps(*after, replace(rule, method="ridge")).gap,
        "final loss": scores.final_loss(nll),
        "loss drop": scores.loss_drop(nll, ledger.losses.first_loss[rows]),
        "compressed size": scores.compressed_ratio(nll, compressed_bits(texts, torch.ones_like(texts).bool())),
        "min-k %": scores.min_k(nll),
        "gradient norm": -gradient_norms(main.module, texts),
        "exposures": population.repeats.float() * schedule.epochs,
        "confidence": confidence[population.tested],
        "variability": variability[population.tested],
    }


def _measure_again(ids: Tensor, keep: Tensor, ledger: Ledger, rule: DetectionRule) -> Measurement:
    """Measures the samples ``ids`` at the end of the run against the controls in ``keep`` ``[M]``."""
    rows = ledger.losses.index.find(ids)
    samples = samples_of(ledger.losses, ledger.controls, rows)
    return measure_gaps(samples, known_controls(ledger.controls).only(keep), rule)


def _without(kind: str, population: Population, ledger: Ledger, rule: DetectionRule) -> tuple[Tensor, Measurement]:
    """Removes the controls of a kind: bool ``[N]`` of the samples they belong to, and a new measurement."""
    removed = population.controls_of(kind)
    affected = torch.tensor([bool(population.controls_of(each)[removed].any()) for each in population.kind])
    return affected, _measure_again(population.tested, ~removed[ledger.controls.ids], ledger, rule)


def _flag_twins(ledger: Ledger, rule: DetectionRule) -> Tensor:
    """Measures each half of the controls as samples, against the other half."""
    known = known_controls(ledger.controls)
    even = torch.arange(len(known.after)) % 2 == 0
    flagged = torch.zeros_like(even)
    for half in (even, ~even):
        count = int(half.sum())
        first = torch.zeros(count, dtype=torch.int64)
        samples = SampleFeatures(
            known.after[half], torch.ones(count), known.features[half], known.early[0, half], first
        )
        flagged[half] = measure_gaps(samples, known.only(~half), rule).flagged
    return flagged


def _plain(found: Findings, main: Run, twin: Run, texts: Tensor) -> dict[str, Any]:
    """Everything to tune a detector without training again: tensors and plain values."""
    population, table, controls = found.population, main.ledger.losses, main.ledger.controls
    runs = {
        name: {
            "visits": {"step": run.visit_step, "id": run.visit_id, "loss": run.visit_loss},
            "evaluation_step": run.evaluation_step,
            "control_losses": run.control_losses,
            "exact": run.exact,
            "tested_nll": token_nll(run.module, texts),
            "control_nll": token_nll(run.module, population.controls),
        }
        for name, run in (("main", main), ("twin", twin))
    }
    return runs | {
        "population": vars(population),
        "memorization": found.memorization,
        "scores": found.scores,
        "flagged": found.flagged,
        "flag_at": found.flag_at,
        "exact_at": found.exact_at,
        "table": table.state_dict(),
        "controls": controls.state_dict(),
        "flags": main.ledger.flags.state_dict(),
    }
