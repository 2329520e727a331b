"""The figures of a run's report: one entry of `FIGURES` each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.statement_section import has_statement

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class RunFigure:
    """A figure that a report has if ``condition`` is true of its findings. Only ``draw`` needs matplotlib."""

    stem: str
    """Of its files."""
    caption: str
    """A full sentence without its stop."""
    section: str
    """The title of a section of `run_sections.SECTIONS`."""
    draw: Callable[[Findings], Figure]
    condition: Callable[[Findings], bool] = lambda findings: True


def _loss_by_rung(findings: Findings) -> Figure:
    from lightning_memsink.reporting.figures import loss_by_rung

    return loss_by_rung(findings.history, findings.onset, findings.loss_unit)


def _gap_distribution(findings: Findings) -> Figure:
    from lightning_memsink.reporting.figures import gap_distribution

    gaps = findings.flags.gap.float()
    null = findings.flags.null_gaps.float()
    return gap_distribution(gaps[gaps.isfinite()], null, findings.evaluation.threshold, findings.unit)


def _verdict_map(findings: Findings) -> Figure:
    from lightning_memsink.reporting.figures import verdict_map

    flags = findings.flags
    first_loss = findings.table.first_loss[: len(flags.verdict)].float()
    units = findings.unit, findings.loss_unit
    return verdict_map(first_loss, flags.gap.float(), flags.verdict, findings.evaluation.threshold, *units)


def _memorized_share(findings: Findings) -> Figure:
    from lightning_memsink.reporting.statement_figure import memorized_share

    return memorized_share(findings.history)


def _mitigation(findings: Findings) -> Figure:
    from lightning_memsink.reporting.mitigation_figure import mitigation_figure

    return mitigation_figure(findings.history, findings.unit)


def _layers(findings: Findings) -> Figure:
    from lightning_memsink.reporting.layer_heat_map import layer_heat_map

    attribution = findings.attribution
    assert attribution is not None  # by the condition
    return layer_heat_map(attribution.rows, list(attribution.units), attribution.blocks)


FIGURES = (
    RunFigure(
        "loss_by_rung", "The loss of repeated samples, compared with samples never trained on", "When", _loss_by_rung
    ),
    RunFigure(
        "memorized_share",
        "The share of all samples that is memorized, from a random sample of them, with its 95 % interval",
        "How much",
        _memorized_share,
        has_statement,
    ),
    RunFigure(
        "gap_distribution",
        "How far the losses of samples lie below those of their controls, compared with the controls themselves",
        "Which",
        _gap_distribution,
    ),
    RunFigure(
        "verdict_map", "Loss at the first visit, gap and verdict of every measured sample", "Which", _verdict_map
    ),
    RunFigure(
        "layers",
        "Where samples have their effect and their gradient, layer by step. A cell is grey where no sample of the "
        "group was measured",
        "Where",
        _layers,
        lambda findings: findings.attribution is not None,
    ),
    RunFigure(
        "mitigation",
        "How often the mitigation acted, and the gap and the held-out loss at the same time",
        "What was done",
        _mitigation,
        lambda findings: bool(findings.interventions),
    ),
)
"""In the order of the report."""


def figures_of(findings: Findings) -> list[RunFigure]:
    """The figures that a report of these findings has; none without an evaluation."""
    return [figure for figure in FIGURES if findings.flags.evaluations and figure.condition(findings)]


def draw_figures(findings: Findings) -> dict[str, Figure]:
    """The figures by file stem. ImportError without matplotlib."""
    return {figure.stem: figure.draw(findings) for figure in figures_of(findings)}
