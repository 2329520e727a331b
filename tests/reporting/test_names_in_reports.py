"""Names of samples in the files of a report, and the copy of these files that loggers keep."""

from __future__ import annotations

import json
from pathlib import Path

import html5lib
import jsonschema
import pyarrow.parquet as pq
import pytest

from lightning_memsink.reporting.document import Document, Grid, _table
from lightning_memsink.reporting.html_page import SCHEMA
from lightning_memsink.reporting.parquet import read_ledger, write_ledger
from lightning_memsink.reporting.run_document import run_document
from lightning_memsink.reporting.run_files import report_files, write_report, write_tables
from lightning_memsink.reporting.run_summary import summary
from lightning_memsink.reporting.scalars import COLUMNS, row_values
from tests.support.made_up import HASHED, MadeUp, made_up

NAMES = {HASHED: "Jane Doe", 5: "<b>x</b> | *y* \\", 1003: "John Doe", 77: "of no sample"}
"""Of two of the three memorized samples, of a control, and of an id that was never recorded."""
WORDS = ("Jane Doe", "<b>x", "John Doe", "of no sample")


def named(names: dict[int, str] = NAMES) -> MadeUp:
    made = made_up(memorized=4)
    made.table.names.add(names)
    return made


def written(made: MadeUp, folder: Path) -> Path:
    findings, path = made.findings(), folder / "report.md"
    write_report(findings, path)
    write_tables(findings, made.controls, None, path)
    return path


def files_below(paths: list[Path]) -> dict[str, Path]:
    """By path relative to the folder of the first."""
    found = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return {file.relative_to(paths[0].parent).as_posix(): file for file in found}


def sample_table(document: Document) -> Grid:
    grids = [grid for section in document.sections for grid in section.grids if grid.head[0] == "sample"]
    return grids[0]


def test_the_table_has_a_column_of_names_beside_the_ids():
    made = named()
    grid = sample_table(run_document(made.findings(), ""))
    assert grid.head[:3] == ("sample", "name", "exposures")
    hashed = f"{HASHED % 2**64:016x}"
    assert [row[:3] for row in grid.rows] == [
        (hashed, "Jane Doe", "4"), ("6", "", "4"), ("5", NAMES[5], "4"), ("4", "", "4"),
    ]  # fmt: skip
    assert grid.caption.startswith("The most memorized samples, by id or hash, and by name. Loss and gap in nats")


def test_without_a_name_among_the_listed_the_table_is_as_ever():
    plain, others = made_up(memorized=4), named({1003: "John Doe", 77: "of no sample"})
    document = run_document(plain.findings(), "")
    assert document == run_document(others.findings(), "")
    grid = sample_table(document)
    assert grid.head[:2] == ("sample", "exposures")
    assert grid.caption == "The most memorized samples, by id or hash. Loss and gap in nats per token, bits over the " \
        "whole sample"  # fmt: skip


def test_the_json_has_names_where_there_are_any_and_follows_the_schema(tmp_path):
    content = json.loads(written(named(), tmp_path).with_suffix(".json").read_text())
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(content)
    listed = content["numbers"]["memorized"]
    assert [one.get("name") for one in listed] == ["Jane Doe", None, NAMES[5], None]
    assert [set(one) for one in listed][1] == {"sample", "gap", "bits", "exposures"}


def test_the_page_is_valid_and_the_markdown_shows_a_name_letter_by_letter(tmp_path):
    path = written(named(), tmp_path)
    page = path.with_suffix(".html").read_text()
    html5lib.HTMLParser(strict=True).parse(page)
    assert "<td>Jane Doe</td>" in page and "<td>&lt;b&gt;x&lt;/b&gt; | *y* \\</td>" in page
    text = path.read_text()
    assert "| Jane Doe | 4 |" in text and r"| \<b\>x\<\/b\> \| \*y\* \\ | 4 |" in text


def test_only_names_are_shown_letter_by_letter():
    rows = _table(Grid(("sample", "name"), [("a_b|", "a_b|")]))
    assert rows[2] == r"| a_b\| | a\_b\| |"


def test_a_name_that_no_file_can_hold_is_written_all_the_same(tmp_path):
    path = written(named({HASHED: "caf\udce9\x00\n"}), tmp_path)
    assert r"<td>caf\udce9\x00\n</td>" in path.with_suffix(".html").read_text()
    html5lib.HTMLParser(strict=True).parse(path.with_suffix(".html").read_text())
    names = pq.read_table(tmp_path / "report_files/ledger/samples.parquet")["sample_name"].to_pylist()
    assert [name for name in names if name is not None] == ["caf\\udce9\x00\n"]


