"""Validation under averaged weights that can't be repeated, and what repeating one leaves as it was."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler
from torchmetrics import MeanMetric

from lightning_memsink import Ledger, LossTracker, MemorizationDetector, SampleGradientMask, memsink
from tests.support.small_runs import (
    CONTROLS,
    Rows,
    TinyLM,
    control_loader,
    fit,
    snapshot,
    train_loader,
    trainer,
    watch,
    weights,
)

REFUSED = (
    r"^LossTracker has no controls: validation runs under other weights than training .*, and can't be repeated under "
    r"those of training: .*{}\. Samples get no verdict while that is so\. {}"
)
NAME_A_LOADER = r"Name held-out samples instead: memsink\(controls=loader\)\.$"


def ema() -> EMAWeightAveraging:
    return EMAWeightAveraging(decay=0.9)


class While(EMAWeightAveraging):
    """Validates under the average at some steps."""

    def __init__(self, swaps: Callable[[int], bool]) -> None:
        super().__init__(decay=0.9)
        self.swaps = swaps

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if self.swaps(trainer.global_step):
            super().on_validation_epoch_start(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.swaps(trainer.global_step):
            super().on_validation_epoch_end(trainer, pl_module)


class Once:
    """Held-out batches that can be read once."""

    def __init__(self) -> None:
        self.batches = iter([batch for _ in range(20) for batch in control_loader()])

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.batches)


class Manual(TinyLM):
    """Under manual optimization training_step would train, and only validation_step can be called."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        return loss


class Fragile(TinyLM):
    """Whose steps need what only Lightning's own loops provide."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.started:
            raise RuntimeError("not between the hooks\nof a validation")
        super().validation_step(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.training:
            raise KeyError("labels")
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        self.started = True

    def on_validation_epoch_end(self) -> None:
        self.started = False


class FragileAndManual(Manual, Fragile):
    training_step = Manual.training_step


def refused(model: Any, message: str, controls: Any = None, **options: Any) -> Any:
    """A run with one warning of that message, which leaves training as it is and gives no verdict."""
    held_out = controls or control_loader
    _, own = fit([ema()], model(), controls=held_out(), **options)
    with pytest.warns(UserWarning, match=message) as warned:
        run, module = fit([*watch(), ema()], model(), controls=held_out(), **options)
    assert len([each for each in warned if "has no controls" in str(each.message)]) == 1
    assert torch.equal(weights(own), weights(module))
    ledger = Ledger.of(run)
    assert ledger.flags.evaluations == [] and not ledger.flags.memorized.any() and len(ledger.controls) == 0
    assert torch.overrides._get_current_function_mode() is None
    assert not any(each._forward_pre_hooks for each in module.modules())
    return run


def test_a_loader_that_can_be_read_once_is_left_to_lightning():
    refused(
        TinyLM, REFUSED.format("Once is an iterator, which can be read once", NAME_A_LOADER), Once, limit_val_batches=3
    )


def test_steps_that_fail_outside_of_the_loop_end_no_training():
    refused(Fragile, REFUSED.format("training_step raises KeyError: 'labels'", NAME_A_LOADER))


def test_under_manual_optimization_training_step_is_not_called():
    remedy = r"Validate under the weights that train\.$"
    refused(FragileAndManual, REFUSED.format("validation_step raises RuntimeError: not between the hooks", remedy))


def test_manual_optimization_is_no_obstacle_where_the_validation_step_can_be_called():
    plain, _ = fit(watch(), Manual())
    run, _ = fit([*watch(), ema()], Manual())
    assert torch.equal(Ledger.of(run).controls.latest, Ledger.of(plain).controls.latest)
    assert torch.equal(Ledger.of(run).flags.verdict, Ledger.of(plain).flags.verdict)


@pytest.mark.parametrize("mode", ["hold", "skip"])
def test_controls_of_an_evaluation_before_are_not_taken_for_those_that_are_missing(mode, tmp_path):
    """Averaging starts late: there are verdicts up to its start and none after, and no crash of any reader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        callbacks = memsink(SampleGradientMask(mode), path=tmp_path / "report.md", identity="content", k=4)
        run, _ = fit([*callbacks, While(lambda step: step > 25)], Fragile(), logger=True, default_root_dir=tmp_path)
    ledger = Ledger.of(run)
    assert [each.step for each in ledger.flags.evaluations] == [7, 14, 21]
    assert ledger.controls.latest_step == -1 and not ledger.controls.latest.isfinite().any()
    assert [row["step"] for row in ledger.history] == [7, 14, 21]
    assert (tmp_path / "report.md").is_file()
    acted = {record["step"]: record["acted"] for record in ledger.interventions["SampleGradientMask"].records}
    if mode == "hold":  # the thermostat compares with the latest controls
        assert acted[28] > 0 and sum(acted[step] for step in (35, 42, 49, 56, 63)) == 0


def test_a_validation_without_an_average_gives_verdicts_again():
    with pytest.warns(UserWarning, match="has no controls"):
        run, _ = fit([*watch(), While(lambda step: step < 30)], Fragile())
    assert [each.step for each in Ledger.of(run).flags.evaluations] == [35, 42, 49, 56, 63]
    assert Ledger.of(run).controls.latest.isfinite().all()


class Meter:
    """Sums up, as people's own meters do."""

    def __init__(self) -> None:
        self.sums: list[float] = []
        self.count = 0


