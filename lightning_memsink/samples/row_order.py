"""Whether the rows of a batch are still in the order in which its samples were fetched.

A hook between the loader and the step may shuffle a batch, or change it. A few elements of each row are kept and
compared with the batch that the step gets.

B  samples in a batch      K  elements kept of a row
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_memsink.samples.batch import tensors_in
from lightning_memsink.samples.batch_rows import Axes, rows_of

_TENSORS, _ELEMENTS, _OF_LIST = 6, 64, 16


class Order(NamedTuple):
    """What became of the rows: ``"kept"``, ``"moved"`` to the order in ``rows``, or ``"lost"``."""

    kind: Literal["kept", "moved", "lost"]
    rows: Tensor | None = None
    """``[B']`` int64: which of the fetched samples each row of the batch is."""


@dataclass(frozen=True)
class _Column:
    """Where a batch has one row for each sample: in a tensor, along an axis, or in as many tensors of a list."""

    positions: tuple[int, ...]
    axis: int | None
    shape: tuple[int, ...]  # without the axis
    kept: Tensor  # [B, K]

    def now(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """``[B', K]`` the same elements of a batch's tensors; None if none of them has the shape for it."""
        if self.axis is None:
            if self.positions[-1] >= len(tensors):
                return None
            return _of_list([tensors[position] for position in self.positions])
        own = [tensors[self.positions[0]]] if self.positions[0] < len(tensors) else []
        for tensor in (*own, *tensors):
            if tensor.ndim > self.axis and _without(tensor, self.axis) == self.shape:
                return elements_of(tensor, self.axis)
        return None


class SameTensors:
    """The tensors of a batch, by identity and by how often they were written to. It keeps none of them alive."""

    def __init__(self, batch: Any) -> None:
        self._tensors = [(weakref.ref(tensor), _version(tensor)) for tensor in tensors_in(batch)]

    def are_in(self, batch: Any) -> bool:
        """Whether a batch holds the very same tensors, which nothing has written to since."""
        now = list(tensors_in(batch))
        return len(now) == len(self._tensors) and all(
            known() is tensor and version is not None and version == _version(tensor)
            for tensor, (known, version) in zip(now, self._tensors, strict=True)
        )


class RowPrints:
    """A few elements of each row of a batch, as it leaves its loader."""

    def __init__(self, columns: list[_Column]) -> None:
        self._columns = columns

    @classmethod
    def of(cls, batch: Any, size: int, axes: Axes | None) -> RowPrints | None:
        """Of a batch in host memory; None if no tensor of it has rows of samples."""
        tensors = list(tensors_in(batch))
        place = {id(tensor): position for position, tensor in enumerate(tensors)}
        columns: list[_Column] = []
        of_sample: list[list[int]] = [[] for _ in range(size)]
        for tensor, owners in rows_of(batch, size, axes):
            axis = next((axis for axis, extent in enumerate(owners.shape) if extent > 1), None)
            if axis is None and size > 1 and id(tensor) in place:
                of_sample[int(owners.reshape(-1)[0])].append(place[id(tensor)])
            elif axis is not None and torch.equal(owners.reshape(-1), torch.arange(size)) and len(columns) < _TENSORS:
                kept = elements_of(tensor.detach(), axis).clone()
                columns.append(_Column((place[id(tensor)],), axis, _without(tensor, axis), kept))
        if size > 1 and len({len(positions) for positions in of_sample}) == 1:
            for positions in list(zip(*of_sample, strict=True))[:_TENSORS]:
                columns.append(_Column(positions, None, (), _of_list([tensors[position] for position in positions])))
        return cls(columns) if columns else None

    @torch.no_grad()
    def order_in(self, batch: Any, ids: Tensor) -> Order:
        """What became of the rows in ``batch``, whose samples were fetched with ``ids`` ``[B]``. Waits for its device.

        Rows that all differ prove an order by themselves. Rows that don't (labels, say) prove it if they are as they
        were and no others say something else. Of rows that were all changed, as augmentation does, each must be
        nearest to its own.
        """
        tensors = list(tensors_in(batch))
        rows = [(column.kept, now.cpu()) for column in self._columns if (now := column.now(tensors)) is not None]
        if len(rows) == len(self._columns) and all(_are_equal(kept, now) for kept, now in rows):
            return Order("kept")
        matches = [_Match.of(kept, now) for kept, now in rows]
        strong = [match for match in matches if match.may_be and match.is_distinct]
        weak = [match for match in matches if match.may_be and match.is_informative]
        found = strong or weak
        if found:
            if all(match.is_equal for match in found):
                return Order("kept")
            return _joint([match.may_be for match in found if match.may_be], ids)
        return Order("kept" if any(match.is_near for match in matches) else "lost")


class _Match(NamedTuple):
    """The rows of a column beside what was kept of them."""

    may_be: (
        list[set[int]] | None
    )  # for each row the fetched rows that it equals; None if there is one of which it is none
    is_equal: bool
    is_distinct: bool  # no two fetched rows are equal
    is_informative: bool  # some two are not
    is_near: bool  # rows were changed, and each is nearest to its own

    @staticmethod
    def of(kept: Tensor, now: Tensor) -> _Match:
        before = kept.to(now.dtype)
        rows = [tuple(map(str, row)) for row in before.tolist()]  # NaN is as NaN
        known: dict[tuple[str, ...], set[int]] = {}
        for n, row in enumerate(rows):
            known.setdefault(row, set()).add(n)
        current = [tuple(map(str, row)) for row in now.tolist()]
        is_equal = current == rows
        may_be = [known.get(row, set()) for row in current]
        complete = may_be if all(may_be) else None
        near = complete is None and len(current) == len(rows) and len(known) == len(rows)
        own = sum(n in some for n, some in enumerate(may_be))
        others = sum(bool(some) and n not in some for n, some in enumerate(may_be))
        is_near = near and ((own >= max(1, len(rows) // 8) and not others) or _is_nearest(before, now))
        return _Match(complete, is_equal, len(known) == len(rows), len(known) > 1, is_near)


def _are_equal(kept: Tensor, now: Tensor) -> bool:
    before = kept.to(now.dtype)
    return before.shape == now.shape and bool(((before == now) | ((before != before) & (now != now))).all())


def _is_nearest(before: Tensor, now: Tensor) -> bool:
    """Whether each row, in units of its columns' spread, is nearer to its own former self than to any other's."""
    first, second = before.double().nan_to_num(), now.double().nan_to_num()
    varies = (first.std(0) > 0) & (second.std(0) > 0)
    if len(first) < 3 or not bool(varies.any()):
        return False
    first, second = ((part - part.mean(0)) / part.std(0) for part in (first[:, varies], second[:, varies]))
    distance = torch.cdist(second, first)
    own = distance.diagonal().clone()
    others = distance.fill_diagonal_(torch.inf).amin(1)
    return bool((own < others).all()) and float(own.mean()) < 0.5 * float(others.mean())


def _joint(orders: list[list[set[int]]], ids: Tensor) -> Order:
    """The one order that all columns allow, but for samples of one id."""
    if len({len(order) for order in orders}) > 1:
        return Order("lost")
    rows: list[int] = []
    for may_be in zip(*orders, strict=True):
        some = sorted(set.intersection(*may_be))
        if not some or len({int(ids[n]) for n in some}) > 1:
            return Order("lost")
        rows.append(some[0])
    return Order("moved", torch.tensor(rows))


def elements_of(tensor: Tensor, axis: int) -> Tensor:
    """``[B, K]`` elements spread over each row."""
    rows = tensor.movedim(axis, 0)
    each = max(1, int(_ELEMENTS ** (1 / max(1, rows.ndim - 1))))
    cuts = tuple(slice(None, None, max(1, extent // each)) for extent in rows.shape[1:])
    part = rows[(slice(None), *cuts)]
    return part.flatten(1) if part.ndim > 1 else part[:, None]


def _of_list(tensors: list[Tensor]) -> Tensor:
    """``[B, K]`` float64: the shape of each tensor, and elements spread over it; 0 where it has fewer."""
    rows = torch.zeros(len(tensors), _OF_LIST + 4, dtype=torch.float64)
    for row, tensor in zip(rows, tensors, strict=True):
        flat = elements_of(tensor.detach()[None], 0)[0]
        flat = flat[:: max(1, len(flat) // _OF_LIST)][:_OF_LIST].double().cpu()
        row[: len(flat)] = flat
        row[_OF_LIST : _OF_LIST + min(4, tensor.ndim)] = torch.tensor(tensor.shape[:4]).double()
    return rows


def _without(tensor: Tensor, axis: int) -> tuple[int, ...]:
    return (*tensor.shape[:axis], *tensor.shape[axis + 1 :])


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None of an inference tensor, which doesn't count that."""
    return None if tensor.is_inference() else tensor._version
