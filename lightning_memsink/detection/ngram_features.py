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
from numpy.typing import NDArray
from torch import Tensor

from lightning_memsink.samples.hashing import pair_hash, run_hash

TOKEN_FEATURES = ("unigram_nll", "bigram_nll", "familiarity", "compressed_bits")
"""Names of the features, in the order of their columns."""

_RUN = 4
"""Tokens of a run (a 4-gram)."""
EXCERPT, SPAN = 1024, 64
"""Tokens that are read of a longer text, in spans of so many that are evenly spread over it."""


@dataclass(frozen=True)
class Ngrams:
    """Hash buckets of a text's tokens, pairs and runs of four, and bool masks of those that are counted.

    Of texts longer than `EXCERPT` they are those of an excerpt, with T tokens.
    """

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
        tokens, mask, follows = excerpt(tokens, mask)
        pair, run = pair_hash(tokens[:, :-1], tokens[:, 1:]), run_hash(tokens, _RUN)
        paired = mask[:, :-1] & mask[:, 1:]
        if follows is not None:
            paired &= follows
        whole = torch.ones_like(run, dtype=torch.bool)
        for place in range(_RUN - 1):
            whole &= paired[:, place : place + run.shape[1]]
        return Ngrams(
            tokens & (len(self.unigrams) - 1),
            mask,
            pair & (self.buckets - 1),
            paired,
            run & (len(self.runs) - 1),
            whole,
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
        return self.familiarity_without(text, _times_own(exposures, text.run, text.whole))

    def familiarity_without(self, text: Ngrams, runs: Tensor) -> Tensor:
        """`familiarity` where ``runs`` ``[B, T-3]`` are left out of the counts of the text's runs."""
        return _masked_mean((self.runs[text.run] - runs).clamp(min=0).log1p(), text.whole)

    def nll(self, text: Ngrams, exposures: Tensor) -> Tensor:
        """``[B, 2]`` mean unigram and bigram negative log-likelihood, in nats per token.

        Unigrams with add-one smoothing, bigrams interpolated with them by a Dirichlet prior (MacKay & Peto 1995).
        ``exposures`` ``[B]``: how often each sample itself was counted; that many of its own counts are left out.
        """
        singles = _times_own(exposures, text.single, text.counted)
        pairs = _times_own(exposures, text.pair, text.paired)
        return self.nll_without(text, singles, pairs, exposures.float()[:, None] * text.counted.sum(1, keepdim=True))

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


def excerpt(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is read of texts ``tokens`` ``[B, T]``, which count where ``mask`` is True: all, or `EXCERPT` of them.

    It is the same for a text however wide its batch is.

    Returns:
        Tokens and mask ``[B, T']``, and bool ``[B, T'-1]`` where one follows the other in the text; None: everywhere.
    """
    if tokens.shape[1] <= EXCERPT:
        return tokens, mask, None
    is_whole = bool(mask.all())
    lengths = torch.tensor([[tokens.shape[1]]]) if is_whole else mask.sum(1, keepdim=True)
    place = torch.arange(EXCERPT)
    spans = place // SPAN * (lengths - SPAN) // (EXCERPT // SPAN - 1) + place % SPAN
    nth = torch.where(lengths > EXCERPT, spans, place)
    at = nth.clamp(max=tokens.shape[1] - 1)
    if is_whole:
        return tokens[:, at[0]], mask[:, :EXCERPT], at[:, 1:] == at[:, :-1] + 1
    at = mask.byte().argsort(dim=1, descending=True, stable=True).gather(1, at)
    return tokens.gather(1, at), nth < lengths, at[:, 1:] == at[:, :-1] + 1


def compressed_bits(tokens: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` bits per token after DEFLATE: low for a text that repeats itself."""
    tokens, mask, _ = excerpt(tokens, mask)
    width = np.int32 if int(tokens.max() if tokens.numel() else 0) > 0x7FFF else np.int16
    texts, kept = tokens.numpy().astype(width), mask.numpy()
    rows = [zlib.compress(text[keep].tobytes(), 6) for text, keep in zip(texts, kept, strict=True)]
    return torch.tensor([8.0 * len(row) for row in rows], dtype=torch.float32) / mask.sum(1).clamp(min=1)


def own_counts(buckets: Tensor, mask: Tensor) -> Tensor:
    """``[B, T]`` how often each bucket occurs in its own row, where the mask is True; elsewhere 1."""
    if not buckets.numel():
        return buckets.float()
    bits = buckets.shape[1].bit_length()
    fits = int(buckets.max()).bit_length() + bits < 31
    dtype = np.dtype(np.int32 if fits else np.int64)  # half the bytes sort in half the time
    places: NDArray[Any] = np.arange(buckets.shape[1], dtype=dtype)
    distinct = np.where(mask.numpy(), buckets.numpy().astype(dtype), -1 - places)  # a masked entry equals no other
    keys: NDArray[Any] = (distinct << bits) | places  # sorting one number is several times as fast as argsort
    keys.sort(1)
    ordered = keys >> bits
    starts = np.ones(keys.shape, dtype=bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=starts[:, 1:])
    lengths = np.diff(np.flatnonzero(starts), append=keys.size)
    own = np.empty(keys.shape, dtype=np.float32)
    np.put_along_axis(own, keys & ((1 << bits) - 1), lengths.repeat(lengths).reshape(keys.shape), 1)
    return torch.from_numpy(own)


def _times_own(exposures: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
    """``[B, T]`` what a text was counted itself, ``exposures`` ``[B]`` times."""
    own, again = torch.zeros(buckets.shape, dtype=torch.float32), exposures > 0
    own[again] = exposures[again, None].float() * own_counts(buckets[again], mask[again])
    return own


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """``[B]`` mean over the masked entries of each row; 0 without any."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)
