"""Fits a case's module with `LossTracker` and compares what the ledger has with each sample's true loss."""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite, isnan, nan
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from benchmarks.capture.case import Case, Data, Fitted, Twin
from lightning_memsink.ledger import Ledger
from lightning_memsink.losses.unreadable import InternalError

Verdict = Literal["right", "refused", "silent wrong", "crashed", "not run"]
Stage = Literal["training", "validation"]
REMEDY = re.compile(r"per_sample|memsink\(loss|LossTracker\(loss|\bsample_id\b")
"""What a refusal tells the user to type."""


@dataclass(frozen=True)
class Outcome:
    """What became of a case in one stage. ``line`` says why: the refusal, or how it is wrong."""

    verdict: Verdict
    line: str = ""
    scaled: bool = False
    """Whether it is right in the second unit that the case allows."""


@dataclass
class Truth(Callback):
    """Computes each sample's loss at the weights of each step, before any other callback sees the batch."""

    case: Case
    data: Data
    order: Sequence[int]
    held_out_order: Sequence[int]
    losses: dict[Stage, dict[int, float]] = field(default_factory=lambda: {"training": {}, "validation": {}})
    factors: dict[Stage, dict[int, float]] = field(default_factory=lambda: {"training": {}, "validation": {}})
    stage: Stage = "training"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._compute("training", pl_module, batch_idx)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._compute("validation", pl_module, batch_idx)

    def rows(self, stage: Stage, batch_idx: int) -> list[int]:
        """Numbers of the samples in a batch."""
        order, size = self.order if stage == "training" else self.held_out_order, self.data.batch_size
        return list(order[batch_idx * size : (batch_idx + 1) * size])

    def _compute(self, stage: Stage, pl_module: LightningModule, batch_idx: int) -> None:
        self.stage = stage
        rows = self.rows(stage, batch_idx)
        samples = [(self.data.samples if stage == "training" else self.data.held_out)[row] for row in rows]
        assert isinstance(pl_module, Fitted)
        with torch.random.fork_rng(), torch.enable_grad():
            losses = self.case.losses(Twin(pl_module), self.data.collate, samples).detach()
            factors = torch.ones(len(rows)) if self.case.also is None else self.case.also(self.data.collate(samples))
        if stage == "training" and batch_idx in self.case.without_loss:
            losses = torch.full_like(losses, nan)
        self.losses[stage] |= dict(zip(rows, losses.tolist(), strict=True))
        self.factors[stage] |= dict(zip(rows, factors.tolist(), strict=True))


@dataclass(frozen=True)
class Warned:
    """A warning while a case was fitted."""

    text: str
    stage: Stage
    is_internal: bool


@contextmanager
def warnings_by_stage(truth: Truth) -> Iterator[list[Warned]]:
    """Collects the warnings of a fit, each with the stage that it came in."""
    warned: list[Warned] = []

    def collect(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        warned.append(Warned(str(message), truth.stage, issubclass(category, InternalError)))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = collect
        yield warned


def shuffled(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


def trainer_of(case: Case, callbacks: Sequence[Callback], **options: Any) -> Trainer:
    return Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "callbacks": list(callbacks),
            **case.options,
            **options,
        }
    )


def run(case: Case, seed: int = 0) -> dict[Stage, Outcome]:
    """Fits the case's module and says what became of training's and of validation's losses."""
    data = case.data()
    order, held_out_order = shuffled(len(data.samples), seed), shuffled(len(data.held_out), seed + 1)
    seed_everything(seed, verbose=False)
    truth = Truth(case, data, order, held_out_order)
    with warnings_by_stage(truth) as warned:
        try:
            trainer = trainer_of(case, [truth, case.tracker()])
            trainer.fit(
                case.module(case), data.batches(data.samples, order), data.batches(data.held_out, held_out_order)
            )
        except Exception as error:
            return dict.fromkeys(("training", "validation"), _crashed(error))
        finally:
            torch.compiler.reset() if case.compiled else None
    ledger = Ledger.of(trainer)
    recorded: dict[Stage, dict[int, float]] = {
        "training": _by_sample(ledger.losses.ids, ledger.losses.last_loss, case.ids(data, data.samples)),
        "validation": _by_sample(ledger.controls.ids, ledger.controls.latest, case.ids(data, data.held_out)),
    }
    return judge(case, truth, recorded, warned)


def judge(
    case: Case, truth: Truth, recorded: Mapping[Stage, Mapping[int, float]], warned: Sequence[Warned]
) -> dict[Stage, Outcome]:
    """The outcome of each stage; in both the losses must have the same unit."""
    internal = [each.text for each in warned if each.is_internal]
    if internal:
        return dict.fromkeys(("training", "validation"), Outcome("crashed", internal[0]))
    training = _judge_stage(case, truth, recorded, _refusals(warned, "training"), "training")
    lines = _refusals(warned, "validation")
    if training.verdict == "refused":
        lines = [*lines, training.line]  # one line suffices
    validation = _judge_stage(case, truth, recorded, lines, "validation")
    if {training.verdict, validation.verdict} == {"right"} and training.scaled != validation.scaled:
        validation = Outcome("silent wrong", "training and validation are in different units")
    return {"training": training, "validation": validation}


