"""What is drawn of a made-up ledger."""

import math
from itertools import pairwise

import pytest
import torch

from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.reporting.figures import gap_distribution, loss_by_rung, verdict_map
from tests.support.made_up import ONSET, RUNGS, MadeUp, made_up


def history(steps: int = 6) -> list[dict[str, float]]:
    made, rows = MadeUp(), []
    for number in range(steps):
        made.evaluate(20 * (number + 1))
        rows.append(made.row(RUNGS))
    return rows


def test_loss_by_rung_draws_a_panel_a_family_and_the_onset():
    rows = history()
    figure = loss_by_rung(rows, ONSET, "nats per token")
    natural, canary = figure.axes
    assert (natural.get_title(), canary.get_title()) == ("natural", "canary")
    lines = {line.get_label(): line for line in natural.lines}
    assert list(lines) == ["x2", "x4", "twins", "onset, step 40"]
    assert list(lines["x4"].get_ydata()) == [row["loss/natural/x4"] for row in rows]
    assert natural.get_ylabel() == "mean loss (nats per token)"


def test_gap_distribution_counts_shares_and_marks_the_threshold():
    figure = gap_distribution(torch.tensor([0.0, 0.1, 2.0, 2.1]), torch.tensor([0.0, 0.2]), 1.0)
    [axes] = figure.axes
    assert sum(bar.get_height() for bar in axes.patches[:50]) == pytest.approx(1)
    assert axes.lines[0].get_xdata()[0] == 1.0


def test_the_verdict_map_draws_each_word_once_and_leaves_out_what_was_not_measured():
    verdict = torch.tensor([Verdict.MEMORIZED, Verdict.LEARNED, Verdict.WAITING, Verdict.NO_LOSS, Verdict.LEARNED])
    figure = verdict_map(torch.ones(5), torch.tensor([2.0, 0.1, 0.2, 0.3, math.nan]), verdict, 1.0)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ["memorized (1)", "learned (1)", "undecided (2)", "threshold"]


@pytest.mark.parametrize(
    "figure",
    [
        lambda: loss_by_rung([], None),
        lambda: gap_distribution(torch.zeros(0), torch.zeros(0), math.nan),
        lambda: gap_distribution(torch.zeros(1), torch.zeros(1), math.nan),
        lambda: verdict_map(torch.zeros(0), torch.zeros(0), torch.zeros(0), math.nan),
    ],
)
def test_a_figure_of_nothing_can_be_drawn(figure, tmp_path):
    figure().savefig(tmp_path / "empty.svg")


def test_figures_overlap_no_text(tmp_path):
    """The oracle: the boxes of all labels, titles and legends, as they are drawn."""
    made = made_up()
    gaps = made.flags.gap.float()
    for figure in (
        loss_by_rung(history(), ONSET, "nats per token"),
        gap_distribution(gaps, made.flags.null_gaps, 1.0, "nats per token"),
        verdict_map(made.table.early_loss.float(), gaps, made.flags.verdict, 1.0, "nats per token"),
    ):
        figure.savefig(tmp_path / "drawn.png")
        ticks = [axis.get_ticklabels() for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
        for labels in ticks:
            boxes = [label.get_window_extent() for label in labels if label.get_visible() and label.get_text()]
            assert not any(one.overlaps(next) for one, next in pairwise(boxes))
        apart = [figure._suptitle.get_window_extent(), *(one.get_window_extent() for one in figure.legends)]
        apart += [axes.get_tightbbox() for axes in figure.axes]
        assert not any(apart[i].overlaps(apart[j]) for i in range(len(apart)) for j in range(i))
