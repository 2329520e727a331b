"""One arm of E1 or E2: trains it, and measures verbatim memorization and losses.

B  samples in a batch      T  tokens      n  samples of a kind      U  different samples
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from math import isfinite
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.common.planted_text import WORLDS, Kind, Sizes, World
from benchmarks.common.training import WARMUP, exact_match, token_nll
from benchmarks.mitigation.arms import ARMS, Gate, acted_share, watching
from lightning_memsink.callbacks.memsinks import MemSinks
from lightning_memsink.ledger import Ledger
from lightning_memsink.mitigation.designed_sinks import masked

NAN, IGNORED = float("nan"), -100
EVERY = 20
"""Steps between two evaluations of the controls."""


@dataclass(frozen=True)
class Measured:
    """Measurements of the deployed model on one kind of text; losses in nats per token, NaN without samples."""

    samples: int
    shown: float
    unseen: float
    exact: float
    """Share of the shown samples that are reproduced verbatim."""
    own_exact: float = NAN
    """The same with each sample's own designed sinks on."""
    trained: float = NAN
    """Visits of a sample that reached the gradient, on average."""
    flagged: float = NAN
    """Share of the shown samples that were flagged as memorized at some evaluation."""


@dataclass(frozen=True)
class Result:
    """One finished arm."""

    experiment: str
    arm: str
    seed: int
    repeated: str
    kinds: Mapping[str, Measured]
    acted: float = NAN
    """Share of sample visits that the mitigation acted on."""
    seconds: float = NAN

    @property
    def validation(self) -> float:
        return self.kinds["background"].unseen

    @property
    def gap(self) -> float:
        """Nats between unseen text of the repeated kind and the repeated text itself."""
        return self.kinds[self.repeated].unseen - self.kinds[self.repeated].shown

    @property
    def false_flags(self) -> float:
        """Share flagged as memorized at some evaluation, of the repeated samples that are not memorized: easy text, and
        text shown twice. Samples seen once are never evaluated."""
        shares = [self.kinds[name].flagged for name in ("easy", "twice") if name in self.kinds]
        sizes = [self.kinds[name].samples for name in ("easy", "twice") if name in self.kinds]
        return sum(share * size for share, size in zip(shares, sizes, strict=True)) / sum(sizes) if sizes else NAN

    def plain(self) -> dict[str, Any]:
        """The result in types that JSON has."""
        return json_able(asdict(self))

    def closed(self, standard: Result, kind: str) -> float:
        """How far the loss of shown samples moved from the standard run's to that of their unseen twins: 1 is all the
        way."""
        own, before = self.kinds[kind], standard.kinds[kind].shown
        return (own.shown - before) / (own.unseen - before)


def json_able(value: Any) -> Any:
    """``value`` with floats rounded to four places and NaN and infinity as None, recursively."""
    if isinstance(value, dict):
        return {str(key): json_able(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_able(part) for part in value]
    if isinstance(value, float):
        return round(value, 4) if isfinite(value) else None
    return value


class Learner(LightningModule):
    """A language model with a standard training step, unless a ``gate`` leaves the gradient of samples out."""

    def __init__(
        self, gpt: torch.nn.Module, weight_decay: float = 0.01, gate: Gate | None = None, warmup: int = WARMUP
    ) -> None:
        super().__init__()
        self.gpt, self.weight_decay, self.gate, self.warmup = gpt, weight_decay, gate, warmup

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.gate is None:
            return self.gpt(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        logits = self.gpt(input_ids=batch["input_ids"]).logits
        nll = -logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        counted = batch["labels"][:, 1:] != IGNORED
        own = (nll.detach() * counted).sum(1) / counted.sum(1)
        kept = counted & self.gate(batch["sample_id"], own)[:, None]
        return (nll * kept).sum() / counted.sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.gpt(input_ids=batch["input_ids"], labels=batch["labels"]).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=self.weight_decay, fused=True)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / self.warmup, total_iters=self.warmup)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


class Visits(Dataset[dict[str, Tensor]]):
    """The ``rows`` ``[R]`` of ``tokens`` ``[U, T]``; the row is the sample id. Labels are ``tokens`` by default.

    ``anew`` is an id drawn again at each visit, the same for all tokens of the text.
    """

    def __init__(self, tokens: Tensor, rows: Tensor, labels: Tensor | None = None, seed: int = 0) -> None:
        self.tokens, self.rows = tokens, rows
        self.labels = tokens if labels is None else labels
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        anew = torch.randint(2**62, (1,), generator=self.generator).expand(len(self.tokens[row]))
        text = {
            "input_ids": self.tokens[row],
            "labels": self.labels[row],
            "attention_mask": self.labels[row] != IGNORED,
        }
        return {**text, "sample_id": row, "anew": anew}


