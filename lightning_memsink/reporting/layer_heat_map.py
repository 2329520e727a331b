"""A heat map, layer by step, of effects and gradients of memorized, learned and hard samples. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_memsink.localization.history import GROUPS, EvaluationProfile
from lightning_memsink.reporting.figures import INK
from lightning_memsink.reporting.localization_summary import short_names

TITLES = {"shares": "attribution, by hidden layer", "norms": "squared gradient norm, by block"}
MOST_NAMES = 24


def layer_heat_map(rows: Sequence[EvaluationProfile], layers: Sequence[str], blocks: Sequence[str]) -> Figure:
    """A column of panels per group of samples, a row of panels for attribution and one for gradient norms, if recorded.

    The values of a step add up to 1 over the layers. Panels of a row share one colour scale, so that groups compare.
    """
    groups = [group for group in GROUPS if any(group in row.shares for row in rows)]
    kinds = [kind for kind in TITLES if any(getattr(row, kind) for row in rows)]
    figure = Figure(figsize=(max(7.0, 3.6 * len(groups) + 1.6), 1.0 + 2.9 * max(1, len(kinds))), layout="constrained")
    figure.set_facecolor("white")
    figure.suptitle("Where samples have their effect, layer by step", fontsize=12, color=INK)
    if not groups or not kinds:
        axes = figure.add_subplot()
        axes.set_axis_off()
        axes.text(0.5, 0.5, "nothing was attributed", transform=axes.transAxes, ha="center", color=INK)
        return figure
    for place, kind in enumerate(kinds):
        names = short_names(layers if kind == "shares" else blocks)
        panels = [figure.add_subplot(len(kinds), len(groups), place * len(groups) + n + 1) for n in range(len(groups))]
        top = max(value for row in rows for values in getattr(row, kind).values() for value in values)
        for axes, group in zip(panels, groups, strict=True):
            mesh = _panel(axes, rows, kind, group, names, top)
            if place == 0:
                axes.set_title(f"{group} samples", fontsize=10)
            if place == len(kinds) - 1:
                axes.set_xlabel("optimizer step")
        for axes in panels[1:]:
            axes.set_yticklabels([])
        bar = figure.colorbar(mesh, ax=panels, format=PercentFormatter(1.0, decimals=0), pad=0.01)
        bar.set_label(TITLES[kind], fontsize=8)
        bar.outline.set_visible(False)
    return figure


def _panel(
    axes: Axes, rows: Sequence[EvaluationProfile], kind: str, group: str, names: Sequence[str], top: float
) -> QuadMesh:
    # A row is of the steps since the evaluation before, so its rectangles span these; without visits they are grey.
    ends = [row.step for row in rows]
    edges = [max(0, 2 * ends[0] - ends[1]) if len(ends) > 1 else 0, *ends]
    blank = [math.nan] * len(names)
    columns = [getattr(row, kind).get(group, blank) for row in rows]
    values = [[column[layer] for column in columns] for layer in range(len(names))]
    mesh = axes.pcolormesh(edges, range(len(names) + 1), values, cmap="viridis", vmin=0, vmax=top)
    axes.set_facecolor("#EEEEEE")
    shown = range(0, len(names), math.ceil(len(names) / MOST_NAMES))
    axes.set_yticks([place + 0.5 for place in shown], [names[place] for place in shown], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()  # as text is read, from the input down
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[:].set_visible(False)
    return mesh
