"""A small training run for the checks: a language model of some thousand parameters and data with repeated samples."""

from __future__ import annotations

import random
import signal
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_memsink.callbacks.live_curves import LiveCurves
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.ledger import Ledger
from lightning_memsink.losses.unreadable import InternalError

VOCABULARY, LENGTH, EPOCHS = 16, 10, 3


def random_tokens(rows: int, seed: int) -> Tensor:
    """``[rows, LENGTH]`` int64."""
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


REPEATED, ONCE, CONTROLS = random_tokens(8, seed=1), random_tokens(8, seed=2), random_tokens(64, seed=3)
TRAIN = torch.cat([REPEATED.repeat(6, 1), ONCE])[torch.randperm(56, generator=torch.Generator().manual_seed(4))]
"""56 rows: 8 sequences six times each, which are soon memorized, and 8 once."""
NEVER_REPEATED = random_tokens(56, seed=5)
"""56 different rows: in one epoch there is nothing to flag."""


def loader(tokens: Tensor, batch_size: int) -> DataLoader[dict[str, Tensor]]:
    """In the order of the rows, and with a random generator of its own, so that only dropout draws from the global."""
    samples: Any = [{"input_ids": row} for row in tokens]
    return DataLoader(samples, batch_size, generator=torch.Generator().manual_seed(0))


class SmallLM(LightningModule):
    """Predicts a token from the two before it, with dropout, and with the forward call of transformers.

    ``interruption`` is raised in the training step at optimizer step 9.
    """

    optimizer: torch.optim.Optimizer
    """The one of the last fit."""

    def __init__(self, interruption: type[BaseException] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.interruption = interruption
        self.steps_begun = 0
        self.resumed_random_state: Tensor | None = None
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.dropout = nn.Dropout(0.1)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, VOCABULARY))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        current = self.embed(input_ids)
        previous = F.pad(current, (0, 0, 1, 0))[:, :-1]
        return SimpleNamespace(logits=self.mlp(self.dropout(torch.cat([current, previous], -1))))

    def get_output_embeddings(self) -> nn.Module:
        """As transformers names the head over the vocabulary."""
        return self.mlp[-1]

    def generate(self) -> None:
        """Here because a causal language model of transformers has it."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        return F.cross_entropy(self(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.steps_begun += 1
        if self.interruption is not None and self.global_step == 9:
            raise self.interruption
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.AdamW(self.parameters(), 2e-2)
        return self.optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["random state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.resumed_random_state = checkpoint["random state"]

    def on_train_epoch_start(self) -> None:
        if self.resumed_random_state is not None:
            torch.set_rng_state(self.resumed_random_state)  # dropout is that of the uninterrupted run
            self.resumed_random_state = None


def companions(callback: Callback | None = None) -> list[Callback]:
    """Callbacks that write the slots of the ledger, without those of the class of ``callback``."""
    writers: list[Callback] = [
        LossTracker(identity="content"),
        MemorizationDetector(k=4),
        SinkLocalizer(every=1, norms=False, fraction=0.1),
        LiveCurves(),
    ]
    return [writer for writer in writers if type(writer) is not type(callback)]


def fit(
    callbacks: Sequence[Callback],
    module: SmallLM | None = None,
    tokens: Tensor = TRAIN,
    epochs: int = EPOCHS,
    logger: Logger | None = None,
    checkpoint: Path | None = None,
    train_loader: Any = None,
) -> tuple[Trainer, SmallLM]:
    """One run from seeded random generators, in a folder of its own; their state afterwards is that of the run."""
    module = SmallLM() if module is None else module
    seed_everything()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            callbacks=list(callbacks),
            default_root_dir=folder,
            max_epochs=epochs,
            val_check_interval=4,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            accelerator="cpu",
            logger=False if logger is None else logger,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            enable_model_summary=False,
        )
        path = None if checkpoint is None else str(checkpoint)
        train_loader = loader(tokens, 8) if train_loader is None else train_loader
        trainer.fit(module, train_loader, loader(CONTROLS, 32), ckpt_path=path)
    return trainer, module


def seed_everything() -> None:
    """All global generators."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def random_state() -> dict[str, Any]:
    """Of each global generator."""
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}


@contextmanager
def quiet() -> Iterator[None]:
    """On one thread and without warnings, except that an error inside lightning_memsink is raised.

    Afterwards Ctrl-C ends the program again, which Lightning prevents once it has seen a KeyboardInterrupt.
    """
    handler, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small for more
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", InternalError)
            yield
    finally:
        torch.set_num_threads(threads)
        if signal.getsignal(signal.SIGINT) is not handler:
            signal.signal(signal.SIGINT, handler)


def facts(trainer: Trainer, module: nn.Module, callback: Callback) -> dict[str, Any]:
    """What two equal runs share to the bit: weights, the ledger's slots, and the state of ``callback``."""
    ledger = Ledger.of(trainer)
    losses, controls, flags = ledger.get(Ledger.losses), ledger.get(Ledger.controls), ledger.get(Ledger.flags)
    sinks, onset = ledger.get(Ledger.sinks), ledger.get(Ledger.onset)
    return {
        "weights": module.state_dict(),
        "ledger.losses": None if losses is None else losses.state_dict(),
        "ledger.controls": None if controls is None else controls.state_dict(),
        "ledger.flags": None if flags is None else flags.state_dict(),
        "ledger.onset": None if onset is None else vars(onset),
        "ledger.sinks": None if sinks is None else {"units": dict(sinks.units), "scores": dict(sinks.scores)},
        "state_dict()": callback.state_dict(),
    }


def difference(found: Any, expected: Any, place: str = "") -> str | None:
    """The first place where two nested values differ, to the bit and with NaN equal to NaN; None if they are equal."""
    if type(found) is not type(expected):
        return f"{place}: {type(found).__name__}, not {type(expected).__name__}"
    if isinstance(found, dict):
        if list(map(str, found)) != list(map(str, expected)):
            return f"{place}: keys {list(found)}, not {list(expected)}"
        pairs: Iterator[tuple[Any, Any, Any]] = ((key, found[key], expected[key]) for key in found)
    elif isinstance(found, list | tuple):
        if len(found) != len(expected):
            return f"{place}: {len(found)} values, not {len(expected)}"
        pairs = ((n, one, other) for n, (one, other) in enumerate(zip(found, expected, strict=True)))
    else:
        return None if _same(found, expected) else f"{place}: {_short(found)}, not {_short(expected)}"
    differences = (difference(one, other, f"{place}[{key!r}]" if place else str(key)) for key, one, other in pairs)
    return next((each for each in differences if each is not None), None)


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, Tensor):
        if found.dtype != expected.dtype or found.shape != expected.shape:
            return False
        return bool(((found == expected) | (found != found) & (expected != expected)).all())
    if isinstance(found, np.ndarray):
        return bool(np.array_equal(found, expected))
    return bool(found == expected) or (found != found and expected != expected)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