class Observed(TinyLM):
    """Whose validation changes whatever a validation can change."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []
        self.by_step: dict[str, list[int]] = {"steps": []}
        self.calls, self.seen, self.meter = 0, [], Meter()
        self.matrix, self.array = torch.zeros(2), np.zeros(2)
        self.mean = MeanMetric()
        self.register_buffer("total", torch.zeros(1))

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.outputs.append(loss)
        self.by_step["steps"].append(batch_idx)
        self.calls += 1
        self.meter.sums.append(float(loss))
        self.meter.count += 1
        self.matrix += loss
        self.array += float(loss)
        self.last_batch = batch
        self.total += loss
        self.mean.update(loss)
        self.log("val_loss", self.mean)
        self.log("noise", torch.rand(1) + random.random() + np.random.rand())

    def on_validation_epoch_end(self) -> None:
        content = [self.last_batch["input_ids"].sum(), *self.matrix, *self.array, self.total, *self.meter.sums]
        numbers = (len(self.outputs), len(self.by_step["steps"]), self.calls, self.meter.count)
        self.seen.append([*numbers, *map(float, content)])
        self.outputs.clear()


class Drawing(Rows):
    """Draws from a generator of its own and from the global one."""

    def __init__(self) -> None:
        super().__init__(CONTROLS)
        self.generator, self.numbers = torch.Generator().manual_seed(1), np.random.default_rng(1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        shift = int(torch.randint(3, (), generator=self.generator)) + int(self.numbers.integers(3))
        return {"input_ids": (self.tokens[index] + shift + torch.randint(2, ())) % 32}


class Counting(SequentialSampler):
    """Starts elsewhere at each pass."""

    passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        order = [*super().__iter__()]
        yield from order[self.passes :] + order[: self.passes]


def drawing() -> Any:
    return DataLoader(Drawing(), 40)


def shuffling() -> Any:
    generator = torch.Generator().manual_seed(1)
    return DataLoader(Rows(CONTROLS), 40, shuffle=True, generator=generator)


def counting() -> Any:
    rows = Rows(CONTROLS)
    return DataLoader(rows, 40, sampler=Counting(rows))


def working() -> Any:
    workers = {"num_workers": 1, "persistent_workers": True, "multiprocessing_context": "fork"}
    return DataLoader(Drawing(), 40, **workers)


@pytest.mark.parametrize("loader", [control_loader, drawing, shuffling, counting, working])
def test_repeating_a_validation_leaves_no_trace(loader):
    seed_everything(0)
    own_run, own = fit([ema()], Observed(), controls=loader(), max_epochs=2)
    seed_everything(0)
    run, module = fit([*watch(), ema()], Observed(), controls=loader(), max_epochs=2)
    assert len(Ledger.of(run).flags.evaluations) == 6
    assert torch.equal(weights(own), weights(module))
    assert module.seen == own.seen and module.by_step == own.by_step
    assert {name: run.callback_metrics[name] for name in ("val_loss", "noise")} == own_run.callback_metrics
    assert torch.equal(module.total, own.total)


def parts_of(batch: Any) -> list[dict[str, Tensor]]:
    return batch if isinstance(batch, list) else [batch]


def no_features(batch: Any) -> Tensor:
    return torch.zeros(sum(len(part["input_ids"]) for part in parts_of(batch)), 1)


class Several(TinyLM):
    """Validates on two loaders, and trains on one, alone or in a list."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(parts_of(batch)[0])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        tokens = torch.cat([part["input_ids"] for part in parts_of(batch)])
        self.log("val_loss", self.loss({"input_ids": tokens}))


@pytest.mark.parametrize("mode", ["sequential", "min_size", "max_size_cycle"])
def test_several_loaders_are_repeated_as_lightning_runs_them(mode):
    def loaders() -> Any:
        return CombinedLoader([control_loader(CONTROLS[:80]), control_loader(CONTROLS[80:])], mode)

    def callbacks() -> list[Any]:
        return [LossTracker(features=no_features), MemorizationDetector(k=4)]

    plain, run = (trainer([*callbacks(), *more], max_epochs=2, limit_val_batches=2) for more in ([], [ema()]))
    for each in (plain, run):
        each.fit(
            Several(), CombinedLoader([train_loader()], mode) if mode != "sequential" else train_loader(), loaders()
        )
    expected, controls = Ledger.of(plain).controls, Ledger.of(run).controls
    assert len(expected) >= 80 and torch.equal(controls.ids, expected.ids)
    assert torch.equal(controls.latest, expected.latest) and torch.equal(controls.previous, expected.previous)


@pytest.mark.parametrize("stop", [21, 42])
def test_a_resumed_run_is_as_an_uninterrupted_one(stop, tmp_path):
    """Also where it was saved after validations under the average. 21 steps are an epoch."""

    def callbacks() -> list[Any]:
        saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1)
        return [*watch(), ema(), saving]

    options = {"default_root_dir": tmp_path, "enable_checkpointing": True, "val_check_interval": 5}
    whole, model = fit(callbacks(), **options)
    path = tmp_path / f"step={stop}.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["LossTracker"]["validation_weights"]
    resumed, module = fit(callbacks(), ckpt_path=path, **options)
    assert state == {"are_averaged": True} and snapshot(resumed, module) == snapshot(whole, model)


def test_own_controls_are_not_touched_by_an_average():
    runs = [
        fit([LossTracker("content", controls=control_loader(), control_every=7), MemorizationDetector(k=4), *more])[0]
        for more in ([], [ema()])
    ]
    expected, controls = (Ledger.of(run).controls for run in runs)
    assert torch.equal(controls.latest, expected.latest) and controls.latest_step == expected.latest_step > 0


def test_a_monitor_of_memsink_exists_where_the_first_validation_is_repeated(tmp_path):
    saving = ModelCheckpoint(tmp_path, monitor="memsink/gap", save_top_k=1)
    callbacks = [*watch(), EMAWeightAveraging(decay=0.9), saving]
    fit(callbacks, enable_checkpointing=True, default_root_dir=tmp_path, max_epochs=2)
    assert saving.best_model_path
