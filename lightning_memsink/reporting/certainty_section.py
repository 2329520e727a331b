"""What a report says of how sure its verdicts are: controls, p-values, what could have been found, and limits."""

from __future__ import annotations

import math

from lightning_memsink.detection.verdicts import Evaluation
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.formatting import count_of, percent
from lightning_memsink.reporting.gap_units import far_below
from lightning_memsink.reporting.statement_section import could_be_found


def how_sure(findings: Findings) -> list[str]:
    """The error rate, the controls, what the verdicts rest on, and what they could have found."""
    last = findings.evaluation
    if last.tail == "none":
        if not last.controls:
            return ["There were no usable controls, so there are no verdicts."]
        return [f"No sample was compared with the {count_of(last.controls, 'control')} yet, so there are no verdicts."]
    lines = [
        f"A sample is called memorized at a false-discovery rate of {percent(last.alpha)} over all samples, and only "
        f"if its loss is {far_below(last.threshold, findings.unit)}, by more than chance explains.",
        f"{count_of(last.controls, 'control')} took part; the smallest p-value they allow is {last.p_floor:.2g}. "
        + _TAILS.get(last.tail, ""),
        *_pools(last),
        *could_be_found(findings),
    ]
    null = findings.flags.null_gaps.float()
    if len(null):
        above = int((null >= last.threshold).sum())
        lines.append(
            f"Of the controls themselves, whose losses no training on them has changed, {above:,} of {len(null):,} "
            "have a loss that far below that of other controls."
        )
    twins = {name.split("/")[1]: share for name, share in group_shares(findings).items() if name.endswith("/twins")}
    if twins:
        shares = ", ".join(f"{percent(share)} of {family}" for family, share in twins.items())
        lines.append(f"Twins of planted samples, never trained on, that pass the same threshold: {shares}.")
    return lines


_TAILS = {
    "conformal": "p-values are ranks among the controls (conformal): no assumption on the distribution of gaps.",
    "normal": "An older version computed p-values from a distribution that it fitted: take them as estimates.",
}


def _pools(last: Evaluation) -> list[str]:
    """Which controls and which losses the verdicts of an evaluation rest on."""
    if not (last.held_out or last.first_visits):
        return []  # of an older version
    lines = [
        f"Of the controls, {last.held_out:,} are held-out samples and {last.first_visits:,} first visits: training "
        "samples' losses before the model was trained on them."
    ]
    if last.first_visits and math.isfinite(last.by_first_visits):
        lines.append(
            f"{percent(last.by_first_visits)} of the samples called memorized were compared with first visits for the "
            "most part, the others with held-out samples."
        )
    if last.looked:
        lines.append(
            f"Verdicts rest on a second look: {count_of(last.looked, 'sample')}, nominated by their visits or drawn at "
            "random, measured once more like the controls. A sample without one is not called memorized."
        )
    else:
        lines.append(
            "Verdicts rest on the losses of last visits, since no sample was measured once more: the data can't be "
            "fetched again, or MemorizationDetector(recheck=0) is set."
        )
    return lines


def limits(findings: Findings) -> list[str]:
    """What no verdict of this run says."""
    return [
        "Memorized means a loss far below that of matched samples never trained on. "
        + (
            "Whether a sample can be extracted by prompting was not tested."
            if findings.extraction is None
            else "Extraction was tested with each text's own beginning only: other prompts may extract more."
        ),
        "Controls must come from the same source as the training data. Samples of a kind that the controls lack are "
        "at best undecided and at worst flagged wrongly.",
        *_seen_once(findings),
    ]


def _seen_once(findings: Findings) -> list[str]:
    if findings.evaluation.looked:
        return []
    return ["Samples seen once can't be judged: their only loss was taken before the model had learned from them."]


def group_shares(findings: Findings) -> dict[str, float]:
    """The series ``share/FAMILY/MEMBER`` of the last evaluation."""
    last = findings.history[-1] if findings.history else {}
    return {name: value for name, value in last.items() if name.startswith("share/")}


def null_share(findings: Findings) -> str:
    """The estimated share of samples that are not memorized, in parentheses; empty without verdicts."""
    if not findings.measured or findings.evaluation.tail != "conformal":
        return ""
    return f" (at most {percent(findings.evaluation.null_share)})"
