"""A passage loses the same tokens wherever it occurs, and training goes by the rest of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.testing import assert_close

from lightning_memsink.callbacks.goldfish import Goldfish
from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask
from lightning_memsink.ledger import Ledger
from lightning_memsink.mitigation.goldfish import drop_targets, dropped_targets
from tests.support.capturing import QUIET, B, C, Model, new
from tests.support.reading import opened
from tests.support.small_runs import CANARIES, TinyLM, chain, fit, snapshot, train_loader, watch
from tests.support.user_losses import TimeMajor

pytestmark = QUIET
LONG, CONTEXT = 12, 3


def tokens(*shape: int, seed: int, vocabulary: int = 50) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def alone(text: Tensor, k: int = 4, context: int = 13, seed: int = 0) -> Tensor:
    """The dropped targets of one sample, all of which count."""
    nothing = torch.zeros_like(text)
    return dropped_targets(text, nothing, nothing == 0, k, context, seed)


def last_of_each(text: Tensor, seed: int = 0) -> Tensor:
    samples = torch.arange(len(text)).repeat_interleave(text.shape[1])
    out = dropped_targets(text.reshape(-1), samples, torch.ones_like(samples) == 1, 4, 13, seed)
    return out.view(text.shape)[:, -1]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 4), length=st.integers(1, 30), context=st.integers(1, 6), seed=st.integers(0, 99),
    time_major=st.booleans(),
)  # fmt: skip
def test_a_target_goes_by_its_context_alone(rows, length, context, seed, time_major):
    """The oracle hashes each target with nothing but its context; contexts with ignored targets are skipped."""
    text, counted = (
        tokens(rows, length, seed=seed),
        torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) > 0.1,
    )
    samples = torch.arange(rows)[:, None].expand(rows, length)
    expected = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        for place in range(context, length):
            window = slice(place - context, place + 1)
            if counted[row, window].all():
                expected[row, place] = alone(text[row, window], 3, context)[-1]
    flat = (text.t(), samples.t(), counted.t()) if time_major else (text, samples, counted)
    got = dropped_targets(*(part.reshape(-1) for part in flat), 3, context)
    got = got.view(length, rows).t() if time_major else got.view(rows, length)
    assert got.tolist() == expected.tolist()


def test_the_first_target_of_a_document_behind_another_is_kept_and_no_ones_context():
    texts = [tokens(40, seed=1), tokens(30, seed=2)]
    targets = torch.cat([tokens(20, seed=3), texts[0], tokens(20, seed=4), texts[1]])
    samples = torch.cat([torch.full((20,), -1), torch.zeros(40), torch.full((20,), -1), torch.ones(30)]).long()
    drop = dropped_targets(targets, samples, torch.ones_like(samples) == 1, 2, 3)
    assert not drop[samples < 0].any()
    for number, text in enumerate(texts):
        expected = alone(text, k=2, context=3)
        assert expected.any() and torch.equal(drop[samples == number], expected)


def test_a_passage_loses_the_same_tokens_wherever_it_occurs():
    passage = tokens(200, seed=1)
    own = alone(passage)[13:]
    for before in (1, 7, 500):
        elsewhere = alone(torch.cat([tokens(before, seed=before), passage, tokens(9, seed=2)]))
        assert torch.equal(elsewhere[before + 13 : before + 200], own)
    assert not alone(passage)[:13].any()


@pytest.mark.parametrize("k", [2, 4, 10])
@pytest.mark.parametrize("vocabulary", [2, 1000, 2**31])
def test_about_one_in_k_is_dropped(k, vocabulary):
    """A thirteenth of two tokens has 8192 contexts, each dropped always or never: the rate is theirs."""
    share = alone(tokens(100_000, seed=3, vocabulary=vocabulary), k)[13:].float().mean().item()
    assert share == pytest.approx(1 / k, abs=0.03 if vocabulary == 2 else 0.005)


@pytest.mark.parametrize("change", ["order", "a zero", "the target", "the seed"])
def test_the_hash_sees_order_and_zeros_and_not_the_target(change):
    """Each a defect of the published hash, but the last."""
    text, seed = tokens(2000, 14, seed=4), 0
    other = text.clone()
    if change == "order":
        other[:, :13] = text[:, :13].flip(1)
    elif change == "a zero":
        other[:, 5] = 0
    elif change == "the target":
        other[:, 13] = 0
    else:
        seed = 7
    got = last_of_each(other, seed)
    differs = (got != last_of_each(text)).float().mean().item()
    assert differs == 0 if change == "the target" else differs == pytest.approx(2 * 0.25 * 0.75, abs=0.05)
    assert got.float().mean().item() == pytest.approx(0.25, abs=0.05)


class Sequences(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.x, self.y = tokens(8, LONG, seed=5, vocabulary=C), tokens(8, LONG, seed=6, vocabulary=C)
        self.y[1, 8:] = -100

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


def kept(y: Tensor, k: int = 2) -> Tensor:
    samples = torch.arange(len(y))[:, None].expand_as(y)
    out = dropped_targets(y.reshape(-1), samples.reshape(-1), y.reshape(-1) != -100, k, CONTEXT)
    return (y != -100) & ~out.view(y.shape)


def in_chunks(model: Model, batch: dict[str, Tensor]) -> Tensor:
    logits, y = model(batch["x"]).view(-1, C), batch["y"].view(-1)
    parts = [F.cross_entropy(a, b, reduction="sum") for a, b in zip(logits.split(7), y.split(7), strict=True)]
    return torch.stack(parts).sum() / (y != -100).sum()


def masked_by_hand(model: Model, batch: dict[str, Tensor]) -> Tensor:
    losses = F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"], reduction="none", ignore_index=-100)
    return losses.sum() / (batch["y"] != -100).sum()


TEXTS: dict[str, tuple[Callable[..., Tensor], type[Model]]] = {
    "flat": (lambda m, b: F.cross_entropy(m(b["x"]).view(-1, C), b["y"].view(-1)), Model),
    "two-dimensional": (lambda m, b: F.cross_entropy(m(b["x"]).transpose(1, 2), b["y"]), Model),
    "time-major": (lambda m, b: F.cross_entropy(m(b["x"]).view(-1, C), b["y"].t().reshape(-1)), TimeMajor),
    "in chunks": (in_chunks, Model),
    "masked by hand": (masked_by_hand, Model),
    "scaled": (lambda m, b: 3 * F.cross_entropy(m(b["x"]).view(-1, C), b["y"].view(-1)), Model),
}


@pytest.mark.parametrize(("step", "cls"), TEXTS.values(), ids=TEXTS)
def test_the_gradient_is_that_of_the_mean_over_kept_tokens(step, cls):
    """The oracle ignores dropped targets in the loss itself."""
    data = Sequences()
    batch = {"x": data.x[:B], "y": data.y[:B]}
    ours, oracle = new(step, cls), new(step, cls)
    loss, found = opened(partial(step, ours), batch, B)
    drop_targets(found, 2, CONTEXT)
    loss.backward()
    left = kept(batch["y"])
    assert 0 < left.sum() < (batch["y"] != -100).sum()
    step(oracle, {"x": batch["x"], "y": torch.where(left, batch["y"], -100)}).backward()
    for one, other in zip(ours.parameters(), oracle.parameters(), strict=True):
        assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-5)


class Ignoring(TinyLM):
    """The oracle of a whole run."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.logits(batch["input_ids"])
        targets = batch["input_ids"][:, 2:]
        targets = torch.where(kept(targets, k=4), targets, -100)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}], ids=str)
