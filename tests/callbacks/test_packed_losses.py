"""Whatever says where the documents of a row are, and however their loss is computed, it is that of each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_memsink import per_sample
from lightning_memsink.ledger import Ledger
from tests.support.packed import LAYOUTS, LONGEST, VOCABULARY, flattened, loader, packed, texts, unpacked
from tests.support.packed_runs import (
    NUMBERS,
    SAID,
    STEPS,
    Model,
    OwnPlaces,
    alone,
    assert_same,
    changed,
    ends,
    fit,
    id_of,
    loss_of,
    only,
    visits,
)

# What says where documents are --------------------------------------------------------------------------------------


@pytest.mark.parametrize("lay", [packed, flattened])
@pytest.mark.parametrize("said", SAID)
def test_whatever_says_the_documents_their_losses_are_those_alone(said, lay):
    model = OwnPlaces()
    segments = {"segments": lambda batch: batch[NUMBERS]} if said == "segments" else {}
    run = fit(model, changed(STEPS, lay, SAID[said]), **segments)
    assert_same(visits(run), alone(Model(), STEPS))


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens", "cu_seqlens"])
@pytest.mark.parametrize("joined", [False, True], ids=["one row", "no axis of rows"])
def test_places_where_documents_begin_say_them(name, joined):
    def change(batch: dict[str, Tensor]) -> dict[str, Any]:
        made = only(batch, **{name: ends(batch)})
        return {key: value[0] if joined and value.ndim > 1 else value for key, value in made.items()}

    assert_same(visits(fit(OwnPlaces(), changed(STEPS, flattened, change))), alone(Model(), STEPS))


# Losses -------------------------------------------------------------------------------------------------------------


class ByHand(Model):
    """log_softmax, the targets' picked, and a mean over those that count."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels = torch.atleast_2d(batch["labels"])[:, 1:]
        likelihood = self(batch)[:, :-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        counts = labels >= 0
        return -(likelihood * counts).sum() / counts.sum()


class Summed(Model):
    """A sum over tokens, divided by their number."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels = torch.atleast_2d(batch["labels"])[:, 1:].flatten()
        loss = F.cross_entropy(self(batch)[:, :-1].flatten(0, 1), labels, reduction="sum")
        return loss / (labels >= 0).sum()


class Unreduced(Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels = torch.atleast_2d(batch["labels"])[:, 1:]
        each = F.cross_entropy(self(batch)[:, :-1].transpose(1, 2), labels, reduction="none")
        return each[labels >= 0].mean()


class Shifted(Model):
    """Labels are the next tokens already."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        following = F.pad(torch.atleast_2d(batch["labels"])[:, 1:], (0, 1), value=-100)
        return F.cross_entropy(self(batch).flatten(0, 1), following.flatten())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [ByHand, Summed, Unreduced, Shifted])
def test_losses_of_other_forms(kind, layout):
    run = fit(kind(), loader(STEPS, layout))
    assert_same(visits(run), alone(Model(), STEPS))


def shifted_in_the_batch(batch: dict[str, Tensor]) -> dict[str, Any]:
    return only(batch, labels=F.pad(batch["labels"][:, 1:], (0, 1), value=-100), document_ids=batch["document_ids"])


class ShiftedBefore(OwnPlaces):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch).flatten(0, 1), batch["labels"].flatten())


def test_labels_that_the_batch_has_shifted_already():
    run = fit(ShiftedBefore(), changed(STEPS, packed, shifted_in_the_batch))
    assert_same(visits(run), alone(Model(), STEPS))


END, PAD = 0, 1


def ended(documents: list[Tensor]) -> list[Tensor]:
    """With a token ``END`` behind each, and without ``PAD``."""
    return [torch.cat([each.clamp(min=2), torch.tensor([END])]) for each in documents]


