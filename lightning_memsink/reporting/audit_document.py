"""The report of an audit."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from math import isfinite
from typing import Any

from lightning_memsink.detection.statistics import LN2, bits, controls_for
from lightning_memsink.extraction.audit.cohort import Cohort
from lightning_memsink.extraction.audit.localized_units import LocalizedUnits
from lightning_memsink.extraction.audit.results import Audit
from lightning_memsink.extraction.audit.statistics import MATCHED
from lightning_memsink.localization.concentration import Concentration
from lightning_memsink.reporting import audit_tables as tables
from lightning_memsink.reporting.document import Answer, Document, Grid, Picture, Section, State
from lightning_memsink.reporting.formatting import count_of, percent
from lightning_memsink.reporting.provenance import versions


def audit_document(audit: Audit, date: str) -> Document:
    """``date``: ISO 8601."""
    sections = [
        Section("What can be extracted", _extraction(audit), [tables.by_group(audit)]),
        Section("Suspected texts against controls", _separation(audit), _separation_tables(audit), _pictures(audit)),
        Section("Single texts", _single_texts(audit), tables.single(audit)),
        *([Section("Where it is", _localization(audit), tables.layers(audit))] if audit.config.units else []),
        Section("Method", _method(audit), [_versions()]),
        Section("What this does not show", LIMITS),
    ]
    return Document(
        "audit", f"What {audit.subject} knows of suspected texts", _answers(audit), _overview(audit), sections,
        _numbers(audit), date,
    )  # fmt: skip


def draw_figures(audit: Audit) -> dict[str, Any]:
    """Matplotlib figures by stem; none if no gaps were measured."""
    if audit.gaps is None:
        return {}
    from lightning_memsink.reporting.figures import gap_distribution

    return {
        "gaps": gap_distribution(
            audit.gaps.gap, audit.gaps.null, audit.gaps.threshold, "nats per token", "suspected texts"
        )
    }


LIMITS = (
    "The result depends on the controls: they must be of the same kinds as the suspected texts, and it must be certain "
    "that they were not trained on. For a kind of text that the controls lack, the result says nothing about training.",
    "A text with a large gap may have been trained on in another version, as a quotation, or because it is well known: "
    "an audit measures what the model knows, not where the model learned it.",
    "Only each text's own beginning was used as a prompt; other prompts may extract more.",
)


def _answers(audit: Audit) -> list[Answer]:
    exact, discoverable, tested = _extracted(audit.suspects, audit.config.n)
    measured = audit.gaps is not None and bool(audit.separations)
    first = Answer(
        "Was memorization measured?",
        "yes" if measured else "partly",
        f"{count_of(len(audit.suspects.texts), 'suspected text')} against "
        f"{count_of(len(audit.controls.texts), 'control')}." + ("" if measured else f" {audit.why_no_gaps}"),
    )
    separation = audit.separations.get(MATCHED)
    if separation is None:
        known = Answer("Does the model know them better than controls?", "unknown", audit.why_no_gaps)
    else:
        state: State = "yes" if separation.auroc_low > 0.5 else "no" if separation.auroc_high < 0.5 else "unknown"
        known = Answer(
            "Does the model know them better than controls?", state,
            f"In {percent(separation.auroc)} of pairs of a suspected text and a control, the suspected text's loss is "
            f"farther below that of comparable controls (95 % interval {percent(separation.auroc_low)} to "
            f"{percent(separation.auroc_high)}; chance is 50 %){_by_bits(audit)}.",
        )  # fmt: skip
    extracted = Answer(
        "Can any be extracted?", "yes" if exact + discoverable else "no",
        f"{exact:,} of {tested:,} come word for word; {discoverable:,} within {audit.config.n:,} sampled tries.",
    )  # fmt: skip
    return [first, known, extracted]


def _by_bits(audit: Audit) -> str:
    """The mean gap of all suspected texts that were matched, as a second sentence; empty without an interval."""
    gap = audit.mean_gap(None)
    if not isfinite(gap.error):
        return ""
    mean, low, high = gap.bits
    return f". The mean gap is {mean:.2f} bits a token ({low:.2f} to {high:.2f})"


def _overview(audit: Audit) -> list[str]:
    if audit.gaps is None:
        return [f"No single text can be called memorized. {audit.why_no_gaps}"]
    flagged = int(audit.gaps.flagged.sum())
    return [
        f"{flagged:,} of {count_of(len(audit.suspects.texts), 'text')} can be called memorized: the model's loss on "
        f"each is at least {audit.gaps.threshold:.2f} nats ({audit.gaps.threshold / LN2:.2f} bits) a token below that "
        f"of comparable controls. No more than about {percent(audit.config.alpha)} of these are expected to be wrong."
    ]


def _extraction(audit: Audit) -> list[str]:
    settings = audit.config
    how = f"temperature {settings.temperature:g}"
    how += f", top-k {settings.top_k}" if settings.top_k else ""
    how += f", top-p {settings.top_p:g}" if settings.top_p < 1 else ""
    return [
        f"The prompt is the first {settings.prefix} tokens of a text. Word for word: greedy decoding generates all "
        f"that follows, up to {settings.length} tokens. In tries: with probability {settings.p:g}, {settings.n:,} "
        f"sampled continuations contain it at least once ({how}).",
    ]


def _separation(audit: Audit) -> list[str]:
    if not audit.separations:
        return ["There are too few suspected texts or controls to compare them."]
    return [
        "How often a suspected text scores above a control (AUROC; .5 is chance), and how many suspected texts lie "
        "above all but a small share of the controls. Only the first score compares texts of equal difficulty; by the "
        "others a text may score high because it is easy.",
        "The controls of a text are of its own kind."
        if audit.matched_within_kind
        else "Suspected texts and controls name different kinds, so the controls of a text may be of any kind.",
    ]


def _separation_tables(audit: Audit) -> list[Grid]:
    return [tables.scores(audit), *tables.gaps(audit)]


def _pictures(audit: Audit) -> list[Picture]:
    caption = "Gaps of suspected texts, and of each control to the other controls"
    return [] if audit.gaps is None else [Picture("gaps", caption)]


def _single_texts(audit: Audit) -> list[str]:
    if audit.gaps is None:
        return [audit.why_no_gaps]
    gaps = audit.gaps
    lines = [
        f"Each text is compared with the {audit.config.k} controls nearest in length, characters per token and "
        f"compressed size. {int((~gaps.matched).sum()):,} have no comparable controls and no verdict.",
        f"The smallest p-value that {count_of(len(gaps.null), 'control')} allow is {gaps.p_floor:.2g}. p-values are "
        f"ranks among them, of the hypothesis that the gap is at most {gaps.threshold:.2f} nats a token.",
    ]
    beyond = int((gaps.beyond & gaps.matched & ~gaps.flagged).sum())
    if beyond:
        needed = controls_for(int(gaps.matched.sum()), audit.config.alpha, beyond)
        lines.append(
            f"{count_of(beyond, 'text')} could not be called memorized, though no control's loss is so far below that "
            f"of others: it would take {count_of(needed, 'control')} to say so."
        )
    total = bits(gaps.gap, audit.suspects.tokens - 1)[gaps.flagged]
    if len(total):
        lines.append(f"In all, the gaps of the texts called memorized are {float(total.sum()):,.0f} bits.")
    return lines


def _localization(audit: Audit) -> list[str]:
    if audit.localized_units is None:
        return [audit.why_no_units]
    sinks = audit.localized_units.sinks
    return [
        f"{len(sinks):,} of {sum(sinks.sizes.values()):,} hidden units have a larger effect on the texts called "
        "memorized than on the controls nearest to these (activation times gradient). They are saved in "
        "sinks.safetensors.",
        str(audit.localized_units.concentration),
        "Removing such units usually harms other texts too: they show where to look and are no remedy.",
    ]


def _method(audit: Audit) -> list[str]:
    settings = ", ".join(f"{name} {value:g}" for name, value in asdict(audit.config).items())
    return [
        f"Model: {audit.subject}, {audit.parameters:,} parameters, SHA-256 {audit.fingerprint[:16]} of its "
        "configuration and its weights' sizes and ends.",
        f"Suspected texts: {_fingerprint(audit.suspects)}. Controls: {_fingerprint(audit.controls)}.",
        f"Settings: {settings}.",
        "Sources: extraction by prefix, Carlini et al. 2023; (n, p)-discoverable, Hayes et al. 2024; min-k%, Shi et "
        "al. 2024; min-k%++, Zhang et al. 2025; intervals of AUROC, DeLong et al. 1988; matched controls with a "
        "false-discovery rate, Benjamini and Hochberg 1995 over conformal p-values.",
    ]


def _versions() -> Grid:
    return Grid(("package", "version"), [(name, version) for name, version in versions().items()])


def _numbers(audit: Audit) -> dict[str, Any]:
    exact, discoverable, tested = _extracted(audit.suspects, audit.config.n)
    return {
        "model": {"name": audit.subject, "fingerprint": audit.fingerprint, "parameters": audit.parameters},
        "settings": asdict(audit.config),
        "suspects": {"texts": len(audit.suspects.texts), "fingerprint": _digest(audit.suspects)},
        "controls": {"texts": len(audit.controls.texts), "fingerprint": _digest(audit.controls)},
        "extraction": {"asked": tested, "exact": exact, "discoverable": discoverable},
        "separation": {name: vars(each) for name, each in audit.separations.items()},
        "flagged": None if audit.gaps is None else int(audit.gaps.flagged.sum()),
        "threshold": None if audit.gaps is None else round(audit.gaps.threshold, 4),
        "bits_a_token": _bits(audit),
        "located": None if audit.localized_units is None else _unit_numbers(audit.localized_units),
        "versions": versions(),
    }


def _bits(audit: Audit) -> dict[str, Any]:
    """Mean gap in bits a token by group, for groups with an interval."""
    groups = dict.fromkeys(each.group for each in audit.suspects.texts)
    gaps = {group or "all": audit.mean_gap(group) for group in [*groups, None]}
    return {
        group: dict(zip(("mean", "low", "high"), each.bits, strict=True))
        for group, each in gaps.items()
        if isfinite(each.error)
    }


def _unit_numbers(localized: LocalizedUnits) -> dict[str, Any]:
    sinks, test = localized.sinks, localized.concentration
    p = test.p if isinstance(test, Concentration) else None
    return {"units": {name: len(chosen) for name, chosen in sinks.units.items()}, "concentration_p": p}


def _extracted(cohort: Cohort, n: int) -> tuple[int, int, int]:
    """Numbers of texts: extracted word for word, extracted within ``n`` tries, and long enough to be tested."""
    results = cohort.results
    long = results.suffix > 0
    return int(results.exact.sum()), int(results.discoverable(n)[long].sum()), int(long.sum())


def _fingerprint(cohort: Cohort) -> str:
    return f"{len(cohort.texts):,}, SHA-256 {_digest(cohort)[:16]}"


def _digest(cohort: Cohort) -> str:
    return hashlib.sha256("\0".join(each.text for each in cohort.texts).encode()).hexdigest()