def test_a_run_is_one_that_ignores_the_dropped_targets(options):
    mask = Goldfish(k=4, context=CONTEXT)
    run, model = fit([*watch(), mask], max_epochs=1, **options)
    _, oracle = fit([], Ignoring(), max_epochs=1, **options)
    for one, other in zip(model.parameters(), oracle.parameters(), strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-3)
    actions = Ledger.of(run).interventions["Goldfish"]
    assert actions.total("visits") == 328 and 0.12 < actions.total("removed") < 0.23, "three of ten targets are kept"


def test_passages_cannot_be_repeated_to_the_end():
    def known_by_heart(model: Any) -> float:
        seen = model.embed(CANARIES)
        first = model.mlp(torch.cat([seen[:, :-2], seen[:, 1:-1]], -1)).argmax(-1)
        return (first == CANARIES[:, 2:]).float().mean().item()

    _, plain = fit([], max_epochs=6)
    _, model = fit([Goldfish(k=3, context=2)], max_epochs=6)
    assert known_by_heart(plain) > 0.97 and known_by_heart(model) < 0.85


def test_texts_shorter_than_the_context_train_bit_for_bit_as_without():
    _, plain = fit([], max_epochs=1)
    _, model = fit([Goldfish(context=13)], max_epochs=1)
    assert all(torch.equal(*pair) for pair in zip(plain.parameters(), model.parameters(), strict=True))


def test_the_ledger_has_losses_over_all_tokens():
    class Frozen(TinyLM):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.0)

    tables = [snapshot(*fit([*watch(), *more], Frozen(), max_epochs=1)) for more in ([], [Goldfish(2, CONTEXT)])]
    assert tables[0] == tables[1]


def test_it_goes_together_with_a_held_sample_in_any_order():
    found = {
        snapshot(*fit([*watch(), *crew], max_epochs=2))
        for crew in ([Goldfish(3, 2), SampleGradientMask("skip")], [SampleGradientMask("skip"), Goldfish(3, 2)])
    }
    assert len(found) == 1


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    def crew() -> list[Any]:
        keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        return [*watch(), Goldfish(3, 2), keep]

    whole = fit(crew(), max_epochs=3, enable_checkpointing=True)
    resumed = fit(crew(), max_epochs=3, ckpt_path=str(tmp_path / "epoch=0.ckpt"), enable_checkpointing=True)
    assert snapshot(*resumed) == snapshot(*whole)
    assert repr(Ledger.of(resumed[0]).interventions["Goldfish"].records) == repr(
        Ledger.of(whole[0]).interventions["Goldfish"].records
    )


def test_a_loss_without_tokens_is_said_once():
    class Squares(TinyLM):
        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            return F.mse_loss(self.embed(batch["input_ids"]), torch.ones(len(batch["input_ids"]), LONG, 16))

    with pytest.warns(UserWarning) as caught:
        fit([Goldfish()], Squares(), max_epochs=1)
    ours = [str(each.message) for each in caught if "Goldfish" in str(each.message)]
    assert len(ours) == 1 and "every sample of such a step alone: " in ours[0]
    assert "the loss is mse_loss, which has no targets [B, T]" in ours[0]


def test_empty_batches_pass():
    class Empty(TinyLM):
        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            return super().loss(batch) if len(batch["input_ids"]) else self.embed.weight.sum() * 0

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        texts = torch.stack([row["input_ids"] for row in rows])
        return {"input_ids": texts[:0] if int(texts[0, 0]) % 2 else texts}

    _, model = fit(
        [Goldfish(3, 2)], Empty(), train=train_loader(chain(100, seed=1), collate_fn=collate), val_check_interval=3
    )
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"), [({"k": 1}, "at least 2, but it is 1"), ({"context": 0}, "at least 1, but it is 0")]
)
def test_a_wrong_option_is_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        Goldfish(**options)
