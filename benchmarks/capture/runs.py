"""Cases: how a step is run: compiled, accumulated, in mixed precision, inside transformers, validated otherwise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from benchmarks.capture.case import BATCH, Data, Fitted, cases, family
from benchmarks.capture.classes import cross_entropy
from benchmarks.capture.data import (
    IGNORED,
    C,
    D,
    H,
    T,
    counted,
    heads,
    mlp,
    normalized,
    numbers,
    split,
    tagger,
    tokens,
    vectors,
)
from benchmarks.capture.sequences import flat, masked_mean
from benchmarks.capture.terms import deep_supervision, two_losses

classes = family(data=vectors, network=mlp())
ragged = family(data=tokens(), network=tagger(), shares=counted)


class CompiledStep(Fitted):
    """The whole loss is compiled."""

    def __init__(self, case: Any) -> None:
        super().__init__(case)
        self._loss = [torch.compile(lambda net, batch: case.step(net, batch), backend=case.compiled)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss[0](self.net, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss[0](self.net, batch), batch_size=1)


class Checkpointed(nn.Module):
    """Runs its layers again in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.embed, self.rest = reentrant, nn.Embedding(C, D), mlp()()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.rest, self.embed(x), use_reentrant=self.reentrant)


def checkpointed_loss(model: Any, batch: Any) -> Tensor:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    return checkpoint(loss, batch["x"], batch["y"], use_reentrant=False)


class FrozenBase(nn.Module):
    """A frozen layer with a low-rank update that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = mlp()().requires_grad_(False)
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def gpt() -> nn.Module:
    config = GPT2Config(
        vocab_size=12, n_positions=T, n_embd=H, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=12, hidden_size=H, num_hidden_layers=1, num_attention_heads=2, intermediate_size=H,
        max_position_embeddings=T, hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )  # fmt: skip
    return BertForMaskedLM(config)


def texts(masked: bool) -> Any:
    """``{"input_ids", "attention_mask", "labels"}`` of varying lengths; labels of every other token if ``masked``."""

    def data() -> Data:
        generator, samples = numbers(), []
        for row in range(5 * BATCH):
            ids, mask = torch.randint(12, (T,), generator=generator), torch.arange(T) < T - row % 3
            kept = mask & (torch.arange(T) % 2 == row % 2) if masked else mask
            samples.append({"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~kept, IGNORED)})
        return split(samples)

    return data


def transformer(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss


def num_items(model: Any, batch: Any) -> Tensor:
    return model(**batch, num_items_in_batch=torch.tensor(40)).loss


def labelled(batch: Any, shift: int = 1) -> Tensor:
    count = (batch["labels"][:, shift:] != IGNORED).sum(1).double()
    return count / count.sum()


causal = family(network=gpt, data=texts(False), shares=labelled, ids_by_content=True)

RUNS = cases(
    "runs",
    classes("compiled model, eager", cross_entropy, compiled="eager"),
    ragged("compiled model, aot_eager", flat, compiled="aot_eager"),
    classes("compiled loss, eager", cross_entropy, module=CompiledStep, compiled="eager"),
    ragged("compiled loss, aot_eager", flat, module=CompiledStep, compiled="aot_eager"),
    classes(
        "compiled loss of two terms",
        two_losses,
        network=heads(label=C, value=D),
        module=CompiledStep,
        compiled="aot_eager",
        unit=".5 mse + 2 cross entropy",
    ),
    ragged("accumulation over 2 batches", flat, options={"accumulate_grad_batches": 2}),
    classes(
        "accumulation and deep supervision",
        deep_supervision,
        network=heads(last=C, middle=C),
        options={"accumulate_grad_batches": 2},
        unit="last + .4 middle",
    ),
    ragged("bf16-mixed", flat, options={"precision": "bf16-mixed"}, tolerance=3e-2),
    ragged("bf16-mixed, masked mean", masked_mean, options={"precision": "bf16-mixed"}, tolerance=3e-2),
    ragged("checkpointed layers", flat, network=lambda: Checkpointed(False)),
    ragged("checkpointed layers, reentrant", flat, network=lambda: Checkpointed(True)),
    ragged("checkpointed loss", checkpointed_loss),
    ragged("gradient clipping", flat, options={"gradient_clip_val": 100.0}),
    classes(
        "batch norm",
        cross_entropy,
        network=normalized,
        rows=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"),
    ),
    classes("a frozen base with a low-rank update", cross_entropy, network=FrozenBase),
    causal("GPT-2 with labels", transformer, unit="mean over the sample's tokens"),
    causal(
        "GPT-2, num_items_in_batch",
        num_items,
        alone=transformer,
        shares=lambda b: labelled(b) * (b["labels"][:, 1:] != IGNORED).sum() / 40,
    ),
    causal("GPT-2, compiled", transformer, compiled="eager"),
    causal(
        "GPT-2, bf16-mixed and accumulation",
        transformer,
        options={"precision": "bf16-mixed", "accumulate_grad_batches": 2},
        tolerance=3e-2,
    ),
    causal("BERT with masked labels", transformer, network=bert, data=texts(True), shares=lambda b: labelled(b, 0)),
    classes("validation returns the loss", cross_entropy, returns=True),
    ragged("validation without flattening", flat, validation=lambda m, b: F.cross_entropy(m(b["x"]).mT, b["y"])),
    ragged("validation by masked mean", flat, validation=masked_mean),
    classes(
        "validation with another loss",
        lambda m, b: F.cross_entropy(m(b[0]), b[1], label_smoothing=0.2),
        validation=lambda m, b: F.mse_loss(m(b[0]).softmax(-1), F.one_hot(b[1], C).to(b[0].dtype)),
        validation_refused=True,
    ),
    classes(
        "validation with one of two losses",
        two_losses,
        network=heads(label=C, value=D),
        validation=lambda m, b: F.cross_entropy(m(b[0])["label"], b[1]),
        validation_refused=True,
        unit=".5 mse + 2 cross entropy",
    ),
    classes(
        "validation with a metric beside",
        cross_entropy,
        validation=lambda m, b: (
            m.log("mse", F.mse_loss(m(b[0])[:, 0], b[0][:, 0]), batch_size=1),
            cross_entropy(m, b),
        )[1],
    ),
)