class Exposures(Callback):
    """Counts the visits of each of ``samples`` that reached the gradient of the model's output."""

    def __init__(self, samples: int) -> None:
        self.trained = torch.zeros(samples)
        self.ids = torch.empty(0, dtype=torch.int64)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.handle = pl_module.gpt.register_forward_hook(self._on_forward)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.handle.remove()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.ids = batch["sample_id"]

    def _on_forward(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        if output.logits.requires_grad:
            ids = self.ids
            output.logits.register_hook(lambda gradient: self._count(ids, gradient))

    def _count(self, ids: Tensor, gradient: Tensor) -> None:
        largest = torch.linalg.vector_norm(
            gradient, torch.inf, dim=(1, 2)
        )  # in one pass, without another tensor of that size
        self.trained.index_add_(0, ids, largest.gt(0).float())


def gpt(vocab_size: int, length: int, width: int = 128, layers: int = 4, dropout: float = 0.0, **shape: Any) -> Any:
    """A new GPT-2: 0.93 M parameters at 1024 tokens."""
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=length, n_embd=width, n_layer=layers, n_head=width // 32,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
        activation_function="gelu_pytorch_tanh", **shape,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def fit(
    module: Learner,
    train: Visits,
    callbacks: Sequence[Callback],
    seed: int,
    controls: Visits | None = None,
    epochs: int = 1,
    every: int = EVERY,
) -> Trainer:
    """A fit in batches of 32 that evaluates ``controls`` every few steps."""
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(train, 32, shuffle=True, drop_last=True, generator=order)
    trainer.fit(module, loader, None if controls is None else DataLoader(controls, 128))
    return trainer


class Examiner(Callback):
    """Measures the kinds of a world when training ends, with the model in evaluation mode, as it would be deployed."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.kinds: dict[str, dict[str, float]] = {}

    def on_train_end(self, trainer: Trainer, pl_module: Learner) -> None:
        pl_module.eval()
        for kind in self.world.kinds:
            shown = kind.shown[:128]
            self.kinds[kind.name] = {
                "shown": float(token_nll(pl_module, shown).mean()),
                "unseen": float(token_nll(pl_module, kind.unseen).mean()),
                "exact": exact_share(pl_module, shown),
            }
            if sinks := [one for one in trainer.callbacks if isinstance(one, MemSinks)]:
                self.kinds[kind.name]["own_exact"] = self._with_own(pl_module, sinks[0], kind)
        pl_module.train()

    def _with_own(self, module: Learner, sinks: MemSinks, kind: Kind) -> float:
        """Share reproduced verbatim when each sample has its own pool units on."""
        ids = self.world.ids(kind.name)[:64]
        with masked(sinks.layers, partial(sinks.pool.own, ids)):
            return exact_share(module, kind.shown[:64])


class Flagged(Callback):
    """Records which of ``samples`` were flagged as memorized at some evaluation."""

    def __init__(self, samples: int) -> None:
        self.ever = torch.zeros(samples, dtype=torch.bool)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ledger = Ledger.of(trainer)
        memorized = ledger.flags.memorized
        self.ever[ledger.losses.ids[: len(memorized)][memorized]] = True


def exact_share(module: Learner, tokens: Tensor) -> float:
    """Share of ``tokens`` ``[n, T]`` that the model continues verbatim."""
    return float(torch.cat([exact_match(module, part) for part in tokens.split(128)]).float().mean())


@cache
def world_of(experiment: str, sizes: Sizes, seed: int) -> World:
    return WORLDS[experiment](sizes, seed)


def run(experiment: str, name: str, seed: int, sizes: Sizes, like: Mapping[str, float] | None = None) -> Result:
    """Trains and measures one arm.

    Args:
        like: by kind, the number of visits of each sample that an oracle trains on, for the arms in `GUIDED`.
    """
    torch.set_num_threads(1)
    start, arm, world = time.perf_counter(), ARMS[name], world_of(experiment, sizes, seed)
    seen = world if arm.world is None else arm.world(world, like or {})
    seed_everything(seed, verbose=False)
    gate = None if arm.gate is None else arm.gate(world, like or {})
    module = Learner(gpt(world.vocab_size, world.tokens.shape[1], **arm.shape), arm.weight_decay, gate)
    counter, examiner, flagged = Exposures(len(world.tokens)), Examiner(world), Flagged(len(world.tokens))
    acting = arm.acting()
    callbacks = [*watching(acting), *acting, *([flagged] if acting else []), counter, examiner]
    controls = Visits(world.controls, torch.arange(len(world.controls))) if acting else None
    trainer = fit(module, Visits(seen.tokens, seen.rows, seed=seed), callbacks, seed, controls)
    kinds = {}
    for kind in world.kinds:
        ids = world.ids(kind.name)
        kinds[kind.name] = Measured(
            len(ids),
            **examiner.kinds[kind.name],
            trained=float(counter.trained[ids].mean()),
            flagged=float(flagged.ever[ids].float().mean()) if acting else NAN,
        )
    return Result(
        experiment, name, seed, world.repeated, kinds,
        acted=acted_share(Ledger.of(trainer)),
        seconds=time.perf_counter() - start,
    )  # fmt: skip
