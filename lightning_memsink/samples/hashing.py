"""Hashes: the ids of the content of samples, and mixers of 64-bit integers.

The mixers return the same numbers on every device and in every version: ids, sinks and n-gram counts depend on them.

B  samples in a batch      T  tokens of a sample      W  words of 64 bits (or, of text, tokens) hashed for a sample
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.samples.batch import batch_size, describe, describe_tensors
from lightning_memsink.samples.batch_rows import rows_of
from lightning_memsink.samples.tokens import Tokens, tokens_of

GOLDEN_64 = -0x61C8864680B583EB  # 2^64 / the golden ratio, as int64
GOLDEN_32 = 0x9E3779B1  # 2^32 / the golden ratio, as a prime


def content_ids(batch: Any, size: int | None = None, axes: Sequence[int] | None = None) -> Tensor:
    """``[B]`` int64: a hash of each sample, equal in every batch, process, memory layout and device.

    Of text, only the tokens that are not padding count, in their order: padding and labels don't. Of other batches the
    bits of every tensor with B rows count: equal values of another dtype hash differently, but -0.0 and 0.0 alike.

    Args:
        batch: anything that a data loader yields.
        size: B, if the loader knows it.
        axes: where the samples lie in each tensor, as `rows_of` takes them.

    Raises:
        ValueError: if B is unknown, or no tensor has a row for each sample.
    """
    tokens = tokens_of(batch, axes)
    if tokens is not None and size in (None, len(tokens.ids)):
        return text_ids(tokens)
    size = batch_size(batch, size, axes) if size is None else size
    rows = [] if size is None else rows_of(batch, size, axes, first_axis=True)
    if size is None or not rows:
        raise ValueError(
            f"content_ids needs a batch with tensors in it, one row a sample, but found {describe(batch)} with "
            f"{describe_tensors(batch)}."
        )
    ids = torch.zeros(size, dtype=torch.int64)
    for tensor, owners in rows:
        ids = _joined(ids, tensor.detach(), owners)
    return ids


def text_ids(tokens: Tokens) -> Tensor:
    """``[B]`` int64: a hash of the tokens of each text that are not padding, in their order."""
    ids, mask = tokens.ids, tokens.mask
    weights = _weights(ids.shape[1], ids.device)
    if not (mask.is_cpu and bool(mask.all())):  # without padding, half of the work
        ids, weights = ids * mask, weights[mask.cumsum(1) - 1]
    return splitmix64(_folded(ids, weights) + splitmix64(mask.sum(1)))


def _joined(ids: Tensor, tensor: Tensor, owners: Tensor) -> Tensor:
    """Hashes ``[B]`` that also depend on each sample's part of one tensor."""
    axis = next((axis for axis, extent in enumerate(owners.shape) if extent > 1), 0)
    by_row = tensor.movedim(axis, 0) if tensor.ndim else tensor[None]
    flat = owners.reshape(-1)
    if len(flat) == len(by_row) == len(ids) and torch.equal(flat, torch.arange(len(ids))):
        words = _words(by_row)
        folded = _folded(words, _weights(words.shape[1], words.device)) + words.shape[1]
        return splitmix64(ids.to(words.device) * 3 + folded)
    ids = ids.clone()
    for sample in flat.unique().tolist():
        if sample < 0:
            continue
        words = _words((by_row if len(flat) == 1 else by_row[(flat == sample).to(by_row.device)]).reshape(1, -1))
        folded = _folded(words, _weights(words.shape[1], words.device)) + words.shape[1]
        ids[sample] = splitmix64(ids[sample, None].to(words.device) * 3 + folded)[0]
    return ids


def _words(tensor: Tensor) -> Tensor:
    """``[B, W]`` int64: the bits of each row, eight bytes a word where they come out even."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    rows = (real.flatten(1) if real.ndim > 1 else real[:, None]) + 0  # turns -0.0 into 0.0
    whole = rows.shape[1] * rows.element_size() % 8 == 0
    sized = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    return rows.contiguous().view(torch.int64 if whole else sized).long()


def _folded(words: Tensor, weights: Tensor) -> Tensor:
    """``[B]``: the sum over ``[B, W]`` words times odd weights, where high bits are folded into low ones."""
    product = (words ^ (words >> 32)).mul_(weights)
    return product.bitwise_xor_(product >> 32).sum(1)


@lru_cache(maxsize=8)
def _weights(count: int, device: torch.device) -> Tensor:
    """``[count]`` odd weights."""
    return splitmix64(torch.arange(1, count + 1, device=device) * GOLDEN_64) | 1


def splitmix64(number: Tensor) -> Tensor:
    """The finalizer of splitmix64, in int64 that wraps; https://doi.org/10.1145/2660193.2660195 (Mix13)."""
    number = (number ^ logical_shift(number, 30)) * -0x40A7B892E31B1A47
    number = (number ^ logical_shift(number, 27)) * -0x6B2FB644ECCEEE15
    return number ^ logical_shift(number, 31)


def logical_shift(number: Tensor, bits: int) -> Tensor:
    """``number >> bits`` that fills with zeros; torch's shift repeats the sign."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)


def mix_(number: Tensor) -> Tensor:
    """Mixes the bits of int64s in place: two rounds of xor-shift and wrapping multiplication by odd numbers."""
    number ^= number >> 32
    number *= -0x40A7B892E31B1A47
    number ^= number >> 29
    number *= -0x6B2FB644ECCEEE15
    return number


def pair_hash(first: Tensor, second: Tensor) -> Tensor:
    """Int64 hashes of pairs of token ids, of any same shape. Low bits are well mixed for tables of up to 2^32 rows."""
    pair = first * GOLDEN_32 + second * 0x85EBCA77
    return pair ^ (pair >> 15)


def run_hash(tokens: Tensor, length: int) -> Tensor:
    """``[B, T - length + 1]`` int64 hashes of all runs of ``length`` tokens of ``[B, T]``; ``[B, 0]`` if T is less."""
    runs = max(0, tokens.shape[1] - length + 1)
    key = torch.zeros_like(tokens[:, :runs])
    for place in range(length):
        key.mul_(GOLDEN_32).add_(tokens[:, place : place + runs]).add_(1)
        key ^= key >> 17
    return key
