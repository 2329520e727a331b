"""Designed sinks in whole runs: the right units on in training, the pool off elsewhere, and nothing else changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memsinks import MemSinks
from lightning_memsink.callbacks.runtime.loader_ids import LoaderIds
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.ledger import Ledger
from lightning_memsink.mitigation.certificate import Certificate
from lightning_memsink.mitigation.designed_sinks import Pool, own_units
from lightning_memsink.samples.hashing import content_ids
from tests.support.small_runs import CONTROLS, LENGTH, TRAIN, Rows, TinyLM, fit, snapshot, watch, weights

POOL, SHARED, ACTIVE = 96, 32, 14  # of TinyLM's 128 hidden units


class ByHand(TinyLM):
    """The mechanism written into the model: own units in training, none of the pool in evaluation."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        mask = torch.zeros(len(tokens), 128)
        mask[:, :SHARED] = 1
        if self.training:
            mask[:, SHARED:] = own_units(content_ids(batch), POOL, ACTIVE).float()
        seen = self.embed(tokens)
        up, act, down = self.mlp
        hidden = act(up(torch.cat([seen[:, :-2], seen[:, 1:-1]], -1)))
        return F.cross_entropy(down(hidden * mask[:, None]).flatten(0, 1), tokens[:, 2:].flatten())


class Checkpointed(TinyLM):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.outer, self.mlp = self.mlp, nn.Identity()
        self.mlp.forward = lambda x: checkpoint(self.outer, x, use_reentrant=False)  # type: ignore[method-assign]


class LeftInEvaluationMode(TinyLM):
    """As `from_pretrained` leaves a model, and Lightning with it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.mlp.eval()


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
@pytest.mark.parametrize("model", [TinyLM, Checkpointed, LeftInEvaluationMode])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}], ids=str)
def test_training_is_what_a_model_with_the_mechanism_written_in_does(model, options):
    expected, state = fit(watch(), ByHand(), max_epochs=2, **options), torch.get_rng_state()
    found = fit([*watch(), MemSinks()], model(), max_epochs=2, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert_close(weights(found[1]), weights(expected[1]), rtol=0, atol=1e-6)
    assert_close(Ledger.of(found[0]).controls.latest, Ledger.of(expected[0]).controls.latest)


def test_callbacks_agree_in_any_order():
    found = set()
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1), (1, 3, 0, 2)):
        crew = [*watch(), MemSinks(certify=16), SinkLocalizer(every=4)]
        run, model = fit([crew[i] for i in order], max_epochs=2)
        ledger = Ledger.of(run)
        facts = (
            ledger.certificate.state(),
            ledger.interventions["MemSinks"].state_dict(),
            ledger.attribution.state_dict(),
        )
        found.add(repr((snapshot(run, model), facts)))
    assert len(found) == 1


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    def crew() -> list[Any]:
        keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        return [*watch(), MemSinks(certify=32), keep]

    whole = fit(crew(), max_epochs=4, enable_checkpointing=True)
    resumed = fit(crew(), max_epochs=4, ckpt_path=str(tmp_path / "epoch=1.ckpt"), enable_checkpointing=True)
    assert snapshot(*resumed) == snapshot(*whole)
    first, second = Ledger.of(whole[0]), Ledger.of(resumed[0])
    assert first.certificate == second.certificate and first.certificate is not None
    assert first.interventions["MemSinks"].state_dict() == second.interventions["MemSinks"].state_dict()
    with (
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint"),
        pytest.raises(ValueError, match=r"trained with Pool\(.*seed=0\), but MemSinks was given Pool\(.*seed=1\)"),
    ):
        fit([*watch(), MemSinks(seed=1)], ckpt_path=str(tmp_path / "epoch=1.ckpt"))


def test_evaluation_is_bit_identical_whatever_the_pool_holds():
    """In a validation of its own, too. The weights keep the pool, and after the run nothing holds it back."""
    run, model = fit([*watch(), MemSinks()], max_epochs=1)
    expected = run.validate(model, run.val_dataloaders, verbose=False)
    with torch.no_grad():
        model.mlp[0].weight[SHARED:] = 100
    assert run.validate(model, run.val_dataloaders, verbose=False) == expected
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert model.loss({"input_ids": TRAIN}).item() > 2 * expected[0]["val_loss"]


def test_memorization_that_the_sinks_hold_is_certified():
    crew = [*watch(), MemSinks(active_fraction=0.3)]
    run, _ = fit(crew, max_epochs=6)
    certificate = Ledger.of(run).certificate
    assert certificate.verdict == "isolated" and certificate.samples >= 20
    assert certificate.own + 1 < min(certificate.dropped, certificate.placebo, certificate.random)
    assert Certificate(**crew[-1].state_dict()["certificate"]) == certificate


def test_fine_tuning_that_leaves_the_sinks_empty_is_told():
    """Only weights that all samples share are trained. Dropping the pool hurts, as it does in any pretrained model."""
    _, model = fit([], max_epochs=3)
    model.mlp.requires_grad_(False)
    run, _ = fit([*watch(), MemSinks()], model, max_epochs=4)
    certificate = Ledger.of(run).certificate
    assert certificate.dropped > certificate.own + 0.1
    assert certificate.verdict == "sinks are empty" and certificate.samples > 30


class ByHandSteps(TinyLM):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class StepsOnce(TinyLM):
    """Its step can't be run a second time."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        assert self.training, "not twice"
        return self.loss(batch)


