"""Documents packed into rows have the losses, exposures and verdicts that they have in rows of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask
from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.ledger import Ledger
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.mitigation.sample_weights import SampleWeights
from tests.support.packed import LAYOUTS, VOCABULARY, PackedGPT, flattened, loader, packed, texts, unpacked
from tests.support.packed_runs import NUMBERS, STEPS, Model, alone, assert_same, fit, id_of, loss_of, visits

CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-4}


# Layouts ------------------------------------------------------------------------------------------------------------


def repeated_steps() -> list[list[Tensor]]:
    """24 steps of documents shown once and of four that every step has."""
    canaries = texts(6, seed=90)[2:]
    generator = torch.Generator().manual_seed(8)
    steps = []
    for step in range(24):
        documents = [*texts(8, seed=100 + step)[2:], *canaries]
        steps.append([documents[place] for place in torch.randperm(len(documents), generator=generator).tolist()])
    return steps


@pytest.fixture(scope="module")
def trained_unpacked() -> Trainer:
    return train_on_repeats("unpacked", "unpacked")


def train_on_repeats(layout: str, of_controls: str) -> Trainer:
    controls = [each for each in texts(300, seed=70) if len(each) > 1]
    model = Model(lr=4e-2)
    return fit(
        model,
        loader(repeated_steps(), layout),
        loader([controls[:150], controls[150:]], of_controls),
        MemorizationDetector(k=4, recheck=0),
        max_epochs=4,
        val_check_interval=8,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_on_packed_documents_leaves_the_same_losses_exposures_and_verdicts(trained_unpacked, layout):
    run = train_on_repeats(layout, layout)
    assert_same(visits(run), visits(trained_unpacked))
    found, expected = (Ledger.of(each) for each in (run, trained_unpacked))
    assert_close(found.controls.latest, expected.controls.latest, **CLOSE)
    order, wanted = (each.losses.ids.argsort() for each in (found, expected))
    assert_close(found.flags.gap[order].float(), expected.flags.gap[wanted].float(), rtol=0, atol=2e-3, equal_nan=True)
    memorized = set(found.losses.ids[found.flags.memorized].tolist())
    assert memorized == set(expected.losses.ids[expected.flags.memorized].tolist())
    assert memorized and memorized <= {id_of(each) for each in texts(6, seed=90)[2:]}
    assert int((found.flags.verdict == Verdict.UNSEEN).sum()) == 0


def test_documents_packed_anew_keep_their_ids():
    every = [each for step in STEPS for each in step]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(4)).tolist()
    anew = [[every[place] for place in order[:9]], [every[place] for place in order[9:]]]
    run = fit(Model(), loader([*STEPS, *anew], "packed"), max_epochs=1)
    assert_same(visits(run), alone(Model(), STEPS))


# Holding one document -----------------------------------------------------------------------------------------------


class Held(SampleGradientMask):
    """As if matched controls said that the third and the last document of a batch are below the set point."""

    def _hold(self, ledger: Ledger, opened: OpenLoss, ids: Tensor) -> SampleWeights:
        weights = torch.ones(len(ids))
        weights[[2, -1]] = 0.0
        return SampleWeights(weights, opened.shares())


class Gradients(Model):
    """Keeps the gradients of its only step."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.kept = torch.cat([weight.grad.flatten() for weight in self.parameters()])


@pytest.mark.parametrize("lay", [unpacked, packed, flattened])
def test_hold_on_a_document_leaves_the_gradients_of_its_neighbours_as_they_were(lay):
    documents = STEPS[0]
    model, mask = Gradients(), Held()
    held_out = [loader([texts(40, seed=3)], "unpacked")]
    fit(model, DataLoader([lay(documents)], batch_size=None), held_out[0], callbacks=[mask], max_epochs=1)
    fresh = Model().double()
    total = sum(len(each) - 1 for each in documents)
    expected = torch.zeros_like(model.kept)
    for place, each in enumerate(documents):
        if place in (2, len(documents) - 1):
            continue
        for token in range(1, len(each)):  # brute force: one backward a token
            fresh.zero_grad()
            labels = torch.full((1, len(each)), -100)
            labels[0, token] = each[token]
            PackedGPT.training_step(fresh, {**unpacked([each]), "labels": labels}, 0).backward()
            expected += torch.cat([weight.grad.flatten() for weight in fresh.parameters()]) / total
    assert float(expected.abs().max()) > 1e-3
    assert_close(model.kept, expected, rtol=0, atol=1e-6)


# Bad input ----------------------------------------------------------------------------------------------------------


def test_a_document_longer_than_a_row_is_one_that_its_tokens_name():
    """It goes on in the next row, where the model does not see its beginning: one visit, the mean over tokens."""
    long, short = torch.arange(30) % VOCABULARY, torch.arange(5)
    first, rest = long[:20], long[20:]
    batch = packed([first, rest, short], 20)
    assert len(batch["input_ids"]) == 3  # the last one is of padding only
    ids = torch.full_like(batch["input_ids"], -1)
    ids[0], ids[1, :10], ids[1, 10:15] = 7, 7, 8
    named = {name: batch[name] for name in ("input_ids", "position_ids", "labels", "attention_mask")}
    run = fit(Model(), DataLoader([{**named, NUMBERS: batch["document_ids"], "sample_id": ids}], batch_size=None))
    model = Model().double()
    losses = [float(loss_of(model, part)) for part in (first, rest, short)]
    assert_same(visits(run), {7: (2, (19 * losses[0] + 9 * losses[1]) / 28), 8: (2, losses[2])})


def test_ids_that_disagree_with_the_segments_are_said():
    batch = {**packed(STEPS[0]), "sample_id": [1, 2, 3, 4, 5, 6]}
    with pytest.raises(RuntimeError, match=r"holds 6 ids for 7 documents in 5 rows, found in document_ids"):
        fit(Model(), DataLoader([batch], batch_size=None))


def test_ids_of_rows_are_of_rows_and_that_is_said():
    batch = packed(STEPS[0])
    rows = len(batch["input_ids"])
    with pytest.warns(UserWarning, match=rf"names the {rows} rows of a batch, in which document_ids shows 7 documents"):
        fit(Model(), DataLoader([{**batch, "sample_id": list(range(rows))}], batch_size=None))


class SkipsNothing(Model):
    """Trains on no batch without targets, as the mean over none is no number."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if bool((batch["labels"] >= 0).any()) else None


@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
@pytest.mark.parametrize("name", ["flattened", "padding"])
def test_batches_of_no_document_are_passed_over(name):
    empty = flattened([]) if name == "flattened" else packed([])
    batches = [packed(STEPS[0]), empty, packed(STEPS[1])]
    run = fit(SkipsNothing(), DataLoader(batches, batch_size=None))
    assert_same(visits(run), alone(Model(), STEPS[:2]))


def test_losses_that_are_not_finite_are_those_of_their_document_only():
    class Broken(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits, labels = self(batch)[:, :-1], batch["labels"][:, 1:]
            each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            second = batch["document_ids"][:, 1:] == 2
            return torch.where(second, torch.inf, each)[labels >= 0].mean()

    documents = [each for each in STEPS[0] if len(each) > 1][:3]
    run = fit(Broken(), DataLoader([packed(documents, 60)], batch_size=None), max_epochs=1)
    found = visits(run)
    expected = alone(Model(), [documents], epochs=1)
    expected.pop(id_of(documents[2]))
    assert torch.isnan(torch.tensor(found.pop(id_of(documents[2]))[1]))
    assert_same(found, expected)
