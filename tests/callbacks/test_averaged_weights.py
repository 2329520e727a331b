"""Validation under other weights than training: controls are those of the weights that train, or there are none."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_memsink import Ledger, per_sample
from tests.support.small_runs import TinyLM, fit, watch, weights

REPEATED = r"validation runs under other weights than training .* in one more pass"


@pytest.fixture(autouse=True)
def no_warnings_about_averaging():
    """Lightning warns of schedulers it swaps and of small runs."""
    with warnings.catch_warnings():
        for message in (
            ".*scheduler.*",
            ".*does not have many workers",
            ".*logging interval",
            ".*grad attribute of a Tens",
        ):
            warnings.filterwarnings("ignore", message)
        yield


@pytest.fixture
def reports(monkeypatch):
    """What is printed about a validation that was repeated."""
    printed: list[str] = []
    monkeypatch.setattr("lightning_memsink.callbacks.runtime.validation_weights.rank_zero_info", printed.append)
    return printed


def facts(run: Any) -> list[Any]:
    """The losses of samples and controls, and all that follows from them but the time at which it is written."""
    ledger = Ledger.of(run)
    controls = ledger.controls
    evaluations = [(each.step, each.controls, each.tested, each.gap, each.counts) for each in ledger.flags.evaluations]
    tensors = [ledger.losses.last_loss, controls.ids, controls.latest, controls.previous]
    return [[*map(Tensor.tolist, [*tensors, ledger.flags.verdict, ledger.flags.onset_step])], repr(evaluations)]


def same_as_without(model: Any, more: Any, **options: Any) -> Any:
    """A run with averaged weights in validation: its facts are those of a run without, and its weights and the losses
    that its own validation logs are those of the same run without this package."""
    without, _ = fit(watch(), TinyLM(), **options)
    own, module = fit([*more()], model(), **options)
    for before in (True, False):
        callbacks = [*more(), *watch()] if before else [*watch(), *more()]
        run, watched = fit(callbacks, model(), **options)
        assert torch.equal(weights(module), weights(watched))
        assert run.callback_metrics["val_loss"] == own.callback_metrics["val_loss"]
        assert facts(run) == facts(without)
    return run


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
def test_an_average_of_lightnings_changes_nothing(decay, reports):
    same_as_without(TinyLM, lambda: [EMAWeightAveraging(decay=decay)], max_epochs=2)
    assert len(reports) == 2 and all(re.search(REPEATED, report) for report in reports)


class FromThirdEpoch(WeightAveraging):
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return (epoch_idx or 0) >= 2


@pytest.mark.parametrize(
    "average",
    [
        lambda: WeightAveraging(use_buffers=False),
        lambda: EMAWeightAveraging(decay=0.9, update_starting_at_step=25),
        FromThirdEpoch,
    ],
    ids=["mean", "from a step", "from an epoch"],
)
def test_averages_that_start_late_or_are_rare_change_nothing(average):
    same_as_without(TinyLM, lambda: [average()])


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"val_check_interval": None, "num_sanity_val_steps": 2},
        {"val_check_interval": None, "check_val_every_n_epoch": 2, "max_epochs": 4},
        {"reload_dataloaders_every_n_epochs": 1},
        {"limit_val_batches": 2},
        {"inference_mode": False, "precision": "bf16-mixed"},
    ],
    ids=str,
)
def test_any_schedule_of_validations_will_do(options):
    same_as_without(TinyLM, lambda: [EMAWeightAveraging(decay=0.9)], **options)


class Average(Callback):
    """An average of one's own, in the place of the weights from ``begin`` to ``end``; ``take`` is how it gets there."""

    def __init__(self, take: Any, begin: str = "on_validation_start", end: str = "on_validation_end") -> None:
        self.take, self.kept = take, None
        vars(self).update({begin: self.swap, end: self.restore})

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.average = copy.deepcopy(pl_module.mlp)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *batch: Any) -> None:
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), pl_module.mlp.parameters(), strict=True):
                mean.lerp_(weight, 0.1)

    def swap(self, trainer: Any, pl_module: Any) -> None:
        self.kept = None if trainer.sanity_checking else self.take(pl_module, self.average)

    def restore(self, trainer: Any, pl_module: Any) -> None:
        if self.kept is not None:
            self.kept()


