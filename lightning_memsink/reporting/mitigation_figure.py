"""A figure of how often a mitigation acted, and of gap and held-out loss at the same time. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_memsink.reporting.figures import COLOURS, INK
from lightning_memsink.reporting.mitigation_summary import acted_shares

SERIES = {
    "gap_of_top_percent": ("gap of the most memorized 1 %", COLOURS["memorized"], "-"),
    "control_loss": ("loss of the held-out controls", COLOURS["learned"], "--"),
}


def mitigation_figure(history: Sequence[Mapping[str, float]], unit: str = "nats") -> Figure:
    """Two panels over optimizer steps: the share of sample visits acted on, and below it gap and held-out loss."""
    figure = Figure(figsize=(9.0, 5.2), layout="constrained", facecolor="white")
    title = "How often the mitigation acted, and the gap and the held-out loss meanwhile"
    figure.suptitle(title, fontsize=12, color=INK)
    above, below = figure.subplots(2, 1, sharex=True)
    for name, points in acted_shares(history).items():
        steps, shares = zip(*points, strict=True)
        above.plot(steps, shares, marker=".", color=INK, label=name)
    above.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    above.set_ylim(bottom=0)
    _finish(above, "share of visits acted on")
    for key, (label, colour, style) in SERIES.items():
        points = [(row["step"], row[key]) for row in history if key in row]
        if points:
            below.plot(*zip(*points, strict=True), linestyle=style, marker=".", color=colour, label=label)
    _finish(below, unit)
    below.set_xlabel("optimizer step")
    below.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure


def _finish(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
