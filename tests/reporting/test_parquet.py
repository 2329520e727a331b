"""The ledger on disk and back."""

import pyarrow.parquet as pq
import pytest
import torch

from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.ledger import Ledger
from lightning_memsink.reporting.parquet import detect, read_ledger, write_ledger
from lightning_memsink.samples.sources import OTHER_CODE
from tests.support.small_runs import fit, watch


@pytest.fixture(scope="module")
def ledger():
    return Ledger.of(fit(watch(), max_epochs=4)[0])


def test_what_is_written_comes_back_to_the_bit(ledger, tmp_path):
    write_ledger(tmp_path, ledger.losses, ledger.controls, ledger.flags)
    table, controls = read_ledger(tmp_path)
    assert repr(table.state_dict()) == repr(ledger.losses.state_dict())
    assert {k: repr(v) for k, v in controls.state_dict().items()} == {
        k: repr(v) for k, v in ledger.controls.state_dict().items()
    }


def test_the_detector_works_on_the_files_alone(ledger, tmp_path):
    """What is memorized at the end of the run is flagged again from disk."""
    write_ledger(tmp_path, ledger.losses, ledger.controls, ledger.flags)
    flags, evaluation = detect(tmp_path)
    live = ledger.flags.memorized
    assert flags.memorized[live].all() and evaluation.memorized == int(flags.memorized.sum())
    # One evaluation flags more samples than two in a row; those that it adds have smaller gaps.
    assert (flags.gap[flags.memorized & ~live] < flags.gap[live].min()).all()
    words = pq.read_table(tmp_path / "samples.parquet")["verdict"].to_pylist()
    assert words == [Verdict(code).word for code in ledger.flags.verdict.tolist()]


def test_a_ledger_without_samples_or_features_can_be_written(tmp_path):
    from lightning_memsink.detection.verdicts import Flags
    from lightning_memsink.samples.control_table import ControlTable
    from lightning_memsink.samples.loss_table import LossTable

    write_ledger(tmp_path, LossTable(), ControlTable(), Flags())
    table, controls = read_ledger(tmp_path)
    assert len(table) == len(controls) == 0


def test_files_that_are_no_ledger_are_refused(ledger, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Found no samples.parquet in .*write_ledger writes it"):
        read_ledger(tmp_path)
    write_ledger(tmp_path, ledger.losses, ledger.controls, ledger.flags)
    pq.write_table(
        pq.read_table(tmp_path / "samples.parquet").replace_schema_metadata(None), tmp_path / "samples.parquet"
    )
    with pytest.raises(ValueError, match=r"samples.parquet is no memsink ledger of schema 1. Write it again"):
        read_ledger(tmp_path)


def test_sources_come_back_as_labels_and_as_the_same_codes(tmp_path):
    from lightning_memsink.samples.control_table import ControlTable
    from tests.support.sourced import sourced

    table, flags = sourced({"b": {Verdict.LEARNED: 2}, None: {Verdict.HARD: 1}, "a|<b>": {Verdict.MEMORIZED: 1}})
    table.source_names.codes(["never written"])
    table.write("source", torch.tensor([0]), torch.tensor([OTHER_CODE]))
    for name, values in [("first_row", [2**40, -1]), ("rows", [3, 1]), ("family", [1, 1]), ("window_tokens", [5, 5])]:
        table.write(name, torch.tensor([1, 2]), torch.tensor(values))
    write_ledger(tmp_path, table, ControlTable(), flags)
    written = pq.read_table(tmp_path / "samples.parquet")
    assert written["source"].to_pylist() == ["other", "b", None, "a|<b>"]
    assert written["first_row"].to_pylist() == [-1, 2**40, -1, -1] and written["rows"].to_pylist() == [0, 3, 1, 0]
    assert "window_tokens" not in written.column_names
    again, _ = read_ledger(tmp_path)
    columns = table.state_dict()["columns"]
    del columns["window_tokens"]
    assert {k: repr(v) for k, v in again.state_dict()["columns"].items()} == {k: repr(v) for k, v in columns.items()}
    assert again.source_names.labels == table.source_names.labels


def test_ledgers_without_the_columns_of_texts_have_none_after_reading(ledger, tmp_path):
    write_ledger(tmp_path, ledger.losses, ledger.controls, ledger.flags)
    names = pq.read_table(tmp_path / "samples.parquet").column_names
    assert ("source" in names) == ("source" in ledger.losses.columns)
    assert read_ledger(tmp_path)[0].columns.keys() == ledger.losses.columns.keys()
