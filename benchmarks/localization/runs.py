"""One seed of the localization benchmark: train a model that memorizes, ask every localizer, zero what it says."""

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
JUDGED = (DEFAULT, "random")
SLOW = ("zero-out", "slimming", "hard concrete")
KINDS = ("natural", "canary")
DESIGN = Pool(pool_fraction=0.5, active_fraction=0.05)
"""Of the designed sinks to find again: a sequence owns one pool unit in twenty, so chance is .05."""


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
    """Of each kind, at most, for the localizers that a criterion stands on."""
    compared: int = 4
    """Of these, for the others; slow ones get one."""
    injections: int = 4
    """Of each kind; slow localizers get one."""


@dataclass(frozen=True)
class Subject:
    """A trained model and what it may know. Sequences are ``[., T]``."""

    module: TextModel
    layers: Sequence[HiddenLayer]
    planted: dict[str, Tensor]
    """By kind."""
    memorized: dict[str, Tensor]
    """By kind: those that it says word for word."""
    twins: dict[str, Tensor]
    """By kind: never trained on."""
    held_out: Tensor
    vocab_size: int

    def task(self, kind: str, targets: Tensor, controls: Tensor | None = None) -> Task:
        against = self.twins[kind] if controls is None else controls
        return Task(self.module, self.layers, self.loss, batches(targets), batches(against))

    def loss(self, tokens: Tensor) -> Tensor:
        return self.module.gpt(input_ids=tokens, labels=tokens).loss


@dataclass(frozen=True)
class Attempt:
    """One localizer on one target."""

    method: str
    kind: str
    seconds: float
    curve: Curve
    """Nothing zeroed, and then ``ZEROED`` of the units."""
    returns: float
    """1 if the target comes back with a changed prompt, 0 if not, NaN if it was not gone."""


@dataclass(frozen=True)
class Found:
    """One seed."""

    attempts: list[Attempt]
    recalls: dict[str, list[float]]
    """By method."""
    injections: list[Injection]
    sets: dict[str, tuple[int, AblationTest]]
    """By kind: how many sequences together, and what zeroing their units did."""
    blind: dict[str, OwnershipRecovery]
    """By method, the slow ones left out: designed sinks, found again."""

    def of(self, method: str, *kinds: str) -> list[Attempt]:
        return [each for each in self.attempts if each.method == method and each.kind in (kinds or KINDS)]


def batches(tokens: Tensor) -> list[Batch]:
    return [Batch(part, len(part)) for part in tokens.split(64)] if len(tokens) else []


def learn(sizes: Sizes, seed: int, *callbacks: Callback) -> Subject:
    """Trains with ``callbacks`` and looks at the model as it is then, without them."""
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
    rungs = {rung.kind: rung for rung in planted.groups if rung.kind in KINDS}
    data = Sequences(planted.train, torch.arange(len(planted.train)), torch.empty(0), vocab_size, seed)
    shown = torch.cat([rung.sequences for rung in rungs.values()])
    watch = [LossTracker(identity="content"), *callbacks]
    run = train(data, held_out, shown, watch, Schedule(epochs=sizes.epochs), seed)
    return Subject(
        run.module,
        find_hidden_layers(run.module),
        {kind: rung.sequences for kind, rung in rungs.items()},
        {kind: rung.sequences[exact_match(run.module, rung.sequences)] for kind, rung in rungs.items()},
        {kind: rung.twins for kind, rung in rungs.items()},
        held_out,
        vocab_size,
    )


def investigate(sizes: Sizes, seed: int) -> Found:
    """Everything of one seed."""
    subject = learn(sizes, seed)
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
    return Found(attempts, recalls, injections, sets, _blind(sizes, seed))


def _single_targets(subject: Subject, kind: str, sizes: Sizes) -> list[Attempt]:
    many = min(sizes.targets, len(subject.memorized[kind]))
    attempts, placebo = [], []
    for method, localizer in METHODS.items():
        asked = sizes.targets if method in JUDGED else 1 if method in SLOW else sizes.compared
        for row in range(min(many, asked)):
            task, start = subject.task(kind, subject.memorized[kind][row][None]), time.perf_counter()
            scores = partial(localizer, seed=row)(task) if method == "random" else localizer(task)
            seconds = time.perf_counter() - start
            attempts.append(_zero(subject, kind, row, method, scores, seconds))
            if method == DEFAULT and many > 1:
                placebo.append(_zero(subject, kind, (row + 1) % many, PLACEBO, scores, seconds))
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


def _blind(sizes: Sizes, seed: int) -> dict[str, OwnershipRecovery]:
    """Trains once more, each sequence with pool units of its own, and asks for them with the whole pool on."""
    subject = learn(sizes, seed, MemSinks(DESIGN.pool_fraction, DESIGN.active_fraction, certify=0))
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
    done = []
    for kind in KINDS:
        for row in range(sizes.injections):
            twins = subject.twins[kind]
            task = subject.task(kind, twins[row][None], twins[sizes.injections :])
            with injected(task, seed=seed + row) as injection:
                done.append(injection)
                for method, localizer in METHODS.items():
                    if row == 0 or method not in SLOW:
                        recalls[method].append(evaluate_injection(localizer, task, injection).recall)
    return recalls, done
