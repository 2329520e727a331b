"""Ghost norms: each sample's squared gradient norm from a layer's input and the gradient at its output.

A layer's gradient for one sample is a sum over positions. Where that sum is an outer product, its norm needs no
gradient: ``|sum_t b_t a_t'|^2 = sum_tu (a_t . a_u)(b_t . b_u)`` (Goodfellow 2015, arXiv 1510.01799; for sequences
Li et al. 2022, arXiv 2110.05679, section 4, "ghost clipping"). A parameter that is used several times has several
contributions, and the norm is that of their sum.

    B  samples    T  positions of a sample    I, O  inputs and outputs of a layer    V  rows of an embedding
    P  elements of a parameter
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

MAX_ELEMENTS = 2**24
"""Elements of per-sample gradients in memory at once."""
CACHE_ELEMENTS = 2**19
"""Elements of patches to copy at once."""
WRITE_COST = 8
"""Cost of writing and reading back an element, in multiply-adds."""


@dataclass(frozen=True)
class Convolution:
    """Geometry of a Conv1d, Conv2d or Conv3d over an input that is padded already."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def patches(self, padded: Tensor) -> Tensor:
        """``[B, C, *kernel, *positions]`` of ``padded`` ``[B, C, *sizes]``: a view."""
        for axis, (kernel, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            padded = padded.unfold(2 + axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        axes = len(self.kernel)
        return padded.permute(0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))


@dataclass(frozen=True)
class Dense:
    """``gradient`` is ``[B, P]``."""

    gradient: Tensor


@dataclass(frozen=True)
class Outer:
    """The gradient of a ``[O, I]`` matrix: ``left`` ``[B, T, O]`` times ``right`` ``[B, T, I]``, over positions."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class EmbeddingRows:
    """The gradient of a ``[V, I]`` table: ``gradients`` ``[B, T, I]`` added to the rows of ``ids`` ``[B, T]``."""

    ids: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Tied:
    """An `Outer` that is paired with one `EmbeddingRows` of known ids, without its large ``left``: its squared ``norm``
    ``[B]``, the part of ``left`` that the table's rows need, ``picked`` ``[B, S, T]``, and ``right`` ``[B, S, I]``."""

    norm: Tensor
    picked: Tensor
    right: Tensor


@dataclass(frozen=True)
class Convolved:
    """The gradient of a convolution's weight."""

    padded: Tensor
    """``[B, C, *sizes]`` input."""
    gradient: Tensor
    """``[B, O, *sizes]`` at the output."""
    weight: Tensor
    """``[O, C / groups, *kernel]``; only its shape counts."""
    geometry: Convolution


Contribution = Dense | Outer | EmbeddingRows | Tied | Convolved


def squared_norm(parts: Sequence[Contribution], shape: torch.Size) -> Tensor:
    """``[B]``, of the sum of ``parts``, which are contributions to one parameter of this ``shape``.

    Raises:
        ValueError: a `Tied` is among other parts than its `EmbeddingRows`.
    """
    match parts:
        case [Dense(gradient)]:
            return _square(gradient)
        case [Convolved(padded, gradient, weight, geometry)]:
            return convolution_weight_squared_norm(padded, gradient, weight, geometry)
        case [Tied(norm)]:
            return norm
        case [Tied(norm, picked, right), EmbeddingRows(ids, gradients)]:
            return norm + rows_squared_norm(ids, gradients) + 2 * _dot_(torch.bmm(right, gradients.mT), picked)
    if all(isinstance(part, Outer) for part in parts):
        return outer_squared_norm(*_joined([(part.left, part.right) for part in parts if isinstance(part, Outer)]))
    if all(isinstance(part, EmbeddingRows) for part in parts):
        return rows_squared_norm(
            *_joined([(part.ids, part.gradients) for part in parts if isinstance(part, EmbeddingRows)])
        )
    return _square(torch.stack([dense(part, shape) for part in parts]).sum(0))


def _joined(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Several calls as one call with more positions."""
    if len(pairs) == 1:
        return pairs[0]
    ones, others = zip(*pairs, strict=True)
    return torch.cat(ones, 1), torch.cat(others, 1)


def samples_of(part: Contribution) -> int:
    """B."""
    match part:
        case Dense(gradient) | Convolved(_, gradient) | EmbeddingRows(_, gradient):
            return len(gradient)
        case Outer(left):
            return len(left)
        case Tied(norm):
            return len(norm)


def tie(outer: Outer, ids: Tensor) -> Tied:
    """``outer`` of an output layer whose table is also read at ``ids`` ``[B, T]``, without its large ``left``."""
    picked = outer.left.gather(2, ids[:, None, :].expand(-1, outer.left.shape[1], -1))
    return Tied(outer_squared_norm(outer.left, outer.right), picked, outer.right)


def dense(part: Contribution, shape: torch.Size) -> Tensor:
    """``[B, P]`` gradient of ``part``, as a dense tensor."""
    match part:
        case Dense(gradient):
            return gradient
        case Outer(left, right):
            return (left.mT @ right).flatten(1)
        case EmbeddingRows(ids, gradients):
            table = gradients.new_zeros(len(ids), *shape)
            return table.scatter_add_(1, ids[..., None].expand_as(gradients), gradients).flatten(1)
        case Convolved(padded, gradient, weight, geometry):
            return convolution_weight_gradient(padded, gradient, weight, geometry)
        case Tied():
            raise ValueError("A tied matrix without its output gradient has no gradient that could be written out.")


def outer_squared_norm(left: Tensor, right: Tensor) -> Tensor:
    """``[B]`` of ``left`` ``[B, T, O]`` times ``right`` ``[B, T, I]`` over positions, in the cheaper form."""
    positions = left.shape[1]
    if positions == 1:
        return _square(left[:, 0]) * _square(right[:, 0])
    if gram_is_cheaper(positions, left.shape[2], right.shape[2]):
        return _dot_(gram(left), gram(right))
    return _dense_squared_norm(left, right)


def gram_is_cheaper(positions: int, outputs: int, inputs: int) -> bool:
    """True if inner products between positions cost less than the gradient itself."""
    return positions**2 * (outputs + inputs) < outputs * inputs * (positions + WRITE_COST)


def gram(vectors: Tensor) -> Tensor:
    """``[B, T, T]`` inner products between the positions of ``[B, T, U]``."""
    return torch.bmm(vectors, vectors.mT)


def _dense_squared_norm(left: Tensor, right: Tensor) -> Tensor:
    chunk = max(1, MAX_ELEMENTS // (left.shape[2] * right.shape[2]))
    pieces = zip(torch.split(left, chunk), torch.split(right, chunk), strict=True)
    return torch.cat([_square(torch.bmm(one.mT, other).flatten(1)) for one, other in pieces])


def rows_squared_norm(ids: Tensor, gradients: Tensor) -> Tensor:
    """``[B]`` of ``gradients`` ``[B, T, I]`` added to the rows that ``ids`` ``[B, T]`` name."""
    batch, positions = ids.shape
    if positions == 1:
        return _square(gradients[:, 0])
    if (ids[:, 1:] > ids[:, :-1]).all():  # every row once, as where positions are looked up
        return _square(gradients.flatten(1))
    if positions <= gradients.shape[2]:
        return _dot_(gram(gradients), (ids[:, :, None] == ids[:, None, :]).to(gradients.dtype))
    span = int(ids.max()) + 1
    own = ids + span * torch.arange(batch, device=ids.device)[:, None]
    rows, place = torch.unique(own, return_inverse=True)
    sums = gradients.new_zeros(len(rows), gradients.shape[2]).index_add_(0, place.flatten(), gradients.flatten(0, 1))
    return gradients.new_zeros(batch).index_add_(0, rows // span, _square(sums))


def convolution_weight_squared_norm(padded: Tensor, gradient: Tensor, weight: Tensor, geometry: Convolution) -> Tensor:
    """``[B]`` of a convolution's weight.

    Args:
        padded: ``[B, C, *sizes]`` input, padded.
        gradient: ``[B, O, *sizes]`` at the output.
        weight: ``[O, C / groups, *kernel]``; only its shape counts.
    """
    if geometry.groups > 1:
        return torch.stack(
            [_square(each.flatten()) for each in _convolution_gradients(padded, gradient, weight, geometry)]
        )
    outputs, patches, inputs = gradient.flatten(2), geometry.patches(padded), weight[0].numel()
    if _pixel_gram_is_cheaper(padded, gradient, inputs):
        return _dot_(patch_gram(padded, gradient.shape[2:], geometry), gram(outputs.mT))
    # The patches of a few samples fit the cache; those of all would copy the input for each tap of the kernel.
    buffer = padded.new_empty(max(1, CACHE_ELEMENTS // max(1, inputs * outputs.shape[2])), inputs, outputs.shape[2])
    norms = []
    for patch, output in zip(patches.split(len(buffer)), outputs.split(len(buffer)), strict=True):
        own = buffer[: len(patch)]
        own.view(patch.shape).copy_(patch)
        norms.append(outer_squared_norm(output.mT, own.mT))
    return torch.cat(norms)


def _pixel_gram_is_cheaper(padded: Tensor, gradient: Tensor, inputs: int) -> bool:
    """True if `patch_gram` costs less than copied patches: where a map is small and has many channels."""
    pixels, positions, outputs = padded[0, 0].numel(), gradient[0, 0].numel(), gradient.shape[1]
    own = pixels**2 * padded.shape[1] + positions**2 * (outputs + inputs // padded.shape[1] * WRITE_COST)
    small = gram_is_cheaper(positions, outputs, inputs)
    return own < (positions**2 * (outputs + inputs) if small else outputs * inputs * positions)


def patch_gram(padded: Tensor, positions: Sequence[int], geometry: Convolution) -> Tensor:
    """``[B, P, P]`` inner products between the patches of ``padded`` ``[B, C, *sizes]`` at P ``positions``.

    A product of patches is a sum over the kernel of products of pixels, and each pair of these is needed many times.
    """
    pixels = gram(padded.flatten(2).mT).view(len(padded), *padded.shape[2:] * 2)
    total: Tensor | None = None
    for tap in product(*map(range, geometry.kernel)):
        axes = zip(tap, geometry.dilation, geometry.stride, positions, strict=True)
        covered = [slice(at * d, at * d + stride * (count - 1) + 1, stride) for at, d, stride, count in axes]
        part = pixels[(slice(None), *covered, *covered)]
        total = part.clone(memory_format=torch.contiguous_format) if total is None else total.add_(part)
    assert total is not None
    return total.view(len(padded), math.prod(positions), -1)


def convolution_weight_gradient(padded: Tensor, gradient: Tensor, weight: Tensor, geometry: Convolution) -> Tensor:
    """``[B, P]``; see `convolution_weight_squared_norm`."""
    return torch.stack([each.flatten() for each in _convolution_gradients(padded, gradient, weight, geometry)])


def _convolution_gradients(padded: Tensor, gradient: Tensor, weight: Tensor, geometry: Convolution) -> list[Tensor]:
    """The weight's gradient of each sample, by one call each."""
    zeros = [0] * len(geometry.kernel)
    rest: tuple[Any, ...] = (weight, None, geometry.stride, zeros, geometry.dilation, False, zeros, geometry.groups)
    backward = torch.ops.aten.convolution_backward
    return [
        backward(one, other, *rest, [False, True, False])[1]
        for one, other in zip(torch.split(gradient, 1), torch.split(padded, 1), strict=True)
    ]


def _square(vectors: Tensor) -> Tensor:
    """Squared lengths along the last axis; no product as large as ``vectors`` is made on the way."""
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return norm.square()


def _dot_(one: Tensor, other: Tensor) -> Tensor:
    """``[B]`` inner products of ``[B, S, T]`` tensors. ``one`` is overwritten: an allocation costs more than sums."""
    return one.mul_(other).flatten(1).sum(1)
