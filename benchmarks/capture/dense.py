"""Cases: a class for each pixel, overlap of masks, and sequences without alignment (CTC)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.capture.case import BATCH, cases, family
from benchmarks.capture.data import C, D, convolution, images, mlp, numbers, split

masks = family(data=images, network=convolution)
spoken = family(data=lambda: utterances(), network=mlp())


def pixels(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def flat_pixels(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).permute(0, 2, 3, 1).reshape(-1, C), batch[1].flatten())


# CTC ---------------------------------------------------------------------------------------------------------


def utterances() -> Any:
    """``(frames [F, D], label [L])`` of varying lengths, padded by the collate function."""
    generator, samples = numbers(), []
    for row in range(5 * BATCH):
        frames, length = 8 + row % 3, 2 + row % 2
        samples.append(
            (torch.randn(frames, D, generator=generator), torch.randint(1, C, (length,), generator=generator))
        )

    def collate(batch: list[Any]) -> Any:
        frames, labels = zip(*batch, strict=True)
        pad = nn.utils.rnn.pad_sequence
        lengths = [torch.tensor([len(one) for one in part]) for part in (frames, labels)]
        return pad(list(frames), batch_first=True), pad(list(labels), batch_first=True), *lengths

    return split(samples, collate=collate)


def ctc(model: Any, batch: Any) -> Tensor:
    frames, labels, frame_lengths, label_lengths = batch
    log_probabilities = model(frames).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probabilities, labels, frame_lengths, label_lengths)


def ctc_per_sequence(model: Any, batch: Any) -> Tensor:
    frames, labels, frame_lengths, label_lengths = batch
    log_probabilities = model(frames).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log_probabilities, labels, frame_lengths, label_lengths, reduction="none").mean()


# Masks of images -----------------------------------------------------------------------------------------------


def overlap(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    p = model(batch[0]).softmax(1)
    return p, F.one_hot(batch[1], C).movedim(-1, 1).to(p.dtype)


def dice(model: Any, batch: Any) -> Tensor:
    p, y = overlap(model, batch)
    return 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)


def dice_by_sample(model: Any, batch: Any) -> Tensor:
    p, y = (part.flatten(1) for part in overlap(model, batch))
    return (1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)).mean()


DENSE = cases(
    "images and speech",
    masks("pixels [B, C, H, W]", pixels),
    masks("pixels, channels last and flattened", flat_pixels),
    spoken("ctc_loss", ctc),
    spoken("ctc_loss, none and mean", ctc_per_sequence),
    masks("dice of the batch", dice, weighable=False, must_refuse=True),
    masks("dice of each sample", dice_by_sample),
)
