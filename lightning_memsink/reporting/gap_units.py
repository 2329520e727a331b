"""Gaps in words, each in the unit of its loss: nats of likelihoods, ratios of other losses."""

from __future__ import annotations

import math

from lightning_memsink.detection.statistics import LN2
from lightning_memsink.reporting.formatting import percent

RATIO = "ratio"
"""An evaluation's unit where a gap is the logarithm of the controls' loss over the sample's own, as of squared errors.
"""
LOG_RATIO = "log ratio"
"""Its name on axes and heads of tables."""
_WORDS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth", 10: "a tenth", 100: "a hundredth"}


def part_of_controls(gap: float) -> str:
    """What a loss is of that of its controls, where the logarithm of their ratio is ``gap``.

    >>> part_of_controls(math.log(2)), part_of_controls(math.log(10)), part_of_controls(0.0), part_of_controls(0.3)
    ('half', 'a tenth', '100 %', '74 %')
    """
    part = math.exp(-gap)
    for number, word in _WORDS.items():
        if abs(part * number - 1) < 0.01:
            return word
    return percent(part)


def far_below(gap: float, unit: str) -> str:
    """What a loss is that lies at least ``gap`` below that of its controls; ``unit`` as `Findings.unit` has it.

    >>> far_below(0.3, "nats per token")
    'at least 0.30 nats per token (0.43 bits per token) below that of its matched controls'
    >>> far_below(math.log(2), LOG_RATIO)
    'at most half of that of its matched controls'
    """
    if unit == LOG_RATIO:
        return f"at most {part_of_controls(gap)} of that of its matched controls"
    return f"at least {with_bits(gap, unit)} below that of its matched controls"


def with_bits(gap: float, unit: str) -> str:
    """A gap, in nats and in bits; never in bits where it is a logarithm of a ratio.

    >>> with_bits(0.3, "nats"), with_bits(math.log(2), LOG_RATIO)
    ('0.30 nats (0.43 bits)', "half of the controls' loss")
    """
    if unit == LOG_RATIO:
        return short(gap, unit)
    return f"{short(gap, unit)} ({gap / LN2:.2f} {unit.replace('nats', 'bits')})"


def interval_in_unit(gap: float, low: float, high: float, unit: str) -> str:
    """A mean gap with its 95 % interval; ends that are not finite are unknown.

    >>> interval_in_unit(0.3, 0.2, 0.4, "nats")
    '0.30 nats (95 % interval 0.20 to 0.40)'
    >>> interval_in_unit(math.log(2), 0.5, 1.0, LOG_RATIO)
    "half of the controls' loss (95 % interval 37 % to 61 %)"
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{short(gap, unit)} (its interval is unknown)"
    ends = f"{low:.2f} to {high:.2f}"
    if unit == LOG_RATIO:
        ends = f"{part_of_controls(high)} to {part_of_controls(low)}"
    return f"{short(gap, unit)} (95 % interval {ends})"


def short(gap: float, unit: str) -> str:
    """A gap in a few characters, for a progress bar and tables.

    >>> short(0.3, "nats"), short(math.log(2), LOG_RATIO)
    ('0.30 nats', "half of the controls' loss")
    """
    return f"{part_of_controls(gap)} of the controls' loss" if unit == LOG_RATIO else f"{gap:.2f} {unit}"