def in_place(module: Any, average: nn.Module) -> Any:
    kept = copy.deepcopy(module.mlp.state_dict())
    module.mlp.load_state_dict(average.state_dict())
    return lambda: module.mlp.load_state_dict(kept)


def storage(module: Any, average: nn.Module) -> Any:
    pairs = [*zip(module.mlp.parameters(), average.parameters(), strict=True)]
    kept = [weight.data for weight, _ in pairs]
    for weight, mean in pairs:
        weight.data = mean.data

    def back() -> None:
        for (weight, _), data in zip(pairs, kept, strict=True):
            weight.data = data

    return back


def parameters(module: Any, average: Any) -> Any:
    kept = module.mlp[2].weight
    module.mlp[2].weight = nn.Parameter(average[2].weight.detach().clone())
    return lambda: setattr(module.mlp[2], "weight", kept)


def whole_module(module: Any, average: nn.Module) -> Any:
    kept, module.mlp = module.mlp, average
    return lambda: setattr(module, "mlp", kept)


def renamed_module(module: Any, average: nn.Module) -> Any:
    kept, module.mlp = module.mlp, nn.Sequential(average)
    return lambda: setattr(module, "mlp", kept)


@pytest.mark.parametrize("take", [in_place, storage, parameters, whole_module, renamed_module])
def test_an_average_is_noticed_however_it_takes_the_place_of_the_weights(take, reports):
    same_as_without(TinyLM, lambda: [Average(take)], max_epochs=2)
    assert len(reports) == 2


@pytest.mark.parametrize("begin", ["on_validation_start", "on_validation_epoch_start"])
@pytest.mark.parametrize("end", ["on_validation_epoch_end", "on_validation_end"])
def test_an_average_is_noticed_whichever_hooks_swap_it(begin, end):
    same_as_without(TinyLM, lambda: [Average(in_place, begin, end)], max_epochs=2)


class Averaging(TinyLM):
    """Keeps an average of its own and validates under it."""

    def __init__(self) -> None:
        super().__init__()
        self.average: Any = copy.deepcopy(self.mlp).requires_grad_(False)

    def on_train_batch_end(self, *batch: Any) -> None:
        average = self.average[0] if isinstance(self.average, list) else self.average
        for mean, weight in zip(average.parameters(), self.mlp.parameters(), strict=True):
            mean.data.lerp_(weight.data, 0.1)


class ByModelHook(Averaging):
    """Swaps in the first of the module's hooks, before any callback's."""

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.mlp, self.average = self.average, self.mlp

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.mlp, self.average = self.average, self.mlp
        self.train()


class WithinStep(Averaging):
    @contextmanager
    def averaged(self) -> Iterator[None]:
        kept = copy.deepcopy(self.mlp.state_dict())
        self.mlp.load_state_dict(self.average.state_dict())
        yield
        self.mlp.load_state_dict(kept)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        with self.averaged():
            super().validation_step(batch, batch_idx)


class ByFunctionalCall(Averaging):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        tokens = batch["input_ids"]
        embedded = self.embed(tokens)
        inputs = torch.cat([embedded[:, :-2], embedded[:, 1:-1]], -1)
        logits = functional_call(self.mlp, dict(self.average.named_parameters()), inputs)
        self.log("val_loss", F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten()))


class OfACopy(Averaging):
    """Evaluates another module, and the embedding that trains."""

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        tokens = batch["input_ids"]
        embedded = self.embed(tokens)
        logits = self.average(torch.cat([embedded[:, :-2], embedded[:, 1:-1]], -1))
        self.log("val_loss", F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten()))


