"""Names of samples in what the commands make of a finished run's report."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_memsink.cli import main
from lightning_memsink.reporting.run_files import write_report
from tests.support.made_up import HASHED, made_up


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of the report of a run in which one memorized sample has a name."""
    made = made_up(memorized=4)
    made.table.names.add({HASHED: "Jane Doe"})
    write_report(made.findings(), tmp_path / "run" / "report.md")
    return tmp_path / "run"


def test_a_page_that_is_made_again_has_the_names(folder, capsys):
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").write_text("lost")
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == before and b"<td>Jane Doe</td>" in before
    assert "Jane Doe" not in capsys.readouterr().out


def test_a_model_card_has_no_names(folder, tmp_path):
    """It is made to be published."""
    card = tmp_path / "README.md"
    assert main(["report", str(folder), "--model-card", str(card)]) == 0
    assert "## Memorization" in card.read_text() and "Jane Doe" not in card.read_text()


def test_the_copy_without_names_is_a_report_as_any_other(folder):
    copy = folder / "report_files" / "without_names"
    before = (copy / "report.html").read_bytes()
    assert main(["report", str(copy)]) == 0
    assert (copy / "report.html").read_bytes() == before and b"Jane Doe" not in before
