"""One run on planted data, with any callbacks, on any number of processes; each process saves its facts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader

from lightning_memsink import (
    ExtractionProbe,
    Goldfish,
    LiveCurves,
    LossTracker,
    LossTruncation,
    MemorizationDetector,
    MemSinks,
    RunReport,
    SampleGradientMask,
    SinkDropout,
    SinkGradientMask,
    SinkLocalizer,
)
from lightning_memsink.examples.resumable import EpochShuffledSampler
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.hashing import content_ids
from tests.support.small_runs import CANARIES, CONTROLS, TRAIN, VOCABULARY, Rows, fit

GLOBAL_BATCH = 12  # divides by one, two and three processes
ONCE = torch.cat([TRAIN[:196], CANARIES])
VISITS = list(range(196)) + 32 * list(range(196, 200))
"""Rows of ``ONCE`` in a pass: the canaries, its last four, come 32 times."""


def are_canaries(ids: Tensor) -> Tensor:
    """Bool ``[N]``: which samples of a ledger they are. Texts are known by their content."""
    return torch.isin(ids, content_ids({"input_ids": CANARIES}))


class GlobalBatches:
    """Process r of w gets the r-th part of each global batch, so that global batches do not depend on w."""

    def __init__(self, visits: list[int], batch: int = GLOBAL_BATCH) -> None:
        self.visits, self.sampler, self.batch = torch.tensor(visits), EpochShuffledSampler(len(visits)), batch

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for part in self.visits[list(self.sampler)].split(self.batch):
            yield part.tensor_split(world)[rank].tolist()


def global_loader() -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Rows(ONCE), batch_sampler=GlobalBatches(VISITS))  # type: ignore[arg-type]


class DeepLM(LightningModule):
    """Two hidden layers and a norm, so that there is something to localize, and in double precision to compare."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.join = nn.Linear(32, 32)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2)
        )
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next token, from the last two."""
        embedded = self.embed(input_ids)
        before = F.pad(embedded, (0, 0, 1, 0))[:, :-1]
        hidden = self.join(torch.cat([before, embedded], -1))
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        logits = self(tokens)[:, 1:-1]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class LogitsProbe(ExtractionProbe):
    """Probes a model that is not called as those of transformers are."""

    def __init__(self) -> None:
        super().__init__({"canaries": CANARIES}, prefix=4)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.logits = lambda tokens, mask: pl_module(tokens)
        super().on_fit_start(trainer, pl_module)


WATCH: dict[str, Callable[[], Callback]] = {
    "LossTracker": lambda: LossTracker(flush_every=1, depth=2),
    "MemorizationDetector": lambda: MemorizationDetector(k=4),
    "SinkLocalizer": lambda: SinkLocalizer(every=2),
    "ExtractionProbe": LogitsProbe,
    "LiveCurves": LiveCurves,
    "RunReport": lambda: RunReport(None),
}
MITIGATION: dict[str, Callable[[], Callback]] = {
    "hold": lambda: SampleGradientMask("hold", k=4),
    "skip": lambda: SampleGradientMask("skip"),
    "attenuate": lambda: SampleGradientMask("attenuate"),
    "route": lambda: SampleGradientMask("route"),
    "SinkGradientMask": SinkGradientMask,
    "SinkGradientMask, half": lambda: SinkGradientMask(0.5),
    "SinkDropout": SinkDropout,
    "MemSinks": lambda: MemSinks(certify=16),
    "Goldfish": lambda: Goldfish(context=2),
    "LossTruncation": lambda: LossTruncation(0.1, window=100),
}


def crew(*mitigations: str) -> list[Callback]:
    """Everything that watches, and the mitigations of these names."""
    return [make() for make in WATCH.values()] + [MITIGATION[name]() for name in mitigations]


class WriteFacts(Callback):
    """Saves the facts of each process at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.save(facts_of(trainer, pl_module), self.folder / f"rank{trainer.global_rank}.pt")


def facts_of(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """The state of all slots, as tensors and plain types; without a collective."""
    ledger = Ledger.of(trainer)
    facts = {
        "weights": {name: whole(weight) for name, weight in module.named_parameters()},
        "world": trainer.world_size,
        "step": trainer.global_step,
        "actions": {name: done.state_dict() for name, done in ledger.interventions.items()},
    }
    for slot in ("losses", "controls", "flags", "attribution", "extraction"):
        if ledger.get(getattr(Ledger, slot)) is not None:
            facts[slot] = getattr(ledger, slot).state_dict()
    for slot in ("onset", "history", "sinks", "certificate"):
        facts[slot] = repr(ledger.get(getattr(Ledger, slot)))
    return facts


def whole(weight: Tensor) -> Tensor:
    """A copy of the weight; for a sharded one, of the shard of this process."""
    return getattr(weight, "_local_tensor", weight).detach().clone()


def digest(facts: Any) -> str:
    """A digest that is equal for facts equal to the bit."""
    return hashlib.sha256(repr(plain(facts)).encode()).hexdigest()


def plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Places where two ranks' facts differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = list(dict.fromkeys([*one, *other]))
        return [each for key in keys for each in differences(one.get(key), other.get(key), f"{where}/{key}")]
    return [] if repr(plain(one)) == repr(plain(other)) else [where]


def train(folder: Path, callbacks: list[Any], **options: Any) -> tuple[Trainer, LightningModule]:
    """A run of three passes that validates every few steps."""
    model = options.pop("model", None) or DeepLM()
    defaults = {
        "max_epochs": 3,
        "val_check_interval": 9,
        "precision": "64-true",
        "use_distributed_sampler": False,
    }
    loader = options.pop("train", None) or global_loader()
    controls = options.pop("controls", None) or DataLoader(Rows(CONTROLS), 10)
    options = {**defaults, **options}
    return fit([*callbacks, WriteFacts(folder)], model, train=loader, controls=controls, **options)


def ranks(folder: Path) -> list[dict[str, Any]]:
    """The facts of each process."""
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


def assert_nearly_equal(one: Any, other: Any, where: str = "") -> None:
    """Asserts equality up to the rounding of sums taken in another order."""
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_nearly_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for left, right in zip(one, other, strict=True):
            assert_nearly_equal(left, right, where)
    elif isinstance(one, Tensor):
        tight = one.dtype in (torch.float32, torch.float64)
        exact = not one.is_floating_point()
        # Half-precision columns keep two or three digits: noise that tips a rounding moves the last of them by 2^-8.
        rtol, atol = (0, 0) if exact else (1e-5, 1e-6) if tight else (1e-2, 1e-2)
        assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True, msg=lambda message: f"{where}: {message}")
    else:
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6, nan_ok=True) if isinstance(one, float) else one == other
