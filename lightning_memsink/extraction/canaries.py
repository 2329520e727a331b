"""Canaries: sequences planted in the training data a known number of times, and twins that are never trained on.

N  training sequences      M  controls      n  planted sequences of a group      m  twins      T  tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_memsink.samples.hashing import content_ids
from lightning_memsink.samples.unique import distinct_rows, without


@dataclass(frozen=True)
class CanaryGroup:
    """``n`` sequences of one kind, each shown ``repeats`` times per epoch, and twins that are never shown."""

    name: str
    """``natural x64``."""
    kind: str
    """``natural``: real text. ``canary``: uniformly random tokens. ``easy``: text whose twins are easy too."""
    repeats: int
    sequences: Tensor
    """``[n, T]``"""
    twins: Tensor
    """``[m, T]``: drawn in the same way, never trained on. All groups of a kind share them."""

    @property
    def ids(self) -> Tensor:
        """``[n]`` int64: the content ids of the sequences."""
        return content_ids(self.sequences)

    @property
    def twin_ids(self) -> Tensor:
        """``[m]`` int64: the content ids of the twins."""
        return content_ids(self.twins)


@runtime_checkable
class HasCanaryGroups(Protocol):
    """A data module that knows the canary groups in its training data."""

    def rungs(self) -> Sequence[CanaryGroup]: ...


@dataclass(frozen=True)
class PlantedCanaries:
    """Data with canaries in it, and the canary groups."""

    train: Tensor
    """``[N, T]``: background and planted sequences, shuffled."""
    controls: Tensor
    """``[M, T]``: held-out background, then the twins of each kind."""
    groups: tuple[CanaryGroup, ...]

    @property
    def rungs(self) -> tuple[CanaryGroup, ...]:
        """The earlier name of ``groups``, for code that uses it."""
        return self.groups


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
) -> PlantedCanaries:
    """Training data with canary groups of different numbers of repeats, to test whether a detector finds them.

    Args:
        background: ``[., T]`` int64, each sequence is shown once.
        held_out: ``[., T]`` of the same text, never shown: the controls of the background.
        natural: ``[., T]`` more of the same text, from which planted sequences and twins are taken; repeated rows, and
            rows that are also in the background or in ``held_out``, are skipped.
        vocab_size: canaries are uniform over the vocabulary.
        repeats: times per epoch that a group is shown; one group of each kind for each number.
        per_rung: natural sequences in each group.
        canaries: random sequences in each group.
        easy: sequences of the easy family, shown ``easy_repeats`` times: a real phrase repeated to the end, in which
            three tokens are one of eight choices each. Memorizing one saves at most 3 ln 8 / (T - 1) nats per token
            over knowing the family (.10 at T=64), so none of them should be called memorized.
        easy_repeats: see ``easy``.
        twins: twins of each kind, shared by its groups.
        seed: of all draws and of the order; the global generators are not used.

    Raises:
        ValueError: ``natural`` has too few usable rows, or ``easy + twins`` is over 512.
    """
    generator = torch.Generator().manual_seed(seed)
    context = background.shape[1]
    real = _shuffled(without(distinct_rows(natural), torch.cat([background, held_out])), generator)
    needed = len(repeats) * per_rung + (twins if per_rung else 0)
    if len(real) < needed:
        raise ValueError(
            f"plant_canaries needs {needed} sequences of `natural` ({len(repeats)} groups of {per_rung}, and {twins} "
            f"twins), but {len(real)} of {len(natural)} are left without those that are repeated or also in the "
            f"background. Give more text, or lower per_rung, twins or the number of repeats."
        )
    random = torch.randint(vocab_size, (len(repeats) * canaries + twins, context), generator=generator)
    family = _easy_family(background, easy + twins, vocab_size, generator)
    groups = [
        *_groups("natural", repeats, per_rung, real, twins),
        *_groups("canary", repeats, canaries, random, twins),
        *_groups("easy", [easy_repeats], easy, family, twins),
    ]
    planted = [group.sequences.repeat(group.repeats, 1) for group in groups]
    twins_by_kind = {group.kind: group.twins for group in groups}
    return PlantedCanaries(
        train=_shuffled(torch.cat([background, *planted]), generator),
        controls=torch.cat([held_out, *twins_by_kind.values()]),
        groups=tuple(groups),
    )


def _groups(kind: str, repeats: Sequence[int], size: int, pool: Tensor, twins: int) -> list[CanaryGroup]:
    """Groups of ``size`` sequences each from the start of ``pool``, all with the ``twins`` sequences after them."""
    if not size:
        return []
    parts = torch.split(pool[: len(repeats) * size], size)
    spare = pool[len(repeats) * size :][:twins]
    return [
        CanaryGroup(f"{kind} x{times}", kind, times, part, spare) for times, part in zip(repeats, parts, strict=True)
    ]


def _easy_family(background: Tensor, count: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """``[count, T]`` distinct: a repeated phrase of the background, with three tokens replaced by one of eight each."""
    context = background.shape[1]
    start = int(torch.randint(len(background), (1,), generator=generator))
    frame = background[start, : min(16, context)].repeat(context // min(16, context) + 1)[:context]
    positions = context * torch.tensor([1, 2, 3]) // 4
    choices = torch.stack([torch.randperm(vocab_size, generator=generator)[:8] for _ in positions])
    if count > 8**3:
        raise ValueError(f"The easy family has 512 members, but easy + twins is {count}. Lower one of them.")
    picked = torch.randperm(8**3, generator=generator)[:count]
    digits = torch.stack([picked // 64, picked // 8 % 8, picked % 8], 1)
    family = frame.repeat(count, 1)
    family[:, positions] = choices.gather(1, digits.T).T
    return family


def _shuffled(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randperm(len(rows), generator=generator)]
