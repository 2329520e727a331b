"""What Lightning's own tests require of callbacks: every way to run a Trainer, and a run that is as without them."""

import copy
import pickle
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.demos.boring_classes import ManualOptimBoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner

import lightning_memsink
from lightning_memsink import Ledger, memsink
from tests.support.small_runs import CONTROLS, TRAIN, TinyLM, control_loader, fit, train_loader, weights

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
KINDS = [
    kind
    for kind in (getattr(lightning_memsink, name) for name in lightning_memsink.__all__)
    if isinstance(kind, type) and issubclass(kind, Callback)
]
SAMPLES = 204  # of different content


@pytest.fixture(autouse=True)
def no_warnings_about_small_runs():
    """Lightning warns of their size and of options that they leave out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def preset(**options):
    return memsink(path=None, identity="content", k=4, **options)


def watched(more=list, model=TinyLM, **options):
    """A run with the preset, whose weights are those of the same run without it."""
    _, plain = fit(more(), model(), **{"max_epochs": 1, **options})
    run, module = fit([*preset(), *more()], model(), **{"max_epochs": 1, **options})
    assert torch.equal(weights(plain), weights(module))
    return run


@pytest.mark.parametrize(
    ("options", "samples", "controls"),
    [
        ({"fast_dev_run": 2}, 24, 80),
        ({"overfit_batches": 2, "val_check_interval": None}, 32, 80),
        ({"limit_train_batches": 0}, 0, 0),
        ({"limit_val_batches": 0, "val_check_interval": None}, SAMPLES, 0),
        ({"max_steps": 9, "max_epochs": -1}, 90, 120),  # in the middle of an epoch, and after a validation
        ({"max_epochs": 0}, 0, 0),
        ({"num_sanity_val_steps": -1}, SAMPLES, 120),
        ({"check_val_every_n_epoch": 2, "val_check_interval": None, "max_epochs": 2}, SAMPLES, 120),
        ({"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2}, SAMPLES, 120),
        ({"precision": "bf16-mixed"}, SAMPLES, 120),
    ],
    ids=str,
)
def test_every_way_to_run_a_trainer_is_recorded_and_unchanged(options, samples, controls):
    ledger = Ledger.of(watched(**options))
    assert (len(ledger.losses), len(ledger.controls)) == (samples, controls)


@pytest.mark.parametrize(
    "more",
    [
        lambda: [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)],
        lambda: [GradientAccumulationScheduler({1: 2})],
    ],
    ids=["StochasticWeightAveraging", "GradientAccumulationScheduler"],
)
def test_callbacks_that_change_training_do_so_as_before(more):
    assert len(Ledger.of(watched(more, max_epochs=3)).losses) == SAMPLES


def test_barebones_records_without_logging():
    run = Trainer(callbacks=preset(), barebones=True, max_epochs=1, accelerator="cpu")
    run.fit(TinyLM(), train_loader(), control_loader())
    assert (len(Ledger.of(run).losses), len(Ledger.of(run).controls)) == (SAMPLES, 120)


class Served(TinyLM):
    """Has a test step and a prediction step too."""

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.loss(batch)


@pytest.mark.parametrize("function", ["validate", "test", "predict"])
def test_validate_test_and_predict_leave_the_ledger_alone(function):
    """Before a fit and after it: the ledger is that of the fit."""
    run = Trainer(callbacks=preset(), max_epochs=1, accelerator="cpu", **QUIET)
    model = Served()
    getattr(run, function)(model, control_loader())
    assert not Ledger.of(run).get(Ledger.losses)
    run.fit(model, train_loader(), control_loader())
    table, controls = Ledger.of(run).losses, Ledger.of(run).controls
    before = table.exposures.clone(), table.last_loss.clone(), controls.latest.clone(), len(Ledger.of(run).history)
    getattr(run, function)(model, control_loader(TRAIN))
    after = table.exposures, table.last_loss, controls.latest, len(Ledger.of(run).history)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(before, after, strict=True))


def test_a_second_fit_of_the_same_trainer_continues_the_ledger():
    run = Trainer(callbacks=preset(), max_epochs=1, accelerator="cpu", **QUIET)
    model = TinyLM()
    run.fit(model, train_loader(), control_loader())
    run.fit_loop.max_epochs = 2
    run.fit(model, train_loader(), control_loader())
    ledger = Ledger.of(run)
    assert ledger.losses.exposures.max() == 64
    assert [row["step"] for row in ledger.history] == [21, 42]


def test_several_validation_loaders_are_controls_together():
    half = len(CONTROLS) // 2
    run, _ = fit(preset(), Both(), controls=[control_loader(CONTROLS[:half]), control_loader(CONTROLS[half:])])
    assert len(Ledger.of(run).controls) == 120


class Both(TinyLM):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.loss(batch))


class TwoOptimizers(TinyLM):
    """Manual optimization: each optimizer has a part of the model, and both step on one loss."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(self.embed.parameters(), 0.1), torch.optim.AdamW(self.mlp.parameters(), 1e-2)]