def test_a_run_that_can_not_be_certified_ends_as_any_other():
    run, model = fit([*watch(), MemSinks()], ByHandSteps(), max_epochs=2)
    expected = fit([*watch(), MemSinks(certify=0)], max_epochs=2)[1]
    assert Ledger.of(run).certificate is None
    assert torch.equal(weights(model), weights(expected))
    with pytest.warns(UserWarning, match="no certificate. AssertionError: not twice"):
        run, model = fit([*watch(), MemSinks()], StepsOnce(), max_epochs=2)
    assert Ledger.of(run).certificate is None and torch.equal(weights(model), weights(expected))


def test_what_can_not_work_is_said_at_the_start():
    with pytest.raises(ValueError, match="pool_fraction is a share strictly between 0 and 1, but it is 1"):
        MemSinks(pool_fraction=1)
    with pytest.warns(UserWarning, match="Pools above 90 % were seen to collapse"):
        MemSinks(pool_fraction=0.95)
    with pytest.raises(ValueError, match="certify is a number of samples"):
        MemSinks(certify=-1)
    with pytest.raises(RuntimeError, match=r"writes `batch`. Add LossTracker\(\)"):
        fit([MemSinks()])
    with pytest.raises(ValueError, match="names no hidden layer"):
        fit([*watch(), MemSinks(modules=["embed*"])])


def test_nothing_is_left_behind_by_a_run_that_fails():
    class Fails(TinyLM):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            raise RuntimeError("user's own")

    model = Fails()
    with pytest.raises(RuntimeError, match="user's own"):
        fit([*watch(), MemSinks()], model)
    assert all(not module._forward_pre_hooks for module in model.modules())


class Writes(Callback):
    """Each rank writes down what it knows at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        facts = {"weights": snapshot(trainer, pl_module), "certificate": Ledger.of(trainer).certificate.state()}
        torch.save(facts, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.filterwarnings("ignore:.*recommended to use .*sync_dist")
def test_ranks_train_alike_and_certify_what_both_saw(tmp_path):
    crew = [*watch(), MemSinks(certify=32), Writes(tmp_path)]
    batches = {"train": DataLoader(Rows(TRAIN), 8, shuffle=True), "controls": DataLoader(Rows(CONTROLS), 20)}
    fit(crew, strategy="ddp_fork", devices=2, max_epochs=3, **batches)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one == other and one["certificate"]["samples"] > 32


# Where the ids come from, or do not -----------------------------------------------------------------------------------


class Packed(TinyLM):
    """Two documents a row, of which the step takes what it needs out of the batch; what ``down`` read is kept."""

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        batch["documents"] = self.documents = batch["input_ids"][:, :1].repeat(1, LENGTH - 2)
        self.documents[:, 5:] += 1000

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        handle = self.mlp[2].register_forward_pre_hook(lambda module, args: reads.append(args[0].detach()))
        reads: list[Tensor] = []
        loss = self.loss(batch)
        handle.remove()
        self.read = reads[0] if self.training else self.read  # the certificate runs the step again
        batch.clear()
        return loss


def test_packed_documents_have_their_own_units_token_by_token():
    model = Packed()
    run, _ = fit([*watch(), MemSinks(key="documents")], model, max_epochs=2)
    assert torch.equal(model.read != 0, Pool().own(model.documents, 128))
    assert Ledger.of(run).certificate.samples >= 8


@pytest.mark.parametrize(
    ("key", "message"),
    [("documents", r"without batch\['documents'\], integers .* keys input_ids"), (None, "samples have no ids")],
)
def test_without_ids_the_pool_is_dropped_and_that_is_said_once(key, message, monkeypatch):
    if key is None:
        monkeypatch.setattr(LoaderIds, "take", lambda self, batch, stage: None)
    model = TinyLM()
    before = model.mlp[2].weight[:, SHARED:].detach().clone()
    with pytest.warns(UserWarning, match=message) as warned:
        run, _ = fit([LossTracker(identity="content"), MemSinks(key=key)], model, controls="none", max_epochs=1)
    assert sum("drops the pool" in str(one.message) for one in warned) == 1
    assert Ledger.of(run).interventions["MemSinks"].records[-1]["removed"] == pytest.approx(0.75)
    assert Ledger.of(run).certificate is None
    assert (model.mlp[2].weight[:, SHARED:] - before).abs().max() < 1e-3  # weight decay alone
