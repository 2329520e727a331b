"""What curves, figures and the summary say of a made-up ledger."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.progress import standing
from lightning_memsink.callbacks.run_report import write_report
from lightning_memsink.controls import ControlTable
from lightning_memsink.reporting.curves import PlantedIds, scalars, top_memorized
from lightning_memsink.reporting.figures import gap_distribution, loss_by_rung, verdict_map
from lightning_memsink.reporting.settings import settings_of
from lightning_memsink.reporting.summary import Findings, markdown, summary
from lightning_memsink.table import LossTable
from lightning_memsink.verdicts import WORDS, Evaluation, Flags, Onset, Verdict

SAMPLES, TOKENS = 24, 10
HASHED = -(2**40) - 1  # an id as hashes of content are: 64 bits, maybe negative


@dataclass(frozen=True)
class PlantedRung:
    name: str
    repeats: int
    ids: Tensor
    twin_ids: Tensor


RUNGS = [
    PlantedRung("natural x2", 2, torch.arange(0, 4), torch.arange(1000, 1004)),
    PlantedRung("natural x4", 4, torch.tensor([4, 5, 6, HASHED]), torch.arange(1000, 1004)),
    PlantedRung("canary x4", 4, torch.arange(8, 12), torch.arange(1004, 1008)),
]
ONSET = Onset(step=40, step_low=20, step_high=60, exposures=4, exposures_low=3, exposures_high=6, samples=3)


class MadeUp:
    """A ledger's contents: 24 samples of 10 tokens, 20 controls; `memorized` of them so after the second evaluation."""

    def __init__(self, memorized: int = 3) -> None:
        self.table, self.controls, self.flags = LossTable(), ControlTable(), Flags()
        self.table.reference_step = 0
        self.memorized = memorized
        self.onset: Onset | None = None

    def evaluate(self, step: int) -> None:
        ids = torch.arange(SAMPLES)
        ids[7] = HASHED
        exposures = torch.where(torch.arange(SAMPLES) < 4, 1, 2)
        visits = torch.repeat_interleave(ids, exposures)
        losses = 3.0 - 0.05 * visits.clamp(min=0) - step / 200
        self.table.record(visits, losses, torch.full_like(visits, step), torch.full_like(visits, TOKENS))
        self.controls.record(step, torch.arange(1000, 1020), 3 - torch.arange(20) / 40 - step / 400, torch.zeros(20, 1))
        flags = self.flags
        flags.grow(SAMPLES)
        flags.gap = torch.linspace(-0.5, 0.5, SAMPLES).half()
        flags.p = torch.full((SAMPLES,), 0.5, dtype=torch.bfloat16)
        flags.verdict[:] = int(Verdict.LEARNED)
        flags.verdict[:2] = torch.tensor([Verdict.UNSEEN, Verdict.NO_LOSS]).to(torch.uint8)
        if self.flags.evaluations:
            rows = torch.arange(4, 4 + self.memorized)
            flags.verdict[rows], flags.gap[rows] = int(Verdict.MEMORIZED), 2 + rows.half() / 8
            flags.onset_step[rows], flags.onset_exposures[rows] = 40, 4
            self.onset = ONSET if self.memorized else None
        flags.null_gaps = torch.cat([torch.linspace(-0.4, 0.4, 19), torch.tensor([1.5])]).roll(5)
        flags.evaluations.append(self.summarized(step))

    def summarized(self, step: int) -> Evaluation:
        return Evaluation(
            step=step,
            epoch=0,
            controls=20,
            tested=20,
            counts=self.flags.counts(),
            train_loss=2.0 - step / 200,
            control_loss=2.5 - step / 400,
            gap=0.1 + step / 400,
            gap_memorized=2.5 if self.onset else math.nan,
            null_low=-0.4,
            null_high=0.4,
            null_sd=0.2,
            threshold=1.0,
            p_floor=1 / 21,
            alpha=0.05,
            tail="conformal",
        )

    def row(self, rungs: list[PlantedRung]) -> dict[str, float]:
        return scalars(self.table, self.controls, self.flags, self.onset, [PlantedIds.of(rung) for rung in rungs])

    def findings(self, rungs: list[PlantedRung] = RUNGS) -> Findings:
        return Findings(self.table, self.flags, self.onset, [self.row(rungs)])


def made_up(memorized: int = 3, evaluations: int = 2) -> MadeUp:
    made = MadeUp(memorized)
    for number in range(evaluations):
        made.evaluate(20 * (number + 1))
    return made


def told_otherwise(made: MadeUp, **facts: object) -> Findings:
    """The findings, with some facts of the last evaluation replaced."""
    made.flags.evaluations[-1] = replace(made.flags.evaluations[-1], **facts)
    return made.findings()


# Curves ---------------------------------------------------------------------------------------------------------------


def test_a_row_holds_every_finite_number_of_the_evaluation():
    made = made_up()
    row, last = made.row([]), made.flags.evaluations[-1]
    assert {name: row[name] for name in ("step", "gap", "null_low", "null_high", "threshold", "p_floor")} == {
        "step": 40, "gap": last.gap, "null_low": -0.4, "null_high": 0.4, "threshold": 1.0, "p_floor": 1 / 21,
    }  # fmt: skip
    assert [row[f"verdict/{word}"] for word in WORDS] == [1, 19, 0, 3, 1]
    assert (row["onset_step"], row["onset_step_low"], row["onset_exposures_high"]) == (40, 20, 6)
    assert row["flagged_fraction"] == 3 / 24
    first = made_up(evaluations=1).row([])
    assert not {"onset_step", "gap_memorized"} & set(first), "what is not known is absent, not NaN"


