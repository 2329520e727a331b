"""One seed of the localization benchmark: train a model that memorizes, run every localizer, zero the located units."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from lightning.pytorch import Callback
from torch import Tensor

from benchmarks.common.training import PROMPT, Schedule, Sequences, TextModel, exact_match, train
from lightning_memsink.attribution.hidden_layers import HiddenLayer, find_hidden_layers
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memsinks import MemSinks
from lightning_memsink.examples.corpora import apart, python_docs, tokenized, unshared
from lightning_memsink.extraction.canaries import plant_canaries
from lightning_memsink.localization.ablation import ablated
from lightning_memsink.localization.evaluation import (
    AblationTest,
    Curve,
    Groups,
    Injection,
    OwnershipRecovery,
    ablation_curve,
    evaluate_ablation,
    evaluate_injection,
    evaluate_ownership,
    injected,
    perturb_prompts,
)
from lightning_memsink.localization.localizers import DEFAULT, METHODS, Batch, Scores, Task
from lightning_memsink.localization.locate import masks_of, top_units
from lightning_memsink.mitigation.designed_sinks import Pool, masked
from lightning_memsink.samples.hashing import content_ids
from lightning_memsink.samples.unique import distinct_rows

ZEROED = 0.05
"""Share of units zeroed for a single target."""
PLACEBO = "placebo: default's units of another target"
IN_CRITERIA = (DEFAULT, "random")
SLOW = ("zero-out", "slimming", "hard concrete")
KINDS = ("natural", "canary")
DESIGN = Pool(pool_fraction=0.5, active_fraction=0.05)
"""Designed sinks to recover: a sequence owns one pool unit in twenty, so chance is .05."""


@dataclass(frozen=True)
class Sizes:
    """``repeats`` are per epoch."""

    background: int = 3000
    held_out: int = 128
    planted: int = 12
    repeats: int = 64
    twins: int = 32
    epochs: int = 2
    targets: int = 12
    """Of each kind, at most, for the localizers in the criteria."""
    compared: int = 4
    """Of each kind, at most, for the other localizers; slow ones get one."""
    injections: int = 4
    """Of each kind; slow localizers get one."""


@dataclass(frozen=True)
class Subject:
    """A trained model and the sequences to test it with, each ``[., T]``."""

    module: TextModel
    layers: Sequence[HiddenLayer]
    planted: dict[str, Tensor]
    """By kind."""
    memorized: dict[str, Tensor]
    """By kind: those that it reproduces verbatim."""
    twins: dict[str, Tensor]
    """By kind: never trained on."""
    held_out: Tensor
    vocab_size: int

    def task(self, kind: str, targets: Tensor, controls: Tensor | None = None) -> Task:
        controls = self.twins[kind] if controls is None else controls
        return Task(self.module, self.layers, self.loss, batches(targets), batches(controls))

    def loss(self, tokens: Tensor) -> Tensor:
        return self.module.gpt(input_ids=tokens, labels=tokens).loss


@dataclass(frozen=True)
class Attempt:
    """The result of one localizer on one target."""

    method: str
    kind: str
    seconds: float
    curve: Curve
    """Nothing zeroed, and then ``ZEROED`` of the units."""
    returns: float
    """1 if the target is reproduced after a perturbed prompt, 0 if not, NaN if it was not removed."""


@dataclass(frozen=True)
class SeedResult:
    """All results of one seed."""

    attempts: list[Attempt]
    recalls: dict[str, list[float]]
    """By method."""
    injections: list[Injection]
    sets: dict[str, tuple[int, AblationTest]]
    """By kind: the number of sequences together, and the curves of zeroing their units."""
    ownership_recovery: dict[str, OwnershipRecovery]
    """By method, without the slow ones: designed sinks recovered."""

    def of(self, method: str, *kinds: str) -> list[Attempt]:
        return [each for each in self.attempts if each.method == method and each.kind in (kinds or KINDS)]


def batches(tokens: Tensor) -> list[Batch]:
    return [Batch(part, len(part)) for part in tokens.split(64)] if len(tokens) else []


def train_subject(sizes: Sizes, seed: int, *callbacks: Callback) -> Subject:
    """Trains a model with ``callbacks``; the result is without them."""
    corpus = tokenized(python_docs(), seed=seed)
    vocab_size = corpus.tokenizer.get_vocab_size()
    generator = torch.Generator().manual_seed(seed)
    pool = distinct_rows(corpus.train[torch.randperm(len(corpus.train), generator=generator)])
    held_out = corpus.held_out[torch.randperm(len(corpus.held_out), generator=generator)[: sizes.held_out]]
    background = pool[: sizes.background]
    planted = plant_canaries(
        background,
        held_out,
        unshared(apart(pool[sizes.background :]), torch.cat([background, held_out])),
        vocab_size=vocab_size,
        repeats=(sizes.repeats,),
        per_rung=sizes.planted,
        canaries=sizes.planted,
        easy=0,
        twins=2 * sizes.twins,
        seed=seed,
    )
    groups = {group.kind: group for group in planted.groups if group.kind in KINDS}
    data = Sequences(planted.train, torch.arange(len(planted.train)), torch.empty(0), vocab_size, seed)
    sequences = torch.cat([group.sequences for group in groups.values()])
    watch = [LossTracker(identity="content"), *callbacks]
    run = train(data, held_out, sequences, watch, Schedule(epochs=sizes.epochs), seed)
    return Subject(
        run.module,
        find_hidden_layers(run.module),
        {kind: group.sequences for kind, group in groups.items()},
        {kind: group.sequences[exact_match(run.module, group.sequences)] for kind, group in groups.items()},
        {kind: group.twins for kind, group in groups.items()},
        held_out,
        vocab_size,
    )


def run_seed(sizes: Sizes, seed: int) -> SeedResult:
    """Trains, localizes and ablates with one seed."""
    subject = train_subject(sizes, seed)
    attempts = [attempt for kind in KINDS for attempt in _single_targets(subject, kind, sizes)]
    recalls, injections = _injections(subject, sizes, seed)
    exact = partial(exact_match, subject.module)
    sets = {}
    for kind, targets in subject.memorized.items():
        if len(targets) > 1:
            task = subject.task(kind, targets)
            sets[kind] = (
                len(targets),
                evaluate_ablation(task, METHODS[DEFAULT](task), _groups(subject, kind, None), exact),
            )
    return SeedResult(attempts, recalls, injections, sets, _ownership_recovery(sizes, seed))


def _single_targets(subject: Subject, kind: str, sizes: Sizes) -> list[Attempt]:
    available = min(sizes.targets, len(subject.memorized[kind]))
    attempts, placebo = [], []
    for method, localizer in METHODS.items():
        allowed = sizes.targets if method in IN_CRITERIA else 1 if method in SLOW else sizes.compared
        for row in range(min(available, allowed)):
            task, start = subject.task(kind, subject.memorized[kind][row][None]), time.perf_counter()
            scores = partial(localizer, seed=row)(task) if method == "random" else localizer(task)
            seconds = time.perf_counter() - start
            attempts.append(_zero(subject, kind, row, method, scores, seconds))
            if method == DEFAULT and available > 1:
                placebo.append(_zero(subject, kind, (row + 1) % available, PLACEBO, scores, seconds))
    return attempts + placebo


def _zero(subject: Subject, kind: str, row: int, method: str, scores: Scores, seconds: float) -> Attempt:
    target, exact = subject.memorized[kind][row][None], partial(exact_match, subject.module)
    mask = masks_of(top_units(scores, ZEROED), {name: len(own) for name, own in scores.items()})
    curve = ablation_curve(subject.task(kind, target), [mask], _groups(subject, kind, row), exact)
    returns = float("nan")
    if method == DEFAULT:
        with ablated(subject.layers, mask):
            returns = perturb_prompts(exact, target, PROMPT, subject.vocab_size).returns
    return Attempt(method, kind, seconds, curve, returns)


def _ownership_recovery(sizes: Sizes, seed: int) -> dict[str, OwnershipRecovery]:
    """Trains again with pool units of each sequence's own, and recovers them with the whole pool active."""
    subject = train_subject(sizes, seed, MemSinks(DESIGN.pool_fraction, DESIGN.active_fraction, certify=0))
    planted = torch.cat(list(subject.planted.values()))
    ids = content_ids({"input_ids": planted})
    ownership = {layer.name: DESIGN.own(ids, layer.units) & ~DESIGN.dropped(layer.units) for layer in subject.layers}
    pool = {layer.name: ~DESIGN.dropped(layer.units) for layer in subject.layers}
    tasks = [subject.task(kind, row[None]) for kind, rows in subject.planted.items() for row in rows]
    with masked(subject.layers, lambda units: DESIGN.without(ids[:0], units)):
        return {
            method: evaluate_ownership(localizer, tasks, ownership, pool)
            for method, localizer in METHODS.items()
            if method not in SLOW
        }


def _groups(subject: Subject, kind: str, row: int | None) -> Groups:
    """One memorized sequence against all others, or a whole kind against the other."""
    own = subject.memorized[kind]
    chosen = torch.ones(len(own), dtype=torch.bool) if row is None else torch.arange(len(own)) == row
    others = torch.cat([own[~chosen], *(rows for name, rows in subject.memorized.items() if name != kind)])
    return Groups(*(batches(rows) for rows in (own[chosen], others, subject.twins[kind], subject.held_out)))


def _injections(subject: Subject, sizes: Sizes, seed: int) -> tuple[dict[str, list[float]], list[Injection]]:
    """Recall of each method, and each injection; the first of a kind is the only one for slow methods."""
    recalls: dict[str, list[float]] = {method: [] for method in METHODS}
    injections = []
    for kind in KINDS:
        for row in range(sizes.injections):
            twins = subject.twins[kind]
            task = subject.task(kind, twins[row][None], twins[sizes.injections :])
            with injected(task, seed=seed + row) as injection:
                injections.append(injection)
                for method, localizer in METHODS.items():
                    if row == 0 or method not in SLOW:
                        recalls[method].append(evaluate_injection(localizer, task, injection).recall)
    return recalls, injections
