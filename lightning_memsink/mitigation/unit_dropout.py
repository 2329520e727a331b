"""Switching chosen hidden units off at random, sample by sample.

B  samples in a batch    T  positions of a sample    U  units of a hidden layer    k  units of it that may be dropped
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from lightning_memsink.attribution.hidden_layers import HiddenLayer


def draw(key: tuple[int, ...], samples: Tensor, units: Tensor, size: int, p: float) -> Tensor:
    """Bool ``[B, U]``: which units are off for which samples. A function of its arguments: no global generator.

    Args:
        key: numbers that name the draw, such as seed, epoch, batch and layer.
        samples: bool ``[B]``, those that units may be dropped for. The others' draws are made, and not used: one
            sample's do not depend on which others are among them.
        units: ``[k]``, those that may be dropped.
        size: U.
        p: probability in 0…1 for each sample and unit by itself.
    """
    digest = blake2b(repr(key).encode(), digest_size=4).digest()  # torch's generator takes 32 bits of a seed
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    drawn = torch.rand(len(samples), len(units), generator=generator) < p
    off = torch.zeros(len(samples), size, dtype=torch.bool)
    off[:, units] = drawn & samples[:, None]
    return off


def switched_off(hidden: Tensor, off: Tensor, layer: HiddenLayer) -> Tensor:
    """``hidden`` with zeros where ``off`` ``[B, U]`` says, the same at all of a sample's positions; a new tensor."""
    shape = [1] * hidden.ndim
    shape[layer.batch_axis], shape[layer.unit_axis] = off.shape
    return hidden.masked_fill(off.to(hidden.device).view(shape), 0)


def rows_of(hidden: Tensor, layer: HiddenLayer) -> int | None:
    """How many samples ``hidden`` seems to hold; None if it has no axis of its own for them, or other units."""
    spare = layer.unit_axis % hidden.ndim == layer.batch_axis % hidden.ndim
    return None if spare or hidden.shape[layer.unit_axis] != layer.units else hidden.shape[layer.batch_axis]
