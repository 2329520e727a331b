"""What an audit found, as a report."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from math import isfinite
from typing import Any

from lightning_memsink.detection.statistics import LN2, bits
from lightning_memsink.extraction.audit.audit import MATCHED, Audit, Cohort
from lightning_memsink.extraction.audit.top_texts import LocalizedUnits
from lightning_memsink.localization.concentration import Concentration
from lightning_memsink.reporting import audit_tables as tables
from lightning_memsink.reporting.document import Answer, Document, Grid, Picture, Section
from lightning_memsink.reporting.provenance import versions
from lightning_memsink.reporting.run_summary import many, percent


def audit_document(audit: Audit, date: str) -> Document:
    """``date``: ISO 8601."""
    sections = [
        Section("What can be extracted", _extraction_words(audit), [tables.by_group(audit)]),
        Section("Suspected texts against controls", _separation_words(audit), _apart(audit), _picture(audit)),
        Section("Single texts", _single_words(audit), tables.single(audit)),
        *([Section("Where it is", _located_words(audit), tables.layers(audit))] if audit.settings.units else []),
        Section("Method", _method(audit), [_versions()]),
        Section("What this does not show", LIMITS),
    ]
    return Document(
        "audit", f"What {audit.subject} knows of suspected texts", _answers(audit), _plain(audit), sections,
        _numbers(audit), date,
    )  # fmt: skip


def picture_of(audit: Audit) -> dict[str, Any]:
    """Matplotlib figures by stem; none where nothing was measured."""
    if audit.gaps is None:
        return {}
    from lightning_memsink.reporting.figures import gap_distribution

    return {
        "gaps": gap_distribution(
            audit.gaps.gap, audit.gaps.null, audit.gaps.threshold, "nats per token", "suspected texts"
        )
    }


LIMITS = (
    "Controls decide: they must be of the same kinds as the suspected texts and surely not trained on. A kind of text "
    "that the controls lack seems memorized, or not, for reasons that have nothing to do with training.",
    "A text that stands out may have been trained on in another version, quoted elsewhere, or simply be well known: "
    "an audit sees what the model knows, not from where.",
    "Only each text's own beginning was tried as a prompt; other prompts may get more out of the model.",
)


def _answers(audit: Audit) -> list[Answer]:
    exact, found, asked = _extracted(audit.suspects, audit.settings.n)
    measured = audit.gaps is not None and bool(audit.separations)
    first = Answer(
        "Was memorization measured?",
        "yes" if measured else "partly",
        f"{many(len(audit.suspects.texts), 'suspected text')} against {many(len(audit.controls.texts), 'control')}."
        + ("" if measured else f" {audit.unmeasured}"),
    )
    apart = audit.separations.get(MATCHED)
    if apart is None:
        known = Answer("Does the model know them better than controls?", "unknown", audit.unmeasured)
    else:
        state: Any = "yes" if apart.auroc_low > 0.5 else "no" if apart.auroc_high < 0.5 else "unknown"
        known = Answer(
            "Does the model know them better than controls?", state,
            f"A suspected text lies farther below controls of its difficulty than another control does in "
            f"{percent(apart.auroc)} of pairs (95 % interval {percent(apart.auroc_low)} to "
            f"{percent(apart.auroc_high)}; chance is 50 %){_by_bits(audit)}.",
        )  # fmt: skip
    said = Answer(
        "Can any be extracted?", "yes" if exact + found else "no",
        f"{exact:,} of {asked:,} come word for word; {found:,} within {audit.settings.n:,} sampled tries.",
    )  # fmt: skip
    return [first, known, said]


def _by_bits(audit: Audit) -> str:
    """Over all suspected texts that were matched."""
    found = audit.mean_gap(None)
    if not isfinite(found.error):
        return ""
    mean, low, high = found.bits
    return f": by {mean:.2f} bits a token on average ({low:.2f} to {high:.2f})"


def _plain(audit: Audit) -> list[str]:
    if audit.gaps is None:
        return [f"No single text can be called memorized here. {audit.unmeasured}"]
    flagged = int(audit.gaps.flagged.sum())
    return [
        f"{many(flagged, 'text')} of {len(audit.suspects.texts):,} can be called memorized: the model's loss on each "
        f"is at least {audit.gaps.threshold:.2f} nats ({audit.gaps.threshold / LN2:.2f} bits) a token below that of "
        f"comparable controls, and of texts called so about {percent(audit.settings.alpha)} at most are expected to "
        "be called so wrongly."
    ]


def _extraction_words(audit: Audit) -> list[str]:
    settings = audit.settings
    how = f"temperature {settings.temperature:g}"
    how += f", top-k {settings.top_k}" if settings.top_k else ""
    how += f", top-p {settings.top_p:g}" if settings.top_p < 1 else ""
    return [
        f"The model is given the first {settings.prefix} tokens of a text. Word for word: greedy decoding says all "
        f"that follows, up to {settings.length} tokens. In tries: with probability {settings.p:g} it comes at "
        f"least once in {settings.n:,} samples ({how}).",
    ]


def _separation_words(audit: Audit) -> list[str]:
    if not audit.separations:
        return ["There are too few suspected texts or controls for this."]
    return [
        "How often a suspected text scores above a control (AUROC; .5 is chance), and how many suspected texts lie "
        "above all but a small share of the controls. Only the first score compares texts of like difficulty; by the "
        "others a text may stand out because it is easy.",
        "A text's controls are of its own kind."
        if audit.by_kind
        else "Kinds of suspected texts and of controls have different names, so controls are sought among all.",
    ]


def _apart(audit: Audit) -> list[Grid]:
    return [tables.scores(audit), *tables.gaps(audit)]


def _picture(audit: Audit) -> list[Picture]:
    caption = "Gaps of suspected texts, and of controls against their fellows"
    return [] if audit.gaps is None else [Picture("gaps", caption)]


def _single_words(audit: Audit) -> list[str]:
    if audit.gaps is None:
        return [audit.unmeasured]
    gaps = audit.gaps
    lines = [
        f"Each text is compared with the {audit.settings.k} controls nearest in length, characters per token and "
        f"compressed size. {int((~gaps.matched).sum()):,} have no controls like them and no verdict.",
        f"The smallest p-value that {len(gaps.null):,} controls allow is {gaps.p_floor:.2g}; p-values are "
        + ("ranks among them." if gaps.tail == "conformal" else "of a fitted normal tail: take them as estimates."),
    ]
    total = bits(gaps.gap, audit.suspects.tokens - 1)[gaps.flagged]
    if len(total):
        lines.append(f"The texts called memorized hold {float(total.sum()):,.0f} bits more than their controls would.")
    return lines


def _located_words(audit: Audit) -> list[str]:
    if audit.located is None:
        return [audit.unlocated]
    sinks = audit.located.sinks
    return [
        f"{len(sinks):,} of {sum(sinks.sizes.values()):,} hidden units do more for the texts called memorized than for "
        "the controls most like them (activation times gradient); they are in sinks.safetensors.",
        str(audit.located.concentration),
        "Units found so can rarely be removed without harm to other texts: it is a place to look, not a remedy.",
    ]


def _method(audit: Audit) -> list[str]:
    settings = ", ".join(f"{name} {value:g}" for name, value in asdict(audit.settings).items())
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
    exact, found, asked = _extracted(audit.suspects, audit.settings.n)
    return {
        "model": {"name": audit.subject, "fingerprint": audit.fingerprint, "parameters": audit.parameters},
        "settings": asdict(audit.settings),
        "suspects": {"texts": len(audit.suspects.texts), "fingerprint": _digest(audit.suspects)},
        "controls": {"texts": len(audit.controls.texts), "fingerprint": _digest(audit.controls)},
        "extraction": {"asked": asked, "exact": exact, "discoverable": found},
        "separation": {name: vars(each) for name, each in audit.separations.items()},
        "flagged": None if audit.gaps is None else int(audit.gaps.flagged.sum()),
        "threshold": None if audit.gaps is None else round(audit.gaps.threshold, 4),
        "bits_a_token": _bits(audit),
        "located": None if audit.located is None else _located(audit.located),
        "versions": versions(),
    }


def _bits(audit: Audit) -> dict[str, Any]:
    """By group, of those that have an interval."""
    groups = dict.fromkeys(each.group for each in audit.suspects.texts)
    found = {group or "all": audit.mean_gap(group) for group in [*groups, None]}
    return {
        group: dict(zip(("mean", "low", "high"), each.bits, strict=True))
        for group, each in found.items()
        if isfinite(each.error)
    }


def _located(found: LocalizedUnits) -> dict[str, Any]:
    sinks, test = found.sinks, found.concentration
    p = test.p if isinstance(test, Concentration) else None
    return {"units": {name: len(chosen) for name, chosen in sinks.units.items()}, "concentration_p": p}


def _extracted(asked: Cohort, n: int) -> tuple[int, int, int]:
    """Word for word, within ``n`` tries, and of how many."""
    long = asked.answers.suffix > 0
    return int(asked.answers.exact.sum()), int(asked.answers.discoverable(n)[long].sum()), int(long.sum())


def _fingerprint(asked: Cohort) -> str:
    return f"{len(asked.texts):,}, SHA-256 {_digest(asked)[:16]}"


def _digest(asked: Cohort) -> str:
    return hashlib.sha256("\0".join(each.text for each in asked.texts).encode()).hexdigest()
