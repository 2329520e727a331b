"""Difficulty of a text, computed without the model: n-gram and compression features to match samples on.

B  samples in a batch      T  tokens      F  features

Compressed size calibrates a loss as in Carlini et al. 2021 (arXiv 2012.07805, section 5.2, zlib entropy). N-gram
likelihoods and counts of n-grams elsewhere in the training text predict losses of text that was never trained on.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memsink.samples.hashing import pair_hash, run_hash

TOKEN_FEATURES = ("unigram_nll", "bigram_nll", "familiarity", "compressed_bits")
"""Names of the features, in the order of their columns."""

_RUN = 4
"""Tokens of a run (a 4-gram)."""


@dataclass(frozen=True)
class Ngrams:
    """Hash buckets of a text's tokens, pairs and runs of four, and bool masks of those that are counted."""

    single: Tensor  # [B, T]
    counted: Tensor
    pair: Tensor  # [B, T-1]
    paired: Tensor
    run: Tensor  # [B, T-3], empty for shorter texts
    whole: Tensor


class NgramCounts:
    """Running hashed counts of tokens, pairs and runs of four in the training text.

    A text that is trained on repeatedly raises its own counts and would seem easy because it is repeated, so a
    sample's own counts are left out of its own features. ``buckets`` for pairs is a power of two: the last bits of a
    hash are its bucket, which is several times as fast to compute as a remainder.
    """

    def __init__(self, buckets: int = 1 << 18) -> None:
        self.buckets = buckets
        self.unigrams = torch.zeros(buckets // 8)
        self.bigrams = torch.zeros(buckets)
        self.runs = torch.zeros(4 * buckets)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies the counts: spawned processes share the memory of tensors, and all ranks would count into it."""
        vars(self).update({name: each.clone() if isinstance(each, Tensor) else each for name, each in state.items()})

    def look_up(self, tokens: Tensor, mask: Tensor) -> Ngrams:
        """The n-grams of ``tokens`` ``[B, T]`` where ``mask`` ``[B, T]`` is True. Counts nothing."""
        pair = pair_hash(tokens[:, :-1], tokens[:, 1:])
        return Ngrams(
            tokens & (len(self.unigrams) - 1),
            mask,
            pair & (self.buckets - 1),
            mask[:, :-1] & mask[:, 1:],
            *self._runs(tokens, mask),
        )

    def update(self, text: Ngrams) -> None:
        """Adds one to the count of each n-gram."""
        self.unigrams.index_add_(0, text.single.flatten(), text.counted.flatten().float())
        self.bigrams.index_add_(0, text.pair.flatten(), text.paired.flatten().float())
        self.runs.index_add_(0, text.run.flatten(), text.whole.flatten().float())

    def familiarity(self, text: Ngrams, exposures: Tensor) -> Tensor:
        """``[B]`` mean of log(1 + count) over a sample's runs of four tokens, counted elsewhere than in the sample.

        Text with near-duplicates in the training text has a low loss even if it was never trained on, and the lower
        the more of them there are: a template filled in a hundred ways is easier than prose with as many known runs.
        """
        return self.familiarity_without(text, exposures.float()[:, None] * own_counts(text.run, text.whole))

    def familiarity_without(self, text: Ngrams, runs: Tensor) -> Tensor:
        """`familiarity` where ``runs`` ``[B, T-3]`` are left out of the counts of the text's runs."""
        return _masked_mean((self.runs[text.run] - runs).clamp(min=0).log1p(), text.whole)

    def nll(self, text: Ngrams, exposures: Tensor) -> Tensor:
        """``[B, 2]`` mean unigram and bigram negative log-likelihood, in nats per token.

        Unigrams with add-one smoothing, bigrams interpolated with them by a Dirichlet prior (MacKay & Peto 1995).
        ``exposures`` ``[B]``: how often each sample itself was counted; that many of its own counts are left out.
        """
        times = exposures.float()[:, None]
        singles, pairs = own_counts(text.single, text.counted), own_counts(text.pair, text.paired)
        return self.nll_without(text, times * singles, times * pairs, times * text.counted.sum(1, keepdim=True))

    def nll_without(self, text: Ngrams, singles: Tensor, pairs: Tensor, tokens: Tensor) -> Tensor:
        """`nll` where ``singles`` ``[B, T]`` and ``pairs`` ``[B, T-1]`` are left out of the counts of the text's tokens
        and pairs, and ``tokens`` ``[B, 1]`` of the number of tokens."""
        count = (self.unigrams[text.single] - singles).clamp(min=0)
        pair_count = (self.bigrams[text.pair] - pairs).clamp(min=0)
        total = (self.unigrams.sum() - tokens).clamp(min=0)
        known = (self.unigrams > 0).sum().clamp(min=1)
        unigram = (count + 1) / (total + known)
        bigram = (pair_count + 4 * unigram[:, 1:]) / (count[:, :-1] + 4)  # a pseudo-count of 4
        return torch.stack(
            [_masked_mean(-unigram.log(), text.counted), _masked_mean(-bigram.clamp(max=1).log(), text.paired)], dim=1
        )

    def state_dict(self) -> dict[str, Any]:
        return {"unigrams": self.unigrams, "bigrams": self.bigrams, "runs": self.runs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unigrams, self.bigrams, self.runs = (state[name].clone() for name in ("unigrams", "bigrams", "runs"))
        self.buckets = len(self.bigrams)

    def _runs(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Buckets of runs of four ``[B, T-3]`` and whether every token of a run is counted; empty for shorter texts."""
        key = run_hash(tokens, _RUN)
        whole = torch.ones_like(key, dtype=torch.bool)
        for place in range(_RUN):
            whole &= mask[:, place : place + key.shape[1]]
        return key & (len(self.runs) - 1), whole


def compressed_bits(tokens: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` bits per token after DEFLATE: low for a text that repeats itself."""
    width = np.int32 if int(tokens.max() if tokens.numel() else 0) > 0x7FFF else np.int16
    texts, kept = tokens.numpy().astype(width), mask.numpy()
    rows = [zlib.compress(text[keep].tobytes(), 6) for text, keep in zip(texts, kept, strict=True)]
    return torch.tensor([8.0 * len(row) for row in rows]) / mask.sum(1).clamp(min=1)


def own_counts(buckets: Tensor, mask: Tensor) -> Tensor:
    """``[B, T]`` how often each bucket occurs in its own row, where the mask is True; elsewhere 1."""
    if not buckets.numel():
        return buckets.float()
    places = np.arange(buckets.numel()).reshape(buckets.shape)
    bits = buckets.numel().bit_length()
    distinct = np.where(mask.numpy(), buckets.numpy(), -1 - places)  # a masked entry equals no other
    keys = (distinct << bits) | places  # sorting one number is several times as fast as argsort
    keys.sort(1)
    ordered = keys >> bits
    starts = np.ones(keys.shape, dtype=bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=starts[:, 1:])
    lengths = np.diff(np.flatnonzero(starts), append=keys.size)
    own = np.empty(keys.size, dtype=np.float32)
    own[(keys & ((1 << bits) - 1)).ravel()] = lengths.repeat(lengths)
    return torch.from_numpy(own).view(buckets.shape)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` mean over the masked entries of each row; 0 without any."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
