"""The ledger on disk and back."""

import pyarrow.parquet as pq
import pytest

from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.ledger import Ledger
from lightning_memsink.reporting.parquet import detect, read_ledger, write_ledger
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