# Parquet --------------------------------------------------------------------------------------------------------------


def test_names_are_a_last_column_of_text_in_both_files(tmp_path):
    made = named()
    write_ledger(tmp_path, made.table, made.controls, made.flags)
    for file, expected in (("samples", {HASHED: "Jane Doe", 5: NAMES[5]}), ("controls", {1003: "John Doe"})):
        table = pq.read_table(tmp_path / f"{file}.parquet")
        assert table.column_names[-1] == "sample_name"
        pairs = zip(table["sample_id"].to_pylist(), table["sample_name"].to_pylist(), strict=True)
        assert {id: name for id, name in pairs if name is not None} == expected


def test_names_come_back_and_change_nothing_else(tmp_path):
    made, plain = named(), made_up(memorized=4)
    write_ledger(tmp_path / "named", made.table, made.controls, made.flags)
    write_ledger(tmp_path / "plain", plain.table, plain.controls, plain.flags)
    table, controls = read_ledger(tmp_path / "named")
    assert table.names.of([HASHED, 5, 1003, 6]) == ["Jane Doe", NAMES[5], "John Doe", 6] and len(table.names) == 3
    other, other_controls = read_ledger(tmp_path / "plain")
    assert len(other.names) == 0
    assert repr(table.state_dict()) == repr(other.state_dict())
    assert repr(controls.state_dict()) == repr(other_controls.state_dict())
    write_ledger(tmp_path / "again", table, controls, made.flags)
    for file in ("samples.parquet", "controls.parquet"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "named" / file).read_bytes()


@pytest.mark.parametrize("names", [{}, {77: "of no sample"}])
def test_without_names_the_files_are_the_same_to_the_bit(names, tmp_path):
    for folder, made, shows in (("plain", made_up(4), True), ("named", named(names), True), ("left", named(), False)):
        write_ledger(tmp_path / folder, made.table, made.controls, made.flags, with_names=shows)
    for file in ("samples.parquet", "controls.parquet"):
        contents = {(tmp_path / folder / file).read_bytes() for folder in ("plain", "named", "left")}
        assert len(contents) == 1
        assert "sample_name" not in pq.read_table(tmp_path / "plain" / file).column_names


# What leaves the machine ----------------------------------------------------------------------------------------------


def test_neither_loggers_nor_the_terminal_get_a_name():
    made = named()
    findings = made.findings()
    samples = findings.top(20)
    assert findings.names_of(samples)[0] == "Jane Doe"
    assert "name" not in COLUMNS
    assert not any(word in repr([sample, row_values(sample)]) for sample in samples for word in WORDS)
    text = summary(findings)
    assert f"Sample {HASHED % 2**64:016x}: seen 4 times" in text and not any(word in text for word in WORDS)


def test_loggers_keep_all_files_without_names(tmp_path):
    (tmp_path / "named").mkdir(), (tmp_path / "plain").mkdir()
    path = written(named(), tmp_path / "named")
    kept, plain = files_below(report_files(path)), files_below(report_files(written(made_up(4), tmp_path / "plain")))
    assert set(kept) == set(plain) and len(kept) == 3 + 4 * 2 + 2
    for name, file in kept.items():
        content, expected = file.read_bytes(), plain[name].read_bytes()
        if file.suffix in (".md", ".html", ".json"):
            dates = [json.loads(one["report.json"].read_text())["date"] for one in (kept, plain)]
            content = content.decode().replace(*dates).encode()
        assert content == expected, name
    own = files_below([path, path.with_suffix(".json"), path.with_suffix(".html")])
    assert all("Jane Doe" in file.read_text() for file in own.values())


def test_a_run_without_names_keeps_no_copy_of_an_earlier_one(tmp_path):
    path = written(named(), tmp_path)
    assert report_files(path)[0] != path
    written(made_up(4), tmp_path)
    assert report_files(path) == [
        tmp_path / name for name in ("report.md", "report.html", "report.json", "report_files")
    ]
    assert not any("Jane Doe" in file.read_text(errors="replace") for file in files_below(report_files(path)).values())
    assert "without_names" not in {file.name for file in (tmp_path / "report_files").iterdir()}


def test_the_lines_of_a_run_with_names_say_where_the_copy_is(tmp_path):
    made = named()
    write_report(made.findings(), tmp_path / "report.md")
    lines = write_tables(made.findings(), made.controls, None, tmp_path / "report.md")
    copy = tmp_path / "report_files" / "without_names"
    assert lines[1:] == [f"All of these without the samples' names: {copy}"] and copy.is_dir()
    plain = made_up(4)
    assert len(write_tables(plain.findings(), plain.controls, None, tmp_path / "plain" / "report.md")) == 1
