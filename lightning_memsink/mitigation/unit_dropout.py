"""Dropout of chosen hidden units, drawn for each sample.

B  samples in a batch    T  positions of a sample    U  units of a hidden layer    k  units of it that may be dropped
"""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from lightning_memsink.attribution.hidden_layers import HiddenLayer
from lightning_memsink.attribution.token_owners import of_tokens


def dropout_mask(key: tuple[int, ...], samples: Tensor, units: Tensor, size: int, p: float) -> Tensor:
    """Bool ``[B, U]``: which units are dropped for which samples. No global generator is used.

    Args:
        key: numbers that identify the draw, such as seed, epoch, batch and layer.
        samples: bool ``[B]``, those that units may be dropped for. The draws of the others are made and not used, so
            that the draw of a sample does not depend on which others are chosen.
        units: ``[k]`` indices of those that may be dropped.
        size: U.
        p: probability in 0…1, independent for each sample and unit.
    """
    digest = blake2b(repr(key).encode(), digest_size=4).digest()  # torch's generator uses 32 bits of a seed
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    drawn = torch.rand(len(samples), len(units), generator=generator) < p
    dropped = torch.zeros(len(samples), size, dtype=torch.bool)
    dropped[:, units] = drawn & samples[:, None]
    return dropped


def zero_units(hidden: Tensor, dropped: Tensor, layer: HiddenLayer, owners: Tensor | None = None) -> Tensor:
    """A copy of ``hidden`` with zeros where ``dropped`` ``[B, U]`` is true, at all positions of a sample.

    ``owners`` are the samples of tokens, as `token_owners.at_tokens` gives them, where rows hold several.
    """
    if owners is not None:
        return hidden.masked_fill(of_tokens(dropped, owners, layer.unit_axis), 0)
    shape = [1] * hidden.ndim
    shape[layer.batch_axis], shape[layer.unit_axis] = dropped.shape
    return hidden.masked_fill(dropped.to(hidden.device, non_blocking=True).view(shape), 0)


def samples_in(hidden: Tensor, layer: HiddenLayer) -> int | None:
    """The size of the batch axis of ``hidden``; None if it has no such axis beside the units, or not U units."""
    is_shared = layer.unit_axis % hidden.ndim == layer.batch_axis % hidden.ndim
    return None if is_shared or hidden.shape[layer.unit_axis] != layer.units else hidden.shape[layer.batch_axis]
