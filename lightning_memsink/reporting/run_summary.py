"""The run in plain words: when memorization set in, which samples, how sure, and what that does not show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from lightning_memsink.detection.statistics import LN2
from lightning_memsink.detection.verdicts import Evaluation, Flags, Onset, Verdict
from lightning_memsink.extraction.history import ExtractionHistory
from lightning_memsink.localization.history import LocalizationHistory
from lightning_memsink.mitigation.certificate import Certificate
from lightning_memsink.mitigation.intervention_log import InterventionLog
from lightning_memsink.reporting.localization_summary import where
from lightning_memsink.reporting.mitigation_summary import what_was_done
from lightning_memsink.reporting.scalars import MemorizedSample, top_memorized
from lightning_memsink.samples.loss_table import LossTable

FIGURES = {
    "loss_by_rung": "Loss of repeated samples against samples never trained on",
    "gap_distribution": "How far samples lie below their controls, against what controls do among themselves",
    "verdict_map": "Early loss, gap and verdict of every measured sample",
    "mitigation": "When the mitigation acted, and what gap and held-out loss did meanwhile",
    "layers": "Where samples have their effect and their gradient, layer by step; grey where none of a group passed",
}
"""File stem and caption of each figure of the report, in its order."""


@dataclass(frozen=True)
class Findings:
    """All that a summary tells of a run at its end."""

    table: LossTable
    flags: Flags
    onset: Onset | None
    history: Sequence[Mapping[str, float]]
    attribution: LocalizationHistory | None = None
    """None where nobody localizes."""
    interventions: Mapping[str, InterventionLog] = field(default_factory=dict)
    """By mitigation; empty where there is none."""
    certificate: Certificate | None = None
    """Of designed sinks."""
    extraction: ExtractionHistory | None = None
    """None where nobody asked."""

    @property
    def evaluation(self) -> Evaluation:
        """The last one."""
        return self.flags.evaluations[-1]

    @property
    def unit(self) -> str:
        """Of losses and gaps; a sample with one loss element has no tokens to speak of."""
        return "nats per token" if len(self.table) and int(self.table.elements.max()) > 1 else "nats"

    def top(self, many: int) -> list[MemorizedSample]:
        return top_memorized(self.table, self.flags, self.evaluation.step, many)


def summary(findings: Findings) -> str:
    """A few short paragraphs, each headed by its question."""
    if not findings.flags.evaluations:
        return "\n".join(NOTHING).format(many(len(findings.table), "sample"))
    return "\n\n".join(f"{title}\n  " + "\n  ".join(lines) for title, lines in parts(findings).items())


NOTHING = (
    "memsink followed {} but judged none: the controls were never evaluated.",
    "Pass held-out samples as the validation set: trainer.fit(model, train_loader, control_loader).",
)


def parts(findings: Findings) -> dict[str, list[str]]:
    """Sentences by the question that they answer. At least one evaluation is needed."""
    return {
        "When": _when(findings),
        "Which": _which(findings),
        **({} if findings.attribution is None else {"Where": where(findings.attribution)}),
        **_extracted(findings),
        **_done(findings),
        "How sure": _how_sure(findings),
        "What this does not show": _limits(findings),
    }


def _extracted(findings: Findings) -> dict[str, list[str]]:
    lines = [] if findings.extraction is None else findings.extraction.words()
    return {"What can be extracted": lines} if lines else {}


def _done(findings: Findings) -> dict[str, list[str]]:
    lines = what_was_done(findings.interventions, findings.certificate)
    return {"What was done": lines} if lines else {}


def markdown(findings: Findings, figures: str | None, opening: Sequence[str] = ()) -> str:
    """The report's text. ``figures``: their directory relative to the report; ``opening``: how to open a logged run."""
    lines = ["# What this run memorized", ""]
    for paragraph in summary(findings).split("\n\n"):
        title, *rest = paragraph.split("\n")
        if rest and rest[0].startswith("  "):
            lines += [f"## {title}", "", *(f"- {line.strip()}" for line in rest), ""]
        else:
            lines += [title, *rest, ""]
    samples = findings.top(20) if findings.flags.evaluations else []
    if samples:
        lines += ["## The most memorized samples", "", *_table(samples, findings.unit), ""]
    if figures is not None:
        lines += ["## Figures", ""]
        for stem, caption in FIGURES.items():
            if (stem == "layers" and findings.attribution is None) or (
                stem == "mitigation" and not findings.interventions
            ):
                continue
            lines += [f"![{caption}]({figures}/{stem}.png)", "", f"*{caption}.* [SVG]({figures}/{stem}.svg)", ""]
    if opening:
        lines += ["## The logged run", "", *(f"- {line}" for line in opening), ""]
    return "\n".join(lines)


def _when(findings: Findings) -> list[str]:
    onset, last = findings.onset, findings.evaluation
    if onset is not None:
        between = f"{onset.step_low:,} to {onset.step_high:,}"
        seen = _range(onset.exposures, onset.exposures_low, onset.exposures_high)
        return [
            f"Memorization set in at step {onset.step:,} (95 % interval {between}), at exposure {seen} of a sample.",
            f"Estimated from {many(onset.samples, 'memorized sample')}: when the first tenth of them were flagged.",
        ]
    if last.memorized:
        return [f"{many(last.memorized, 'sample')} stand as memorized; no onset was estimated."]
    if last.tail == "none":
        return ["That can't be said: no sample could be compared with controls."]
    return [f"Not in this run: up to step {last.step:,} no sample stands as memorized."]


