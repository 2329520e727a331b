"""GPT-2-like and Llama-like models without a download, and text of their vocabulary.

B  samples of a batch      T  tokens of a sample      V  vocabulary      D  width
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset


@dataclass(frozen=True)
class Shape:
    """Sizes of a model and of its batches."""

    name: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    length: int
    batch: int
    llama: bool = False

    def build(self) -> Decoder:
        return Decoder(self)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden.float(), hidden.shape[-1:], self.weight.float(), 1e-5).to(hidden.dtype)


class Attention(nn.Module):
    """Causal; with rotary positions for ``shape.llama``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.rotary = shape.heads, shape.llama
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=not shape.llama)
        self.out = nn.Linear(shape.width, shape.width, bias=not shape.llama)

    def forward(self, hidden: Tensor) -> Tensor:
        parts = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(hidden).chunk(3, -1)]
        query, key, value = [*map(rotate, parts[:2]), parts[2]] if self.rotary else parts
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out


def rotate(heads: Tensor) -> Tensor:
    """``[B, heads, T, D]`` turned by position (rotary embeddings, Su et al. 2021)."""
    half = heads.shape[-1] // 2
    place = torch.arange(heads.shape[-2], device=heads.device, dtype=torch.float32)[:, None]
    angle = place * 10000.0 ** (-torch.arange(half, device=heads.device, dtype=torch.float32) / half)
    cos, sin, (left, right) = angle.cos().to(heads.dtype), angle.sin().to(heads.dtype), heads.split(half, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)


class PlainMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.act, self.c_proj = nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.c_proj(self.act(self.c_fc(hidden)))
        return out


class GatedMLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = 256 * round(width * 8 / 3 / 256) or 128
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.act_fn, self.down_proj = nn.SiLU(), nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return out


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        norm = RMSNorm if shape.llama else nn.LayerNorm
        self.ln_1, self.ln_2 = norm(shape.width), norm(shape.width)
        self.attn = Attention(shape)
        self.mlp = GatedMLP(shape.width) if shape.llama else PlainMLP(shape.width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attn(self.ln_1(hidden))
        out: Tensor = hidden + self.mlp(self.ln_2(hidden))
        return out


class Decoder(nn.Module):
    """GPT-2-like (learned positions, LayerNorm, GELU) or Llama-like (rotary, RMSNorm, SwiGLU); the head is tied."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.wte = nn.Embedding(shape.vocabulary, shape.width)
        self.wpe = None if shape.llama else nn.Embedding(shape.length, shape.width)
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_f = (RMSNorm if shape.llama else nn.LayerNorm)(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for weight in self.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.02)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        """Logits ``[B, T, V]`` or, with ``labels`` ``[B, T]``, their loss."""
        hidden = self.wte(tokens)
        if self.wpe is not None:
            hidden = hidden + self.wpe(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.h:
            hidden = block(hidden)
        logits = self.head(self.ln_f(hidden))
        return logits if labels is None else next_token_loss(logits, labels)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


class Training(LightningModule):
    """AdamW at ``rate``; at 0 nothing is trained, so that losses can be compared with those of the same weights.
    With ``loss_inside``, the model itself returns the loss, as compiled models often do."""

    def __init__(self, model: nn.Module, rate: float = 1e-4, loss_inside: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.model, self.rate, self.loss_inside, self.fused = model, rate, loss_inside, fused

    def training_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> Tensor:
        if self.loss_inside:
            loss: Tensor = self.model(batch["input_ids"], batch["labels"])
            return loss
        return next_token_loss(self.model(batch["input_ids"]), batch["labels"])

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.training_step(batch)

    def configure_optimizers(self) -> Any:
        if not self.rate:
            return torch.optim.SGD(self.parameters(), 0.0)
        return torch.optim.AdamW(self.parameters(), self.rate, fused=self.fused)


class ZipfText(Dataset[dict[str, Tensor]]):
    """Zipf-distributed tokens with a stretch that comes twice; with ``padded``, every third sample is shorter."""

    def __init__(self, samples: int, length: int, vocabulary: int, seed: int, padded: bool = False) -> None:
        draw = np.random.default_rng(seed)
        ids = np.minimum(draw.zipf(1.2, (samples, length)) - 1, vocabulary - 1)
        for row in ids:
            source, target = draw.integers(0, length // 2, 2)
            row[target : target + length // 8] = row[source : source + length // 8]
        self.ids, self.mask = torch.from_numpy(ids.astype(np.int64)), torch.ones(samples, length, dtype=torch.int64)
        for sample in range(0, samples, 3) if padded else ():
            self.mask[sample, length - 1 - sample % (length // 2) :] = 0

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, sample: int) -> dict[str, Tensor]:
        ids, mask = self.ids[sample], self.mask[sample]
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask > 0, ids, -100)}
