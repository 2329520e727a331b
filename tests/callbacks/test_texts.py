"""A text is one sample wherever it stands: repeats that are rows of their own count as visits of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_memsink import LossTracker, SampleGradientMask, memsink
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.hashing import content_ids
from tests.support.small_runs import CANARIES, LENGTH, Rows, TinyLM, chain, control_loader, fit, noise

COPIES = 64
TRAIN = torch.cat([chain(3000, seed=11), CANARIES.repeat(COPIES, 1)])
CONTROLS = torch.cat([chain(150, seed=200), noise(150, seed=300)])


def said(model: TinyLM) -> int:
    """Canaries that are continued word for word from their first four tokens."""
    texts = CANARIES[:, :4]
    with torch.no_grad():
        while texts.shape[1] < LENGTH:
            logits = model.logits(torch.cat([texts, texts[:, :1]], 1))[:, -1]
            texts = torch.cat([texts, logits.argmax(-1, keepdim=True)], 1)
    return int((texts == CANARIES).all(1).sum())


@pytest.mark.parametrize("epochs", [1, 2])
def test_repeated_rows_are_found_and_held_within_an_epoch(epochs, capsys):
    found = {}
    for is_held in (False, True):
        model = TinyLM()
        loader = DataLoader(Rows(TRAIN), 32, shuffle=True, generator=torch.Generator().manual_seed(0))
        callbacks = memsink(SampleGradientMask() if is_held else None, path=None)
        run, _ = fit(
            *(callbacks, model),
            train=loader,
            controls=control_loader(CONTROLS),
            max_epochs=epochs,
            val_check_interval=10,
        )
        ledger = Ledger.of(run)
        rows = ledger.losses.index.find(content_ids({"input_ids": CANARIES}))
        assert ledger.losses.exposures[rows].tolist() == [COPIES * epochs] * len(CANARIES)
        assert ledger.losses.rows[rows].tolist() == [COPIES] * len(CANARIES)
        found[is_held] = ledger.flags.memorized[rows].tolist(), said(model), ledger.losses.last_loss[rows]
    assert found[False][0] == [True] * len(CANARIES) and found[False][1] > 0
    assert found[True][1] == 0 and bool((found[True][2] > 3).all())  # plain: below .6
    capsys.readouterr()


def tracked(**options: object) -> LossTracker:
    tracker = LossTracker(**options)
    tokens = torch.cat([chain(20, seed=1), chain(20, seed=1)[:5], chain(8, seed=2)])
    fit([tracker], train=DataLoader(Rows(tokens), 8, shuffle=True), max_epochs=2, val_check_interval=2)
    return tracker


def test_a_text_remembers_its_first_row_and_how_many_there_are():
    table = tracked().table
    assert len(table) == 28
    texts = chain(20, seed=1)
    rows = table.index.find(content_ids({"input_ids": texts}))
    assert table.rows[rows].tolist() == [2] * 5 + [1] * 15 and table.exposures[rows].tolist() == [4] * 5 + [2] * 15
    first: Tensor = table.first_row[rows]
    assert all(row in (n, n + 20) for n, row in enumerate(first.tolist()[:5]))
    assert first.tolist()[5:] == list(range(5, 20))


def test_rows_are_samples_for_whom_asks_for_them_and_what_they_share_is_said():
    with pytest.warns(UserWarning, match=r"5 texts come under several ids, 10 ids together \(one text under 2\)"):
        table = tracked(identity="index").table
    assert sorted(table.ids.tolist()) == list(range(33)) and set(table.exposures.tolist()) == {2}


def test_a_ledger_that_named_rows_goes_on_naming_rows():
    """Written by a version whose default was the row: with other ids every sample would come twice."""
    with pytest.warns(UserWarning, match="come under several ids"):
        old = tracked(identity="index")
    state = {name: part for name, part in old.state_dict().items() if name != "identity"}
    tracker = LossTracker()
    tracker.load_state_dict(state)
    tokens = torch.cat([chain(20, seed=1), chain(20, seed=1)[:5], chain(8, seed=2)])
    with pytest.warns(UserWarning, match="come under several ids"):
        fit([tracker], train=DataLoader(Rows(tokens), 8), max_epochs=1, val_check_interval=2)
    assert sorted(tracker.table.ids.tolist()) == list(range(33)) and set(tracker.table.exposures.tolist()) == {3}
