"""A language model of a few thousand parameters and data with planted repeats, for tests of whole runs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, Dataset

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.examples.resumable import EpochShuffledSampler
from lightning_memsink.ledger import Ledger

VOCABULARY, LENGTH = 32, 12


class Rows(Dataset[dict[str, Tensor]]):
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index]}


class TinyLM(LightningModule):
    """Two tokens of context: enough to learn a chain, and to memorize a little."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.mlp = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, VOCABULARY))

    def logits(self, tokens: Tensor) -> Tensor:
        """``[B, T - 2, V]``, of the tokens from the third on."""
        embedded = self.embed(tokens)
        return self.mlp(torch.cat([embedded[:, :-2], embedded[:, 1:-1]], -1))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        logits = self.logits(tokens)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 2:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-2)


class DeepLM(TinyLM):
    """Three hidden layers, for tests of depth."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        first, last = self.mlp[0], self.mlp[2]
        self.mlp = nn.Sequential(first, nn.GELU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128), nn.GELU(), last)


def chain(rows: int, seed: int) -> Tensor:
    """``[rows, LENGTH]`` text of a random Markov chain, the same chain for every seed."""
    rule = torch.softmax(3 * torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(99)), -1)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCABULARY, (rows, 1), generator=generator)
    for _ in range(LENGTH - 1):
        tokens = torch.cat([tokens, torch.multinomial(rule[tokens[:, -1]], 1, generator=generator)], 1)
    return tokens


def noise(rows: int, seed: int) -> Tensor:
    return torch.randint(VOCABULARY, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


CANARIES = noise(4, seed=5)
TRAIN = torch.cat([chain(200, seed=1), CANARIES.repeat(32, 1)])
CONTROLS = torch.cat([chain(60, seed=2), noise(60, seed=3)])


def train_loader(tokens: Tensor = TRAIN, batch_size: int = 16, **options: Any) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Rows(tokens), batch_size, sampler=EpochShuffledSampler(len(tokens)), **options)


def control_loader(tokens: Tensor = CONTROLS) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Rows(tokens), 40)


def trainer(callbacks: list[Any], **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "barebones": False}
    defaults = {"max_epochs": 3, "val_check_interval": 7, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(callbacks=callbacks, **{**quiet, **defaults, **options})


def fit(callbacks: list[Any], model: LightningModule | None = None, **options: Any) -> tuple[Trainer, LightningModule]:
    """One run on the planted data; ``train=`` and ``controls=`` name other loaders."""
    model = model or TinyLM()
    train, controls = options.pop("train", None) or train_loader(), options.pop("controls", None) or control_loader()
    ckpt_path = options.pop("ckpt_path", None)
    run = trainer(callbacks, **options)
    run.fit(model, train, controls if controls != "none" else None, ckpt_path=ckpt_path)
    return run, model


def watch(**options: Any) -> list[Any]:
    return [LossTracker(identity="content", **options), MemorizationDetector(k=4)]


def weights(model: nn.Module) -> Tensor:
    """All of them in one vector, as they are now."""
    return parameters_to_vector(model.parameters()).detach()


def snapshot(run: Trainer, model: LightningModule) -> str:
    """Everything that must be equal in two runs, to the bit."""
    ledger = Ledger.of(run)
    facts = [ledger.losses.state_dict(), ledger.controls.state_dict(), ledger.flags.state_dict(), ledger.onset]
    return repr(_plain([*facts, model.state_dict()]))


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), value.tolist()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value
