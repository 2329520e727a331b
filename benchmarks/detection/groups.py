"""Three disjoint groups of training samples, drawn alike. Each is trained on by one run, which the others never saw.

So every sample has a true memorization: the mean loss of the other groups' runs against that of its own.

    T  tokens      U  different samples of a group      M  controls, held out from all
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.detection.population import Pool, from_template, of_other_order
from lightning_memsink.examples.corpora import Corpus
from lightning_memsink.extraction.canaries import plant_canaries
from lightning_memsink.samples.unique import distinct_rows

GROUPS = 3
DRAWN_AS = {"background": "held_out", "near": "held_out", "noise": "canary"}
"""Kind of the controls of samples of another name; others have controls of their own name."""


@dataclass(frozen=True)
class GroupSizes:
    """How many samples each group has, and how often an epoch shows them."""

    background: int = 1300
    held_out: int = 300
    repeats: tuple[int, ...] = (2, 4, 8, 16, 32, 64, 64)
    natural: int = 5
    """Natural sequences shown each number of times."""
    canaries: int = 3
    easy: int = 8
    easy_repeats: int = 32
    twins: int = 48
    """Controls of each kind but natural text."""
    once: int = 40
    """Shuffled and template samples, shown once an epoch."""
    noise: int = 8
    noise_repeats: int = 16
    families: int = 4
    members: int = 12
    """Near-duplicates in each family, each shown once an epoch."""


@dataclass(frozen=True)
class Group:
    """What one run trains on. A sample's id is its row in ``tokens``."""

    tokens: Tensor
    """``[U, T]``"""
    kind: list[str]
    """``[U]``: background, natural, canary, easy, shuffled, template, near or noise."""
    repeats: Tensor
    """``[U]`` times an epoch."""

    def rows(self, times: int = 1) -> Tensor:
        """Ids, each as often as an epoch shows it. What is repeated, is repeated ``times`` as often."""
        return torch.arange(len(self.tokens)).repeat_interleave(self.shown(times))

    def shown(self, times: int) -> Tensor:
        """``[U]`` times that an epoch shows each sample."""
        return torch.where(self.repeats > 1, times * self.repeats, self.repeats)

    def of(self, *kinds: str) -> Tensor:
        """Bool ``[U]``."""
        return torch.tensor([kind in kinds for kind in self.kind])


@dataclass(frozen=True)
class Groups:
    """All groups of one seed, and what none of them trains on."""

    groups: Sequence[Group]
    controls: Tensor
    """``[M, T]``"""
    control_kind: list[str]
    """``[M]``: held_out, canary, easy, shuffled or template."""

    def controls_of(self, kind: str) -> Tensor:
        """Bool ``[M]``: the controls that are drawn as samples of a kind are."""
        wanted = DRAWN_AS.get(kind, kind)
        return torch.tensor([each == ("held_out" if wanted == "natural" else wanted) for each in self.control_kind])


def draw_groups(corpus: Corpus, vocab_size: int, sizes: GroupSizes, seed: int) -> Groups:
    """Draws groups and controls from one corpus, each sequence used once."""
    generator = torch.Generator().manual_seed(seed)
    pool = Pool(distinct_rows(corpus.train[torch.randperm(len(corpus.train), generator=generator)]))
    held_out = corpus.held_out[torch.randperm(len(corpus.held_out), generator=generator)[: sizes.held_out]]
    ladder = len(sizes.repeats) * sizes.natural
    natural = pool.take_apart(GROUPS * ladder, held_out).split(ladder)
    of_family = GROUPS * sizes.easy + sizes.twins
    length = held_out.shape[1]
    easy = plant_canaries(
        pool.sequences, held_out, held_out, vocab_size=vocab_size, repeats=(), per_rung=0, canaries=0, easy=of_family,
        twins=0, seed=seed,
    ).groups[-1].sequences  # fmt: skip
    many = GROUPS * sizes.once + sizes.twins
    random = torch.randint(vocab_size, (GROUPS * len(sizes.repeats) * sizes.canaries + sizes.twins, length),
                           generator=generator)  # fmt: skip
    made = {
        "canary": (random, len(sizes.repeats) * sizes.canaries),
        "easy": (easy, sizes.easy),
        "shuffled": (of_other_order(pool.take(many), generator), sizes.once),
        "template": (from_template(pool.take(1)[0], many, vocab_size, generator), sizes.once),
    }
    groups = []
    for number in range(GROUPS):
        own = {kind: texts[number * each : (number + 1) * each] for kind, (texts, each) in made.items()}
        ladders = torch.tensor(sizes.repeats)
        frames = pool.take(sizes.families)
        parts = [
            ("background", pool.take(sizes.background), torch.tensor([1])),
            ("natural", natural[number], ladders.repeat_interleave(sizes.natural)),
            ("canary", own["canary"], ladders.repeat_interleave(sizes.canaries)),
            ("easy", own["easy"], torch.tensor([sizes.easy_repeats])),
            ("shuffled", own["shuffled"], torch.tensor([1])),
            ("template", own["template"], torch.tensor([1])),
            ("near", _near_duplicates(frames, sizes.members, vocab_size, generator), torch.tensor([1])),
            ("noise", torch.zeros(sizes.noise, length, dtype=torch.int64), torch.tensor([sizes.noise_repeats])),
        ]
        groups.append(
            Group(
                torch.cat([texts for _, texts, _ in parts]),
                [kind for kind, texts, _ in parts for _ in texts],
                torch.cat([times.expand(len(texts)) for _, texts, times in parts]),
            )
        )
    controls = {"held_out": held_out} | {kind: texts[GROUPS * each :] for kind, (texts, each) in made.items()}
    return Groups(groups, torch.cat(list(controls.values())), [kind for kind, texts in controls.items() for _ in texts])


def _near_duplicates(frames: Tensor, members: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """``[F * members, T]``: of each frame ``[F, T]``, copies in which a tenth of the tokens is drawn anew."""
    texts = frames.repeat_interleave(members, 0)
    changed = torch.rand(texts.shape, generator=generator) < 0.1
    return torch.where(changed, torch.randint(vocab_size, texts.shape, generator=generator), texts)
