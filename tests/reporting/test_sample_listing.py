"""The most memorized samples and families of a ledger on disk."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_memsink.reporting.sample_listing import RunSamples, as_json, samples_file

OLD = Path(__file__).parents[1] / "formats" / "f36e55b" / "ledger"
NAN = math.nan


def ledger(path, gaps, memorized=(), **more):
    """A ``samples.parquet`` of as many samples as ``gaps``, whose ids are 100, 101, ..."""
    count = len(gaps)
    columns = {
        "sample_id": list(range(100, 100 + count)),
        "exposures": [10 * (n + 1) for n in range(count)],
        "last_loss": [1.0] * count,
        "elements": [8.0] * count,
        "gap": gaps,
        "p": [0.5] * count,
        "verdict": ["memorized" if n in memorized else "learned" for n in range(count)],
        "reason": [""] * count,
        "onset_step": [5 + n if n in memorized else -1 for n in range(count)],
        **more,
    }
    pq.write_table(pa.table(columns), path)
    return RunSamples(path)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "samples.parquet"


def ids(listed):
    return [each.id for each in listed]


def test_memorized_samples_come_first_then_larger_gaps_then_those_not_measured(file):
    samples = ledger(file, [NAN, 3.0, 1.0, 2.0, 9.0], memorized=(2, 3))
    assert ids(samples.most_memorized(9)) == [103, 102, 104, 101, 100]
    assert ids(samples.most_memorized(2)) == [103, 102]


def test_what_is_not_known_is_none(file):
    [sample] = ledger(
        file, [NAN], first_row=[-1], rows=pa.array([0], pa.int16()), source=pa.array([None], pa.string())
    ).most_memorized(1)
    assert (sample.gap, sample.first_row, sample.more_rows, sample.source, sample.name, sample.onset_step) == (
        None,
        None,
        0,
        None,
        None,
        None,
    )
    assert json.loads(as_json([sample], [None]))[0]["gap"] is None


def test_rows_names_and_sources_are_listed(file):
    more = {"first_row": [0, 7], "rows": [1, 4], "source": ["web", "books"], "sample_name": ["a", None]}
    first, second = ledger(file, [2.0, 1.0], **more).most_memorized(2)
    assert (first.first_row, first.more_rows, first.source, first.name) == (0, 0, "web", "a")
    assert (second.first_row, second.more_rows, second.source, second.name) == (7, 3, "books", None)


def test_a_source_is_found_by_its_label_also_where_labels_are_numbers(file):
    samples = ledger(file, [1.0, 2.0, 3.0], source=["web", None, "web"])
    assert ids(samples.most_memorized(9, samples.of_source("web"))) == [102, 100]
    samples = ledger(file, [1.0, 2.0, 3.0], source=[4, 5, 4])
    assert ids(samples.most_memorized(9, samples.of_source("5"))) == [101]


def test_an_unknown_source_is_answered_with_those_that_there_are(file):
    with pytest.raises(ValueError, match=r"of source `wbe`; did you mean `web`\? The run has `books`, `web`$"):
        ledger(file, [1.0, 2.0], source=["web", "books"]).of_source("wbe")
    many = ledger(file, [0.0] * 1000, source=[f"customer {n}" for n in range(1000)])
    with pytest.raises(ValueError, match=r"`customer 0`, .* and 990 more$"):
        many.of_source("zzz")
    with pytest.raises(ValueError, match=r"has no sources\. A run records them from batch"):
        ledger(file, [1.0]).of_source("web")


def test_a_family_adds_up_its_texts_and_is_shown_by_the_one_with_the_largest_gap(file):
    samples = ledger(
        file,
        [1.0, 5.0, NAN, 2.0, 3.0, 9.0],
        memorized=(1, 4),
        family=pa.array([0, 0, 0, 3, 4, -1], pa.int32()),
        elements=[8.0, 24.0, 50.0, 8.0, 8.0, 8.0],
    )
    [family], count = samples.largest_families(9)
    assert count == 1 and (family.texts, family.memorized, family.exposures) == (3, 1, 60)
    assert family.gap == pytest.approx((8 * 1 + 24 * 5) / 32) and family.onset_step == 6
    assert family.member.id == 101


def test_families_are_sorted_by_gap_and_those_not_measured_come_last(file):
    family = [0, 0, 2, 2, 4, 4]
    samples = ledger(file, [1.0, 1.0, NAN, NAN, 2.0, 2.0], family=family)
    listed, count = samples.largest_families(9)
    assert count == 3 and [each.member.id for each in listed] == [104, 100, 102] and listed[2].gap is None
    assert len(samples.largest_families(1)[0]) == 1 and samples.largest_families(1)[1] == 3


def test_a_family_counts_with_all_its_texts_where_one_is_of_the_source(file):
    family, source = [0, 0, 2, 2], ["web", "books", "books", "books"]
    samples = ledger(file, [1.0, 3.0, 2.0, 2.0], family=family, source=source)
    [family], count = samples.largest_families(9, samples.of_source("web"))
    assert count == 1 and family.texts == 2 and family.member.id == 101


def test_a_run_without_families_says_so(file):
    with pytest.raises(ValueError, match=r"has no families: that run did not look"):
        ledger(file, [1.0]).largest_families(1)
    assert ledger(file, [1.0, 2.0], family=[-1, -1]).largest_families(1) == ([], 0)


def test_a_ledger_without_samples_has_none(file):
    samples = ledger(file, pa.array([], pa.float32()), family=pa.array([], pa.int32()))
    assert samples.most_memorized(5) == [] and samples.largest_families(5) == ([], 0)


def test_a_ledger_of_before_sources_and_families_is_read():
    samples = RunSamples(OLD / "samples.parquet")
    words = pq.read_table(OLD / "samples.parquet").to_pylist()
    expected = sorted(words, key=lambda row: (row["verdict"] != "memorized", -row["gap"]))
    assert ids(samples.most_memorized(16)) == [row["sample_id"] for row in expected]
    assert not samples.has_row_numbers_as_ids


def test_ids_may_be_rows_only_if_all_are_small_and_none_has_a_name(file):
    assert ledger(file, [1.0]).has_row_numbers_as_ids
    assert not ledger(file, [1.0], sample_name=["a"]).has_row_numbers_as_ids
    assert not ledger(file, [1.0, 1.0], sample_id=[5, -5]).has_row_numbers_as_ids
    assert not ledger(file, [1.0, 1.0], sample_id=[5, 2**62]).has_row_numbers_as_ids


def test_the_ledger_of_a_run_is_found_by_its_folder_its_report_and_the_file_itself(tmp_path):
    folder = tmp_path / "memsink_report_files" / "ledger"
    folder.mkdir(parents=True)
    report = tmp_path / "memsink_report.md"
    report.touch()
    ledger(folder / "samples.parquet", [1.0])
    for run in (tmp_path, report, folder, folder.parent, folder / "samples.parquet"):
        assert samples_file(run) == folder / "samples.parquet"


def test_the_copy_without_names_is_not_taken_for_a_second_run(tmp_path):
    for folder in ("report_files/ledger", "report_files/without_names/report_files/ledger"):
        (tmp_path / folder).mkdir(parents=True)
        ledger(tmp_path / folder / "samples.parquet", [1.0])
    assert samples_file(tmp_path) == tmp_path / "report_files/ledger/samples.parquet"


def test_no_ledger_several_and_another_file_are_different_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*nowhere\. Name the folder"):
        samples_file(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no ledger\. Name the folder that memsink_report.md is in"):
        samples_file(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}_files" / "ledger").mkdir(parents=True)
        ledger(tmp_path / f"{name}_files" / "ledger" / "samples.parquet", [1.0])
    with pytest.raises(FileNotFoundError, match=r"ledgers of 2 runs; name one of them: .*a_files.*b_files"):
        samples_file(tmp_path)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"text": ["a"]}), other)
    with pytest.raises(ValueError, match=r"is no ledger of samples: it has no column sample_id"):
        RunSamples(other)
    other.write_text("no table")
    with pytest.raises(ValueError, match=r"other\.parquet is not Parquet"):
        RunSamples(other)