def test_manual_optimization_with_several_optimizers_is_recorded():
    """Lightning counts every optimizer's step."""
    run = watched(model=TwoOptimizers)
    assert run.global_step == 42
    assert len(Ledger.of(run).losses) == SAMPLES and Ledger.of(run).losses.last_loss.isfinite().all()


def test_lightnings_own_manual_model_is_recorded():
    run = Trainer(callbacks=memsink(path=None), max_epochs=1, accelerator="cpu", **QUIET)
    run.fit(ManualOptimBoringModel())
    assert len(Ledger.of(run).losses) == 64 and Ledger.of(run).losses.last_loss.isfinite().all()


# Tuning ------------------------------------------------------------------------------------------------------


class Data(LightningDataModule):
    batch_size = 16

    def train_dataloader(self):
        return train_loader(batch_size=self.batch_size)

    def val_dataloader(self):
        return control_loader()


class Tunable(TinyLM):
    lr = 1e-2

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.lr)


def find_rate(run, model, data):
    Tuner(run).lr_find(model, datamodule=data, num_training=10)


def find_size(run, model, data):
    Tuner(run).scale_batch_size(model, datamodule=data, max_trials=2, steps_per_trial=2)


@pytest.mark.parametrize(
    ("tune", "callbacks"),
    [
        (find_rate, list),
        (find_size, list),
        (lambda *_: None, lambda: [BatchSizeFinder(max_trials=2, steps_per_trial=2)]),
    ],
    ids=["lr_find", "scale_batch_size", "BatchSizeFinder"],
)
def test_trials_of_a_tuner_record_no_visit_and_are_not_changed(tune, callbacks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the Tuner writes a checkpoint into the working directory
    ends = []
    for watching in ([], preset()):
        model, data = Tunable(), Data()
        run = Trainer(callbacks=[*watching, *callbacks()], max_epochs=1, accelerator="cpu", **QUIET)
        tune(run, model, data)
        run.fit(model, datamodule=data)
        ends.append(weights(model))
    assert torch.equal(*ends)
    assert Ledger.of(run).losses.exposures.sum() == len(TRAIN)


# Scalars and loggers -----------------------------------------------------------------------------------------


def test_a_checkpoint_at_the_end_of_the_training_epoch_may_monitor_our_scalars(tmp_path):
    keep = ModelCheckpoint(tmp_path, monitor="memsink/gap", save_on_train_epoch_end=True, save_top_k=1)
    fit([*preset(), keep], max_epochs=2, enable_checkpointing=True)
    assert keep.best_model_path and keep.best_model_score is not None


def test_early_stopping_may_monitor_our_scalars_beside_a_learning_rate_monitor(tmp_path):
    stop = EarlyStopping("memsink/flagged_fraction", mode="max", stopping_threshold=0.01, patience=99)
    logger = CSVLogger(tmp_path)
    run, _ = fit([LearningRateMonitor("step"), stop, *preset()], max_epochs=8, logger=logger, log_every_n_steps=5)
    assert 0 < run.current_epoch < 7
    assert {"memsink/gap", "lr-AdamW"} <= set(
        (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().split("\n")[0].split(",")
    )


# State -------------------------------------------------------------------------------------------------------


def test_state_keys_are_unique_and_do_not_change():
    keys = [(kind().state_key, kind().state_key) for kind in KINDS]
    assert all(first == second for first, second in keys)
    assert len({first for first, _ in keys}) == len(KINDS) > 8


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copy", "pickle"])
def test_callbacks_can_be_copied_before_and_after_a_run(clone):
    for kind in KINDS:
        assert type(clone(kind())) is kind
    callbacks = preset()
    run, _ = fit(callbacks, max_epochs=1)
    again, _ = fit([clone(one) for one in preset()], max_epochs=1)
    assert torch.equal(Ledger.of(run).losses.last_loss, Ledger.of(again).losses.last_loss)
    states = [(one.state_dict(), clone(one).state_dict()) for one in callbacks]
    assert all(repr(before) == repr(after) for before, after in states)


def test_states_pass_lightnings_safe_loading(tmp_path):
    """The state of every callback, saved to a file, holds tensors and plain types only."""
    torch.save({kind.__name__: kind().state_dict() for kind in KINDS}, tmp_path / "states")
    assert set(torch.load(tmp_path / "states", weights_only=True)) == {kind.__name__ for kind in KINDS}


def test_two_runs_with_callbacks_of_their_own_share_no_ledger():
    first, _ = fit(preset(), max_epochs=1)
    second, _ = fit(preset(), max_epochs=1)
    assert Ledger.of(first).losses is not Ledger.of(second).losses
    assert torch.equal(Ledger.of(first).losses.exposures, Ledger.of(second).losses.exposures)
