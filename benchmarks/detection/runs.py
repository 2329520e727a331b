"""One seed of the detection benchmark: train twice, learn the truth, note what was said.

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
"""A sample is memorized above the one and not memorized below the other, nats per token; in between nobody says."""

FAMILIES = ("canary", "easy", "shuffled", "template")
"""Kinds whose controls are taken away, one at a time."""


@dataclass(frozen=True)
class Findings:
    """One seed: what is true and what was said of it."""

    population: Population
    memorization: Tensor
    """``[N]``: the truth."""
    scores: dict[str, Tensor]
    """``[N]`` each, larger the more it looks memorized; ``knn gap, live`` is the detector's own."""
    flagged: Tensor
    """Bool ``[N]``: stood as memorized when training ended, by losses that training itself had passed."""
    flagged_after: Tensor
    """Bool ``[N]``: flagged when all losses were taken anew after training, as an auditor would."""
    bereft: dict[str, tuple[Tensor, Measurement]]
    """By kind whose controls were taken away: who of ``[N]`` had those, and what is said of all without them."""
    twins: Tensor
    """Bool ``[M]``: flagged when half of the controls is measured against the other half."""
    flag_at: Tensor
    """``[N]`` the evaluation from which on a sample stood as memorized; E if it never did."""
    exact_at: Tensor
    """``[N]`` the evaluation at which it could first be extracted, word for word; E if never."""
    evaluation_step: Tensor
    """``[E]``"""

    @property
    def positive(self) -> Tensor:
        return self.memorization > POSITIVE

    @property
    def negative(self) -> Tensor:
        return self.memorization < NEGATIVE

    def auroc(self, score: str, *kinds: str) -> float:
        """Against all unmemorized samples, or those of some kinds."""
        rivals = self.negative & self.population.of(*kinds) if kinds else self.negative
        return scores.auroc(self.scores[score], self.positive, rivals)

    def lead_steps(self) -> Tensor:
        """Steps from flag to first extraction, of each sample ever extracted though it is not easy; -inf unflagged."""
        extracted = (self.exact_at < len(self.evaluation_step)) & self.positive
        steps = torch.cat([self.evaluation_step.float(), torch.tensor([torch.inf])])
        return steps[self.exact_at[extracted]] - steps[self.flag_at[extracted]]


