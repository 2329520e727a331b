"""One seed of the standard setting: train twice, compute the true memorization, record the detector's verdicts.

N  tested samples      M  controls      E  evaluations
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.common.training import Run, Schedule, Sequences, gradient_norms, token_nll, train
from benchmarks.detection import adapter, saving, scores
from benchmarks.detection.corpus import documentation
from benchmarks.detection.population import Population, Sizes, populate
from benchmarks.detection.verdict_log import VerdictLog
from lightning_memsink.detection.matched_controls import Measurement
from lightning_memsink.detection.ngram_features import compressed_bits
from lightning_memsink.detection.verdicts import Verdict

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
    flag_step: Tensor
    """``[N]`` optimizer step of the first evaluation at which a sample was memorized; infinite if it never was."""
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
        return self.evaluation_step.float()[self.exact_at[extracted]] - self.flag_step[extracted]


def investigate(sizes: Sizes, schedule: Schedule, seed: int, save: Path | None = None) -> Findings:
    """Trains both runs of one seed and compares the detector's verdicts with true memorization."""
    corpus = documentation(seed)
    vocab_size = corpus.tokenizer.get_vocab_size()
    population = populate(corpus, vocab_size, sizes, seed)
    # A noise sample has new tokens at every visit: measure it on the next ones.
    anew = torch.randint(vocab_size, population.tokens.shape, generator=torch.Generator().manual_seed(seed))
    is_noise = torch.isin(torch.arange(len(anew)), population.noise)
    all_texts = torch.where(is_noise[:, None], anew, population.tokens)
    planted, texts = population.tokens[population.tested], all_texts[population.tested]
    trained = population.main.unique()
    verdicts = VerdictLog(population.tested)
    callbacks = adapter.watching()
    main, twin = (
        train(
            Sequences(population.tokens, rows, population.noise, vocab_size, seed),
            population.controls, planted, own, schedule, seed, followed,
        )
        for rows, own, followed in (
            (population.main, [*callbacks, verdicts], None if save is None else all_texts[trained]),
            (population.twin, [], None),
        )
    )  # fmt: skip
    nll = token_nll(main.module, texts)
    ends = [token_nll(run.module, population.controls).mean(1) for run in (main, twin)]
    memorization = _truth(population, nll.mean(1), token_nll(twin.module, texts).mean(1), *ends)
    as_trained = None if save is None else saving.slots_of(main.ledger)
    adapter.describe_again(callbacks[0], population.tested, texts)
    again = adapter.Retrospect(main.ledger, population.tested)
    found = Findings(
        population=population,
        memorization=memorization,
        scores=_all_scores(population, main, texts, nll, again, ends[0], schedule),
        flagged=adapter.verdicts_of(main.ledger, population.tested).verdict == Verdict.MEMORIZED,
        flagged_after=again.after(nll.mean(1), ends[0]).flagged,
        without_controls={kind: _without(kind, population, again, nll.mean(1), ends[0]) for kind in FAMILIES},
        twins=again.halves(),
        flag_step=verdicts.first_step,
        exact_at=scores.first_time(main.exact),
        evaluation_step=main.evaluation_step,
    )
    if save is not None and as_trained is not None:
        save.mkdir(parents=True, exist_ok=True)
        torch.save(
            saving.plain(population, main, twin, texts, trained) | as_trained | saving.results(found),
            save / f"detection_{seed}.pt",
        )
    return found


def _truth(population: Population, main: Tensor, twin: Tensor, main_controls: Tensor, twin_controls: Tensor) -> Tensor:
    truth = torch.empty_like(main)
    for kind in set(population.kind):
        of, like = population.of(kind), population.controls_of(kind)
        truth[of] = scores.counterfactual(main[of], twin[of], main_controls[like], twin_controls[like])
    return truth


def _all_scores(
    population: Population,
    main: Run,
    texts: Tensor,
    nll: Tensor,
    again: adapter.Retrospect,
    of_controls: Tensor,
    schedule: Schedule,
) -> dict[str, Tensor]:
    """All other scores come from a forward at the end of the run; the detector's from that and from training."""
    confidence, variability = scores.cartography(main.visit_id, main.visit_probability, len(population.tokens))
    return {
        "knn gap": again.after(nll.mean(1), of_controls).gap,
        "knn gap, live": adapter.verdicts_of(main.ledger, population.tested).gap,
        "ridge gap": again.after(nll.mean(1), of_controls, method="ridge").gap,
        "final loss": scores.final_loss(nll),
        "loss drop": scores.loss_drop(nll, main.ledger.losses.first_loss[again.rows]),
        "compressed size": scores.compressed_ratio(nll, compressed_bits(texts, torch.ones_like(texts).bool())),
        "min-k %": scores.min_k(nll),
        "gradient norm": -gradient_norms(main.module, texts),
        "exposures": population.repeats.float() * schedule.epochs,
        "confidence": confidence[population.tested],
        "variability": variability[population.tested],
    }


def _without(
    kind: str, population: Population, again: adapter.Retrospect, losses: Tensor, of_controls: Tensor
) -> tuple[Tensor, Measurement]:
    """Removes the controls of a kind: bool ``[N]`` of the samples they belong to, and a new measurement."""
    removed = population.controls_of(kind)
    affected = torch.tensor([bool(population.controls_of(each)[removed].any()) for each in population.kind])
    return affected, again.after(losses, of_controls, keep=~removed)
