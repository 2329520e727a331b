"""E4: an ordinary training over several epochs, with nothing planted in it. What does `hold` cost where there is
nothing to hold, and what does it save once the model overfits?

T  tokens
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor

from benchmarks.common.planted_text import documentation, split_background
from benchmarks.common.training import token_nll
from benchmarks.mitigation.arms import ARMS, acted_share, watching
from benchmarks.mitigation.runs import Learner, Visits, fit, gpt, json_able
from lightning_memsink.ledger import Ledger


@dataclass(frozen=True)
class Sizes:
    """Numbers of texts of 64 tokens, and steps between two evaluations. A GPT of .9 M parameters overfits them."""

    texts: int = 1024
    controls: int = 256
    unseen: int = 512
    epochs: int = 16
    every: int = 16


@dataclass(frozen=True)
class Ordinary:
    """One finished arm: the loss of unseen text after each epoch, in nats per token; the share of visits that `hold`
    acted on, and its set point at the end."""

    arm: str
    seed: int
    held_out: tuple[float, ...]
    acted: float
    set_point: float
    seconds: float

    def plain(self) -> dict[str, Any]:
        """The result in types that JSON has."""
        return json_able(asdict(self))

    @property
    def best(self) -> float:
        """That of the best epoch: the best that early stopping can do."""
        return min(self.held_out)

    @property
    def last(self) -> float:
        return self.held_out[-1]


class HeldOut(Callback):
    """Measures unseen text after every epoch, with the model in evaluation mode."""

    def __init__(self, unseen: Tensor) -> None:
        self.unseen = unseen
        self.losses: list[float] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Learner) -> None:
        pl_module.eval()
        self.losses.append(float(token_nll(pl_module, self.unseen).mean()))
        pl_module.train()


@cache
def texts(seed: int, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, int]:
    """Training texts, controls and unseen texts of Python's documentation ``[., T]``, and the number of tokens."""
    corpus = documentation(seed)
    train, held_out, _ = split_background(corpus, sizes.texts, sizes.controls + sizes.unseen, seed)
    controls, unseen = held_out.split([sizes.controls, sizes.unseen])
    return train, controls, unseen, corpus.tokenizer.get_vocab_size()


def train_ordinarily(name: str, seed: int, sizes: Sizes) -> Ordinary:
    """Trains and measures one arm."""
    torch.set_num_threads(1)
    start, arm = time.perf_counter(), ARMS[name]
    train, controls, unseen, vocab_size = texts(seed, sizes)
    seed_everything(seed, verbose=False)
    module = Learner(gpt(vocab_size, train.shape[1], **arm.shape), arm.weight_decay)
    measured, acting = HeldOut(unseen), arm.acting()
    trainer = fit(
        module, Visits(train, torch.arange(len(train)), seed=seed), [*watching(acting), *acting, measured], seed,
        Visits(controls, torch.arange(len(controls))) if acting else None, epochs=sizes.epochs, every=sizes.every,
    )  # fmt: skip
    ledger = Ledger.of(trainer)
    logs = ledger.interventions.values()
    return Ordinary(
        name, seed, tuple(measured.losses),
        acted_share(ledger),
        next((one.records[-1].get("set_point", float("nan")) for one in logs if one.records), float("nan")),
        time.perf_counter() - start,
    )  # fmt: skip
