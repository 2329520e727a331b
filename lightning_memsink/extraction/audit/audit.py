"""Suspected texts against controls in a model that was trained without us.

N  suspected texts      M  controls
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.detection.knn import nearest
from lightning_memsink.detection.matched_controls import (
    Controls,
    DetectionRule,
    Measurement,
    SampleFeatures,
    measure_gaps,
    standardize,
)
from lightning_memsink.extraction.audit.answer_cache import AnswersFile
from lightning_memsink.extraction.audit.mean_gap import MeanGap, mean_gap
from lightning_memsink.extraction.audit.model_loading import Subject
from lightning_memsink.extraction.audit.texts import Encoded, Text, encode, with_decoded_text
from lightning_memsink.extraction.audit.top_texts import LocalizedUnits, TopTexts, examine_top_texts, locate_units
from lightning_memsink.extraction.probe import ExtractionResults, ProbeConfig, logits_of, probe
from lightning_memsink.extraction.separation import Separation, separation

MATCHED = "gap to matched controls"
SCORES = (MATCHED, "loss", "zlib", "min-k%", "min-k%++")
"""What suspected texts and controls are told apart by, as the report names it: first against controls of the same
difficulty, then membership scores, which know of none."""
KIND_WEIGHT = 4
"""Times that a text's kind counts beside each feature of its difficulty: controls of another kind come last."""
FELLOWS = 3
"""Controls whose units are compared with those of a text called memorized."""
Advance = Callable[[int], object]
"""Called with the number of texts that are done."""


@dataclass(frozen=True)
class AuditConfig:
    """What is asked, and when a text counts as memorized.

    Args:
        prefix: tokens that the model is given.
        length: tokens of a text that are looked at.
        n: sampled tries, and ``p``, the probability to see the rest among them.
        temperature: of sampling, as ``top_k`` and ``top_p``.
        alpha: false-discovery rate over the suspected texts.
        k: controls that a text is compared with.
        min_gap: nats per token that a memorized text lies below its controls at least.
        fpr: share of controls that a membership score may accuse.
        closer: texts that stand out most, to be looked at more closely: generated, and tried after other beginnings.
        units: whether to look for the units that carry the texts called memorized.
        unit_fraction: of all units, to be named.
        batch_size: texts in a forward.
    """

    prefix: int = 32
    length: int = 128
    n: int = 1000
    p: float = 0.5
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    alpha: float = 0.05
    k: int = 8
    min_gap: float = 1.0
    fpr: float = 0.01
    closer: int = 20
    units: bool = False
    unit_fraction: float = 0.01
    batch_size: int = 8

    @property
    def scheme(self) -> ProbeConfig:
        return ProbeConfig(self.prefix, self.n, self.p, self.temperature, self.top_k, self.top_p)

    @property
    def rule(self) -> DetectionRule:
        return DetectionRule(alpha=self.alpha, k=self.k, min_gap=self.min_gap)


@dataclass(frozen=True)
class Cohort:
    """Texts, what was answered of each, and what they are matched on."""

    texts: Sequence[Text]
    tokens: Tensor
    """``[N]`` how many of each were looked at."""
    answers: ExtractionResults
    scores: dict[str, Tensor]
    """``[N]`` by name, larger the more it looks trained on."""
    features: Tensor
    """``[N, F]`` of difficulty: tokens (logarithm), characters per token, compressed bits per character; then of kind,
    where it is told."""


