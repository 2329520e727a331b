"""Near-duplicates among texts that come a few at a time: an index of shingles, and groups of texts that share many.

N  texts added so far      B  texts that come      K  hashes of a sketch      P  pairs of texts

datasketch 2.0 and rensa 0.5 find the same kind of candidates, but not what makes a shared header count for little: that
takes the shingles of a pair, which their signatures don't hold. For a million texts of 64 tokens, at the rate of
10,000 to 40,000, datasketch needs 320 s of processor time and 5 GB, and rensa 21 s and 1.6 GB; this index takes 11 s,
and 0.3 GB (`python -m benchmarks.families`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_memsink.samples.shingles import NO_HASH, SKETCH, Hashes, TextCounts, bucket

POSTED = 12
"""Lowest hashes of a text by which later ones find it."""
CANDIDATES = 4
"""Earlier texts that a text is compared with: those that share most of its posted hashes, and at least two."""
ALIKE, ALIKE_SHINGLES = 0.42, 2.5
"""Weighted similarity of texts that are joined, as a part of the similarity to expect of two texts of which each has a
tenth of its tokens changed (.36 by shingles of three); and the weight of the shingles that they share at least."""
KIN, KIN_SHINGLES = 0.17, 1.5
"""The same of a text and the first one of its family."""
NEARLY_EQUAL, EQUAL_SHINGLES = 0.6, 6
"""Similarity, and shared shingles, of texts that are joined however common their shingles are."""

PASSES = 16
"""Of grouping. Only a long chain of texts, each similar to the next, takes more, and leaves its last texts alone."""
BLOCK = 1 << 13
"""Texts or pairs that are computed at a time."""

Numbers = NDArray[np.int64]


class NearDuplicates:
    """The texts added so far, and pairs of them that may be near-duplicates.

    A text takes 128 bytes for its sketch, up to 32 for its pairs, and 96 to 144 in the index; another 32 MiB count in
    how many texts a shingle occurs.

    Args:
        length: tokens of a shingle.
    """

    def __init__(self, length: int = 3) -> None:
        agreeing = 0.9 ** (2 * length)  # shingles that two variants share, as a part of one's
        self._expected = agreeing / (2 - agreeing)
        self.counts = TextCounts()
        self._sketches: Hashes = np.empty((1024, SKETCH), dtype=np.int32)
        self._count = 0
        self._pairs: list[NDArray[np.int32]] = []
        self._latest = self._posted(1024)

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes of memory, less the counts' 32 MiB."""
        return self._sketches.nbytes + self._latest.nbytes + sum(pairs.nbytes for pairs in self._pairs)

    def add(self, hashes: Hashes) -> None:
        """Adds texts by the `hashes_of` all their shingles ``[B, S]``, under the numbers N, N + 1, ..., and remembers
        the earlier ones that each is similar to."""
        for start in range(0, len(hashes), BLOCK):
            self._add(self.counts.sketch(hashes[start : start + BLOCK]))

    def _add(self, found: Hashes) -> None:
        self._grow(len(found))
        numbers = np.arange(self._count, self._count + len(found))
        self._sketches[numbers] = found
        self._count += len(found)
        pairs = self._candidates(found, numbers)
        for part in range(0, len(pairs), BLOCK):
            some = pairs[part : part + BLOCK]
            related = self._similar(some).are_related
            self._pairs.append(some[related].astype(np.int32))
        if len(self._pairs) > 64:
            self._pairs = [np.concatenate(self._pairs)]

    def groups(self) -> Numbers:
        """``[N]`` the first text of the group that each belongs to, by what is known of all of them by now.

        A group is a star: each text is similar to its first one, and has been found through others of the group that it
        is similar to. So a chain of texts, of which each resembles the next one only, is no group.
        """
        every = np.arange(self._count)
        pairs = np.concatenate([np.zeros((0, 2), dtype=np.int64), *self._pairs])
        pairs = pairs[self._in_blocks(pairs, "are_alike")]
        texts, joined = np.unique(pairs, return_inverse=True)
        pairs, alone = joined.reshape(-1, 2), np.arange(len(texts))
        first, free = alone.copy(), np.ones(len(texts), dtype=bool)
        for _ in range(PASSES):
            if not len(pairs):
                break
            own = np.where(free, alone, first)
            self._join(own, pairs, texts)
            members = np.flatnonzero(free & (own != alone))
            settled = members[self._in_blocks(texts[np.stack([members, own[members]], 1)], "are_related")]
            first[settled] = own[settled]
            free[settled] = free[own[settled]] = False
            pairs = pairs[free[pairs].all(1)]
        every[texts] = texts[first]
        return every

    def state_dict(self, texts: int) -> dict[str, Any]:
        """Of the first ``texts`` ones."""
        pairs = np.concatenate(self._pairs) if self._pairs else np.zeros((0, 2), dtype=np.int32)
        return {
            "sketches": torch.from_numpy(self._sketches[:texts].copy()),
            "pairs": torch.from_numpy(pairs[(pairs < texts).all(1)]),
            "counts": {name: torch.from_numpy(values) for name, values in self.counts.state_dict().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what was saved; the index and the counts are made anew of it."""
        saved = state["sketches"].numpy()
        self.counts = TextCounts()
        self._count, self._pairs = 0, [state["pairs"].numpy().copy()]
        self._sketches = np.empty((1024, SKETCH), dtype=np.int32)
        self._grow(len(saved))
        self._sketches[: len(saved)] = saved
        self._count = len(saved)
        self.counts.load_state_dict({name: values.numpy() for name, values in state["counts"].items()}, saved)
        self._post_all()

    def _candidates(self, found: Hashes, numbers: Numbers) -> Numbers:
        """``[P, 2]`` each new text, and earlier ones that share at least two of its posted hashes."""
        hashes = self.counts.rarest(found, POSTED)
        slots = np.where(hashes == NO_HASH, -1, bucket(hashes, len(self._latest))).ravel()
        order = slots.argsort(kind="stable")
        ordered, owner = slots[order], np.repeat(numbers, POSTED)[order]
        earlier = np.full(len(order), -1, dtype=np.int64)
        earlier[1:] = np.where(ordered[1:] == ordered[:-1], owner[:-1], self._latest[ordered[1:]])
        if len(order):
            earlier[0] = self._latest[ordered[0]]
        earlier[(ordered < 0) | (earlier == owner)] = -1
        ends = np.ones(len(order), dtype=bool)
        ends[:-1] = ordered[1:] != ordered[:-1]
        ends &= ordered >= 0
        self._latest[ordered[ends]] = owner[ends]
        of_texts = np.empty_like(earlier)
        of_texts[order] = earlier
        return _most_often(of_texts.reshape(-1, POSTED), numbers)

    def _similar(self, pairs: Numbers) -> _Similarity:
        return _Similarity(self._sketches[pairs[:, 0]], self._sketches[pairs[:, 1]], self.counts, self._expected)

    def _in_blocks(self, pairs: Numbers, name: str) -> NDArray[np.bool_]:
        """``[P]`` an attribute of the similarities of pairs."""
        parts = [getattr(self._similar(pairs[n : n + BLOCK]), name) for n in range(0, len(pairs), BLOCK)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)

    def _join(self, first: Numbers, pairs: Numbers, texts: Numbers) -> None:
        """Joins groups, given by the ``first`` of each text, that a pair is across, where their first ones are similar.

        ``first`` is changed in place. Each round joins a group to one earlier group only, so it takes a few. All three
        are places in ``texts``.
        """
        refused = np.zeros((0, 2), dtype=np.int64)
        for _ in range(PASSES):
            across = np.unique(np.sort(first[pairs], 1), axis=0)
            across = across[across[:, 0] != across[:, 1]]
            across = _without(across, refused, len(first))
            fits = self._in_blocks(texts[across], "are_related")
            refused = np.concatenate([refused, across[~fits]])
            across = across[fits]
            if not len(across):
                return
            later, at = np.unique(across[:, 1], return_index=True)  # to the earliest of several: pairs are sorted
            target = np.arange(len(first))
            target[later] = across[at, 0]
            while True:
                further = target[target]
                if (further == target).all():
                    break
                target = further
            first[:] = target[first]

    def _grow(self, more: int) -> None:
        needed = self._count + more
        if needed <= len(self._sketches):
            return
        capacity = max(needed, len(self._sketches) * 3 // 2)
        wider = np.empty((capacity, SKETCH), dtype=np.int32)
        wider[: self._count] = self._sketches[: self._count]
        self._sketches = wider
        self._post_all()

    def _post_all(self) -> None:
        self._latest = self._posted(len(self._sketches))
        for start in range(0, self._count, BLOCK):
            some = self.counts.rarest(self._sketches[start : min(start + BLOCK, self._count)], POSTED)
            owner = np.broadcast_to(np.arange(start, start + len(some))[:, None], some.shape)
            known = some != NO_HASH
            self._latest[bucket(some[known], len(self._latest))] = owner[known]  # the last of equal ones is kept

    @staticmethod
    def _posted(capacity: int) -> NDArray[np.int32]:
        return np.full(2 * POSTED * capacity, -1, dtype=np.int32)


class _Similarity:
    """The similarities of pairs of sketches ``[P, K]``."""

    def __init__(self, first: Hashes, second: Hashes, counts: TextCounts, expected: float) -> None:
        self._expected = expected
        both = np.concatenate([first, second], 1)
        both.sort(1)
        # Up to the last hash of a full sketch it is known which of the hashes a text has.
        limit = np.minimum(first[:, -1], second[:, -1])
        both[(both > limit[:, None])] = NO_HASH
        weights = counts.weights(both)
        shared = np.zeros(both.shape, dtype=bool)
        shared[:, 1:] = (both[:, 1:] == both[:, :-1]) & (both[:, 1:] != NO_HASH)
        self.shared = shared.sum(1)
        self.all = (both != NO_HASH).sum(1) - self.shared
        self.shared_weight = (weights * shared).sum(1)
        self.weight = weights.sum(1) - self.shared_weight

    @property
    def are_nearly_equal(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (self.shared >= NEARLY_EQUAL * self.all) & (self.shared >= EQUAL_SHINGLES)
        return found

    @property
    def are_alike(self) -> NDArray[np.bool_]:
        """Whether two texts are joined."""
        return self._share(ALIKE, ALIKE_SHINGLES) | self.are_nearly_equal

    @property
    def are_related(self) -> NDArray[np.bool_]:
        """Whether two texts may be in one group."""
        return self._share(KIN, KIN_SHINGLES) | self.are_nearly_equal

    def _share(self, similarity: float, weight: float) -> NDArray[np.bool_]:
        """Whether two texts share this part of the similarity to expect of variants, and shingles of this weight."""
        needed = np.maximum(similarity * self._expected * self.weight, weight)
        found: NDArray[np.bool_] = self.shared_weight >= needed
        return found


def _most_often(candidates: Numbers, numbers: Numbers) -> Numbers:
    """``[P, 2]`` each of ``numbers`` ``[B]`` with the up to `CANDIDATES` that occur most often in its row ``[B, C]``,
    and at least twice. -1 is none."""
    ordered = np.sort(candidates, 1)
    starts = np.ones(ordered.shape, dtype=bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    row, column = starts.nonzero()
    if not len(row):
        return np.zeros((0, 2), dtype=np.int64)
    ends = np.append(column[1:], 0)
    ends[np.append(row[1:] != row[:-1], True)] = ordered.shape[1]
    times, value = ends - column, ordered[row, column]
    kept = (times >= 2) & (value >= 0)
    row, value, times = row[kept], value[kept], times[kept]
    order = np.lexsort((-value, -times, row))  # of those that share as many, the latest
    row, value = row[order], value[order]
    begins = np.searchsorted(row, row)
    kept = np.arange(len(row)) - begins < CANDIDATES
    return np.stack([numbers[row[kept]], value[kept]], 1)


def _without(pairs: Numbers, others: Numbers, base: int) -> Numbers:
    """The pairs ``[P, 2]`` of numbers below ``base`` that are none of ``others``."""
    found: Numbers = pairs[~np.isin(pairs[:, 0] * base + pairs[:, 1], others[:, 0] * base + others[:, 1])]
    return found
