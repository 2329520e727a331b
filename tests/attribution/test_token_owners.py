"""Tokens of documents in a module's input: found by its axes, summed and unpacked; effects and norms of documents."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from lightning_memsink.attribution.gradient_norms import GradientNorms, total_squared_norm
from lightning_memsink.attribution.gradient_sketches import GradientSketches
from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.attribution.token_owners import TokenOwners, at_tokens, of_documents, of_tokens
from lightning_memsink.attribution.unit_recorder import UnitRecorder
from lightning_memsink.samples.documents import documents_in
from tests.support.packed import LAYOUTS, PackedGPT, laid_out, texts, unpacked

OWNERS = torch.tensor([[0, 0, 1], [2, -1, -1]])
HIDDEN = torch.arange(30.0).reshape(2, 3, 5)
SUMS = torch.stack([HIDDEN[0, :2].sum(0), HIDDEN[0, 2], HIDDEN[1, 0]])
ARRANGED = {
    "rows first": (HIDDEN, 0, -1),
    "tokens first": (HIDDEN.transpose(0, 1), 1, -1),
    "units in the middle": (HIDDEN.transpose(1, 2), 0, 1),
    "in one": (HIDDEN.reshape(6, 5), 0, -1),
}


@pytest.mark.parametrize(("hidden", "batch_axis", "unit_axis"), ARRANGED.values(), ids=ARRANGED)
def test_tokens_are_found_in_any_order_of_axes(hidden, batch_axis, unit_axis):
    owners = at_tokens(OWNERS, hidden, batch_axis, unit_axis)
    assert torch.equal(of_documents(hidden, owners, 3, unit_axis), SUMS)
    spread = of_tokens(torch.ones(3, 5, dtype=torch.bool), owners, unit_axis)
    assert torch.equal(spread.expand_as(hidden), (owners >= 0).expand_as(hidden))


def test_a_batch_without_an_axis_of_rows_is_one_row():
    flat = OWNERS.reshape(-1)
    for hidden in (HIDDEN.reshape(1, 6, 5), HIDDEN.reshape(6, 5)):
        assert torch.equal(of_documents(hidden, at_tokens(flat, hidden), 3), SUMS)
    assert torch.equal(TokenOwners(flat, 3).unpacked(HIDDEN.reshape(1, 6, 5)), TokenOwners(OWNERS, 3).unpacked(HIDDEN))


@pytest.mark.parametrize(
    "hidden",
    [HIDDEN[:, :2], HIDDEN[:1], HIDDEN.reshape(1, 6, 5), HIDDEN[0], HIDDEN[..., None], HIDDEN.reshape(3, 2, 5)],
)
def test_other_tokens_are_not_guessed(hidden):
    assert at_tokens(OWNERS, hidden) is None and TokenOwners(OWNERS, 3).unpacked(hidden) is None


def test_documents_are_unpacked_in_their_order_with_zeros_behind():
    expected = torch.zeros(3, 2, 5)
    expected[0], expected[1, 0], expected[2, 0] = HIDDEN[0, :2], HIDDEN[0, 2], HIDDEN[1, 0]
    owners = TokenOwners(OWNERS, 3)
    assert torch.equal(owners.unpacked(HIDDEN), expected)
    assert torch.equal(owners.unpacked(HIDDEN.reshape(6, 5)), expected)
    assert torch.equal(owners.unpacked(HIDDEN[..., 0].long(), features=0), expected[..., 0].long())


def test_one_long_document_among_many_short_ones_is_not_unpacked():
    owners = torch.cat([torch.zeros(500, dtype=torch.int64), torch.arange(1, 500)])
    assert not TokenOwners(owners, 500).can_unpack
    assert (
        TokenOwners(torch.arange(500), 500).can_unpack and TokenOwners(torch.zeros(0, dtype=torch.int64), 0).can_unpack
    )


def alone(model: PackedGPT, document: Tensor) -> Tensor:
    """The summed loss of one document by itself."""
    batch = unpacked([document])
    logits = model(batch)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), reduction="sum")


def step(model: PackedGPT, layout: str, documents: list[Tensor]) -> Tensor:
    """The sum of the losses of all tokens."""
    batch = laid_out(layout, documents)
    return model.training_step(batch, 0) * sum(len(each) - 1 for each in documents)


def owners_of(layout: str, documents: list[Tensor]) -> TokenOwners:
    found = documents_in(laid_out(layout, documents))
    return TokenOwners(found.owners, found.count)


@pytest.fixture
def model() -> PackedGPT:
    return PackedGPT().double()


DOCUMENTS = texts(7, seed=4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_are_those_of_each_document_alone(model, layout):
    """Also of the embedding, whose weight the head has too."""
    recorder = GradientNorms(model)
    recorder.open()
    loss = step(model, layout, DOCUMENTS)
    recorder.owners = owners_of(layout, DOCUMENTS)
    loss.backward()
    norms = recorder.finish(len(DOCUMENTS))
    assert not recorder.uncovered
    expected = []
    for each in DOCUMENTS:
        gradients = torch.autograd.grad(alone(model, each), list(model.parameters()), allow_unused=True)
        expected.append(sum(float(part.square().sum()) for part in gradients if part is not None))
    assert_close(total_squared_norm(norms), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_effects_are_those_of_each_document_alone(model, layout):
    recorder = UnitRecorder(find_hidden_layers(model))
    recorder.open()
    loss = step(model, layout, DOCUMENTS)
    recorder.owners = owners_of(layout, DOCUMENTS)
    loss.backward()
    effects = recorder.finish(len(DOCUMENTS))
    for number, each in enumerate(DOCUMENTS):
        hidden: list[Tensor] = []
        hook = model.blocks[0].mlp[2].register_forward_pre_hook(lambda _, args, kept=hidden: kept.append(args[0]))
        [gradient] = torch.autograd.grad(alone(model, each), hidden)
        hook.remove()
        assert_close(effects["blocks.0.mlp.2"][number], -(hidden[0] * gradient).sum((0, 1)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sketches_are_those_of_rows_of_their_own(model, layout):
    sketches = []
    for each in ("unpacked", layout):
        recorder = GradientSketches(model)
        recorder.open()
        loss = step(model, each, DOCUMENTS)
        recorder.owners = None if each == "unpacked" else owners_of(each, DOCUMENTS)
        loss.backward()
        sketches.append(recorder.finish(len(DOCUMENTS)))
        recorder.remove()
    assert_close(sketches[1], sketches[0], rtol=1e-9, atol=1e-12)
    assert bool((sketches[0].abs().sum(1) > 0).sum() == 6)


class Convolved(PackedGPT):
    """A convolution that sees a token's neighbours, and a layer that gets other tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pooled = nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 8)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        logits = super().forward(batch)
        extra = self.conv(logits[..., :8].mT).mT
        return logits + extra.sum(-1, keepdim=True) + self.pooled(extra[:, :3]).sum()


def test_what_mixes_tokens_or_has_others_is_left_out_and_named():
    model, documents = Convolved().double(), texts(2, seed=4)
    batch = laid_out("packed", documents)  # as many rows as documents
    assert len(batch["input_ids"]) == len(documents) == 2
    recorder, units = GradientNorms(model), UnitRecorder(find_hidden_layers(model, ["blocks.*.mlp.2", "pooled"]))
    recorder.open()
    units.open()
    loss = model.training_step(batch, 0)
    recorder.owners = units.owners = owners_of("packed", documents)
    loss.backward()
    norms, effects = recorder.finish(2), units.finish(2)
    assert recorder.uncovered["conv"] == "its input [2, 8, 24] is not of the tokens of documents alone"
    assert recorder.uncovered["pooled"] == "its input [2, 3, 8] is not of the tokens of documents alone"
    assert not {"conv", "pooled"} & norms.keys() and "blocks.0.mlp.2" in norms
    assert units.left_out == {"pooled": "its input [2, 3, 8] is not of the 2 x 24 tokens of the documents"}
    assert "pooled" not in effects
