"""Settings of the detection benchmark besides the standard one: other models, ordinary changes to a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from benchmarks.common.training import WARMUP, TextModel

LAYERS, HEADS = 4, 4


@dataclass(frozen=True)
class Setting:
    """One way to train on the groups of `groups.Groups`, and when a sample is memorized."""

    title: str
    architecture: Literal["gpt2", "gpt_neox", "llama"] = "gpt2"
    dropout: float = 0.0
    decays: bool = False
    """Whether the learning rate falls linearly to 0."""
    label_smoothing: float = 0.0
    epochs: int = 2
    times: int = 1
    """By which the repeats within an epoch are multiplied, of samples that are shown more than once."""
    batch_size: int = 32
    evaluate_every: int = 20
    """Steps between two evaluations."""
    lr: float = 2e-3
    controls: Literal["all", "natural", "none"] = "all"
    """Which held-out samples the validation set has: of all kinds, natural text only, or there is none."""
    positive: float = 1.0
    """Above it a sample is memorized, nats per token."""
    tpr: float = 0.95
    """Bound on the share of planted samples above it that are called memorized."""


SETTINGS = {
    "neox": Setting("GPT-NeoX", "gpt_neox"),
    "llama": Setting("Llama", "llama"),
    "dropout": Setting("dropout of .1", dropout=0.1),
    "decay": Setting("learning rate that falls to 0", decays=True),
    "smoothing": Setting("label smoothing of .1", label_smoothing=0.1),
    "natural": Setting("controls of natural text only", controls="natural"),
    "unvalidated": Setting(
        "one epoch, no validation set", epochs=1, times=2, evaluate_every=10, controls="none", positive=2.0, tpr=0.8
    ),
    "twice": Setting("batches of 8: samples seen twice are memorized", "llama", batch_size=8, evaluate_every=40),
}


def network(setting: Setting, vocab_size: int, length: int) -> nn.Module:
    """A causal language model of 0.6 to 0.9 M parameters at 1024 tokens."""
    common: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0}
    rate = setting.dropout
    if setting.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_positions=length, n_embd=128, n_layer=LAYERS, n_head=HEADS,
                resid_pdrop=rate, embd_pdrop=rate, attn_pdrop=rate, **common,
            )
        )  # fmt: skip
    shape = common | {
        "hidden_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": length,
        "attention_dropout": rate,
    }
    if setting.architecture == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(intermediate_size=384, hidden_dropout=rate, **shape))
    return LlamaForCausalLM(LlamaConfig(intermediate_size=256, **shape))


class VariedText(TextModel):
    """A text model as a setting has it. ``steps``: at which a learning rate that decays is 0."""

    def __init__(self, setting: Setting, vocab_size: int, length: int, steps: int) -> None:
        super().__init__(vocab_size, length, lr=setting.lr, gpt=network(setting, vocab_size, length))
        self.setting, self.steps = setting, steps

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        if not self.setting.label_smoothing:
            loss: Tensor = self.gpt(input_ids=tokens, labels=tokens).loss
            return loss
        logits = self.gpt(input_ids=tokens).logits[:, :-1]
        targets = tokens[:, 1:].flatten()
        return cross_entropy(logits.flatten(0, 1), targets, label_smoothing=self.setting.label_smoothing)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)

        def factor(step: int) -> float:
            rising = min(1.0, (step + 1) / WARMUP)
            return rising * max(0.0, 1 - step / self.steps) if self.setting.decays else rising

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
