"""Trains a small GPT while recording every loss, and measures it afterwards.

V  visits of a sample in training      E  evaluations      T  tokens of a sample
N  samples to test                     M  controls         R  rows of training data
P  planted sequences                   F  followed sequences
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_memsink.ledger import Ledger

PROMPT, CONTINUATION = 16, 32
"""Exact match: after a prompt of 16 tokens, greedy generation gives each of the next 32."""

WARMUP = 30


class TextModel(LightningModule):
    """An ordinary GPT: 0.93 M parameters at the default size and 1024 tokens. ``gpt`` is another model to train."""

    def __init__(
        self,
        vocab_size: int,
        length: int,
        layers: int = 4,
        width: int = 128,
        lr: float = 2e-3,
        gpt: torch.nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.lr = lr
        self.gpt = gpt or GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=length,
                n_embd=width,
                n_layer=layers,
                n_head=width // 32,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.gpt(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.gpt(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


class Sequences(Dataset[dict[str, Tensor]]):
    """Samples ``tokens[rows]``: ``rows`` ``[R]`` are rows of ``tokens`` ``[N, T]`` and the samples' ids.

    For an id in ``noise``, random tokens are drawn each time it is fetched.
    """

    def __init__(self, tokens: Tensor, rows: Tensor, noise: Tensor, vocab_size: int, seed: int) -> None:
        self.tokens, self.rows, self.vocab_size = tokens, rows, vocab_size
        self.noise = frozenset(noise.tolist())
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.rows[index]
        tokens = self.tokens[row]
        if int(row) in self.noise:
            tokens = torch.randint(self.vocab_size, tokens.shape, generator=self.generator)
        return {"input_ids": tokens, "sample_id": row}


@dataclass(frozen=True)
class Schedule:
    """Length of training and steps between two evaluations."""

    epochs: int = 2
    batch_size: int = 32
    evaluate_every: int = 20
    lr: float = 2e-3


class LossRecorder(Callback):
    """Records every loss, and at each validation which of the ``planted`` ``[P, T]`` sequences can be extracted and
    the losses of ``followed`` ``[F, T]``.
    """

    def __init__(self, planted: Tensor, followed: Tensor | None = None) -> None:
        self.planted, self.followed = planted, followed
        self.followed_losses: list[list[float]] = []
        self.records = False
        """Whether a step of the run itself is under way: samples may be measured again between two steps."""
        # Python numbers: small tensors kept for the whole run fragment the heap around large ones.
        self.visits: list[tuple[list[int], list[int], list[float], list[float]]] = []
        self.evaluations: list[tuple[int, list[float], list[bool]]] = []

    def setup(self, trainer: Trainer, pl_module: TextModel, stage: str) -> None:
        self.trainer = trainer
        self.handle = pl_module.gpt.register_forward_hook(self._record, with_kwargs=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.handle.remove()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.ids = batch["sample_id"]
        self.records = True

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.records = False

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.records = True

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.records = False

    def on_validation_start(self, trainer: Trainer, pl_module: TextModel) -> None:
        exact = torch.cat([exact_match(pl_module, part) for part in self.planted.split(128)])
        self.evaluations.append((trainer.global_step, [], exact.tolist()))
        if self.followed is not None:
            self.followed_losses.append(token_nll(pl_module, self.followed).mean(1).tolist())

    def _record(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not self.records or "labels" not in kwargs:
            return
        nll = _token_nll(output.logits.detach(), kwargs["labels"])
        if self.trainer.validating or self.trainer.sanity_checking:
            self.evaluations[-1][1].extend(nll.mean(1).tolist())
        else:
            step = [self.trainer.global_step] * len(self.ids)
            probability = nll.neg().exp().mean(1).tolist()
            self.visits.append((step, self.ids.tolist(), nll.mean(1).tolist(), probability))


@dataclass(frozen=True)
class Run:
    """One finished run. Losses in nats per token."""

    module: TextModel
    ledger: Ledger
    visit_step: Tensor
    """``[V]``, as the next three: the optimizer step that followed the visit, the sample, its loss, and the mean
    probability of its tokens."""
    visit_id: Tensor
    visit_loss: Tensor
    visit_probability: Tensor
    evaluation_step: Tensor
    """``[E]``"""
    control_losses: Tensor
    """``[E, M]``"""
    exact: Tensor
    """Bool ``[E, P]``: the planted sequences that can be extracted."""
    followed_losses: Tensor
    """``[E, F]`` of the sequences followed; empty without."""


def train(
    data: Sequences,
    controls: Tensor,
    planted: Tensor,
    callbacks: Sequence[Callback],
    schedule: Schedule,
    seed: int,
    followed: Tensor | None = None,
) -> Run:
    """An ordinary fit on ``data``, validated on ``controls`` ``[M, T]``. ``followed`` ``[F, T]`` changes no weight."""
    seed_everything(seed, verbose=False)
    module = TextModel(data.vocab_size, controls.shape[1], lr=schedule.lr)
    recorder = LossRecorder(planted, followed)
    steps = schedule.epochs * (len(data) // schedule.batch_size)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps // schedule.evaluate_every * schedule.evaluate_every,  # the last step is evaluated
        val_check_interval=schedule.evaluate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, recorder],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    held_out = Sequences(controls, torch.arange(len(controls)), torch.empty(0), data.vocab_size, seed)
    loader = DataLoader(data, schedule.batch_size, shuffle=True, drop_last=True)
    trainer.fit(module, loader, DataLoader(held_out, 128))
    step, ids, loss, probability = (torch.tensor(list(chain(*column))) for column in zip(*recorder.visits, strict=True))
    steps, losses, exact = zip(*recorder.evaluations, strict=True)
    return Run(
        module.eval(),
        Ledger.of(trainer),
        step,
        ids,
        loss,
        probability,
        torch.tensor(steps),
        torch.tensor(losses),
        torch.tensor(exact),
        torch.tensor(recorder.followed_losses),
    )


@torch.no_grad()
def token_nll(module: TextModel, tokens: Tensor) -> Tensor:
    """``[N, T-1]`` negative log-likelihood of each token of ``tokens`` ``[N, T]`` but the first."""
    return torch.cat([_token_nll(module.gpt(input_ids=part).logits, part) for part in tokens.split(128)])


@torch.no_grad()
def exact_match(module: TextModel, tokens: Tensor) -> Tensor:
    """Bool ``[N]``: greedy generation repeats the sample. One forward pass suffices: the first wrong token decides."""
    end = PROMPT + CONTINUATION
    logits = module.gpt(input_ids=tokens[:, : end - 1]).logits[:, PROMPT - 1 :]
    return (logits.argmax(-1) == tokens[:, PROMPT:end]).all(1)


def gradient_norms(module: TextModel, tokens: Tensor) -> Tensor:
    """``[N]`` norm over all weights of the gradient of each sample's loss, one backward pass a sample."""
    norms = []
    for row in tokens:
        module.zero_grad()
        module.gpt(input_ids=row[None], labels=row[None]).loss.backward()
        norms.append(torch.stack([weight.grad.norm() for weight in module.parameters()]).norm())
    module.zero_grad()
    return torch.stack(norms)


def _token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """``[B, T-1]``. Calls no loss function of torch's, because the callbacks would capture it as one more loss."""
    return -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
