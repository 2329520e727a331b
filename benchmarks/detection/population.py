"""Training samples, tested samples and held-out samples of the detection benchmark, drawn from a real text.

T  tokens      U  different samples      N  samples to test      M  controls
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memsink.examples.corpora import Corpus
from lightning_memsink.examples.corpora.text import apart, unshared
from lightning_memsink.extraction.canaries import plant_canaries
from lightning_memsink.samples.unique import distinct_rows, without


@dataclass(frozen=True)
class Sizes:
    """How many of each. ``repeats`` are per epoch: each further epoch shows every sample as often again.

    A ladder, and 64 times three times over: most of what is memorized in the end was shown often, as in the study
    whose bounds are applied here.
    """

    background: int = 3600
    held_out: int = 400
    repeats: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 64, 64, 128)
    per_rung: int = 6
    canaries: int = 4
    easy: int = 12
    easy_repeats: int = 32
    twins: int = 48
    once: int = 32
    """Tested samples of each of the kinds seen once an epoch: background, shuffled, template."""
    noise: int = 12
    noise_repeats: int = 16


@dataclass(frozen=True)
class Population:
    """Both runs' data. Rows of ``tokens`` are ids; ``main`` and ``twin`` list rows, a row as often as it is shown."""

    tokens: Tensor
    """``[U, T]``"""
    main: Tensor
    twin: Tensor
    """The same with others in the place of the tested samples, drawn alike and shown once; noise for canaries. A
    twin that knew no random text would find some canaries much harder than others, and the truth would be blurred."""
    tested: Tensor
    """``[N]`` rows."""
    kind: list[str]
    """``[N]``: natural, canary, easy, noise, background, shuffled or template."""
    repeats: Tensor
    """``[N]`` times an epoch."""
    controls: Tensor
    """``[M, T]``"""
    control_kind: list[str]
    """``[M]``: held_out, natural, canary, easy, shuffled or template."""

    def of(self, *kinds: str) -> Tensor:
        """Bool ``[N]``."""
        return torch.tensor([kind in kinds for kind in self.kind])

    def controls_of(self, *kinds: str) -> Tensor:
        """Bool ``[M]``: the controls drawn as samples of these kinds are."""
        wanted = {DRAWN_AS.get(kind, kind) for kind in kinds}
        return torch.tensor([kind in wanted for kind in self.control_kind])

    @property
    def noise(self) -> Tensor:
        """Rows whose tokens are drawn anew each time they are shown."""
        return self.tested[self.of("noise")]


DRAWN_AS = {"background": "natural", "noise": "canary"}


def populate(corpus: Corpus, vocab_size: int, sizes: Sizes, seed: int) -> Population:
    """Draws everything from one corpus, each sequence used once."""
    generator = torch.Generator().manual_seed(seed)
    pool = Pool(distinct_rows(corpus.train[torch.randperm(len(corpus.train), generator=generator)]))
    background = pool.take(sizes.background)
    held_out = corpus.held_out[torch.randperm(len(corpus.held_out), generator=generator)[: sizes.held_out]]
    planted = plant_canaries(
        background,
        held_out,
        pool.take_apart(len(sizes.repeats) * sizes.per_rung + sizes.twins, torch.cat([background, held_out])),
        vocab_size=vocab_size,
        repeats=sizes.repeats,
        per_rung=sizes.per_rung,
        canaries=sizes.canaries,
        easy=sizes.easy,
        easy_repeats=sizes.easy_repeats,
        twins=sizes.twins,
        seed=seed,
    )
    once = {
        "background": pool.take(2 * sizes.once),
        "shuffled": of_other_order(pool.take(2 * sizes.once + sizes.twins), generator),
        "template": from_template(pool.take(1)[0], 2 * sizes.once + sizes.twins, vocab_size, generator),
    }
    nothing = torch.zeros(sizes.noise, held_out.shape[1], dtype=torch.int64)
    tested = [
        *((group.kind, group.sequences, group.repeats) for group in planted.groups),
        *((kind, texts[: sizes.once], 1) for kind, texts in once.items()),
        ("noise", nothing, sizes.noise_repeats),
    ]
    controls = {
        "held_out": held_out,
        **{group.kind: group.twins for group in planted.groups},
        **{kind: texts[2 * sizes.once :] for kind, texts in once.items() if kind != "background"},
    }
    texts = torch.cat([sequences for _, sequences, _ in tested])
    kinds = [kind for kind, sequences, _ in tested for _ in sequences]
    repeats = torch.tensor([times for _, sequences, times in tested for _ in sequences])
    real = pool.take(sum(len(sequences) * times for kind, sequences, times in tested if kind in ("natural", "easy")))
    fresh = torch.cat([real, *(texts[sizes.once : 2 * sizes.once] for texts in once.values())])
    rows = torch.arange(len(background) + len(texts) + len(fresh))
    known, own, others = rows.split([len(background), len(texts), len(fresh)])
    noise = own[[kind == "noise" for kind in kinds]]
    random = noise.repeat_interleave(-(-(int(repeats.sum()) - len(others)) // len(noise)))
    shown = own.repeat_interleave(repeats)
    return Population(
        tokens=torch.cat([background, texts, fresh]),
        main=torch.cat([known, shown]),
        twin=torch.cat([known, others, random[: len(shown) - len(others)]]),
        tested=own,
        kind=kinds,
        repeats=repeats,
        controls=torch.cat(list(controls.values())),
        control_kind=[kind for kind, sequences in controls.items() for _ in sequences],
    )


class Pool:
    """Sequences, each of which is taken at most once."""

    def __init__(self, sequences: Tensor) -> None:
        self.sequences, self.taken = sequences, 0

    def take_apart(self, many: int, others: Tensor) -> Tensor:
        """Like `take`, but none that shares half of its tokens in a row with another or with ``others``.

        A near-duplicate is trained on more often than its repeats, and a twin of it would have been trained on.
        """
        left = self.sequences[self.taken :]
        taken = unshared(apart(left), others)[:many]
        self.sequences = torch.cat([self.sequences[: self.taken], taken, without(left, taken)])
        return self.take(len(taken))

    def take(self, many: int) -> Tensor:
        self.taken += many
        if self.taken > len(self.sequences):
            raise ValueError(
                f"The text has {len(self.sequences)} sequences, but the sizes ask for at least {self.taken}. "
                f"Lower `background` or `repeats`."
            )
        return self.sequences[self.taken - many : self.taken]


def of_other_order(texts: Tensor, generator: torch.Generator) -> Tensor:
    """The tokens of each text in another order."""
    return texts.gather(1, torch.rand(texts.shape, generator=generator).argsort(1))


def from_template(frame: Tensor, many: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """``[many, T]`` copies of one text ``[T]``, every sixth token drawn anew."""
    texts = frame.repeat(many, 1)
    slots = torch.arange(len(frame)) % 6 == 5
    return torch.where(slots, torch.randint(vocab_size, texts.shape, generator=generator), texts)
