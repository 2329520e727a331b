"""Ground truth: sequences planted in the training data a known number of times, and twins that never are.

N  training sequences      M  controls      n  planted sequences of a rung      m  twins      T  tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memsink.samples.unique import distinct_rows, without


@dataclass(frozen=True)
class CanaryGroup:
    """One step of the ladder: ``n`` sequences of one kind, each shown ``repeats`` times."""

    name: str
    """``natural x64``."""
    kind: str
    """``natural``: real text. ``canary``: uniformly random tokens. ``easy``: text whose unseen twins are easy too."""
    repeats: int
    sequences: Tensor
    """``[n, T]``"""
    twins: Tensor
    """``[m, T]``: drawn the same way, never trained on. All rungs of a kind share them."""

    @property
    def ids(self) -> Tensor:
        """``[n]`` int64: the content ids of the sequences."""
        return _content_ids(self.sequences)

    @property
    def twin_ids(self) -> Tensor:
        """``[m]`` int64: the content ids of the twins."""
        return _content_ids(self.twins)


@dataclass(frozen=True)
class Planted:
    """``train`` ``[N, T]``: shuffled; ``controls`` ``[M, T]``: held-out background, then the twins of each kind."""

    train: Tensor
    controls: Tensor
    rungs: tuple[CanaryGroup, ...]


def plant_canaries(
    background: Tensor,
    held_out: Tensor,
    natural: Tensor,
    *,
    vocab_size: int,
    repeats: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
    per_rung: int = 8,
    canaries: int = 4,
    easy: int = 12,
    easy_repeats: int = 64,
    twins: int = 32,
    seed: int = 0,
) -> Planted:
    """Background once, and among it sequences repeated up a ladder: what a detector should find, and what not.

    Args:
        background: ``[., T]`` int64, shown once each.
        held_out: ``[., T]`` of the same text, never shown: the controls of the background.
        natural: ``[., T]`` more of the same text to plant and to draw twins from; rows that also are in the
            background or among ``held_out``, and repeated rows, are passed over.
        vocab_size: canaries are uniform over it.
        repeats: the ladder, times per epoch.
        per_rung: natural sequences of each rung.
        canaries: random sequences of each rung.
        easy: sequences of the easy family, shown ``easy_repeats`` times: a real phrase said over and over, three
            of its tokens out of eight choices. Knowing one by heart saves at most 3 ln 8 / (T - 1) nats per
            token over knowing the family (.10 at T=64), so none of them should be called memorized.
        easy_repeats: see ``easy``.
        twins: of each kind, shared by its rungs.
        seed: decides everything drawn and the order; the global generators are left alone.
    """
    generator = torch.Generator().manual_seed(seed)
    context = background.shape[1]
    real = _shuffled(without(distinct_rows(natural), torch.cat([background, held_out])), generator)
    needed = len(repeats) * per_rung + (twins if per_rung else 0)
    if len(real) < needed:
        raise ValueError(
            f"plant_canaries needs {needed} sequences of `natural` ({len(repeats)} rungs of {per_rung}, and {twins} "
            f"twins), but {len(real)} of {len(natural)} are left without those that are repeated or also in the "
            f"background. Give more text, or lower per_rung, twins or the number of repeats."
        )
    random = torch.randint(vocab_size, (len(repeats) * canaries + twins, context), generator=generator)
    family = _easy_family(background, easy + twins, vocab_size, generator)
    rungs = [
        *_ladder("natural", repeats, per_rung, real, twins),
        *_ladder("canary", repeats, canaries, random, twins),
        *_ladder("easy", [easy_repeats], easy, family, twins),
    ]
    planted = [rung.sequences.repeat(rung.repeats, 1) for rung in rungs]
    twins_by_kind = {rung.kind: rung.twins for rung in rungs}
    return Planted(
        train=_shuffled(torch.cat([background, *planted]), generator),
        controls=torch.cat([held_out, *twins_by_kind.values()]),
        rungs=tuple(rungs),
    )


def _ladder(kind: str, repeats: Sequence[int], per_rung: int, pool: Tensor, twins: int) -> list[CanaryGroup]:
    """Rungs of ``per_rung`` sequences each from the front of ``pool``, all with the ``twins`` that come after them."""
    if not per_rung:
        return []
    parts = torch.split(pool[: len(repeats) * per_rung], per_rung)
    spare = pool[len(repeats) * per_rung :][:twins]
    return [
        CanaryGroup(f"{kind} x{times}", kind, times, part, spare) for times, part in zip(repeats, parts, strict=True)
    ]


def _easy_family(background: Tensor, many: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """``[many, T]`` distinct: a phrase of the background cycled, three tokens of it replaced by one of eight each."""
    context = background.shape[1]
    start = int(torch.randint(len(background), (1,), generator=generator))
    frame = background[start, : min(16, context)].repeat(context // min(16, context) + 1)[:context]
    places = context * torch.tensor([1, 2, 3]) // 4
    choices = torch.stack([torch.randperm(vocab_size, generator=generator)[:8] for _ in places])
    if many > 8**3:
        raise ValueError(f"The easy family has 512 members, but easy + twins asks for {many}. Lower one of them.")
    picked = torch.randperm(8**3, generator=generator)[:many]
    digits = torch.stack([picked // 64, picked // 8 % 8, picked % 8], 1)
    family = frame.repeat(many, 1)
    family[:, places] = choices.gather(1, digits.T).T
    return family


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)]


def _content_ids(sequences: Tensor) -> Tensor:
    from lightning_memsink.samples.hashing import content_ids  # reached only where ids are compared with a ledger's

    return content_ids(sequences)
