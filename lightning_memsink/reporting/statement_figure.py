"""A figure of the share of a run that is memorized, over its evaluations. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_memsink.reporting.figures import COLOURS, INK

SERIES = ("step", "share", "share_low", "share_high")


def memorized_share(history: Sequence[Mapping[str, float]]) -> Figure:
    """The series ``share`` over optimizer steps, within ``share_low`` and ``share_high``; empty rows are left out."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained", facecolor="white")
    figure.suptitle("How much of the run is memorized?", fontsize=12, color=INK)
    axes = figure.add_subplot()
    rows = [[row[name] for name in SERIES] for row in history if all(name in row for name in SERIES)]
    if rows:
        steps, shares, low, high = zip(*rows, strict=True)
        axes.fill_between(steps, low, high, color=COLOURS["memorized"], alpha=0.2, linewidth=0, label="95 % interval")
        axes.plot(steps, shares, marker=".", color=COLOURS["memorized"], label="share of all samples")
        axes.legend(frameon=False, fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("memorized")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
