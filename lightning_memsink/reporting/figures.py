"""Figures of losses, gaps and verdicts, each a function of plain numbers; and figures as files. Needs matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lightning_memsink._files import written_whole
from lightning_memsink.detection.verdicts import Onset, Verdict

# The palette of Okabe and Ito, whose colours differ for every kind of colour vision. Markers differ too.
COLOURS = {
    "memorized": "#D55E00",
    "learned": "#0072B2",
    "hard": "#E69F00",
    "undecided": "#999999",
    "unseen": "#CCCCCC",
}
MARKERS = {"memorized": "o", "learned": "s", "hard": "^", "undecided": "x", "unseen": "."}
INK, PALE = "#333333", "#BBBBBB"
COMPARED = ("twins", "controls")
"""Members of a family that are samples never trained on."""
TITLES = {"exposures": "by exposures so far"}
MOST_POINTS = 3000
"""Points of a verdict in the map; more would only make the file larger."""


def loss_by_rung(history: Sequence[Mapping[str, float]], onset: Onset | None, unit: str = "nats") -> Figure:
    """A panel per family of planted samples: the mean loss of each canary group over steps, and that of its twins.

    Colours are darker for more repeats. Without planted samples, groups are by exposures.
    """
    families = _families(history)
    columns = min(3, max(1, len(families)))
    rows = max(1, math.ceil(len(families) / columns))
    figure = _figure(max(9.0, 4.0 * columns), 3.8 * rows, "Loss of repeated samples, and of samples never trained on")
    colours = _shades(families)
    for place, (family, members) in enumerate(families.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        for member in members:
            style = {"linestyle": "--"} if member in COMPARED else {"marker": ".", "markersize": 5}
            series = _series(history, f"loss/{family}/{member}")
            axes.plot(*series, color=colours[member], label=member, **style)
        if onset is not None:
            axes.axvline(onset.step, color=COLOURS["memorized"], linewidth=1.2, label=f"onset, step {onset.step}")
            shade: dict[str, Any] = {"color": COLOURS["memorized"], "alpha": 0.15, "linewidth": 0}
            axes.axvspan(onset.step_low, onset.step_high, label="its 95 % interval", **shade)
        axes.set_title(TITLES.get(family, family.replace("_", " ")), fontsize=10)
        _finish(axes, "optimizer step", with_unit("mean loss", unit) if place % columns == 0 else "")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    labels: dict[str, Any] = {}
    for axes in figure.axes:
        lines, names = axes.get_legend_handles_labels()
        labels |= dict(zip(names, lines, strict=True))
    if labels:
        order = sorted(labels, key=_repeats)
        figure.legend([labels[label] for label in order], order, fontsize=9, frameon=False, loc="outside right center")
    else:
        _write_nothing(figure.add_subplot())
    return figure


def gap_distribution(
    gaps: Tensor, null: Tensor, threshold: float, unit: str = "nats", measured: str = "training samples"
) -> Figure:
    """Histograms of ``gaps`` ``[N]`` and of each control to the other controls, ``null`` ``[M]``, with the threshold.

    ``measured``: what the gaps are of, for the legend.
    """
    figure = _figure(9.0, 4.0, "How far is a sample's loss below that of its controls?")
    axes = figure.add_subplot()
    ends = [float(end) for values in (gaps, null) if len(values) for end in (values.min(), values.max())]
    ends += [threshold] if math.isfinite(threshold) else []
    span = (min(ends, default=0.0), max(ends, default=1.0))
    bins = [span[0] + (span[1] - span[0] or 1.0) * edge / 50 for edge in range(51)]
    # Shares on a logarithmic axis, so that a few memorized samples are visible beside many others.
    if len(gaps):
        label = f"{measured} ({len(gaps):,})"
        axes.hist(bins[:-1], bins, weights=_shares(gaps, bins), color=COLOURS["learned"], alpha=0.55, label=label)
    if len(null):
        label = f"controls, compared with other controls ({len(null):,})"
        axes.hist(bins[:-1], bins, weights=_shares(null, bins), histtype="step", color=INK, linewidth=1.5, label=label)
    if len(gaps) or len(null):
        axes.set_yscale("log")
        axes.set_ylim(top=1.5)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.3%}".rstrip("0%").rstrip(".") + " %")
    if math.isfinite(threshold):
        label = f"threshold, {threshold:.2f} {unit}"
        axes.axvline(threshold, color=COLOURS["memorized"], linestyle="--", label=label)
    _finish(axes, f"gap: loss expected from matched controls − own loss ({unit})", "share of samples (logarithmic)")
    _legend_below(figure, axes, 3)
    return figure


def _shares(values: Tensor, bins: Sequence[float]) -> list[float]:
    """The share of ``values`` ``[N]`` in each bin."""
    edges = torch.tensor(bins, dtype=torch.float64)
    return (torch.histogram(values.double(), edges).hist / len(values)).tolist()


def verdict_map(
    first: Tensor,
    gap: Tensor,
    verdict: Tensor,
    threshold: float = math.nan,
    unit: str = "nats",
    loss_unit: str = "nats",
) -> Figure:
    """A point per measured sample: loss at its first visit (x), gap (y) and, as colour and marker, verdict; all are
    ``[N]``. ``unit`` is that of gaps."""
    figure = _figure(9.0, 4.6, "Loss at the first visit, gap and verdict of samples")
    axes = figure.add_subplot()
    measured = torch.isfinite(first) & torch.isfinite(gap)
    for rank, (word, colour) in enumerate(COLOURS.items()):
        codes = torch.tensor([code for code in Verdict if code.word == word])
        rows = (measured & torch.isin(verdict.long(), codes)).nonzero().flatten()
        if len(rows):
            drawn = rows[:: math.ceil(len(rows) / MOST_POINTS)]
            axes.scatter(
                first[drawn].tolist(),
                gap[drawn].tolist(),
                s=22 if len(drawn) < 300 else 9,
                c=colour,
                marker=MARKERS[word],
                alpha=0.7,
                linewidths=1.0 if word == "undecided" else 0.0,
                label=f"{word} ({len(rows):,})",
                zorder=3 - rank / 10,
                rasterized=len(drawn) > 500,
            )
    axes.axhline(0, color=PALE, linewidth=0.8, zorder=0)
    if math.isfinite(threshold):
        axes.axhline(threshold, color=COLOURS["memorized"], linestyle="--", linewidth=1, label="threshold")
    _finish(axes, with_unit("loss at the first visit", loss_unit), f"gap to matched controls ({unit})")
    _legend_below(figure, axes, 6)
    return figure


def save(figure: Figure, stem: Path) -> None:
    """Writes ``STEM.svg`` and ``STEM.png``, each complete or not there."""
    for kind in ("svg", "png"):
        with written_whole(stem.with_suffix(f".{kind}")) as unfinished:
            if kind == "svg":
                unfinished.write_text(svg(figure), encoding="utf-8")
            else:
                figure.savefig(unfinished, format=kind, dpi=150)


def save_all(drawn: Mapping[str, Figure], folder: Path) -> dict[str, str]:
    """Writes figures, given by stem, into ``folder``, and returns their SVG. Makes no folder if there are none."""
    if drawn:
        folder.mkdir(exist_ok=True)
    for stem, figure in drawn.items():
        save(figure, folder / stem)
    return {stem: (folder / f"{stem}.svg").read_text(encoding="utf-8") for stem in drawn}


def svg(figure: Figure) -> str:
    """The figure as SVG: the same bytes for the same figure, with text as text."""
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "memsink", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return drawn.getvalue()


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    figure.suptitle(title, fontsize=12, color=INK)
    return figure


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=PALE, alpha=0.4, linewidth=0.6)


def with_unit(quantity: str, unit: str) -> str:
    """The label of an axis; ``unit`` may be empty."""
    return f"{quantity} ({unit})" if unit else quantity


def _legend_below(figure: Figure, axes: Axes, columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        figure.legend(fontsize=9, frameon=False, loc="outside lower center", ncols=columns)
    else:
        _write_nothing(axes)


def _write_nothing(axes: Axes) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color=INK)


def _shades(families: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A colour per member, the same in all families: darker for more repeats, ink for samples never trained on."""
    members = sorted({member for members in families.values() for member in members} - set(COMPARED), key=_repeats)
    shade = matplotlib.colormaps["viridis_r"]
    colours = {member: shade(0.12 + 0.88 * rank / max(1, len(members) - 1)) for rank, member in enumerate(members)}
    return colours | dict.fromkeys(COMPARED, INK)


def _families(history: Sequence[Mapping[str, float]]) -> dict[str, list[str]]:
    """The members of each family that have a loss in any row, by number of repeats; twins and controls last."""
    families: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in history for name in row if name.startswith("loss/")):
        _, family, member = name.split("/")
        families.setdefault(family, []).append(member)
    return {family: sorted(members, key=_repeats) for family, members in families.items()}


def _repeats(member: str) -> float:
    """The number of repeats of a member: 64 of ``x64``, 8 of ``8-15``, infinity of ``twins``."""
    digits = member.split("-")[0].lstrip("x")
    return float(digits) if digits.isdigit() else math.inf


def _series(history: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    rows = [row for row in history if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]
