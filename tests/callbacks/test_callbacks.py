"""Whole runs with the tracker and the detector: what is recorded, flagged, resumed and left behind."""

from itertools import permutations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.hashing import content_ids
from lightning_memsink.samples.visits import Visit
from tests.support.small_runs import (
    CANARIES,
    CONTROLS,
    TRAIN,
    Rows,
    TinyLM,
    control_loader,
    fit,
    snapshot,
    train_loader,
    watch,
    weights,
)


def test_a_visit_is_measured_at_one_evaluation_only():
    """A visit just before an evaluation is not counted again at the next one."""
    run, _ = fit(watch(), max_epochs=2)
    ledger = Ledger.of(run)
    visits = {step: set() for step in range(42)}
    for epoch in range(2):
        order = torch.randperm(len(TRAIN), generator=torch.Generator().manual_seed(epoch))
        for batch, rows in enumerate(order.split(16)):
            visits[epoch * 21 + batch] = set(content_ids({"input_ids": TRAIN[rows]}).tolist())
    known, expected = set(), []
    for evaluation in ledger.flags.evaluations:
        fresh = set()
        for step in range(evaluation.step - 7, evaluation.step):
            fresh |= visits[step] & known
            known |= visits[step]
        expected.append(len(fresh))
    assert [evaluation.tested for evaluation in ledger.flags.evaluations] == expected


class Bystander(Callback):
    """Reads slots as a reader should: first in on_train_start, and in hooks that write none of them."""

    def on_train_start(self, trainer, pl_module):
        assert Ledger.of(trainer).flags is not None

    def on_validation_end(self, trainer, pl_module):
        _ = Ledger.of(trainer).onset


def test_planted_canaries_are_flagged_and_at_most_a_hundredth_of_the_rest():
    """The rest has six visits a sample, in a model that can memorize a rare pair of tokens."""
    run, _ = fit(watch(), max_epochs=6)
    ledger = Ledger.of(run)
    rows = ledger.losses.index.find(content_ids({"input_ids": CANARIES}))
    assert ledger.losses.exposures[rows].tolist() == [6 * 32] * 4
    assert (ledger.flags.verdict[rows] == Verdict.MEMORIZED).all()
    assert ledger.flags.memorized.sum() <= 4 + 2
    assert ledger.onset is not None and 0 <= ledger.onset.step_low <= ledger.onset.step <= ledger.onset.step_high


def test_losses_are_those_of_each_sample_alone():
    """At learning rate zero, the ledger holds the loss of a forward pass on each sample by itself."""

    class Frozen(TinyLM):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    run, model = fit(watch(), Frozen(), max_epochs=1)
    table = Ledger.of(run).losses
    for tokens in TRAIN[:20]:
        row = table.index.find(content_ids({"input_ids": tokens[None]}))
        assert table.last_loss[row].item() == pytest.approx(model.loss({"input_ids": tokens[None]}).item(), abs=1e-5)
    controls = Ledger.of(run).controls
    for sample, loss in zip(controls.ids, controls.latest, strict=True):
        alone = CONTROLS[(content_ids({"input_ids": CONTROLS}) == sample).nonzero()[0]]
        assert loss.item() == pytest.approx(model.loss({"input_ids": alone}).item(), abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.5}], ids=str)
def test_watching_leaves_weights_and_random_state_as_they_are_without_it(options):
    _, plain = fit([], **options)
    state = torch.get_rng_state()
    _, watched = fit(watch(), **options)
    assert torch.equal(weights(plain), weights(watched))
    assert torch.equal(state, torch.get_rng_state())


def test_callbacks_agree_in_any_order():
    """Losses, flags, onset and weights are bit-equal however the list is written."""
    snapshots = set()
    for order in permutations(range(3)):
        callbacks = [*watch(), Bystander()]
        snapshots.add(snapshot(*fit([callbacks[i] for i in order])))
    assert len(snapshots) == 1


@pytest.mark.parametrize("every", [7, 10])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, every):
    """Wherever the checkpoint falls between two flushes, and by Lightning's loading with weights_only."""
    keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    whole = fit([*watch(flush_every=every), keep], max_epochs=4, enable_checkpointing=True)
    again = [*watch(flush_every=every), ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")]
    resumed = fit(again, max_epochs=4, ckpt_path=str(tmp_path / "epoch=1.ckpt"), enable_checkpointing=True)
    assert snapshot(*resumed) == snapshot(*whole)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([MemorizationDetector()], r"No callback of this Trainer writes `losses`. Add LossTracker\(\) to Trainer"),
        ([Bystander(), LossTracker()], r"writes `onset`. Add MemorizationDetector\(\) to Trainer"),
    ],
)
def test_a_missing_callback_is_named_before_the_first_step(callbacks, message):
    with pytest.raises(RuntimeError, match=message):
        fit(callbacks)