def _which(findings: Findings) -> list[str]:
    last, known = findings.evaluation, max(1, sum(findings.evaluation.counts.values()))
    others = ", ".join(f"{count:,} {word}" for word, count in last.counts.items() if count and word != "memorized")
    lines = [
        f"{last.memorized:,} of {many(known, 'sample')} memorized ({percent(last.memorized / known)})"
        + (f"; {others}." if others else ".")
    ]
    reasons = _reasons(findings.flags)
    if reasons:
        lines.append(f"Undecided because: {reasons}.")
    worst = _worst_rungs(findings.history)
    if worst:
        lines.append(f"Memorized most by group: {worst}.")
    lines += [
        f"Sample {sample.name}: seen {sample.exposures:,} times, loss {sample.loss:.2f} where its controls have "
        f"{sample.control_loss:.2f} ({sample.gap:.2f} {findings.unit}, {sample.bits:,.0f} bits in all)."
        for sample in findings.top(5)
    ]
    return lines


def _how_sure(findings: Findings) -> list[str]:
    last = findings.evaluation
    if last.tail == "none":
        if not last.controls:
            return ["There were no usable controls, so there is no verdict to be sure of."]
        return [f"Nothing was compared with the {many(last.controls, 'control')} yet, so no verdict stands on them."]
    level = f"at a false-discovery rate of {percent(last.alpha)}"
    lines = [
        f"A sample is called memorized {level}, and only if its loss is at least {last.threshold:.2f} {findings.unit} "
        f"({last.threshold / LN2:.2f} {findings.unit.replace('nats', 'bits')}) below that of its matched controls.",
        f"{many(last.controls, 'control')} took part; the smallest p-value they allow is {last.p_floor:.2g}. "
        + _TAILS[last.tail],
    ]
    null = findings.flags.null_gaps.float()
    if len(null):
        over = int((null >= last.threshold).sum())
        lines.append(
            f"Of the controls themselves, never trained on, {over:,} of {len(null):,} lie that far below their fellows."
        )
    twins = {name.split("/")[1]: share for name, share in _shares(findings.history).items() if name.endswith("/twins")}
    if twins:
        told = ", ".join(f"{percent(share)} of {family}" for family, share in twins.items())
        lines.append(f"Twins of planted samples that would have been flagged, wrongly: {told}.")
    return lines


_TAILS = {
    "conformal": "p-values are ranks among the controls (conformal): no assumption on how gaps are spread.",
    "normal": "Too coarse to flag anything here, so a fitted normal tail stands in: take p-values as estimates.",
}


def _limits(findings: Findings) -> list[str]:
    return [
        "Memorized means a loss far below that of matched samples never trained on. "
        + (
            "Whether one can be extracted by prompting is another question, for a probe to answer."
            if findings.extraction is None
            else "Extraction was tried with each text's own beginning only: other prompts may do better."
        ),
        "Controls must come from where the training data come from. What they have no likeness of is undecided at "
        "best, and flagged too easily at worst.",
        "Samples seen once can't be judged: their only loss was taken before the model had learned from them.",
    ]


def _worst_rungs(history: Sequence[Mapping[str, float]]) -> str:
    """Up to three groups with the largest share memorized, by name."""
    shares = {name: share for name, share in _shares(history).items() if share > 0 and not name.endswith("/twins")}
    worst = sorted(shares, key=lambda name: -shares[name])[:3]
    return ", ".join(f"{_group(name)} ({percent(shares[name])})" for name in worst)


def _group(name: str) -> str:
    _, family, member = name.split("/")
    return f"seen {member} times" if family == "exposures" else f"{family.replace('_', ' ')} {member}"


def _shares(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    last = history[-1] if history else {}
    return {name: value for name, value in last.items() if name.startswith("share/")}


def _reasons(flags: Flags) -> str:
    by_code = torch.bincount(flags.verdict.long(), minlength=len(Verdict)).tolist()
    return ", ".join(f"{by_code[code]:,} {code.reason}" for code in Verdict if code.reason and by_code[code])


def _table(samples: Sequence[MemorizedSample], unit: str) -> list[str]:
    head = f"| sample | exposures | loss | controls' loss | gap, {unit} | bits | p | since step |"
    lines = [head, "|" + " --: |" * (head.count("|") - 1)]
    for one in samples:
        since = "" if one.onset_step is None else f"{one.onset_step:,}"
        lines.append(
            f"| {one.name} | {one.exposures:,} | {one.loss:.3f} | {one.control_loss:.3f} | {one.gap:.3f} "
            f"| {one.bits:,.0f} | {one.p:.2g} | {since} |"
        )
    return lines


def _range(value: float, low: float, high: float) -> str:
    return f"{value:g}" if low == high else f"{value:g} ({low:g} to {high:g})"


def many(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def percent(share: float) -> str:
    """For people. Two digits are enough; a small share is not rounded to nothing."""
    if not math.isfinite(share):
        return "unknown"
    return f"{share:.0%}".replace("%", " %") if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"
