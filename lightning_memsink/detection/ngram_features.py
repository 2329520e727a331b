"""How difficult is a text, without asking the model: n-gram and compression features to match samples on.

B  samples in a batch      T  tokens      F  features
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOKEN_FEATURES = ("unigram_nll", "bigram_nll", "familiarity", "compressed_bits")
_RUN = 4


@dataclass(frozen=True)
class Ngrams:
    """Where a text's tokens, pairs and runs of four are counted (buckets), and which of them count (bool)."""

    single: Tensor  # [B, T]
    counted: Tensor
    pair: Tensor  # [B, T-1]
    paired: Tensor
    run: Tensor  # [B, T-3], empty for shorter texts
    whole: Tensor


class NgramCounts:
    """Running hashed counts of the tokens, pairs and runs of four that training has seen.

    A text that repeats itself in training raises its own counts, and would seem easy for being repeated:
    so a sample's own counts are left out of its own features. ``buckets`` for pairs, a power of two: its last bits say
    where a hash is counted, which is several times as fast as a remainder.
    """

    def __init__(self, buckets: int = 1 << 18) -> None:
        self.buckets = buckets
        self.unigrams = torch.zeros(buckets // 8)
        self.bigrams = torch.zeros(buckets)
        self.runs = torch.zeros(4 * buckets)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A spawned process is sent the memory itself, which all ranks would then count into: each takes its own."""
        vars(self).update({name: each.clone() if isinstance(each, Tensor) else each for name, each in state.items()})

    def look_up(self, tokens: Tensor, mask: Tensor) -> Ngrams:
        """The n-grams of ``tokens`` ``[B, T]`` where ``mask`` ``[B, T]`` holds. Counts nothing."""
        pair = tokens[:, :-1] * 0x9E3779B1 + tokens[:, 1:] * 0x85EBCA77
        pair = pair ^ (pair >> 15)
        return Ngrams(
            tokens & (len(self.unigrams) - 1),
            mask,
            pair & (self.buckets - 1),
            mask[:, :-1] & mask[:, 1:],
            *self._runs(tokens, mask),
        )

    def update(self, text: Ngrams) -> None:
        """Counts each of them once more."""
        self.unigrams.index_add_(0, text.single.flatten(), text.counted.flatten().float())
        self.bigrams.index_add_(0, text.pair.flatten(), text.paired.flatten().float())
        self.runs.index_add_(0, text.run.flatten(), text.whole.flatten().float())

    def familiarity(self, text: Ngrams, exposures: Tensor) -> Tensor:
        """``[B]`` mean of log(1 + times) over a sample's runs of four tokens: how often each occurs elsewhere.

        Text with near-duplicates in training gets a low loss without ever having been trained on, and the lower the
        more there are: a template filled in a hundred ways is easier than prose of which as many runs are known.
        """
        seen = self.runs[text.run] - exposures.float()[:, None] * _own(text.run, text.whole)
        return _mean(seen.clamp(min=0).log1p(), text.whole)

    def nll(self, text: Ngrams, exposures: Tensor) -> Tensor:
        """``[B, 2]`` mean unigram and bigram negative log-likelihood, in nats per token.

        ``exposures`` ``[B]``: how often each sample itself was counted; that many of its own counts are left out.
        """
        times = exposures.float()[:, None]
        seen = (self.unigrams[text.single] - times * _own(text.single, text.counted)).clamp(min=0)
        seen_pair = (self.bigrams[text.pair] - times * _own(text.pair, text.paired)).clamp(min=0)
        total = (self.unigrams.sum() - times * text.counted.sum(1, keepdim=True)).clamp(min=0)
        known = (self.unigrams > 0).sum().clamp(min=1)
        one = (seen + 1) / (total + known)
        # Bigrams are interpolated with unigrams by a pseudo-count of 4 (Dirichlet prior smoothing).
        two = (seen_pair + 4 * one[:, 1:]) / (seen[:, :-1] + 4)
        return torch.stack([_mean(-one.log(), text.counted), _mean(-two.clamp(max=1).log(), text.paired)], dim=1)

    def state_dict(self) -> dict[str, Any]:
        return {"unigrams": self.unigrams, "bigrams": self.bigrams, "runs": self.runs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unigrams, self.bigrams, self.runs = (state[name].clone() for name in ("unigrams", "bigrams", "runs"))
        self.buckets = len(self.bigrams)

    def _runs(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Buckets of runs of four ``[B, T-3]`` and whether all of a run counts; empty for shorter texts."""
        length = max(0, tokens.shape[1] - _RUN + 1)
        key, whole = torch.zeros_like(tokens[:, :length]), torch.ones_like(mask[:, :length])
        for place in range(_RUN):
            key.mul_(0x9E3779B1).add_(tokens[:, place : place + length]).add_(1)
            key ^= key >> 17
            whole &= mask[:, place : place + length]
        return key & (len(self.runs) - 1), whole


def compressed_bits(tokens: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` bits per token after DEFLATE: low where a text repeats itself."""
    width = np.int32 if int(tokens.max() if tokens.numel() else 0) > 0x7FFF else np.int16
    texts, kept = tokens.numpy().astype(width), mask.numpy()
    rows = [zlib.compress(text[keep].tobytes(), 6) for text, keep in zip(texts, kept, strict=True)]
    return torch.tensor([8.0 * len(row) for row in rows]) / mask.sum(1).clamp(min=1)


def _own(buckets: Tensor, mask: Tensor) -> Tensor:
    """``[B, T]`` how often each bucket occurs in its own row, where the mask holds; elsewhere 1."""
    if not buckets.numel():
        return buckets.float()
    places = np.arange(buckets.numel()).reshape(buckets.shape)
    bits = buckets.numel().bit_length()
    apart = np.where(mask.numpy(), buckets.numpy(), -1 - places)  # what is masked equals nothing
    keys = (apart << bits) | places  # sorted as one number, several times as fast as with an order beside it
    keys.sort(1)
    ordered = keys >> bits
    starts = np.ones(keys.shape, dtype=bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=starts[:, 1:])
    lengths = np.diff(np.flatnonzero(starts), append=keys.size)
    own = np.empty(keys.size, dtype=np.float32)
    own[(keys & ((1 << bits) - 1)).ravel()] = lengths.repeat(lengths)
    return torch.from_numpy(own).view(buckets.shape)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