def test_two_of_a_kind_are_refused_by_lightning_at_once():
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        fit([LossTracker(), LossTracker()])


def test_a_callback_list_can_be_used_again():
    """The second run continues the ledger of the first, with a warning; nothing is left on model or strategy."""
    callbacks = watch()
    fit(callbacks, max_epochs=1)
    with pytest.warns(UserWarning, match="evaluated another run up to step 21, and this run starts at step 0"):
        run, _ = fit(callbacks, max_epochs=1)
    assert Ledger.of(run).losses.exposures.max() == 64


def test_scalars_can_stop_a_run_and_name_its_checkpoint(tmp_path):
    stop = EarlyStopping("memsink/memorized", stopping_threshold=0.5, mode="max", patience=1000, strict=True)
    keep = ModelCheckpoint(tmp_path, monitor="memsink/gap", filename="{memsink/gap:.2f}", auto_insert_metric_name=False)
    run, _ = fit([*watch(), stop, keep], max_epochs=20, enable_checkpointing=True)
    assert run.current_epoch < 19
    assert float(run.callback_metrics["memsink/memorized"]) >= 1
    assert keep.best_model_path


@pytest.mark.parametrize("end", ["success", "exception", "interrupt"])
def test_nothing_is_left_behind(end):
    class Fails(TinyLM):
        def training_step(self, batch, batch_idx):
            if self.global_step == 9 and end != "success":
                raise RuntimeError("user's own") if end == "exception" else KeyboardInterrupt
            return super().training_step(batch, batch_idx)

    model, loader, callbacks = Fails(), train_loader(), watch()
    before = dict(vars(loader))
    try:
        run, _ = fit(callbacks, model, train=loader, max_epochs=1)
    except (RuntimeError, SystemExit):
        run = model._trainer
    assert vars(loader) == before
    assert torch.overrides._get_current_function_mode() is None
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert run is None or "process_dataloader" not in vars(run.strategy)


@pytest.mark.filterwarnings("ignore:.*have the content of training samples")
def test_a_share_of_the_training_set_serves_as_controls():
    """The share is never trained on, every other sample is, and the run is that on the rest."""
    callbacks = [LossTracker(identity="index", control_fraction=0.2, control_every=5), MemorizationDetector(k=4)]
    run, _ = fit(callbacks, train=DataLoader(Rows(TRAIN), 16, shuffle=True), controls="none", max_epochs=2)
    ledger = Ledger.of(run)
    held_out = round(0.2 * len(TRAIN))
    assert len(ledger.controls) == held_out
    assert len(ledger.losses) == len(TRAIN) - held_out
    assert set(ledger.losses.exposures.tolist()) == {2}
    assert [evaluation.step for evaluation in ledger.flags.evaluations][:3] == [5, 10, 15]
    assert ledger.flags.evaluations[-1].tested > 0


def test_a_loader_named_by_the_user_serves_as_controls_and_leaves_no_trace():
    _, plain = fit([], max_epochs=2)
    state = torch.get_rng_state()
    callbacks = [LossTracker(identity="content", controls=control_loader(), control_every=5), MemorizationDetector(k=4)]
    run, watched = fit(callbacks, max_epochs=2)
    assert len(Ledger.of(run).controls) == len(CONTROLS)
    assert torch.equal(weights(plain), weights(watched)) and torch.equal(state, torch.get_rng_state())


def test_unrecorded_visits_in_a_checkpoint_are_restored_by_one_process_only(monkeypatch):
    """Every process restores the same file, and the visits of all processes are recorded together."""
    tracker = LossTracker(identity="content")
    tracker.visits.add(Visit(torch.tensor([7, 8]), torch.tensor([1.0, 2.0]), 3, None, None))
    restored = []
    for first in (True, False):
        monkeypatch.setattr("lightning_memsink.callbacks.runtime.visit_recorder.is_first", lambda first=first: first)
        rank = LossTracker(identity="content")
        rank.load_state_dict(tracker.state_dict())
        restored.append([visit["ids"].tolist() for visit in rank.visits.state_dict()["visits"]])
    assert restored == [[[7, 8]], []]
