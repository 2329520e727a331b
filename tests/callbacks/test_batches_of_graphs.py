"""A batch of graphs begins with the nodes of them all: a mitigation counts samples by their ids, not by its rows."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.loss_truncation import LossTruncation
from lightning_memsink.callbacks.sink_dropout import SinkDropout
from lightning_memsink.callbacks.sink_gradient_mask import SinkGradientMask
from lightning_memsink.localization.sinks import Sinks
from tests.support.graphs import BATCH, GRAPHS, OfGraphs, collated, graphs
from tests.support.small_runs import trainer

READOUT = Sinks({"readout.2": torch.arange(4)}, {"readout.2": torch.ones(4)}, {"readout.2": 16})


@pytest.mark.parametrize(
    ("mitigation", "acted"),
    [
        (LossTruncation(0.2, window=16), lambda times: 0 < times < 2 * GRAPHS),
        (SinkDropout(who="all", sinks=READOUT), lambda times: times == 2 * GRAPHS),
        (SinkGradientMask(sinks=READOUT), lambda times: times == 2 * GRAPHS),
    ],
    ids=lambda each: type(each).__name__,
)
@pytest.mark.parametrize("tracker_first", [True, False])
def test_samples_are_graphs(mitigation, acted, tracker_first, recwarn):
    crew = [LossTracker(), mitigation] if tracker_first else [mitigation, LossTracker()]
    before = mitigation.interventions.total("visits"), mitigation.interventions.total("acted")
    trainer(crew, max_epochs=2, val_check_interval=None).fit(
        OfGraphs(), DataLoader(graphs(seed=0), BATCH, collate_fn=collated)
    )
    assert mitigation.interventions.total("visits") - before[0] == 2 * GRAPHS
    assert acted(mitigation.interventions.total("acted") - before[1])
    assert not [str(each.message) for each in recwarn if type(mitigation).__name__ in str(each.message)]