@dataclass(frozen=True)
class Audit:
    """All that is found."""

    subject: str
    fingerprint: str
    parameters: int
    settings: AuditConfig
    suspects: Cohort
    controls: Cohort
    gaps: Measurement | None
    """None if the controls are too few, which ``unmeasured`` tells."""
    unmeasured: str
    separations: dict[str, Separation]
    """By score; empty if there are too few of either."""
    closer: TopTexts
    located: LocalizedUnits | None
    """None if nobody asked, or if ``unlocated`` tells why not."""
    unlocated: str
    by_kind: bool
    """Whether a text's controls are of its own kind."""

    def matched(self, group: str | None) -> Tensor:
        """Bool ``[N]``: texts of a group (None: of any) that have controls like them; none if nothing was measured."""
        own = torch.tensor([group in (None, each.group) for each in self.suspects.texts])
        return own & (False if self.gaps is None else self.gaps.matched)

    def mean_gap(self, group: str | None) -> MeanGap:
        """How far the matched texts of a group lie below comparable controls; None for all."""
        if self.gaps is None:
            return MeanGap(torch.nan, torch.nan)
        null = self.gaps.null
        if self.by_kind:
            kinds = {each.kind for each in self.suspects.texts if group in (None, each.group)}
            usable = self.controls.answers.loss.isfinite()
            null = null[torch.tensor([each.kind in kinds for each in self.controls.texts])[usable]]
        return mean_gap(self.gaps.gap[self.matched(group)], null)


def audit(
    subject: Subject,
    suspects: Sequence[Text],
    controls: Sequence[Text],
    settings: AuditConfig,
    kept: AnswersFile | None = None,
    advance: Advance = lambda done: None,
) -> Audit:
    """Asks for all texts, those first that ``kept`` has no answer for, and compares.

    Raises:
        ValueError: a suspected text is among the controls, or none is longer than the prefix.
    """
    suspects, controls = (with_decoded_text(texts, subject.tokenizer) for texts in (suspects, controls))
    twice = {each.text for each in suspects} & {each.text for each in controls}
    if twice:
        line = next(each.line for each in controls if each.text in twice)
        raise ValueError(
            f"Line {line} of the controls is a suspected text too: a control must not have been trained on."
        )
    encoded = [encode(texts, subject.tokenizer, settings.length) for texts in (suspects, controls)]
    longest = int(encoded[0].mask.sum(1).max())
    if longest <= settings.prefix:
        raise ValueError(
            f"No suspected text is longer than the prefix of {settings.prefix} tokens; the longest has {longest}. "
            "Ask with a shorter one (--prefix) or for longer texts."
        )
    own, others = (
        _asked(subject, texts, each, settings, kept, advance)
        for texts, each in zip((suspects, controls), encoded, strict=True)
    )
    own, others, by_kind = tell_kinds_apart(own, others)
    gaps, unmeasured = gaps_of(own, others, settings.rule)
    told = {} if gaps is None else {MATCHED: (gaps.gap[gaps.matched], gaps.null)}
    told |= {name: (own.scores[name], others.scores[name]) for name in own.scores}
    apart = {
        name: separation(*told[name], settings.fpr)
        for name in SCORES
        if name in told and min(int(each.isfinite().sum()) for each in told[name]) > 1
    }
    closer = examine_top_texts(
        subject, encoded[0], encoded[1], _most(own, gaps)[: settings.closer], settings.prefix, advance
    )
    located, unlocated = _located(subject, encoded, own, others, gaps, settings)
    return Audit(
        subject.name, subject.fingerprint, subject.parameters, settings, own, others, gaps, unmeasured, apart,
        closer, located, unlocated, by_kind,
    )  # fmt: skip


def tell_kinds_apart(suspects: Cohort, controls: Cohort) -> tuple[Cohort, Cohort, bool]:
    """Both with a feature for each kind, if every suspected one is also a control's: else they tell nothing."""
    kinds = sorted({each.kind for each in suspects.texts})
    shared = set(kinds) <= {each.kind for each in controls.texts}
    if not shared or len({each.kind for each in controls.texts}) == 1:
        return suspects, controls, shared
    own, others = (
        replace(asked, features=torch.cat([asked.features, *[_kinds(asked, kinds)] * KIND_WEIGHT], 1))
        for asked in (suspects, controls)
    )
    return own, others, True


def _kinds(asked: Cohort, kinds: Sequence[str]) -> Tensor:
    """``[N, K]``"""
    return torch.tensor([[float(each.kind == kind) for kind in kinds] for each in asked.texts])


def _most(suspects: Cohort, gaps: Measurement | None) -> list[int]:
    """Rows of the texts that are long enough to be asked for, those that stand out most first."""
    order = suspects.answers.log10_tries if gaps is None else -gaps.gap
    rows: list[int] = order.argsort(stable=True).tolist()
    return [row for row in rows if suspects.answers.suffix[row] > 0]


