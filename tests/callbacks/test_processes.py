"""Two processes: what every rank saw is in every rank's ledger."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.hashing import content_ids
from tests.support.small_runs import CANARIES, CONTROLS, TRAIN, Rows, fit, snapshot, watch


class Writes(Callback):
    """Each rank writes down what it knows at the end."""

    def __init__(self, folder):
        self.folder = folder

    def on_fit_end(self, trainer, pl_module):
        ledger = Ledger.of(trainer)
        rows = ledger.losses.index.find(content_ids({"input_ids": CANARIES}))
        facts = {
            "snapshot": snapshot(trainer, pl_module),
            "exposures": int(ledger.losses.exposures.sum()),
            "samples": len(ledger.losses),
            "controls": len(ledger.controls),
            "where": repr((ledger.attribution.state_dict(), str(ledger.sinks))),
            "canaries": ledger.flags.verdict[rows].tolist(),
        }
        torch.save(facts, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.filterwarnings("ignore:.*recommended to use .*sync_dist")
def test_ranks_hold_the_same_ledger_of_all_samples(tmp_path):
    fit(
        [*watch(), SinkLocalizer(every=2), Writes(tmp_path)],
        strategy="ddp_fork",
        devices=2,
        max_epochs=6,
        train=DataLoader(Rows(TRAIN), 8, shuffle=True),
        controls=DataLoader(Rows(CONTROLS), 20),
    )
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one == other
    assert (one["samples"], one["controls"], one["exposures"]) == (204, 120, 6 * len(TRAIN))
    assert "sinks" in one["where"]
    assert one["canaries"] == [Verdict.MEMORIZED] * 4
