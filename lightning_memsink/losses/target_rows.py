"""Reads off the targets of a loss call whose its rows are.

A target that lies in a tensor of the batch, or equals one in an order that no other order could give, says it where the
way from the batch to the prediction can't be followed: in compiled code, say.

    B  samples in a batch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_memsink.losses.sample_rows import SampleRows


def rows_of_target(target: Tensor | None, leaves: Sequence[tuple[Tensor, Tensor]], batch_size: int) -> SampleRows | str:
    """The rows of a loss call by its target, or why they are unknown.

    Args:
        target: of any shape, as the call's losses.
        leaves: the batch's tensors with their owners, as `SampleRows` has them.
    """
    if batch_size == 1 and target is not None:
        return SampleRows(torch.zeros([1] * target.ndim, dtype=torch.int64))
    if target is None or not target.numel():
        return "its targets are not of the batch"
    for leaf, owners in leaves:
        found = _by_place(target, leaf, owners)
        if found is not None:
            return SampleRows(found)
    orders: list[Tensor] = []
    for leaf, owners in leaves:
        orders += [order for order in _by_value(target, leaf, owners) if not any(map(order.equal, orders))]
    if not orders:
        return "its targets are not those of the batch in an order that is known"
    if len(orders) > 1 or bool((target == target.reshape(-1)[0]).all()):
        return "its targets are the same in several orders"
    return SampleRows(orders[0].reshape(target.shape))


def place_of(target: Tensor | None, tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Number of the batch's tensor that ``target`` is a view of, and the offset in it; None for no view."""
    if target is None:
        return None
    storage = _storage(target)
    for number, tensor in enumerate(tensors):
        if _storage(tensor) == storage:
            return number, int(target.storage_offset() - tensor.storage_offset())
    return None


def _storage(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage().data_ptr(), tensor.dtype


def _by_place(target: Tensor, leaf: Tensor, owners: Tensor) -> Tensor | None:
    if _storage(leaf) != _storage(target) or not leaf.is_contiguous():
        return None
    offset = int(target.storage_offset() - leaf.storage_offset())
    last = offset + sum((extent - 1) * stride for extent, stride in zip(target.shape, target.stride(), strict=True))
    if offset < 0 or last >= leaf.numel():
        return None
    flat = owners.expand(leaf.shape).reshape(-1)
    return flat.as_strided(target.shape, target.stride(), offset)


def _by_value(target: Tensor, leaf: Tensor, owners: Tensor) -> Iterator[Tensor]:
    """Flat owners for each order of the leaf that gives the target."""
    flat = target.detach().reshape(-1)
    for values, own in _orders(leaf.detach(), owners.expand(leaf.shape)):
        if values.numel() == flat.numel() and torch.equal(values.reshape(-1).to(flat), flat):
            yield own.reshape(-1)


def _orders(leaf: Tensor, owners: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield leaf, owners
    if leaf.ndim < 2:
        return
    yield leaf.transpose(0, 1), owners.transpose(0, 1)
    if leaf.ndim == 2 and not leaf.is_floating_point():  # tokens to predict from those before them
        yield leaf[:, 1:], owners[:, 1:]
        yield pad(leaf[:, 1:], (0, 1), value=-100), torch.cat([owners[:, 1:], owners[:, -1:]], 1)
        yield leaf.T[1:], owners.T[1:]
