"""Suspected texts against controls in a model that was trained without us.

N  suspected texts      M  controls
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.asking import Answers, Scheme, ask, logits_of
from lightning_memsink.auditing.answers_file import AnswersFile
from lightning_memsink.auditing.subject import Subject
from lightning_memsink.auditing.texts import Encoded, Text, encode
from lightning_memsink.detection import Controls, Measurement, Rule, Samples, measure
from lightning_memsink.extraction_metrics import Separation, separation

SCORES = ("loss", "zlib", "min-k%", "min-k%++")
"""Membership scores, as the report names them."""
Advance = Callable[[int], object]
"""Called with the number of texts that are done."""


@dataclass(frozen=True)
class Settings:
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
    batch_size: int = 8

    @property
    def scheme(self) -> Scheme:
        return Scheme(self.prefix, self.n, self.p, self.temperature, self.top_k, self.top_p)

    @property
    def rule(self) -> Rule:
        return Rule(alpha=self.alpha, k=self.k, min_gap=self.min_gap)


@dataclass(frozen=True)
class Asked:
    """Texts, what was answered of each, and what they are matched on."""

    texts: Sequence[Text]
    tokens: Tensor
    """``[N]`` how many of each were looked at."""
    answers: Answers
    scores: dict[str, Tensor]
    """``[N]`` by name, larger the more it looks trained on."""
    features: Tensor
    """``[N, 3]`` of difficulty: tokens (logarithm), characters per token, compressed bits per character."""


@dataclass(frozen=True)
class Audit:
    """All that is found."""

    subject: str
    fingerprint: str
    parameters: int
    settings: Settings
    suspects: Asked
    controls: Asked
    gaps: Measurement | None
    """None if the controls are too few, which ``unmeasured`` tells."""
    unmeasured: str
    separations: dict[str, Separation]
    """By score; empty if there are too few of either."""


def audit(
    subject: Subject,
    suspects: Sequence[Text],
    controls: Sequence[Text],
    settings: Settings,
    kept: AnswersFile | None = None,
    advance: Advance = lambda done: None,
) -> Audit:
    """Asks for all texts, those first that ``kept`` has no answer for, and compares.

    Raises:
        ValueError: a suspected text is among the controls, or none is longer than the prefix.
    """
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
    gaps, unmeasured = _gaps(own, others, settings.rule)
    apart = {
        name: separation(own.scores[name], others.scores[name], settings.fpr)
        for name in SCORES
        if min(int(each.scores[name].isfinite().sum()) for each in (own, others)) > 1
    }
    return Audit(subject.name, subject.fingerprint, subject.parameters, settings, own, others, gaps, unmeasured, apart)


def _asked(
    subject: Subject, texts: Sequence[Text], encoded: Encoded, settings: Settings, kept: AnswersFile | None,
    advance: Advance,
) -> Asked:  # fmt: skip
    logits, columns = logits_of(subject.model), [field.name for field in fields(Answers)]
    known: list[dict[str, Any] | None] = [None if kept is None else kept.get(each.text) for each in texts]
    advance(sum(each is not None for each in known))
    # Texts of like length together: a forward costs what its longest does.
    todo = sorted((row for row, each in enumerate(known) if each is None), key=lambda row: int(encoded.mask[row].sum()))
    for start in range(0, len(todo), settings.batch_size):
        rows = todo[start : start + settings.batch_size]
        width = int(encoded.mask[rows].sum(1).max())
        told = ask(logits, encoded.tokens[rows, :width], encoded.mask[rows, :width], settings.scheme, len(rows))
        for at, row in enumerate(rows):
            known[row] = {name: getattr(told, name)[at].item() for name in columns}
        if kept is not None:
            kept.add({texts[row].text: known[row] or {} for row in rows})
        advance(len(rows))
    answers = Answers(*(torch.tensor([(each or {})[name] for each in known]) for name in columns))
    return _described(texts, encoded.mask.sum(1), answers)


def _described(texts: Sequence[Text], tokens: Tensor, answers: Answers) -> Asked:
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
    return Asked(texts, tokens, answers, scores, features)


def _gaps(suspects: Asked, controls: Asked, rule: Rule) -> tuple[Measurement | None, str]:
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
    samples = Samples(
        losses[0], torch.ones_like(losses[0]), suspects.features, unknown, torch.zeros(len(unknown), dtype=torch.int64)
    )
    others = Controls(losses[1], losses[1], controls.features, torch.full((1, len(losses[1])), torch.nan))
    return measure(samples, others, rule), ""


def as_plain(settings: Settings) -> dict[str, Any]:
    """As JSON has it."""
    return asdict(settings)
