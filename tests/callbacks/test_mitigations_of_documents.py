"""Mitigations and localization act on documents packed into rows as on the same documents in rows of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_memsink.callbacks.goldfish import Goldfish
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.loss_truncation import LossTruncation
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.memsinks import MemSinks
from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask
from lightning_memsink.callbacks.sink_dropout import SinkDropout
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.history import LocalizationHistory
from lightning_memsink.localization.sample_attribution import StepAttribution
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.samples.hashing import text_ids
from lightning_memsink.samples.tokens import Tokens
from tests.support.packed import LAYOUTS, PackedGPT, laid_out, loader, texts
from tests.support.small_runs import trainer, weights

STEPS = 5
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-6}


def documents() -> list[list[Tensor]]:
    """Of each step; each comes in every second one."""
    pair = [texts(9, seed=1), texts(9, seed=2)]
    return [pair[step % 2] for step in range(STEPS)]


def fit(callbacks: list[Any], layout: str, model: PackedGPT | None = None) -> tuple[Trainer, PackedGPT]:
    model = model or PackedGPT()
    run = trainer(callbacks, max_epochs=1, val_check_interval=1.0, precision="64-true")
    run.fit(model, loader(documents(), layout), loader([texts(40, seed=3)], "unpacked"))
    return run, model


def watch() -> list[Any]:
    return [LossTracker(flush_every=1), MemorizationDetector(k=4)]


NAMES = [f"blocks.{number}.mlp.2" for number in range(2)]
SINKS = Sinks(
    {name: torch.arange(8) for name in NAMES}, {name: torch.ones(8) for name in NAMES}, {name: 20 for name in NAMES}
)


def id_of(document: Tensor) -> int:
    return int(text_ids(Tokens(document[None], torch.ones(1, len(document), dtype=torch.bool))))


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return weights(fit(watch(), "unpacked")[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_trains_alike_in_every_layout(plain, layout):
    """So that the tests below compare what the callbacks do, and nothing else."""
    assert_close(weights(fit(watch(), layout)[1]), plain, **CLOSE)


def trained(layout: str, *callbacks: Any, watched: bool = True) -> Tensor:
    return weights(fit([*(watch() if watched else []), *callbacks], layout)[1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("make", "watched"),
    [
        (lambda: MemSinks(certify=0), True),
        (lambda: Goldfish(k=2, context=2), True),
        (lambda: Goldfish(k=2, context=2), False),
        (lambda: LossTruncation(0.3, window=5), True),
        (lambda: LossTruncation(0.3, window=5), False),
        (lambda: SinkDropout(sinks=SINKS, who="all"), True),
        (lambda: SinkDropout(sinks=SINKS, who="all"), False),
    ],
    ids=["sinks", "goldfish", "goldfish alone", "truncation", "truncation alone", "dropout", "dropout alone"],
)
def test_a_mitigation_acts_on_documents_as_on_rows_of_their_own(plain, layout, make, watched):
    expected = trained("unpacked", make(), watched=watched)
    assert float((expected - plain).abs().max()) > 1e-3
    assert_close(trained(layout, make(), watched=watched), expected, **CLOSE)


class Latched(SampleGradientMask):
    """As if the detector had flagged the third document of the first step."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.latched = torch.tensor([id_of(documents()[0][2])])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", ["route", "skip", "attenuate"])
def test_a_flagged_document_is_acted_on_and_not_its_neighbours(plain, layout, mode):
    mask = Latched(mode)
    expected = trained("unpacked", mask)
    assert float((expected - plain).abs().max()) > 1e-3
    other = Latched(mode)
    assert_close(trained(layout, other), expected, **CLOSE)
    assert other.interventions.state_dict() == mask.interventions.state_dict()


