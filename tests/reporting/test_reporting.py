"""What curves, figures and the summary say of a made-up ledger."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.progress import describe_flags
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.detection.verdicts import WORDS, Flags
from lightning_memsink.reporting.document import first_page, markdown
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.provenance import settings_of
from lightning_memsink.reporting.run_document import run_document
from lightning_memsink.reporting.run_figures import FIGURES
from lightning_memsink.reporting.run_files import write_report
from lightning_memsink.reporting.run_sections import SECTIONS
from lightning_memsink.reporting.run_summary import summary
from lightning_memsink.reporting.scalars import top_memorized
from lightning_memsink.samples.loss_table import LossTable
from tests.support.made_up import HASHED, ONSET, RUNGS, TOKENS, findings_with, made_up
from tests.support.small_runs import fit, watch


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
        "1 of 20 have a loss that far below that of other controls",
        "0 % of natural, 25 % of canary",
        "What this does not show",
    ],
)
def test_the_summary_says(words):
    assert words in summary(made_up().findings())


def test_the_summary_of_a_run_that_memorized_nothing():
    text = summary(made_up(memorized=0).findings())
    assert "Memorization did not set in: up to step 40 no sample is memorized." in text
    assert "0 of 24 samples memorized (0 %)" in text
    which = text.split("What this does not show")[0].split("Which")[1]
    assert "largest memorized share" not in text and "Sample" not in which


def test_the_summary_without_any_evaluation_says_what_to_pass():
    text = summary(Findings(LossTable(), Flags(), None, []))
    assert "judged none" in text and "trainer.fit(model, train_loader, control_loader)" in text


def test_the_summary_without_controls_claims_nothing():
    nothing = {name: math.nan for name in ("gap", "gap_memorized", "null_low", "null_high", "null_sd", "threshold")}
    text = summary(findings_with(made_up(memorized=0), controls=0, tail="none", **nothing))
    assert "no usable controls" in text and "Unknown: no sample could be compared with controls" in text
    assert "nan" not in text


def test_samples_without_tokens_are_not_measured_per_token():
    made = made_up()
    made.table.elements.fill_(1)
    assert "per token" not in summary(made.findings())


def test_the_report_lists_samples_and_links_figures_beside_it(tmp_path):
    findings = replace(made_up().findings(), logged_runs=["W&B run: somewhere"])
    write_report(findings, tmp_path / "deep" / "report.md")
    text = (tmp_path / "deep" / "report.md").read_text()
    assert "| 6 | 4 |" in text and "W&B run: somewhere" in text
    files = {file.name for file in (tmp_path / "deep" / "report_files").iterdir()}
    stems = ("loss_by_rung", "memorized_share", "gap_distribution", "verdict_map")
    assert files == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert all(f"(report_files/{stem}.png)" in text for stem in stems)


def test_the_report_without_figures_links_none():
    assert "![" not in markdown(run_document(made_up().findings(), ""), None)


def test_the_report_is_the_whole_document():
    """First page, method, settings and versions as in HTML, every section once, and no table twice."""
    findings = replace(made_up().findings(), settings={"LossTracker": {"flush_every": 50}}, versions={"torch": "9.9"})
    document = run_document(findings, "2030-01-01T00:00:00+00:00")
    text = markdown(document, "report_files")
    assert "\n".join(first_page(document)) in text and "2030-01-01T00:00:00+00:00" in text
    titles = ["When", "How much", "Which", "How sure", "What this does not show", "Method"]
    assert [line for line in text.splitlines() if line.startswith("## ")] == [f"## {title}" for title in titles]
    tables = [line for line in text.splitlines() if line.startswith("| ---")]
    assert len(tables) == 4 and "| LossTracker | flush_every=50 |" in text and "| torch | 9.9 |" in text
    paragraphs = [words for section in document.sections for words in section.paragraphs]
    assert all(text.count(f"- {words}\n") == 1 for words in paragraphs)
    for picture in (picture for section in document.sections for picture in section.pictures):
        assert text.count(f"*{picture.caption}.* [SVG](report_files/{picture.stem}.svg)") == 1


def test_the_summary_is_the_sections_of_the_report():
    """Of those sections that the summary has, it says every sentence of the report."""
    findings = made_up().findings()
    text, titles = summary(findings), {section.title for section in SECTIONS if not section.in_summary}
    for section in run_document(findings, "").sections:
        assert (section.title in titles) != all(f"\n  {words}" in text for words in section.paragraphs)


def test_every_figure_has_a_section_and_a_stem_of_its_own():
    assert {figure.section for figure in FIGURES} <= {section.title for section in SECTIONS}
    assert len({figure.stem for figure in FIGURES}) == len(FIGURES)
    assert len({section.title for section in SECTIONS}) == len(SECTIONS)


# The bar --------------------------------------------------------------------------------------------------------------


def test_the_bar_says_nothing_until_something_was_measured():
    assert describe_flags(Flags()) == ""
    assert describe_flags(made_up().flags) == "memorized 3 · gap 0.20 nats"
    assert describe_flags(findings_with(made_up(), gap=math.nan).flags) == "memorized 3"


def test_settings_are_the_arguments_and_nothing_found_in_training():
    detector = MemorizationDetector(alpha=0.01, k=4)
    detector.onset = ONSET
    found = settings_of([detector, LossTracker(), object()])
    assert found["MemorizationDetector"] == {
        "alpha": 0.01, "k": 4, "method": "knn", "min_gap": None, "consecutive": 2, "reach": 2.0, "recheck": 512,
        "unit": None,
    }  # fmt: skip
    assert found["LossTracker"]["flush_every"] == 50


def test_the_settings_of_a_localizer_are_its_arguments_before_and_after_a_fit():
    localizer = SinkLocalizer(every=2, agreement=False)
    before = settings_of([localizer])["SinkLocalizer"]
    assert (before["every"], before["norms"], before["agreement"]) == (2, True, False)
    fit([*watch(), localizer], max_epochs=1)
    assert settings_of([localizer])["SinkLocalizer"] == before
