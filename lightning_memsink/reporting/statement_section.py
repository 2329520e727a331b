"""What a report says of the run as a whole: how much is memorized, and what could have been found."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_memsink.detection.run_statement import GroupStatement, RunStatement
from lightning_memsink.detection.statistics import controls_for, flagged_together, too_few_together
from lightning_memsink.reporting.document import LABELS, Grid
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.formatting import count_of, percent
from lightning_memsink.reporting.gap_units import LOG_RATIO, interval_in_unit, part_of_controls, short, with_bits
from lightning_memsink.reporting.name_text import shown

IN_SENTENCES = 5
"""Groups that the summary describes in a sentence."""


def has_statement(findings: Findings) -> bool:
    """Whether a random sample of the run was measured at the last evaluation."""
    return findings.measured and findings.evaluation.statement is not None


def statement_sentences(findings: Findings) -> list[str]:
    """The share that is memorized, how many that are at least, the mean gap, and what they rest on."""
    it, last = findings.evaluation.statement, findings.evaluation
    if it is None:
        return []
    by = (
        f"made its loss less than {part_of_controls(last.threshold)} of what it was without"
        if findings.unit == LOG_RATIO
        else f"took more than {with_bits(last.threshold, findings.unit)} off its loss"
    )
    return [
        f"{share_words(it)} of the {count_of(it.population, 'sample')} trained on are "
        f"memorized: training on such a sample {by}.",
        f"{_at_least(it)}." if it.at_least else "That any is memorized, this sample alone does not show.",
        f"On average, a sample's loss is {_mean_gap(it, findings.unit)}.",
        f"This is from {count_of(it.samples, 'sample')} drawn at random, whose losses were taken "
        + (
            "once more, in the same mode, with the same weights and at the same step as those of the controls."
            if it.by_second_look
            else "at their last visits: no sample was measured once more, so what was learned since is not in it."
        ),
    ]


def could_be_found(findings: Findings) -> list[str]:
    """The smallest gap and the smallest share that this run could have found."""
    it, unit = findings.evaluation.statement, findings.unit
    if it is None:
        return ["What this run could have found is unknown: no random sample of its samples was measured."]
    gap = (
        "no single sample, whatever its loss"
        if math.isinf(it.detectable_gap)
        else f"a single sample whose loss is {_detectable(it.detectable_gap, unit)}"
    )
    share = (
        "no share of all samples, however large: too few were measured"
        if math.isnan(it.detectable_share)
        else f"{percent(it.detectable_share)} of all samples or more, if far below their controls"
    )
    return [f"What this run could have found with a power of 80 %: {gap}; {share}."]


def share_words(it: RunStatement | GroupStatement) -> str:
    """The share that is memorized with its interval."""
    return f"{percent(it.share)} (95 % interval {percent(it.share_low)} to {percent(it.share_high)})"


def statement_tables(findings: Findings) -> list[Grid]:
    """A row per number of exposures, and one per source."""
    it = findings.evaluation.statement
    if it is None:
        return []
    about = "The share that is memorized, of samples drawn at random, with its 95 % interval"
    grids = [
        Grid((head, "samples", "memorized", "95 % interval", "mean gap"), _rows(groups, findings.unit, name), caption)
        for head, groups, name, caption in (
            ("exposures", it.by_exposures, str, f"{about}, by exposures"),
            (LABELS, it.by_source, shown, f"{about}, by source"),
        )
        if groups
    ]
    return grids


def group_sentences(findings: Findings) -> list[str]:
    """The same for a terminal: the groups with the most samples in a sentence each."""
    it = findings.evaluation.statement
    if it is None:
        return []
    visits = [(f"seen {_times(group.label)}", group) for group in it.by_exposures]
    sources = [(f"source {shown(group.label)}", group) for group in it.by_source]
    return [
        "Memorized, " + "; ".join(f"{name}: {share_words(group)}" for name, group in groups) + "."
        for groups in (visits[:IN_SENTENCES], sources[:IN_SENTENCES])
        if groups
    ]


def why_none_is_no_answer(findings: Findings) -> str | None:
    """Why a run without memorized samples may have some, and what to set, as the end of a sentence after "because".

    None where they would have been seen: a single sample could be called memorized.
    """
    last, it = findings.evaluation, findings.evaluation.statement
    if last.tail == "none":
        return (
            "there are no usable ones; pass held-out samples of the same kinds as the validation set"
            if not last.controls
            else "none was measured after a training step on it; let training go on, and evaluate again"
        )
    measuring = sum(each.tail != "none" for each in findings.flags.evaluations)
    if measuring < findings.consecutive:
        return (
            f"a verdict takes {findings.consecutive} evaluations in a row and {measuring} measured any sample; set "
            "Trainer(val_check_interval=...) to evaluate more often, or MemorizationDetector(consecutive=1)"
        )
    if last.controls_needed:
        return (
            f"samples have a lower loss than all controls, which are too few for a verdict; "
            f"pass {last.controls_needed:,} held-out samples or more"
        )
    if it is None:
        return _by_the_floor(findings) if not (last.held_out or last.first_visits) else _NO_SAMPLE
    if math.isinf(it.detectable_gap):
        return _too_few_controls(findings, it.population)
    if findings.unit != LOG_RATIO and it.detectable_gap >= last.control_loss:
        return (
            f"a sample is found if its loss is {it.detectable_gap:.2f} {findings.unit} lower, but the controls' own "
            f"is only {last.control_loss:.2f}; pass more held-out samples, or such as resemble the training data more"
        )
    return None


def _by_the_floor(findings: Findings) -> str | None:
    """The same of an evaluation by an older version, which stated nothing of the run."""
    last = findings.evaluation
    if last.p_floor <= last.alpha / max(1, last.tested):
        return None
    return _too_few_controls(findings, last.tested)


def _too_few_controls(findings: Findings, samples: int) -> str:
    last, few = findings.evaluation, too_few_together(len(findings.flags.evaluations))
    level = min(1.0, last.alpha / max(last.null_share, 1e-6))
    needed = controls_for(max(1, samples), level, few=few)
    together = flagged_together(max(1, samples), last.controls, level, few)
    only = f", only {together:,} or more together" if 1 < together <= samples else ""
    return (
        f"{count_of(last.controls, 'control')} can't single out one of {count_of(samples, 'sample')}{only}; pass "
        f"{needed:,} held-out samples or more"
    )


_NO_SAMPLE = (
    "the controls tell nothing of samples like these, or no random sample was measured; set "
    "MemorizationDetector(recheck=512) and pass held-out samples of the same kinds"
)


def if_none_is_memorized(findings: Findings) -> list[str]:
    """What is said where no sample is called memorized: that none is, that it can't be said, or that some are."""
    last, it = findings.evaluation, findings.evaluation.statement
    why = why_none_is_no_answer(findings)
    if last.tail == "none":
        return [f"Unknown: no sample could be compared with controls, because {why}."]
    if it is not None and it.at_least:
        because = f", because {why}" if why else ""
        return [
            f"{_at_least(it)}, up to step {last.step:,}. Which they are can't be said{because}.",
        ]
    if why is not None:
        lines = [f"Whether any sample is memorized can't be said, because {why}."]
        if it is not None and it.share_high < 1:
            lines.append(f"No more than {percent(it.share_high)} of all samples are (95 % confidence).")
        return lines
    return [f"Memorization did not set in: up to step {last.step:,} no sample is memorized."]


def _at_least(it: RunStatement) -> str:
    verb = "is" if it.at_least == 1 else "are"
    return f"At least {it.at_least:,} of {count_of(it.population, 'sample')} {verb} memorized (95 % confidence)"


def _mean_gap(it: RunStatement, unit: str) -> str:
    gap = interval_in_unit(it.gap, it.gap_low, it.gap_high, unit)
    return gap if unit == LOG_RATIO else f"{gap} below that of its controls"


def _detectable(gap: float, unit: str) -> str:
    return (
        f"{part_of_controls(gap)} of that of its controls or less" if unit == LOG_RATIO else f"{short(gap, unit)} lower"
    )


def _times(visits: str) -> str:
    return "once" if visits == "1" else f"{visits} times"


def _rows(groups: Sequence[GroupStatement], unit: str, name: object) -> list[tuple[str, ...]]:
    assert callable(name)
    return [
        (
            str(name(group.label)),
            f"{group.samples:,}",
            percent(group.share),
            f"{percent(group.share_low)} to {percent(group.share_high)}",
            short(group.gap, unit),
        )
        for group in groups
    ]