class Units(Callback):
    """Which units of the first MLP are on, by document and step, in training."""

    def __init__(self) -> None:
        self.on: list[dict[int, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        ids, numbers = (torch.atleast_2d(batch[name]) for name in ("input_ids", "document_ids"))

        def note(module: Any, args: tuple[Tensor, ...]) -> None:
            self.on.append({})
            for row, own in enumerate(numbers):
                for number in own[own >= 0].unique().tolist():
                    at = own == number
                    is_on = args[0].detach()[row, at] != 0
                    assert bool((is_on == is_on[0]).all())  # the same for all tokens of a document
                    self.on[-1][id_of(ids[row, at])] = is_on[0]

        self.handle = pl_module.blocks[0].mlp[2].register_forward_pre_hook(note)

    def on_train_batch_end(self, *_: Any) -> None:
        self.handle.remove()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_document_has_its_own_pool_units(layout):
    sinks, units = MemSinks(certify=0), Units()
    fit([*watch(), sinks, units], layout)
    for on, own in zip(units.on, documents(), strict=True):
        assert on.keys() == {id_of(each) for each in own}
        for id, found in on.items():
            assert torch.equal(found, sinks.pool.own(torch.tensor([id]), 20)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_certificate_measures_documents(layout):
    certificates = []
    for each in ("unpacked", layout):
        run, _ = fit([*watch(), MemSinks(certify=16)], each)
        certificates.append(Ledger.of(run).certificate)
    expected, found = (certificate.state() for certificate in certificates)
    assert expected["samples"] == found["samples"] == 18 - 2  # but for the two of one token, which have no loss
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, abs=1e-5) if isinstance(value, float) else value), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("objective", ["loss", "margin"])
def test_effects_norms_and_agreement_are_those_of_documents(layout, objective, monkeypatch):
    steps: list[StepAttribution] = []
    monkeypatch.setattr(LocalizationHistory, "record", lambda self, step, *rest: steps.append(step))
    for each in ("unpacked", layout):
        fit([*watch(), SinkLocalizer(every=1, objective=objective, agreement=True)], each)
    assert len(steps) == 2 * STEPS
    for expected, found in zip(steps[:STEPS], steps[STEPS:], strict=True):
        assert torch.equal(found.ids, expected.ids) and len(found.ids) == 9
        assert_close(found.shares, expected.shares, **CLOSE)
        assert_close(found.norms, expected.norms, **CLOSE)
        assert bool((expected.shares.abs().sum(1) > 0.9).sum() == 8)  # the document of one token has no loss
        assert bool((expected.norms.sum(1) > 0).sum() == 8)


class Shifted(PackedGPT):
    """Gives the model all tokens but the last, so that its rows are shorter than those of the batch."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        shorter = {name: values if name == "labels" else values[:, :-1] for name, values in batch.items()}
        return F.cross_entropy(self(shorter).flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: MemSinks(certify=0),
            r"reads \[\d, 23, 20\], and the ids of the batch are \[\d, 24\].*drops the pool there",
        ),
        (lambda: Latched("route"), r"is \[\d, 23, 20\], without the \[\d, 24\] tokens"),
        (lambda: SinkDropout(sinks=SINKS, who="all"), r"its input \[\d, 23, 20\] is not of the \[\d, 24\] tokens"),
        (lambda: SinkLocalizer(every=1), r"its input \[\d, 23, 20\] is not of the \d x 24 tokens of the documents"),
    ],
    ids=["sinks", "route", "dropout", "localizer"],
)
def test_a_layer_of_other_tokens_is_left_alone_and_this_is_said(make, said):
    plain = weights(fit(watch(), "packed", Shifted())[1])
    with pytest.warns(UserWarning, match=said) as warned:
        found = weights(fit([*watch(), make()], "packed", Shifted())[1])
    messages = [str(each.message) for each in warned if "blocks." in str(each.message)]
    assert len(messages) == len(set(messages)) <= 2  # once for each layer
    assert torch.equal(found, plain) or isinstance(make(), MemSinks)


@pytest.mark.parametrize(
    "make", [lambda: Goldfish(k=2, context=2), lambda: LossTruncation(0.3, window=5), lambda: Latched("skip")]
)
def test_a_loss_is_weighed_by_document_where_the_rows_are_shorter(make):
    """The loss is followed by its targets, whatever the layers read."""
    expected = weights(fit([*watch(), make()], "packed")[1])
    assert_close(weights(fit([*watch(), make()], "packed", Shifted())[1]), expected, **CLOSE)


def test_norms_are_left_out_where_each_document_by_itself_would_not_fit(monkeypatch):
    monkeypatch.setattr("lightning_memsink.attribution.token_owners.MOST_PADDING", 0)
    steps: list[StepAttribution] = []
    monkeypatch.setattr(LocalizationHistory, "record", lambda self, step, *rest: steps.append(step))
    with pytest.warns(UserWarning, match="no gradient norms and no agreement in steps whose documents differ so much"):
        fit([*watch(), SinkLocalizer(every=1, agreement=True)], "packed")
    assert len(steps) == STEPS and all(step.norms is None and step.alignment is None for step in steps)
    assert all(bool(step.shares.any()) for step in steps)


def test_a_batch_of_padding_only_is_no_step_of_any_sample():
    """Nor does it end the training."""

    class Padded(PackedGPT):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return self(batch).square().mean()

    steps = [texts(9, seed=1), [torch.zeros(0, dtype=torch.int64)] * 2]
    batches = [laid_out("packed", documents) for documents in steps]
    callbacks = [LossTracker(), MemSinks(certify=0), Goldfish(k=2, context=2), SinkDropout(sinks=SINKS, who="all")]
    run = trainer(callbacks, max_epochs=1, limit_val_batches=0)
    model = Padded()
    with pytest.warns(UserWarning):
        run.fit(model, DataLoader(batches, batch_size=None))
    assert run.global_step == 2 and bool(weights(model).isfinite().all())