class Verdicts(Callback):
    """Notes after every evaluation who stands as memorized."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.memorized: list[Tensor] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        self.memorized.append(torch.isin(self.rows, ledger.losses.ids[ledger.flags.memorized]))


def investigate(sizes: Sizes, schedule: Schedule, rule: DetectionRule, seed: int, save: Path | None = None) -> Findings:
    """Trains both runs of one seed and holds what was said of the samples against what is true."""
    corpus = tokenized(python_docs(), seed=seed)
    vocab_size = corpus.tokenizer.get_vocab_size()
    people = populate(corpus, vocab_size, sizes, seed)
    verdicts = Verdicts(people.tested)
    texts = people.tokens[people.tested]
    tracker = LossTracker(identity="key")
    crew = [tracker, MemorizationDetector(**asdict(rule)), verdicts]
    main, twin = (
        train(
            Sequences(people.tokens, rows, people.noise, vocab_size, seed),
            people.controls, texts, callbacks, schedule, seed,
        )
        for rows, callbacks in ((people.main, crew), (people.twin, []))
    )  # fmt: skip
    # An id without a text of its own is as good as its next text.
    drawn = torch.randint(vocab_size, texts.shape, generator=torch.Generator().manual_seed(seed))
    texts = torch.where(people.of("noise")[:, None], drawn, texts)
    nll = token_nll(main.module, texts)
    ends = [token_nll(run.module, people.controls).mean(1) for run in (main, twin)]
    memorization = _truth(people, nll.mean(1), token_nll(twin.module, texts).mean(1), *ends)
    _describe_again(tracker, people.tested, texts)
    after = _measure_after(people, main.ledger, nll.mean(1), ends[0])
    found = Findings(
        population=people,
        memorization=memorization,
        scores=_all_scores(people, main, texts, nll, after, rule, schedule),
        flagged=verdicts.memorized[-1],
        flagged_after=measure_gaps(*after, rule).flagged,
        bereft={kind: _without(kind, people, main.ledger, rule) for kind in FAMILIES},
        twins=_judge_twins(main.ledger, rule),
        flag_at=scores.first_time(torch.stack(verdicts.memorized)),
        exact_at=scores.first_time(main.exact),
        evaluation_step=main.evaluation_step,
    )
    if save is not None:
        save.mkdir(parents=True, exist_ok=True)
        torch.save(_plain(found, main, twin, texts), save / f"detection_{seed}.pt")
    return found


def _truth(people: Population, main: Tensor, twin: Tensor, main_controls: Tensor, twin_controls: Tensor) -> Tensor:
    truth = torch.empty_like(main)
    for kind in set(people.kind):
        of, like = people.of(kind), people.controls_of(kind)
        truth[of] = scores.counterfactual(main[of], twin[of], main_controls[like], twin_controls[like])
    return truth


def _describe_again(tracker: LossTracker, ids: Tensor, texts: Tensor) -> None:
    """Matching features as of now: of a sample last visited long ago they are as old as that visit."""
    tokens = Tokens(texts, torch.ones_like(texts, dtype=torch.bool))
    rows = tracker.table.index.find(ids)
    tracker.matching.describe(tracker.table, rows, torch.ones_like(rows, dtype=torch.bool), tokens, None)


def _measure_after(
    people: Population, ledger: Ledger, losses: Tensor, of_controls: Tensor
) -> tuple[SampleFeatures, Controls]:
    """What there is to measure by losses ``[N]`` and ``[M]`` taken after training."""
    rows = ledger.losses.index.find(people.tested)
    last = replace(samples_of(ledger.losses, ledger.controls, rows), losses=losses, weight=torch.ones(len(rows)))
    now = of_controls[ledger.controls.ids]
    return last, replace(known_controls(ledger.controls), before=now, after=now)


def _all_scores(
    people: Population,
    main: Run,
    texts: Tensor,
    nll: Tensor,
    after: tuple[SampleFeatures, Controls],
    rule: DetectionRule,
    schedule: Schedule,
) -> dict[str, Tensor]:
    """Every rival is measured by a forward at the end of the run; the detector so, and live."""
    ledger = main.ledger
    rows = ledger.losses.index.find(people.tested)
    confidence, variability = scores.cartography(main.visit_id, main.visit_probability, len(people.tokens))
    return {
        "knn gap": measure_gaps(*after, rule).gap,
        "knn gap, live": ledger.flags.gap[rows].float(),
        "ridge gap": measure_gaps(*after, replace(rule, method="ridge")).gap,
        "final loss": scores.final_loss(nll),
        "loss drop": scores.loss_drop(nll, ledger.losses.first_loss[rows]),
        "compressed size": scores.compressed_ratio(nll, compressed_bits(texts, torch.ones_like(texts).bool())),
        "min-k %": scores.min_k(nll),
        "gradient norm": -gradient_norms(main.module, texts),
        "exposures": people.repeats.float() * schedule.epochs,
        "confidence": confidence[people.tested],
        "variability": variability[people.tested],
    }


def _measure_again(ids: Tensor, keep: Tensor, ledger: Ledger, rule: DetectionRule) -> Measurement:
    """What the end of the run says of samples ``ids``, by the controls in ``keep`` ``[M]``."""
    rows = ledger.losses.index.find(ids)
    samples = samples_of(ledger.losses, ledger.controls, rows)
    return measure_gaps(samples, known_controls(ledger.controls).only(keep), rule)


def _without(kind: str, people: Population, ledger: Ledger, rule: DetectionRule) -> tuple[Tensor, Measurement]:
    """Takes a kind's controls away: who has lost them, bool ``[N]``, and a new measurement."""
    gone = people.controls_of(kind)
    losers = torch.tensor([bool(people.controls_of(each)[gone].any()) for each in people.kind])
    return losers, _measure_again(people.tested, ~gone[ledger.controls.ids], ledger, rule)


def _judge_twins(ledger: Ledger, rule: DetectionRule) -> Tensor:
    """Each half of the controls as if it were trained on, by the other half."""
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
    """All that a detector can be tuned on, without training again: tensors and plain values."""
    people, table, controls = found.population, main.ledger.losses, main.ledger.controls
    runs = {
        name: {
            "visits": {"step": run.visit_step, "id": run.visit_id, "loss": run.visit_loss},
            "evaluation_step": run.evaluation_step,
            "control_losses": run.control_losses,
            "exact": run.exact,
            "tested_nll": token_nll(run.module, texts),
            "control_nll": token_nll(run.module, people.controls),
        }
        for name, run in (("main", main), ("twin", twin))
    }
    return runs | {
        "population": vars(people),
        "memorization": found.memorization,
        "scores": found.scores,
        "flagged": found.flagged,
        "flag_at": found.flag_at,
        "exact_at": found.exact_at,
        "table": table.state_dict(),
        "controls": controls.state_dict(),
        "flags": main.ledger.flags.state_dict(),
    }