def pair(documents: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``x`` and ``y`` ``[R, T]`` of documents, with padding at each row's end; ``y`` is the next token, of whatever."""
    batch = packed(ended(documents), LONGEST - 1)
    x = F.pad(batch["input_ids"].masked_fill(batch["attention_mask"] == 0, PAD), (0, 1), value=PAD)
    return x, F.pad(x[:, 1:], (0, 1), value=PAD)


def by_end(x: Tensor) -> Tensor:
    """Numbers of the documents, -1 for padding."""
    return F.pad((x == END).long().cumsum(1)[:, :-1], (1, 0)).masked_fill(x == PAD, -1)


class Pairs(Model):
    """Of one stream, cut into rows: what a document's last token predicts of the next one is no part of its loss."""

    def logits(self, x: Tensor) -> Tensor:
        numbers = by_end(x)
        places = torch.arange(x.shape[1]).expand_as(x)
        begins = torch.ones_like(numbers, dtype=torch.bool)
        begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        places = places - torch.where(begins, places, 0).cummax(1).values
        return self({"input_ids": x, "position_ids": places, NUMBERS: numbers})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.logits(x).flatten(0, 1), y.flatten(), ignore_index=PAD)


class PairsMasked(Pairs):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.logits(x).flatten(0, 1), y.masked_fill(x == PAD, -100).flatten())


class PairsByHand(Pairs):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        each = F.cross_entropy(self.logits(x).transpose(1, 2), y, reduction="none")
        counts = x != PAD
        return (each * counts).sum() / counts.sum()


@pytest.mark.parametrize("kind", [Pairs, PairsMasked, PairsByHand])
def test_pairs_of_tokens_and_next_tokens_with_segments(kind):
    run = fit(kind(), DataLoader([pair(step) for step in STEPS], batch_size=None), segments=lambda b: by_end(b[0]))
    assert_same(visits(run), alone(Model(), [ended(step) for step in STEPS]))


class WholeLabels(OwnPlaces):
    """Labels are the text, each document's first token included, and padding is masked out by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        ids, counts = batch["input_ids"], batch["attention_mask"][:, 1:]
        each = F.cross_entropy(self(batch)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        return (each * counts).sum() / counts.sum()


@pytest.mark.parametrize("lay", [packed, flattened])
def test_labels_that_are_the_text_itself(lay):
    """A document's first token, which a packed row predicts from the document before, is no part of its loss."""
    model = WholeLabels()
    run = fit(model, changed(STEPS, lay, SAID["positions and a mask"]))
    assert_same(visits(run), alone(Model(), STEPS))


