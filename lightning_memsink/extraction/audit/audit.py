"""Audit of a finished model: suspected texts against controls that it was not trained on.

N  suspected texts      M  controls
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_memsink.detection.feature_units import standardize
from lightning_memsink.detection.knn import nearest
from lightning_memsink.detection.matched_controls import Measurement
from lightning_memsink.extraction.audit.answer_cache import AnswersFile
from lightning_memsink.extraction.audit.cohort import Cohort, cohort_of
from lightning_memsink.extraction.audit.config import AuditConfig
from lightning_memsink.extraction.audit.localized_units import LocalizedUnits, locate_units
from lightning_memsink.extraction.audit.model_loading import Subject
from lightning_memsink.extraction.audit.results import Audit
from lightning_memsink.extraction.audit.statistics import matched_gaps, rank_suspects, separations, with_kind_features
from lightning_memsink.extraction.audit.texts import Encoded, Text, encode, with_decoded_text
from lightning_memsink.extraction.audit.top_texts import examine_top_texts
from lightning_memsink.extraction.probe import ExtractionResults, logits_of, probe

UNIT_CONTROLS = 3
"""Nearest controls per text called memorized, which its units are compared on."""
Advance = Callable[[int], object]
"""Called with the number of texts that were just finished."""


def audit(
    subject: Subject,
    suspects: Sequence[Text],
    controls: Sequence[Text],
    config: AuditConfig,
    cache: AnswersFile | None = None,
    advance: Advance = lambda done: None,
) -> Audit:
    """Probes the model with all texts and compares the suspected texts with the controls.

    Args:
        subject: the model.
        suspects: texts that may have been trained on.
        controls: texts of the same kinds that were not.
        config: what is measured.
        cache: results of texts that were probed before; new results are added. None keeps none.
        advance: is called with the number of texts that were just finished, for a progress bar.

    Raises:
        ValueError: a suspected text is among the controls, or none is longer than the prefix.
    """
    suspects, controls = (with_decoded_text(texts, subject.tokenizer) for texts in (suspects, controls))
    _refuse_overlap(suspects, controls)
    encoded = [encode(texts, subject.tokenizer, config.length) for texts in (suspects, controls)]
    _refuse_short(encoded[0], config.prefix)
    own, others = (
        cohort_of(texts, each, _probe_texts(subject, texts, each, config, cache, advance))
        for texts, each in zip((suspects, controls), encoded, strict=True)
    )
    own, others, within_kind = with_kind_features(own, others)
    gaps, why_no_gaps = matched_gaps(own, others, config.rule)
    rows = rank_suspects(own, gaps)[: config.closer]
    top_texts = examine_top_texts(subject, own.encoded, others.encoded, rows, config.prefix, advance)
    units, why_no_units = _localized_units(subject, own, others, gaps, config)
    return Audit(
        subject=subject.name,
        fingerprint=subject.fingerprint,
        parameters=subject.parameters,
        config=config,
        suspects=own,
        controls=others,
        gaps=gaps,
        why_no_gaps=why_no_gaps,
        separations=separations(own, others, gaps, config.fpr),
        top_texts=top_texts,
        localized_units=units,
        why_no_units=why_no_units,
        matched_within_kind=within_kind,
    )


def _refuse_overlap(suspects: Sequence[Text], controls: Sequence[Text]) -> None:
    shared = {text.text for text in suspects} & {text.text for text in controls}
    if shared:
        line = next(text.line for text in controls if text.text in shared)
        raise ValueError(
            f"Line {line} of the controls is a suspected text too: a control must not have been trained on."
        )


def _refuse_short(suspects: Encoded, prefix: int) -> None:
    longest = int(suspects.mask.sum(1).max())
    if longest <= prefix:
        raise ValueError(
            f"No suspected text is longer than the prefix of {prefix} tokens; the longest has {longest}. "
            "Use a shorter prefix (--probe.prefix) or longer texts."
        )


def _probe_texts(
    subject: Subject,
    texts: Sequence[Text],
    encoded: Encoded,
    config: AuditConfig,
    cache: AnswersFile | None,
    advance: Advance,
) -> ExtractionResults:
    """Results for all texts: from the cache where it has them, from the model for the others."""
    logits, columns = logits_of(subject.model), ExtractionResults.columns()
    rows: list[dict[str, Any] | None] = [None if cache is None else cache.get(text.text) for text in texts]
    advance(sum(row is not None for row in rows))
    # Texts of similar length together: a forward pass costs what its longest text does.
    missing = sorted((n for n, row in enumerate(rows) if row is None), key=lambda n: int(encoded.mask[n].sum()))
    for start in range(0, len(missing), config.batch_size):
        chosen = missing[start : start + config.batch_size]
        batch = encoded.select(chosen)
        results = probe(logits, batch.tokens, batch.mask, config.probe, len(chosen))
        for position, n in enumerate(chosen):
            rows[n] = {name: getattr(results, name)[position].item() for name in columns}
        if cache is not None:
            cache.add({texts[n].text: rows[n] or {} for n in chosen})
        advance(len(chosen))
    return ExtractionResults(*(torch.tensor([(row or {})[name] for row in rows]) for name in columns))


def _localized_units(
    subject: Subject, suspects: Cohort, controls: Cohort, gaps: Measurement | None, config: AuditConfig
) -> tuple[LocalizedUnits | None, str]:
    """The units that carry the texts called memorized; or None and the reason why there are none."""
    targets = [] if gaps is None else gaps.flagged.nonzero().flatten().tolist()
    if not config.units or not targets:
        return None, "No text is called memorized, so there are no units to look for." if config.units else ""
    points, reference = standardize(suspects.features, controls.features)
    usable = controls.results.loss.isfinite().nonzero().flatten()
    similar = usable[nearest(points[targets], reference[usable], UNIT_CONTROLS)[0].unique()].tolist()
    memorized, others = suspects.encoded.select(targets), controls.encoded.select(similar)
    try:
        return locate_units(subject, memorized, others, config.unit_fraction, config.batch_size), ""
    except ValueError as error:
        return None, str(error)
