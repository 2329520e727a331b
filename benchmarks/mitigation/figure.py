"""A figure of memorization left against cost, for all arms of E1 and E2, with the sweep of set points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.mitigation.arms import ARMS, COMBINED, OURS, STANDARD, SWEEP
from benchmarks.mitigation.runs import Result

Point = tuple[float, float]
WORST = 0.35
"""Upper end of the axis, in nats above standard; points beyond are drawn at the edge, with their value."""
PANELS = (
    ("E1", "background", "E1: validation"),
    ("E2", "background", "E2: validation"),
    ("E2", "domain", "E2: unseen text of the repeated domain"),
)


def draw(results: Mapping[tuple[str, str, int], Result], path: Path) -> None:
    """Writes the figure to ``path``, and makes its folder."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.2), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    names = [name for name in ARMS if any(arm == name for _, arm, _ in results)]
    handles = {}
    for panel, (experiment, kind, title) in zip(panels, PANELS, strict=True):
        points = points_of(results, experiment, kind)
        for number, name in enumerate(names):
            if name in points:
                handles[name] = _mark(panel, points[name], number, name)
        swept = [points[name] for name in SWEEP if name in points]
        panel.plot(*zip(*[(x, min(y, WORST)) for x, y in swept], strict=True) if swept else ([], []), color="C0", lw=1)
        edge = frontier([point for name, point in points.items() if "oracle" not in name])
        panel.step(*zip(*edge, strict=True) if edge else ([], []), where="post", color="0.6", ls=":", lw=1.5, zorder=0)
        panel.axhline(0, color="0.85", lw=0.8, zorder=0)
        panel.set_ylim(top=WORST * 1.05)
        panel.set_xlabel("memorization left: gap of the repeated text, % of standard's")
        panel.set_ylabel("loss against standard, nats per token (lower is better)")
        panel.set_title(title)
    legend = figure.legend(
        [handles[name] for name in names], [f"{number} {name}" for number, name in enumerate(names, 1)],
        loc="outside lower center",
        ncols=5, fontsize=8, frameon=False,
    )  # fmt: skip
    legend.set_title("filled: ours; hollow: rivals; grey: oracles. Line: set points of hold. Dotted: the frontier")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def points_of(results: Mapping[tuple[str, str, int], Result], experiment: str, kind: str) -> dict[str, Point]:
    """By arm: share of standard's gap left in percent, and loss on unseen ``kind`` against standard's; of all seeds."""
    gathered: dict[str, list[Point]] = {}
    for (where, name, seed), own in results.items():
        standard = results.get((experiment, STANDARD, seed))
        if where == experiment and standard is not None:
            price = own.kinds[kind].unseen - standard.kinds[kind].unseen
            gathered.setdefault(name, []).append((100 * own.gap / standard.gap, price))
    return {name: (fmean(x for x, _ in own), fmean(y for _, y in own)) for name, own in gathered.items()}


def frontier(points: Sequence[Point]) -> list[Point]:
    """The Pareto frontier: the points that no other beats on both axes, from left to right.

    >>> frontier([(0.0, 3.0), (1.0, 1.0), (2.0, 2.0), (3.0, 0.0)])
    [(0.0, 3.0), (1.0, 1.0), (3.0, 0.0)]
    """
    edge: list[Point] = []
    for point in sorted(points):
        if not edge or point[1] < edge[-1][1]:
            edge.append(point)
    return edge


def _mark(panel, point: Point, number: int, name: str):  # type: ignore[no-untyped-def]
    x, y = point
    ours = name in OURS or name in COMBINED
    color = "0.55" if "oracle" in name else "C0" if name in SWEEP else "C1" if ours else "C3"
    (handle,) = panel.plot(
        x, min(y, WORST), "o" if y < WORST else "^", ms=7, color=color, mfc=color if ours else "white", zorder=3
    )
    beyond = f" ({y:+.1f})" if y >= WORST else ""
    below = -9 if y >= WORST and number % 2 else 4  # points beyond are in one row, where labels would overlap
    panel.annotate(f"{number + 1}{beyond}", (x, min(y, WORST)), (5, below), textcoords="offset points", fontsize=8)
    return handle