def test_a_rung_is_the_mean_of_its_samples_and_a_twin_set_of_its_controls():
    made = made_up()
    row = made.row(RUNGS)
    loss = dict(zip(made.table.ids.tolist(), made.table.last_loss.tolist(), strict=True))
    for rung, name in zip(RUNGS, ("natural/x2", "natural/x4", "canary/x4"), strict=True):
        mean = sum(loss[id] for id in rung.ids.tolist()) / 4
        assert row[f"loss/{name}"] == pytest.approx(mean)
    assert row["loss/natural/twins"] == pytest.approx(float(made.controls.latest[:4].mean()))
    assert row["loss/canary/twins"] == pytest.approx(float(made.controls.latest[4:8].mean()))
    assert (row["share/natural/x2"], row["share/natural/x4"], row["share/canary/x4"]) == (0, 0.75, 0)
    assert (row["share/natural/twins"], row["share/canary/twins"]) == (0, 0.25), "one control passes the threshold"


def test_without_rungs_samples_are_grouped_by_exposures():
    row = made_up().row([])
    assert {name for name in row if name.startswith("loss/")} == {
        "loss/exposures/2-3", "loss/exposures/4-7", "loss/exposures/controls",
    }  # fmt: skip
    assert row["share/exposures/4-7"] == 3 / 20
    assert row["loss/exposures/controls"] == row["control_loss"]


def test_samples_that_came_after_the_last_evaluation_change_nothing_but_losses():
    made = made_up()
    made.table.record(torch.tensor([77]), torch.tensor([1.0]), torch.tensor([50]), torch.tensor([TOKENS]))
    assert made.row([])["share/exposures/1"] == 0
    assert "3 of 24 samples" in summary(made.findings())


def test_the_list_of_memorized_samples_starts_with_the_largest_gap():
    made = made_up(memorized=4)
    samples = top_memorized(made.table, made.flags, 40, top=3)
    assert [sample.id for sample in samples] == [HASHED, 6, 5]
    first = samples[0]
    assert first.hash == f"{HASHED % 2**64:016x}"
    assert first.control_loss == pytest.approx(first.loss + first.gap)
    assert first.bits == pytest.approx(first.gap * TOKENS / math.log(2))
    assert (first.verdict, first.onset_step, first.exposures) == ("memorized", 40, 4)


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "set in at step 40 (95 % interval 20 to 60), at exposure 4 (3 to 6)",
        "3 of 24 samples memorized (12 %); 1 unseen, 19 learned, 1 undecided",
        "Undecided because: 1 no finite loss",
        "natural x4 (75 %)",
        "Sample 6: seen 4 times",
        "false-discovery rate of 5 %",
        "at least 1.00 nats per token (1.44 bits per token)",
        "20 controls took part; the smallest p-value they allow is 0.048",
        "1 of 20 lie that far below their fellows",
        "0 % of natural, 25 % of canary",
        "What this does not show",
    ],
)
def test_the_summary_says(words):
    assert words in summary(made_up().findings())


def test_the_summary_of_a_run_that_memorized_nothing():
    text = summary(made_up(memorized=0).findings())
    assert "Not in this run: up to step 40 no sample stands as memorized." in text
    assert "0 of 24 samples memorized (0 %)" in text
    assert "Memorized most" not in text and "Sample" not in text.split("What this does not show")[0].split("Which")[1]


def test_the_summary_without_any_evaluation_says_what_to_pass():
    text = summary(Findings(LossTable(), Flags(), None, []))
    assert "judged none" in text and "trainer.fit(model, train_loader, control_loader)" in text


def test_the_summary_without_controls_claims_nothing():
    nothing = {name: math.nan for name in ("gap", "gap_memorized", "null_low", "null_high", "null_sd", "threshold")}
    text = summary(told_otherwise(made_up(memorized=0), controls=0, tail="none", **nothing))
    assert "no usable controls" in text and "That can't be said" in text
    assert "nan" not in text


def test_a_fitted_tail_is_called_an_estimate():
    assert "take p-values as estimates" in summary(told_otherwise(made_up(), tail="normal"))


def test_samples_without_tokens_are_not_measured_per_token():
    made = made_up()
    made.table.elements.fill_(1)
    assert "per token" not in summary(made.findings())


def test_the_report_lists_samples_and_links_figures_beside_it(tmp_path):
    write_report(made_up().findings(), tmp_path / "deep" / "told.md", ["W&B run: somewhere"], {})
    text = (tmp_path / "deep" / "told.md").read_text()
    assert "| 6 | 4 |" in text and "W&B run: somewhere" in text
    files = {file.name for file in (tmp_path / "deep" / "told_files").iterdir()}
    stems = ("loss_by_rung", "gap_distribution", "verdict_map")
    assert files == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert all(f"(told_files/{stem}.png)" in text for stem in stems)


def test_the_report_without_figures_links_none():
    assert "![" not in markdown(made_up().findings(), None)


# Figures --------------------------------------------------------------------------------------------------------------


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


# The bar --------------------------------------------------------------------------------------------------------------


def test_the_bar_says_nothing_until_something_was_measured():
    assert standing(Flags()) == ""
    assert standing(made_up().flags) == "memorized 3 · gap 0.20 nats"
    assert standing(told_otherwise(made_up(), gap=math.nan).flags) == "memorized 3"


def test_settings_are_the_arguments_and_nothing_found_in_training():
    detector = MemorizationDetector(alpha=0.01, k=4)
    detector.onset = ONSET
    found = settings_of([detector, LossTracker(), object()])
    assert found["MemorizationDetector"] == {
        "alpha": 0.01, "k": 4, "method": "knn", "min_gap": 1.0, "null_sds": 4.0, "consecutive": 2, "reach": 2.0,
    }  # fmt: skip
    assert found["LossTracker"]["flush_every"] == 50
