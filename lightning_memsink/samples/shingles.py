"""MinHash of texts: the lowest hashes of their shingles, which are runs of a few tokens.

B  texts      T  tokens of a text      K  hashes of a sketch      P  pairs of texts

A sketch holds the `SKETCH` lowest distinct hashes (bottom-k MinHash: Broder 1997, "On the resemblance and containment
of documents"), so of a text with no more shingles all of them. The share of two texts' lowest hashes that both have
estimates the Jaccard similarity of their shingles.

Everything here is numpy on one thread: torch would begin a second pool of threads in the background thread that calls
it, which takes processors from the training.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

SKETCH = 32
"""Hashes kept of a text, 4 bytes each. The standard error of a similarity of .36 is .08."""
NO_HASH = np.int32(2**31 - 1)
"""Fills the sketch of a text with fewer shingles."""
INFORMATION = 20
"""Bits of a shingle: 2²⁰ different ones at least are to be expected, so that unrelated texts share few by chance."""
SHORTEST, LONGEST = 3, 8
"""Tokens of a shingle."""

Hashes = NDArray[np.int32]
"""``[B, S]`` or, of a sketch, ``[B, K]``: distinct, ascending, `NO_HASH` at the end of shorter ones."""


def shingle_length(ids: NDArray[np.int64], mask: NDArray[np.bool_]) -> int:
    """Tokens of a shingle for texts such as ``ids`` ``[B, T]``: 3 for words and their parts, 5 to 6 for characters.

    As many as have `INFORMATION` bits by the entropy of single tokens, with the correction of Miller (1955) for small
    numbers. Below 256 tokens that says too little, and it is 3.
    """
    tokens = ids[mask]
    if len(tokens) < 256:
        return SHORTEST
    _, counts = np.unique(tokens, return_counts=True)
    shares = counts / len(tokens)
    bits = float(-(shares * np.log2(shares)).sum()) + (len(counts) - 1) / (2 * len(tokens) * math.log(2))
    return min(max(math.ceil(INFORMATION / max(bits, 1e-9)), SHORTEST), LONGEST)


def hashes_of(ids: NDArray[np.int64], mask: NDArray[np.bool_], length: int) -> Hashes:
    """``[B, S]`` the distinct hashes of all shingles of texts ``ids`` ``[B, T]``, ascending.

    Args:
        ids: tokens.
        mask: False where a token is padding.
        length: tokens of a shingle.
    """
    runs = ids.shape[1] - length + 1
    if runs < 1 or not len(ids):
        return np.full((len(ids), 1), NO_HASH)
    key = np.zeros((len(ids), runs), dtype=np.uint64)
    whole = np.ones(key.shape, dtype=bool)
    words = ids.astype(np.uint64)
    for place in range(length):
        key *= np.uint64(0x9E3779B97F4A7C15)
        key += words[:, place : place + runs]
        key += np.uint64(1)
        key ^= key >> np.uint64(29)
        whole &= mask[:, place : place + runs]
    key *= np.uint64(0xBF58476D1CE4E5B9)
    key ^= key >> np.uint64(32)
    key *= np.uint64(0x94D049BB133111EB)
    hashes = (key >> np.uint64(33)).astype(np.int32)
    hashes[~whole] = NO_HASH
    hashes.sort(1)
    repeats = hashes[:, 1:] == hashes[:, :-1]
    if (repeats & (hashes[:, 1:] != NO_HASH)).any():
        hashes[:, 1:][repeats] = NO_HASH
        hashes.sort(1)
    return hashes


def lowest(hashes: Hashes, rare: NDArray[np.bool_], count: int, at_least: int) -> Hashes:
    """``[B, count]`` the lowest ``rare`` ones of each row of ascending ``hashes`` ``[B, S]``.

    Where fewer than ``at_least`` are rare, the lowest others fill the row.
    """
    kept = hashes
    if not rare.all():
        kept = np.where(rare, hashes, NO_HASH)
        few = np.flatnonzero((kept != NO_HASH).sum(1) < at_least)
        kept.sort(1)
        if len(few):
            ranked = hashes[few].astype(np.int64) + (~rare[few] << np.int64(31))
            ranked.sort(1)
            ranked = ranked[:, :count]
            filled = (ranked & NO_HASH).astype(np.int32)
            filled.sort(1)
            kept = kept[:, :count]
            kept[few] = filled
    kept = kept[:, :count]
    return np.pad(kept, ((0, 0), (0, count - kept.shape[1])), constant_values=NO_HASH)


class TextCounts:
    """In how many texts each shingle occurs, counted by its hash.

    `weights` are what makes a shingle that very many texts share count for little: a header that stands before each
    text, the fixed words of a template, common phrases. Up to `FULL` texts a shingle counts as one, then as the square
    of ``FULL / texts``: in 100 texts as .026, in 1,000 as .0003.
    """

    FULL = 16
    COMMON = 0.25
    """Weight below which a shingle is left out of sketches: in more than `RARE` texts."""
    RARE = 32
    BUCKETS = 1 << 24
    LARGEST = 50_000

    def __init__(self) -> None:
        self._counts = np.zeros(self.BUCKETS, dtype=np.uint16)  # 32 MiB, of which only what is used takes memory

    def __getstate__(self) -> dict[str, NDArray[Any]]:
        at = np.flatnonzero(self._counts)
        return {"at": at, "texts": self._counts[at]}

    def __setstate__(self, state: dict[str, NDArray[Any]]) -> None:
        self._counts = np.zeros(self.BUCKETS, dtype=np.uint16)
        self._counts[state["at"]] = state["texts"]

    def sketch(self, hashes: Hashes) -> Hashes:
        """``[B, K]`` sketches of up to 2^13 new texts ``[B, S]``, whose shingles are counted.

        Common shingles are left out where others are there: else the sketch of a text with a long header would be of
        the header. So it is for a header's first texts, if they don't come together.
        """
        known = hashes != NO_HASH
        ordered = np.sort(hashes[known])
        common = np.unique(ordered[self.RARE :][ordered[self.RARE :] == ordered[: -self.RARE]])
        passed = hashes[:, :SKETCH]
        self._add(passed[passed != NO_HASH])
        self._raise(common, np.searchsorted(ordered, common, "right") - np.searchsorted(ordered, common))
        found = self.rarest(hashes, SKETCH)
        self._add(found[(found > passed[:, -1:]) & (found != NO_HASH)])
        return found

    def rarest(self, hashes: Hashes, count: int) -> Hashes:
        """``[B, count]`` the lowest hashes that are not common, and others where these are less than half of them."""
        return lowest(hashes, (self.weights(hashes) >= self.COMMON) | (hashes == NO_HASH), count, count // 2)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """The counts of what is shared by more than a few texts."""
        at = np.flatnonzero(self._counts > 2)
        return {"at": at.astype(np.int32), "texts": self._counts[at].astype(np.int32)}

    def load_state_dict(self, state: dict[str, NDArray[Any]], sketches: Hashes) -> None:
        """From a `state_dict`, and from the sketches ``[N, K]`` of all texts so far."""
        self._counts = np.zeros_like(self._counts)
        for start in range(0, len(sketches), 1 << 13):
            some = sketches[start : start + (1 << 13)]
            self._add(some[some != NO_HASH])
        self._counts[self._counts > 2] = 2
        self._counts[state["at"]] = state["texts"]

    def _add(self, hashes: NDArray[np.int32]) -> None:
        at = bucket(hashes, self.BUCKETS)
        np.add.at(self._counts, at, np.uint16(1))
        self._counts[at] = np.minimum(self._counts[at], self.LARGEST)

    def _raise(self, hashes: NDArray[np.int32], texts: NDArray[np.int64]) -> None:
        """Counts at least these ``texts`` for each of ``hashes``, of which some were counted already."""
        at = bucket(hashes, self.BUCKETS)
        self._counts[at] = np.maximum(self._counts[at], texts.clip(max=self.LARGEST))

    def weights(self, hashes: Hashes) -> NDArray[np.float32]:
        """Of each hash, in (0, 1], in the shape of ``hashes``; 0 for `NO_HASH`."""
        texts = np.maximum(self._counts[bucket(hashes, self.BUCKETS)], self.FULL).astype(np.float32)
        found: NDArray[np.float32] = np.square(self.FULL / texts)
        found[hashes == NO_HASH] = 0
        return found


def bucket(hashes: Hashes, buckets: int) -> NDArray[np.int64]:
    """The bucket of each hash, in 0…buckets-1. Lowest hashes are small numbers, so they are mixed first."""
    mixed = (hashes.astype(np.uint32) * np.uint32(0x9E3779B1)).astype(np.uint64)
    found: NDArray[np.int64] = ((mixed * np.uint64(buckets)) >> np.uint64(32)).astype(np.int64)
    return found
