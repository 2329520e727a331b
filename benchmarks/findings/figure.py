"""The figure of FINDINGS.md: a panel per claim."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.findings.runs import Run, Snapshot

COLOURS = {1: "#bdd7e7", 4: "#6baed6", 16: "#2171b5", 64: "#08306b"}


def draw(going: Sequence[Run], stopped: Sequence[Run], path: Path) -> None:
    """Draws curves of the first seed and dots of all seeds, and writes the figure, with its folder if necessary."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), layout="constrained")
    panels = figure.subplots(2, 3).flatten()
    first, other = going[0], stopped[0]
    natural = sorted(repeats for kind, repeats in first.groups.values() if kind == "natural")
    for repeats in natural:
        _line(
            panels[0],
            first,
            [_gap(first, snapshot, "natural", repeats) for snapshot in first.snapshots],
            f"x{repeats}",
            repeats,
        )
    panels[0].axvline(first.half, color="0.7", ls=":")
    _finish(panels[0], "1. Early onset: gap of repeated passages", "optimizer step", "gap to unseen twins, nats")
    for kind, marker in (("natural", "o"), ("canary", "^"), ("easy", "s")):
        points = [
            (repeats, _gap(one, one.at_half(), kind, repeats))
            for one in going
            for group_kind, repeats in one.groups.values()
            if group_kind == kind
        ]
        panels[1].plot(*zip(*points, strict=True), marker, ls="", label=kind, alpha=0.8)
    panels[1].set_xscale("log", base=2)
    _finish(panels[1], "2. Repetition and rarity", "times shown", "gap to unseen twins, nats")
    rows = [profile for profile in first.profiles if "memorized" in profile.shares]
    for layer in range(len(rows[0].shares["memorized"]) if rows else 0):
        steps, shares = [row.step for row in rows], [row.shares["memorized"][layer] for row in rows]
        panels[2].plot(steps, shares, label=f"layer {layer + 1}")
    _finish(panels[2], "3. Where: memorized samples' attribution", "optimizer step", "share of a layer")
    panels[3].plot(
        [snapshot.step for snapshot in first.snapshots],
        [snapshot.held_out for snapshot in first.snapshots],
        color="#333333",
    )
    twin = panels[3].twinx()
    twin.plot(
        [snapshot.step for snapshot in first.snapshots],
        [snapshot.memorized for snapshot in first.snapshots],
        color="#D55E00",
    )
    twin.set_ylabel("memorized samples", color="#D55E00")
    _finish(panels[3], "4. Coexists with generalization", "optimizer step", "held-out loss, nats", legend=False)
    for one, label, style in ((first, "repetition goes on", "-"), (other, "repetition stops", "--")):
        gaps = [_gap(one, snapshot, "natural", natural[-1]) for snapshot in one.snapshots]
        panels[4].plot([snapshot.step for snapshot in one.snapshots], gaps, style, color=COLOURS.get(64), label=label)
    panels[4].axvline(first.half, color="0.7", ls=":")
    _finish(panels[4], f"5. Growth and forgetting, x{natural[-1]}", "optimizer step", "gap to unseen twins, nats")
    panels[5].set_axis_off()
    figure.suptitle(
        "Curves: one seed. Dots: means of the canary groups of all seeds. Dotted line: the end of the first half.",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _gap(one: Run, snapshot: Snapshot, kind: str, repeats: int) -> float:
    return float(one.gap(snapshot, kind, repeats).mean())


def _line(axes: Any, one: Run, values: list[float], label: str, repeats: int) -> None:
    axes.plot([snapshot.step for snapshot in one.snapshots], values, color=COLOURS.get(repeats, "0.5"), label=label)


def _finish(axes: Any, title: str, x: str, y: str, legend: bool = True) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize=9)
