"""The slots of a ledger: one writer each, read by type, closed by their writer."""

from __future__ import annotations

import gc
import subprocess
import sys
from weakref import ref

import pytest
from lightning.pytorch import Callback, Trainer

from lightning_memsink import Ledger
from lightning_memsink.samples.control_table import ControlTable
from tests.support.small_runs import fit, watch


def test_a_slot_that_nothing_writes_is_none_when_got_and_an_error_when_required():
    ledger = Ledger()
    assert ledger.get(Ledger.sinks) is None
    with pytest.raises(RuntimeError, match=r"No callback of this Trainer writes `flags`. Add MemorizationDetector\(\)"):
        ledger.require(Ledger.flags)
    ledger.controls = ControlTable()
    ledger.require(Ledger.controls)
    assert ledger.get(Ledger.controls) is ledger.controls


def test_a_misspelt_slot_is_an_attribute_error():
    with pytest.raises(AttributeError, match="atribution"):
        Ledger().get(Ledger.atribution)


def test_mypy_knows_the_type_of_a_slot(tmp_path):
    program = tmp_path / "reader.py"
    program.write_text(
        "from lightning_memsink.ledger import Ledger\n"
        "ledger = Ledger()\n"
        "reveal_type(ledger.get(Ledger.sinks))\n"
        "ledger.require(Ledger.losses)\n"
        "ledger.get(Ledger.atribution)\n"
    )
    flags = ["--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
    found = subprocess.run([sys.executable, "-m", "mypy", *flags, program], capture_output=True, text=True).stdout
    assert "localization.sinks.Sinks | None" in found and '"type[Ledger]" has no attribute "atribution"' in found, found


class Writer(Callback):
    def __init__(self) -> None:
        self.closed: list[Ledger] = []

    def close(self, ledger: Ledger) -> None:
        self.closed.append(ledger)


def test_the_writer_ends_its_evaluation_when_a_reader_asks():
    ledger, writer = Ledger(), Writer()
    ledger.close(Ledger.controls)  # no writer: nothing to end
    ledger.close_with(Ledger.controls, writer.close)
    ledger.close(Ledger.controls)
    assert writer.closed == [ledger]
    gone = ref(writer)
    del writer
    gc.collect()
    assert gone() is None, "a ledger must not keep callbacks, and through them a Trainer, alive"
    ledger.close(Ledger.controls)


def test_a_ledger_goes_with_its_trainer():
    run, model = fit(watch(), max_epochs=1)
    ledger = ref(Ledger.of(run))
    assert isinstance(run, Trainer)
    del run, model
    gc.collect()
    assert ledger() is None