class OfAHiddenCopy(TinyLM):
    """Evaluates a copy of the whole model, which is no part of it."""

    def on_fit_start(self) -> None:
        self.average = [TinyLM()]

    def on_train_batch_end(self, *batch: Any) -> None:
        for mean, weight in zip(self.average[0].parameters(), self.parameters(), strict=True):
            mean.data.lerp_(weight.data, 0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val_loss", self.average[0].loss(batch))


@pytest.mark.parametrize("model", [ByModelHook, WithinStep, ByFunctionalCall, OfACopy, OfAHiddenCopy])
def test_an_average_of_the_modules_own_is_noticed(model, reports):
    same_as_without(model, list, max_epochs=2)
    assert len(reports) == 2


class Normed(TinyLM):
    """With batch norm, dropout and a module that only training calls."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout, self.head = nn.BatchNorm1d(10), nn.Dropout(0.2), nn.Linear(32, 32)

    def logits(self, tokens: Tensor) -> Tensor:
        logits = self.norm(self.dropout(super().logits(tokens)))
        return logits + 0.1 * self.head(logits) if self.training else logits


class Reporting(TinyLM):
    """Reports its own losses, since those of compiled code are not always read."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens = batch["input_ids"]
        losses = F.cross_entropy(self.logits(tokens).transpose(1, 2), tokens[:, 2:], reduction="none")
        return per_sample(losses.mean(1))

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        super().validation_step(batch, batch_idx)
        return self.training_step(batch, batch_idx)


class Compiled(Reporting):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.compile(self.mlp, backend="eager")  # type: ignore[assignment]


class CompiledWithin(Reporting):
    def __init__(self) -> None:
        super().__init__()
        self.mlp.compile(backend="eager")


class Tied(TinyLM):
    """The output layer is the embedding, and is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 16))

    def logits(self, tokens: Tensor) -> Tensor:
        return F.linear(super().logits(tokens), self.embed.weight)


class Together(TinyLM):
    """Trains beside a teacher, which training calls too."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = [copy.deepcopy(self.mlp)]
        self.registered = copy.deepcopy(self.mlp).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.registered(torch.zeros(1, 32))
        return super().training_step(batch, batch_idx)

    on_train_batch_end = OfAHiddenCopy.on_train_batch_end

    def on_fit_start(self) -> None:
        self.average = [copy.deepcopy(self)]


class InTrainMode(Normed):
    def on_validation_model_eval(self) -> None:
        """Leaves dropout on and batch norm learning."""


@pytest.mark.parametrize("model", [TinyLM, Normed, Compiled, CompiledWithin, Tied, Together, InTrainMode])
def test_ordinary_validations_are_not_repeated(model, reports):
    run, module = fit(watch(), model(), max_epochs=2)
    _, own = fit([], model(), max_epochs=2)
    assert torch.equal(weights(own), weights(module))
    assert reports == [] and len(Ledger.of(run).flags.evaluations) == 6
    assert not any(each._forward_pre_hooks for each in module.modules())


def test_statistics_of_batch_norm_are_weights_too(reports):
    class Precise(Callback):
        """Swaps other running statistics in, and nothing else."""

        def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.kept = pl_module.norm.running_mean.clone()
            pl_module.norm.running_mean += 1

        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.norm.running_mean.copy_(self.kept)

    plain, _ = fit(watch(), Normed(), max_epochs=2)
    run, _ = fit([*watch(), Precise()], Normed(), max_epochs=2)
    assert len(reports) == 1 and facts(run) == facts(plain)


@pytest.mark.parametrize("model", [Compiled, CompiledWithin])
def test_an_average_is_noticed_in_a_compiled_model(model, reports):
    plain, _ = fit(watch(), model(), max_epochs=2)
    run, _ = fit([*watch(), EMAWeightAveraging(decay=0.9)], model(), max_epochs=2)
    assert len(reports) == 1 and facts(run) == facts(plain)


@pytest.mark.parametrize("model", [TinyLM, Normed])
def test_the_last_epoch_of_swa_which_does_not_train_gives_no_controls(model):
    """The epoch that updates batch norm runs under the average, in training and in validation."""

    def averaged() -> list[Callback]:
        return [StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)]

    for order in (1, -1):
        run, module = fit([*watch(), *averaged()][::order], model())
        _, own = fit(averaged(), model())
        assert torch.equal(weights(own), weights(module))
        assert [each.step for each in Ledger.of(run).flags.evaluations] == [7, 14, 21, 28, 35, 42, 49, 56, 63]
        assert Ledger.of(run).controls.latest_step == 63
