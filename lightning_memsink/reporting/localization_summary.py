"""In which layers and units memorized samples have their effect: sentences for the report, series for loggers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_memsink.localization.history import EvaluationProfile, LocalizationHistory
from lightning_memsink.reporting.formatting import count_of

SIGNIFICANT = 0.05
"""The largest p-value at which the effect is called concentrated."""


def where(attribution: LocalizationHistory) -> list[str]:
    """The sentences of the report. They say so where something could not be tested."""
    if not attribution.rows:
        return ["Unknown: no training step was recorded before an evaluation."]
    row = next((row for row in reversed(attribution.rows) if "memorized" in row.shares), None)
    if row is None:
        return ["Unknown: no memorized sample was in a recorded training step."]
    parts = (_layers(row, attribution), _updates(row, attribution), _alignment(row))
    return [line for part in (*parts, _concentration(attribution), _units(attribution)) for line in part]


def series(row: EvaluationProfile) -> dict[str, float]:
    """Scalars for loggers, those that are finite.

    ``depth/GROUP`` in 0…1: the mean depth of a group's attribution, 0 for the first layer. ``agreement/GROUP``: the
    mean cosine of a group's gradients with that of the controls. ``concentration/gini``, ``/top_1_percent``, ``/p``: of
    the attribution of memorized samples over units.
    """
    values: dict[str, float] = {}
    for group, shares in row.shares.items():
        if len(shares) > 1:
            values[f"depth/{group}"] = sum(n * share for n, share in enumerate(shares)) / (len(shares) - 1)
    values |= {f"agreement/{group}": cosine for group, cosine in row.agreement.items()}
    test = row.concentration
    if test is not None:
        values |= {
            "concentration/gini": test.gini,
            "concentration/top_1_percent": test.top_share,
            "concentration/p": test.p,
        }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _layers(row: EvaluationProfile, attribution: LocalizationHistory) -> list[str]:
    return [*_effects(row, attribution), *_gradients(row, attribution)]


def _effects(row: EvaluationProfile, attribution: LocalizationHistory) -> list[str]:
    names, shares = short_names(list(attribution.units)), row.shares["memorized"]
    if len(names) < 2:
        return []
    top = max(range(len(shares)), key=lambda layer: shares[layer])
    others = f"; for other samples it is {_whole(_others(row, 'shares', top))}" if len(row.shares) > 1 else ""
    lines = [
        f"Of the effect that hidden units have on memorized samples, {_whole(shares[top])} is in layer {names[top]}, "
        f"the largest share of {len(names)} layers{others}."
    ]
    first = next(row for row in attribution.rows if "memorized" in row.shares)
    if first is not row:
        before = first.shares["memorized"]
        moved = max(range(len(shares)), key=lambda layer: abs(shares[layer] - before[layer]))
        lines.append(
            f"From step {first.step:,} to step {row.step:,} the share of layer {names[moved]} changed most, from "
            f"{_whole(before[moved])} to {_whole(shares[moved])}."
        )
    return lines


def _gradients(row: EvaluationProfile, attribution: LocalizationHistory) -> list[str]:
    if "memorized" not in row.norms or len(row.norms) < 2:
        return []
    names, own = short_names(attribution.blocks), row.norms["memorized"]
    block = max(range(len(own)), key=lambda block: abs(own[block] - _others(row, "norms", block)))
    return [
        f"The squared gradient norm of memorized samples differs most from that of other samples in {names[block]}: "
        f"{_whole(own[block])} of it is there, and {_whole(_others(row, 'norms', block))} for other samples."
    ]


def _updates(row: EvaluationProfile, attribution: LocalizationHistory) -> list[str]:
    if not row.movement or not row.by_memorized:
        return []
    names = short_names(attribution.blocks)
    moved = max(range(len(names)), key=lambda block: row.movement[block])
    largest = max(range(len(names)), key=lambda block: row.by_memorized[block])
    return [
        f"Training updates are largest in {names[moved]}. The part of memorized samples in the gradient norm of all "
        f"samples is largest in {names[largest]}: {100 * row.by_memorized[largest]:.1f} %."
    ]


def _alignment(row: EvaluationProfile) -> list[str]:
    if "memorized" not in row.agreement:
        return []
    others = ", ".join(f"{group} {cosine:.2f}" for group, cosine in row.agreement.items() if group != "memorized")
    return [
        "The mean cosine of the gradients of memorized samples with that of the controls is "
        f"{row.agreement['memorized']:.2f}" + (f" ({others})." if others else ".")
    ]


def _concentration(attribution: LocalizationHistory) -> list[str]:
    test = next((row.concentration for row in reversed(attribution.rows) if row.concentration is not None), None)
    if test is None:
        return ["Whether the effect is concentrated can't be tested: too few memorized samples were recorded."]
    verdict = "more concentrated than" if test.p <= SIGNIFICANT else "not shown to be more concentrated than"
    return [
        f"The effect on memorized samples is {verdict} the effect on matched other samples: the top 1 % of units have "
        f"{100 * test.top_share:.1f} % of it, and its Gini coefficient is {test.gini:.2f}, compared with "
        f"{test.null_gini:.2f} ({test.null_low:.2f} to {test.null_high:.2f}) under permuted flags (p = {test.p:.2g}, "
        f"{count_of(test.samples, 'memorized sample')})."
    ]


def _units(attribution: LocalizationHistory) -> list[str]:
    sinks = attribution.sinks
    if sinks is None or sinks.empty:
        return []
    count, total = sum(len(units) for units in sinks.units.values()), sum(sinks.sizes.values())
    line = f"Localized: {count:,} of {count_of(total, 'unit')}"
    if sinks.stability is None:
        return [f"{line}. There are too few samples to test how stable this choice is."]
    observed, chance = sinks.stability
    return [
        f"{line}. Chosen from two halves of the memorized samples, the units overlap by {100 * observed:.0f} % "
        f"(Jaccard index; chance {100 * chance:.1f} %)."
    ]


def _whole(share: float) -> str:
    return f"{100 * share:.0f} %"


def _others(row: EvaluationProfile, kind: str, layer: int) -> float:
    """The mean share of a layer, of ``kind`` ``shares`` or ``norms``, over visits of samples that are not memorized."""
    groups = {group: shares for group, shares in getattr(row, kind).items() if group != "memorized"}
    visits = sum(row.visits[group] for group in groups)
    total: float = sum(row.visits[group] * shares[layer] for group, shares in groups.items())
    return total / max(1, visits)


def short_names(names: Sequence[str]) -> list[str]:
    """Module names without the parts, between dots, that all of them begin or end with.

    >>> short_names(["gpt.h.0.mlp.c_proj", "gpt.h.1.mlp.c_proj"])
    ['0', '1']
    >>> short_names(["gpt.h.0", "gpt.wte"])
    ['h.0', 'wte']
    """
    if len(names) < 2:
        return list(names)
    parts = [name.split(".") for name in names]
    start = _common_parts(parts)
    end = _common_parts([part[::-1] for part in parts])
    shortest = min(map(len, parts))
    end = min(end, shortest - start - 1)
    start, end = min(start, shortest - 1), max(0, end)
    return [".".join(part[start : len(part) - end]) for part in parts]


def _common_parts(parts: Sequence[Sequence[str]]) -> int:
    """The number of first parts that are the same in all."""
    return next((n for n, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), min(map(len, parts)))
