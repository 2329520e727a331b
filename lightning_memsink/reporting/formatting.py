"""Numbers as people read them in sentences and tables."""

from __future__ import annotations

import math


def count_of(number: int, noun: str) -> str:
    """A number with its noun.

    >>> count_of(1, "sample"), count_of(2000, "sample")
    ('1 sample', '2,000 samples')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def percent(share: float) -> str:
    """A share in 0…1 with two significant digits; a small share is not rounded to zero.

    >>> percent(0.123), percent(0.0012), percent(0.0), percent(math.nan)
    ('12 %', '0.12 %', '0 %', 'unknown')
    """
    if not math.isfinite(share):
        return "unknown"
    return f"{share:.0%}".replace("%", " %") if share >= 0.1 or share == 0 else f"{100 * share:.2g} %"


def value_range(value: float, low: float, high: float) -> str:
    """A value with its interval, unless the interval is a single value.

    >>> value_range(4, 3, 6), value_range(4, 4, 4)
    ('4 (3 to 6)', '4')
    """
    return f"{value:g}" if low == high else f"{value:g} ({low:g} to {high:g})"