def _located(
    subject: Subject, encoded: Sequence[Encoded], suspects: Cohort, controls: Cohort, gaps: Measurement | None,
    settings: AuditConfig,
) -> tuple[LocalizedUnits | None, str]:  # fmt: skip
    """Of the texts called memorized against the controls most like them; or why that can't be."""
    targets = [] if gaps is None else gaps.flagged.nonzero().flatten().tolist()
    if not settings.units or not targets:
        return None, "No text is called memorized, so there are no units to look for." if settings.units else ""
    points, own = standardize(suspects.features, controls.features)
    usable = controls.answers.loss.isfinite().nonzero().flatten()
    likes = usable[nearest(points[targets], own[usable], FELLOWS)[0].unique()].tolist()
    try:
        return locate_units(
            subject, encoded[0], targets, encoded[1], likes, settings.unit_fraction, settings.batch_size
        ), ""
    except ValueError as error:
        return None, str(error)


def _asked(
    subject: Subject, texts: Sequence[Text], encoded: Encoded, settings: AuditConfig, kept: AnswersFile | None,
    advance: Advance,
) -> Cohort:  # fmt: skip
    logits, columns = logits_of(subject.model), [field.name for field in fields(ExtractionResults)]
    known: list[dict[str, Any] | None] = [None if kept is None else kept.get(each.text) for each in texts]
    advance(sum(each is not None for each in known))
    # Texts of like length together: a forward costs what its longest does.
    todo = sorted((row for row, each in enumerate(known) if each is None), key=lambda row: int(encoded.mask[row].sum()))
    for start in range(0, len(todo), settings.batch_size):
        rows = todo[start : start + settings.batch_size]
        width = int(encoded.mask[rows].sum(1).max())
        told = probe(logits, encoded.tokens[rows, :width], encoded.mask[rows, :width], settings.scheme, len(rows))
        for at, row in enumerate(rows):
            known[row] = {name: getattr(told, name)[at].item() for name in columns}
        if kept is not None:
            kept.add({texts[row].text: known[row] or {} for row in rows})
        advance(len(rows))
    answers = ExtractionResults(*(torch.tensor([(each or {})[name] for each in known]) for name in columns))
    return _described(texts, encoded.mask.sum(1), answers)


def _described(texts: Sequence[Text], tokens: Tensor, answers: ExtractionResults) -> Cohort:
    loss = answers.loss.double()
    packed = torch.tensor([len(zlib.compress(each.text.encode())) for each in texts])
    characters = torch.tensor([len(each.text) for each in texts])
    scores = {
        "loss": -loss,
        "zlib": -loss * (tokens - 1) / packed,
        "min-k%": answers.min_k.double(),
        "min-k%++": answers.min_k_plus_plus.double(),
    }
    features = torch.stack([tokens.double().log(), characters / tokens, 8 * packed / characters], 1).float()
    return Cohort(texts, tokens, answers, scores, features)


def gaps_of(suspects: Cohort, controls: Cohort, rule: DetectionRule) -> tuple[Measurement | None, str]:
    """Each suspected text against its matched controls; or why that can't be."""
    usable = int(controls.answers.loss.isfinite().sum())
    if usable < rule.controls_needed:
        return None, (
            f"{usable} controls are too few for a verdict on single texts: at least {rule.controls_needed} are needed, "
            "of the same kinds as what is suspected."
        )
    losses = [each.answers.loss.float() for each in (suspects, controls)]
    if not losses[0].isfinite().all():
        return None, "Some suspected texts have no finite loss."
    unknown = torch.full((len(losses[0]),), torch.nan)
    samples = SampleFeatures(
        losses[0], torch.ones_like(losses[0]), suspects.features, unknown, torch.zeros(len(unknown), dtype=torch.int64)
    )
    others = Controls(losses[1], losses[1], controls.features, torch.full((1, len(losses[1])), torch.nan))
    return measure_gaps(samples, others, rule), ""
