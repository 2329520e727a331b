"""The models that attribution is timed on: two GPT-2 and models of plain layers, which every peer supports."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.common.training import TextModel
from benchmarks.common.workloads import CLASSES, CONTEXT, VOCABULARY
from benchmarks.overhead.gradient_peers import IGNORED, Task

GPT, VIT, CNN = 1.20, 1.35, 1.60
"""Bounds on the time of a step with exact norms, relative to a plain step."""


class Logits(nn.Module):
    """A Hugging Face language model that maps ids to logits."""

    def __init__(self, gpt: nn.Module) -> None:
        super().__init__()
        self.gpt = gpt

    def forward(self, ids: Tensor) -> Tensor:
        return self.gpt(input_ids=ids, use_cache=False).logits


class Block(nn.Module):
    """Attention and MLP of Linear layers only, which every peer supports."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.act, self.causal = nn.GELU(), causal

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.before(x)).unflatten(-1, (3, -1, 32)).movedim(-3, 0).transpose(-2, -3)
        mixed = functional.scaled_dot_product_attention(*heads, is_causal=self.causal)
        x = x + self.out(mixed.transpose(-2, -3).flatten(-2))
        return x + self.down(self.act(self.up(self.between(x))))


class Text(nn.Module):
    """A GPT without tied weights, with position embeddings looked up for each sample."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        steps = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        return self.head(self.norm(self.blocks(self.word(ids) + self.place(steps))))


class Vision(nn.Module):
    def __init__(self, layers: int = 4, width: int = 128) -> None:
        super().__init__()
        self.cut, self.place = nn.Conv2d(3, width, 4, stride=4), nn.Embedding(64, width)
        self.blocks = nn.Sequential(*(Block(width, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.cut(images).flatten(2).mT
        steps = torch.arange(patches.shape[1]).repeat(len(patches), 1)
        return self.head(self.norm(self.blocks(patches + self.place(steps))).mean(1))


def cnn(width: int = 32) -> nn.Module:
    layers = [
        nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.ReLU(), nn.MaxPool2d(2))
        for before, after in pairwise([3, width, 2 * width, 4 * width])
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, CLASSES))


def texts(samples: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def batch(seed: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(VOCABULARY, (samples, CONTEXT), generator=torch.Generator().manual_seed(seed))
        return ids, functional.pad(ids[:, 1:], (0, 1), value=IGNORED)

    return batch


def images(samples: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def batch(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        pixels = torch.randn(samples, 3, 32, 32, generator=generator)
        return pixels, torch.randint(CLASSES, (samples,), generator=generator)

    return batch


TASKS = (
    Task("GPT-2 2x64", lambda: Logits(TextModel(VOCABULARY, CONTEXT, 2, 64).gpt), texts(32), GPT, by_floor=True),
    Task("GPT-2 4x256", lambda: Logits(TextModel(VOCABULARY, CONTEXT, 4, 256).gpt), texts(16), GPT),
    Task("untied 2x64", lambda: Text(2, 64), texts(32), GPT, by_floor=True),
    Task("untied 4x256", lambda: Text(4, 256), texts(16), GPT),
    Task("ViT", Vision, images(32), VIT),
    Task("CNN", cnn, images(32), CNN),
)