def _judge_stage(
    case: Case,
    truth: Truth,
    recorded: Mapping[Stage, Mapping[int, float]],
    refusals: Sequence[str],
    stage: Stage,
) -> Outcome:
    must_refuse = case.must_refuse or (stage == "validation" and case.validation_refused)
    found, losses, factors = recorded[stage], truth.losses[stage], truth.factors[stage]
    expected = dict.fromkeys(losses, nan) if must_refuse else losses
    outcome = compare(found, expected, refusals, case.tolerance, must_refuse)
    if outcome.verdict == "silent wrong" and case.also is not None:
        other = compare(found, {row: losses[row] * factors[row] for row in losses}, refusals, case.tolerance)
        if other.verdict == "right":
            return Outcome("right", scaled=True)
    return outcome


def compare(
    found: Mapping[int, float],
    expected: Mapping[int, float],
    refusals: Sequence[str],
    tolerance: float,
    must_refuse: bool = False,
) -> Outcome:
    """Compares recorded with true losses, both by the sample's number; NaN and no entry are the same.

    A finite loss must be right, whatever was said; one that is missing needs a refusal, unless the sample has none.
    """
    wrong = {
        row: loss
        for row, loss in found.items()
        if isfinite(loss) and not abs(loss - expected.get(row, nan)) <= tolerance * (1 + abs(expected.get(row, nan)))
    }
    if wrong:
        return Outcome("silent wrong", how_wrong(wrong, found, expected))
    missing = [row for row, loss in expected.items() if isfinite(loss) and not isfinite(found.get(row, nan))]
    if missing or must_refuse:
        line = f"nothing is recorded for {len(missing)} of {len(expected)} samples, and nothing is said"
        return Outcome("refused", refusals[0]) if refusals else Outcome("silent wrong", line)
    return Outcome("right")


def how_wrong(wrong: Mapping[int, float], found: Mapping[int, float], expected: Mapping[int, float]) -> str:
    """One line: of how many samples, by how much, and whether losses are of other samples or in another unit."""
    true = [expected.get(row, nan) for row in wrong]
    if any(map(isnan, true)):
        return f"{sum(map(isnan, true))} samples have a loss and should have none"
    furthest = max(abs(a - b) for a, b in zip(wrong.values(), true, strict=True))
    line = f"{len(wrong)} of {len(expected)} are wrong, by {furthest:.3g}"
    ratios = [a / b if b else nan for a, b in zip(wrong.values(), true, strict=True)]
    if len(ratios) > 1 and max(ratios) - min(ratios) < 1e-3 * abs(max(ratios)):
        return f"{line}: all {ratios[0]:.4g} times the truth"
    others = sum(any(abs(loss - other) < 1e-4 for other in expected.values()) for loss in wrong.values())
    return f"{line}: {others} are the losses of other samples" if others * 2 >= len(wrong) else line


def _refusals(warned: Sequence[Warned], stage: Stage) -> list[str]:
    """Warnings that name a remedy. Those that name the other stage's step belong there, whenever they came."""
    other = "validation_step" if stage == "training" else "training_step"
    own = f"{stage}_step"
    remedies = [each for each in warned if REMEDY.search(each.text)]
    return [each.text for each in remedies if own in each.text or (each.stage == stage and other not in each.text)]


def _by_sample(ids: Tensor, losses: Tensor, known: Sequence[int]) -> dict[int, float]:
    """Losses by the sample's number; ids that belong to no sample get negative numbers."""
    number = {id_: row for row, id_ in enumerate(known)}
    rows = [number.get(id_, -1 - place) for place, id_ in enumerate(ids.tolist())]
    return dict(zip(rows, losses.tolist(), strict=True))


def _crashed(error: Exception) -> Outcome:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return Outcome("crashed", f"{type(error).__name__}: {error} ({place.name}:{place.lineno})".replace("\n", " "))


def explains(case: Case, seed: int = 0) -> float:
    """How far the step's loss is from the sum of the samples' parts and the rest, relative to 1 + its size, in double.

    It is the benchmark's own fault if that is not zero.
    """
    data = case.data()
    samples = [data.samples[row] for row in shuffled(len(data.samples), seed)[: data.batch_size]]
    collate = doubled(data.collate)
    seed_everything(seed, verbose=False)
    with doubles():
        model = Twin(case.module(case).double())
        loss = case.step(model, collate(samples))
        loss = (loss["loss"] if isinstance(loss, Mapping) else loss).detach()
        parts = case.parts(model, collate, samples).sum().detach()
        rest = torch.zeros(()) if case.rest is None else case.rest(model, collate(samples)).detach()
    return float((loss - parts - rest).abs() / (1 + loss.abs()))


@contextmanager
def doubles() -> Iterator[None]:
    """Makes float64 the default type."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def doubled(collate: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """``collate`` whose floating-point tensors are float64, as a Trainer with ``precision="64-true"`` has them."""
    from lightning_utilities.core.apply_func import apply_to_collection

    def double(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return lambda samples: apply_to_collection(collate(samples), Tensor, double)
