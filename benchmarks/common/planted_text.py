"""Data of experiments E1 and E2: which texts are trained on how often, and which are held out.

T  tokens      U  different samples      R  rows of training data
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from lightning_memsink.examples.corpora import Corpus, apart, python_docs, tokenized, unshared
from lightning_memsink.examples.corpora import python_code as source_code
from lightning_memsink.extraction.canaries import plant_canaries
from lightning_memsink.samples.unique import distinct_rows


@dataclass(frozen=True)
class Sizes:
    """Numbers of sequences of each kind, and how many times each is shown in the one epoch."""

    background: int = 5120
    natural: int = 24
    natural_times: int = 64
    twice: int = 48
    """Natural sequences shown two times: not memorized, but a detector could flag them."""
    domain: int = 256
    domain_times: int = 16
    canaries: int = 12
    canary_times: int = 128
    """At 96 times, ordinary training memorizes only 14 of 16 in some runs, and there must be something to prevent."""
    easy: int = 12
    easy_times: int = 32
    controls: int = 128
    """Held-out background sequences; other kinds have 48."""
    twins: int = 48
    unseen: int = 384
    """Held-out sequences of real text to measure on; canaries and easy ones have 64."""


@dataclass(frozen=True)
class Kind:
    """Samples of one distribution, some shown and some not. Each tensor is ``[., T]``."""

    name: str
    shown: Tensor
    times: int
    controls: Tensor
    """In the validation loader, where a mitigation may read their losses."""
    unseen: Tensor
    """Used by the report only."""


@dataclass(frozen=True)
class World:
    """The data of one experiment. A sample's id is its row in ``tokens``."""

    kinds: tuple[Kind, ...]
    repeated: str
    """The kind of real text that is repeated: ``natural`` or ``domain``."""
    vocab_size: int

    def __getitem__(self, name: str) -> Kind:
        return {kind.name: kind for kind in self.kinds}[name]

    @property
    def tokens(self) -> Tensor:
        """``[U, T]``"""
        return torch.cat([kind.shown for kind in self.kinds])

    @property
    def times(self) -> Tensor:
        """``[U]`` how often each sample is shown."""
        return torch.cat([torch.full((len(kind.shown),), kind.times) for kind in self.kinds])

    @property
    def rows(self) -> Tensor:
        """``[R]`` ids, each as often as it is shown."""
        times = self.times
        return torch.arange(len(times)).repeat_interleave(times)

    @property
    def controls(self) -> Tensor:
        return torch.cat([kind.controls for kind in self.kinds])

    def ids(self, *names: str) -> Tensor:
        """Ids of the samples of these kinds."""
        kinds = [name for kind in self.kinds for name in [kind.name] * len(kind.shown)]
        return torch.tensor([row for row, name in enumerate(kinds) if name in names], dtype=torch.int64)

    def shown(self, times: Mapping[str, int]) -> World:
        """The same data with other numbers of times for some kinds."""
        kinds = (replace(kind, times=times.get(kind.name, kind.times)) for kind in self.kinds)
        return replace(self, kinds=tuple(kinds))


def planted_documentation(sizes: Sizes, seed: int) -> World:
    """E1: repeated sequences of the same kind as the other text."""
    corpus = documentation(seed)
    background, held_out, rest = split_background(corpus, sizes.background, sizes.controls + sizes.unseen, seed)
    vocab_size = corpus.tokenizer.get_vocab_size()
    planted = plant_canaries(
        background, held_out, rest, vocab_size=vocab_size, repeats=(sizes.natural_times,), per_rung=sizes.natural,
        canaries=0, easy=sizes.easy, easy_repeats=sizes.easy_times, twins=sizes.twins + 64 + sizes.twice, seed=seed,
    )  # fmt: skip
    natural, easy = planted.groups
    nothing = held_out[:0]
    kinds = (
        Kind("background", background, 1, held_out[: sizes.controls], held_out[sizes.controls :]),
        Kind("natural", natural.sequences, natural.repeats, nothing, natural.twins[sizes.twice :]),
        Kind("twice", natural.twins[: sizes.twice], 2, nothing, natural.twins[sizes.twice :]),
        _canaries(sizes, vocab_size, background.shape[1], seed),
        _with_twins("easy", easy.sequences, easy.repeats, easy.twins, sizes.twins),
    )
    return World(kinds, "natural", vocab_size)


def planted_source_code(sizes: Sizes, seed: int) -> World:
    """E2: repeated source code, which no other text is."""
    corpus = documentation(seed)
    background, held_out, _ = split_background(corpus, sizes.background, sizes.controls + sizes.unseen, seed)
    vocab_size = corpus.tokenizer.get_vocab_size()
    code = tokenized(source_code(), held_out=0.5, seed=seed, tokenizer=corpus.tokenizer)
    generator = torch.Generator().manual_seed(seed)
    shown = _shuffled(unshared(distinct_rows(code.train), background), generator)[: sizes.domain]
    unseen = _shuffled(unshared(code.held_out, torch.cat([shown, background])), generator)
    unseen = unseen[: 2 * sizes.twins + sizes.unseen]
    kinds = (
        Kind("background", background, 1, held_out[: sizes.controls], held_out[sizes.controls :]),
        _with_twins("domain", shown, sizes.domain_times, unseen, 2 * sizes.twins),
        _canaries(sizes, vocab_size, background.shape[1], seed),
    )
    return World(kinds, "domain", vocab_size)


WORLDS = {"E1": planted_documentation, "E2": planted_source_code}


@cache
def documentation(seed: int) -> Corpus:
    """Python's documentation, tokenized; whole texts are held out."""
    return tokenized(python_docs(), seed=seed)


def split_background(corpus: Corpus, count: int, held_out: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """``count`` sequences, ``held_out`` others, and the rest, of which none shares half a sequence with another."""
    generator = torch.Generator().manual_seed(seed)
    pool = distinct_rows(_shuffled(corpus.train, generator))
    held = _shuffled(corpus.held_out, generator)[:held_out]
    return pool[:count], held, unshared(apart(pool[count:]), torch.cat([pool[:count], held]))


def _canaries(sizes: Sizes, vocab_size: int, length: int, seed: int) -> Kind:
    """Uniformly random tokens."""
    shape = (sizes.canaries + sizes.twins + 64, length)
    random = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    return _with_twins("canary", random[: sizes.canaries], sizes.canary_times, random[sizes.canaries :], sizes.twins)


def _with_twins(name: str, shown: Tensor, times: int, twins: Tensor, controls: int) -> Kind:
    return Kind(name, shown, times, twins[:controls], twins[controls:])


def _shuffled(sequences: Tensor, generator: torch.Generator) -> Tensor:
    return sequences[torch.randperm(len(sequences), generator=generator)]