class Reports(Model):
    """Its own losses of documents, by `per_sample`."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels, numbers = batch["labels"][:, 1:], batch["document_ids"]
        each = F.cross_entropy(self(batch)[:, :-1].transpose(1, 2), labels, reduction="none", ignore_index=-100)
        count = numbers.amax(1).clamp(min=-1) + 1
        flat = (numbers + (count.cumsum(0) - count)[:, None])[:, 1:]
        counts = labels >= 0
        sums = each.new_zeros(int(count.sum())).index_add(0, flat[counts], each[counts])
        elements = torch.bincount(flat[counts], minlength=len(sums))
        losses = sums / elements.clamp(min=1)
        return per_sample(losses, batch["names"]) if "names" in batch else per_sample(losses)


@pytest.mark.parametrize("lay", [packed, flattened])
def test_a_step_reports_a_loss_for_each_document(lay):
    """That of a document of one token is then a 0 that the step itself has said."""
    run = fit(Reports(), changed(STEPS, lay, lambda batch: batch))
    expected = {id: (n, 0.0 if loss != loss else loss) for id, (n, loss) in alone(Model(), STEPS).items()}
    assert_same(visits(run), expected)


@pytest.mark.parametrize("lay", [packed, flattened])
def test_a_step_reports_ids_of_documents_too(lay):
    names, batches = {}, []
    for step, documents in enumerate(STEPS):
        numbers = torch.arange(len(documents)) + 100 * (step + 1)
        names |= {id_of(each): number for each, number in zip(documents, numbers.tolist(), strict=True)}
        batches.append({**lay(documents), "names": numbers})
    run = fit(Reports(), DataLoader(batches, batch_size=None))
    expected = {names[id]: (n, 0.0 if loss != loss else loss) for id, (n, loss) in alone(Model(), STEPS).items()}
    assert_same(visits(run), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_micro_batches_that_are_accumulated(layout):
    run = fit(Model(), loader(STEPS, layout), accumulate_grad_batches=2)
    assert_same(visits(run), alone(Model(), STEPS))


@pytest.mark.filterwarnings("ignore:.*have the content of training samples")
def test_controls_are_packed_documents_too():
    held_out = [texts(30, seed=60), texts(30, seed=61)]
    run = fit(Model(), loader(STEPS, "packed"), loader(held_out, "packed"))
    controls = Ledger.of(run).controls
    expected = alone(Model(), held_out)
    found = dict(zip(controls.ids.tolist(), controls.latest.tolist(), strict=True))
    assert found.keys() <= expected.keys() and len(found) >= 58
    for id, loss in found.items():
        assert loss == pytest.approx(expected[id][1], abs=1e-4, nan_ok=True)


# Ids ----------------------------------------------------------------------------------------------------------------


def keyed(documents: list[Tensor], numbers: list[int], form: str) -> dict[str, Any]:
    batch = packed(documents)
    owners = batch["document_ids"]
    of_rows = [int(row.max()) + 1 for row in owners]
    nested, rest = [], list(numbers)
    for count in of_rows:
        nested.append(rest[:count])
        rest = rest[count:]
    if form == "list":
        return {**batch, "sample_id": numbers}
    if form == "tensor":
        return {**batch, "sample_id": torch.tensor(numbers)}
    if form == "list a row":
        return {**batch, "sample_id": nested}
    by_token = torch.full_like(owners, -1)
    for row, own in enumerate(nested):
        for place, number in enumerate(own):
            by_token[row][owners[row] == place] = number
    return {**{name: value for name, value in batch.items() if name != "document_ids"}, NUMBERS: owners,
            "sample_id": by_token}  # fmt: skip


@pytest.mark.parametrize("form", ["list", "tensor", "list a row", "by token"])
def test_own_ids_of_documents(form):
    batches, names = [], {}
    for step, documents in enumerate(STEPS):
        numbers = [1000 * step + 7 * place for place in range(len(documents))]
        names |= {id_of(each): number for each, number in zip(documents, numbers, strict=True)}
        batches.append(keyed(documents, numbers, form))
    run = fit(Model(), DataLoader(batches, batch_size=None))
    assert_same(visits(run), {names[id]: visit for id, visit in alone(Model(), STEPS).items()})


def test_windows_of_a_long_document_are_one_visit_a_pass_whose_loss_is_the_mean_over_tokens():
    """Windows stand in one batch and in two; each is read without what is before it."""
    longs = [torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)) for n in (50, 31, 64)]
    windows = [(number, part) for number, text in enumerate(longs) for part in text.split(20)]
    batches = []
    for begin in range(0, len(windows), 3):
        some = windows[begin : begin + 3]
        batch = unpacked([part for _, part in some])
        kept = {name: batch[name] for name in ("input_ids", "position_ids", "labels", "attention_mask")}
        batches.append({**kept, NUMBERS: batch["document_ids"], "sample_id": torch.tensor([n for n, _ in some])})
    run = fit(Model(), DataLoader(batches, batch_size=None))
    model = Model().double()
    expected = {}
    for number, text in enumerate(longs):
        parts = [part for part in text.split(20) if len(part) > 1]
        losses = [float(loss_of(model, part)) * (len(part) - 1) for part in parts]
        expected[number] = 2, sum(losses) / sum(len(part) - 1 for part in parts)
    assert_same(visits(run), expected)
