"""Where memorization sits, in plain words and as plain series."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_memsink.localization.history import EvaluationProfile, LocalizationHistory

SURE = 0.05
"""Largest p-value at which clustering is called so."""


def where(attribution: LocalizationHistory) -> list[str]:
    """Lines of the summary; what could not be tested is said so."""
    if not attribution.rows:
        return ["That can't be said: no evaluation followed a step that was looked at."]
    told = next((row for row in reversed(attribution.rows) if "memorized" in row.shares), None)
    if told is None:
        return ["No memorized sample passed on a step that was looked at, so there is nothing to attribute."]
    parts = (_layers(told, attribution), _movement(told, attribution), _agreement(told))
    return [line for part in (*parts, _clusters(attribution), _sinks(attribution)) for line in part]


def series(row: EvaluationProfile) -> dict[str, float]:
    """Scalars for loggers: ``depth/GROUP`` in 0…1, the mean depth of a group's attribution (0: first layer), and of the
    memorized samples' attribution ``concentration/gini``, ``/top_1_percent``, ``/p``.
    """
    told: dict[str, float] = {}
    for group, shares in row.shares.items():
        if len(shares) > 1:
            told[f"depth/{group}"] = sum(n * share for n, share in enumerate(shares)) / (len(shares) - 1)
    told |= {f"agreement/{group}": cosine for group, cosine in row.agreement.items()}
    found = row.concentration
    if found is not None:
        told |= {
            "concentration/gini": found.gini,
            "concentration/top_1_percent": found.top_share,
            "concentration/p": found.p,
        }
    return {name: value for name, value in told.items() if math.isfinite(value)}


def _layers(row: EvaluationProfile, attribution: LocalizationHistory) -> list[str]:
    lines = [*_of_units(row, attribution), *_of_gradients(row, attribution)]
    return [line.replace("%", " %") for line in lines]


def _of_units(row: EvaluationProfile, attribution: LocalizationHistory) -> list[str]:
    names, shares = short_names(list(attribution.units)), row.shares["memorized"]
    if len(names) < 2:
        return []
    top = max(range(len(shares)), key=lambda layer: shares[layer])
    others = f"; of other samples, {_others(row, 'shares', top):.0%}" if len(row.shares) > 1 else ""
    lines = [
        f"Of the effect that hidden units have on memorized samples, {shares[top]:.0%} lies in layer {names[top]}, the "
        f"largest of {len(names)}{others}."
    ]
    first = next(each for each in attribution.rows if "memorized" in each.shares)
    if first is not row:
        moved = max(range(len(shares)), key=lambda layer: abs(shares[layer] - first.shares["memorized"][layer]))
        before = first.shares["memorized"][moved]
        lines.append(
            f"It moved: layer {names[moved]} held {before:.0%} of it at step {first.step:,} and holds "
            f"{shares[moved]:.0%} at step {row.step:,}, the largest change."
        )
    return lines


def _of_gradients(row: EvaluationProfile, attribution: LocalizationHistory) -> list[str]:
    if "memorized" not in row.norms or len(row.norms) < 2:
        return []
    names, own = short_names(attribution.blocks), row.norms["memorized"]
    apart = max(range(len(own)), key=lambda block: abs(own[block] - _others(row, "norms", block)))
    return [
        f"Of their squared gradient norm {own[apart]:.0%} lies in {names[apart]}; of other samples', "
        f"{_others(row, 'norms', apart):.0%}. Nowhere do the two differ more."
    ]


def _movement(row: EvaluationProfile, attribution: LocalizationHistory) -> list[str]:
    if not row.movement or not row.by_memorized:
        return []
    names = short_names(attribution.blocks)
    most = max(range(len(names)), key=lambda block: row.movement[block])
    part = max(range(len(names)), key=lambda block: row.by_memorized[block])
    return [
        f"Weights moved most in {names[most]}. Memorized samples hold {row.by_memorized[part]:.1%} of the gradient "
        f"norm in {names[part]}, where their part is largest.".replace("%", " %")
    ]


def _agreement(row: EvaluationProfile) -> list[str]:
    if "memorized" not in row.agreement:
        return []
    others = ", ".join(f"{group} {cosine:.2f}" for group, cosine in row.agreement.items() if group != "memorized")
    return [
        "Gradients of memorized samples agree with that of the controls by a cosine of "
        f"{row.agreement['memorized']:.2f}" + (f" ({others})." if others else ".")
    ]


def _clusters(attribution: LocalizationHistory) -> list[str]:
    found = next((row.concentration for row in reversed(attribution.rows) if row.concentration is not None), None)
    if found is None:
        return ["Whether it clusters can't be tested: too few memorized samples were looked at."]
    verdict = "more clustered than" if found.p <= SURE else "no more clustered than"
    return [
        f"It is {verdict} the effect on matched other samples: the top 1 % of units hold {100 * found.top_share:.1f} % "
        f"of it, Gini {found.gini:.2f} against {found.null_gini:.2f} ({found.null_low:.2f} to {found.null_high:.2f}) "
        f"under permuted flags (p = {found.p:.2g}, {found.samples} memorized samples)."
    ]


def _sinks(attribution: LocalizationHistory) -> list[str]:
    sinks = attribution.sinks
    if sinks is None or sinks.empty:
        return []
    count, total = sum(len(units) for units in sinks.units.values()), sum(sinks.sizes.values())
    told = f"Localized: {count:,} of {total:,} units"
    if sinks.stability is None:
        return [f"{told}; too few samples to say how stable the choice is."]
    observed, chance = sinks.stability
    return [
        f"{told}. Two halves of the memorized samples agree on {100 * observed:.0f} % of them "
        f"(Jaccard; chance {100 * chance:.1f} %)."
    ]


def _others(row: EvaluationProfile, kind: str, layer: int) -> float:
    groups = {group: shares for group, shares in getattr(row, kind).items() if group != "memorized"}
    visits = sum(row.visits[group] for group in groups)
    total: float = sum(row.visits[group] * shares[layer] for group, shares in groups.items())
    return total / max(1, visits)


def short_names(names: Sequence[str]) -> list[str]:
    """Without what all begin and end with, at dots.

    >>> short_names(["gpt.h.0.mlp.c_proj", "gpt.h.1.mlp.c_proj"])
    ['0', '1']
    >>> short_names(["gpt.h.0", "gpt.wte"])
    ['h.0', 'wte']
    """
    if len(names) < 2:
        return list(names)
    parts = [name.split(".") for name in names]
    start = _alike(parts)
    end = _alike([part[::-1] for part in parts])
    shortest = min(map(len, parts))
    end = min(end, shortest - start - 1)
    start, end = min(start, shortest - 1), max(0, end)
    return [".".join(part[start : len(part) - end]) for part in parts]


def _alike(parts: Sequence[Sequence[str]]) -> int:
    """How many first parts all have in common."""
    return next((n for n, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), min(map(len, parts)))
