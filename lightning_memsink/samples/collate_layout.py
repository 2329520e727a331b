"""Where the samples lie in the batches that a collate function makes, proven by comparing the two.

B  samples fetched for a batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import default_collate

from lightning_memsink.samples.batch import leaves, tensors_in
from lightning_memsink.samples.batch_rows import UNPROVEN, whole
from lightning_memsink.samples.sample_values import Path, holds, rank, start_of, values_of

FIRST, EVERY = 8, 4
"""First batches that are compared in full, and how often two rows of a later one are."""
_PATTERNS, _PATHS, _ENOUGH, _ROWS = 64, 12, 4, 16
_Values = dict[Path, Any]


class Layout(NamedTuple):
    """What is known of one batch."""

    axes: tuple[int, ...] | None = None
    """For each tensor, in the order of `tensors_in`, what `samples.batch_rows.rows_of` takes; None if nothing is."""
    order: tuple[int, ...] | None = None
    """Which of the fetched samples each row of the batch is; None if they are in the order in which they came."""
    is_lost: bool = False
    """Whether the samples were put into another order that can't be identified."""


@dataclass(frozen=True)
class _Column:
    """Tensors of a batch, and one reading of them as B rows: along an axis of one, or a tensor each."""

    tensors: tuple[int, ...]  # positions among the batch's tensors
    axis: int | None
    path: Path  # of the tensor, without the position in a list of samples

    def row(self, tensors: list[Tensor], n: int) -> Tensor:
        return tensors[self.tensors[n]] if self.axis is None else tensors[self.tensors[0]].select(self.axis, n)


class _Probe(NamedTuple):
    """A column that has been found to hold a value of the samples, in their order."""

    column: _Column
    path: Path
    at_end: bool


class _Known(NamedTuple):
    axes: tuple[int, ...]
    probe: _Probe | None


class CollateLayout:
    """Compares the samples that a collate function gets with the batch that it returns.

    torch's own stacks along the first axis. Of any other the first batches are compared, and those of another pattern
    of shapes; a later one now and then in two rows, and in full again if these differ. It reads both, changes neither
    and draws no random number.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self._seen = 0
        self._reorders = False
        self._known: dict[Any, _Known] = {}
        self._axis_of: dict[Path, set[int]] = {}

    def of(self, samples: Any, batch: Any, ids: Sequence[int] | None = None) -> Layout:
        """The layout of ``batch``, which was made of ``samples``; nothing is known if they can't be compared.

        ``ids`` of the samples, if they have any: the same sample twice may change places with itself.
        """
        if self.collate is default_collate:
            return Layout(tuple(0 if tensor.ndim else UNPROVEN for tensor in tensors_in(batch)))
        try:
            return self._compared(samples, batch, ids)
        except Exception:  # an odd sample must not end the training: nothing is claimed of it
            return Layout()

    def _compared(self, samples: Any, batch: Any, ids: Sequence[int] | None) -> Layout:
        if not isinstance(samples, (list, tuple)) or not samples:
            return Layout()
        if len(samples) == 1:
            return Layout(tuple(_axis_of_one(tensor, samples[0]) for tensor in tensors_in(batch)))
        self._seen += 1
        tree = list(leaves(batch))
        tensors = [tensor for _, tensor in tree]
        pattern = tuple((tensor.ndim, *_axes_with(tensor, len(samples))) for tensor in tensors)
        known = self._known.get(pattern)
        if known is not None and self._seen > FIRST and not self._reorders:
            rows = [(self._seen * step) % len(samples) for step in (2, 3)]
            is_due = known.probe is not None and self._seen % EVERY == 0
            some = {n: dict(values_of(samples[n])) for n in rows} if is_due else {}
            if known.probe is None or not is_due or _in_order(known.probe, tensors, some):
                return Layout(known.axes)
        layout, probe = self._examined(tree, samples, ids)
        self._reorders |= layout.order is not None or layout.is_lost
        if layout.axes is not None and not self._reorders:
            if len(self._known) >= _PATTERNS:
                self._known.clear()
            self._known[pattern] = _Known(layout.axes, probe)
        return layout

    def _examined(
        self, tree: list[tuple[Path, Tensor]], samples: Sequence[Any], ids: Sequence[int] | None
    ) -> tuple[Layout, _Probe | None]:
        tensors, values = [tensor for _, tensor in tree], [dict(values_of(sample)) for sample in samples]
        paths = [path for path in values[0] if all(path in other for other in values)]
        columns = list(_columns(tree, len(samples)))
        probes = [probe for column in columns if (probe := _found(column, paths, tensors, values)) is not None]
        order: tuple[int, ...] | None = None
        if not probes:
            orders = [_order(column, paths, tensors, values) for column in columns]
            if any(order is not None for order in orders):
                order = _joint([order for order in orders if order is not None], ids)
                if order is None:
                    return Layout(is_lost=True), None
                values = [values[n] for n in order]
                probes = [probe for column in columns if (probe := _found(column, paths, tensors, values)) is not None]
        axes = [UNPROVEN] * len(tree)
        for position in range(len(tree)):
            of_tensor = [probe.column for probe in probes if position in probe.column.tensors]
            if len(of_tensor) == 1:
                column = of_tensor[0]
                axes[position] = whole(column.tensors.index(position)) if column.axis is None else column.axis
        self._remember(tree, axes, len(samples))
        return Layout(tuple(axes), order), min(probes, key=lambda probe: _elements(probe, tensors), default=None)

    def _remember(self, tree: list[tuple[Path, Tensor]], axes: list[int], size: int) -> None:
        """Takes an axis that was proven in other batches, always the same, where this one doesn't show it."""
        for position, (path, tensor) in enumerate(tree):
            if axes[position] >= 0:
                self._axis_of.setdefault(path, set()).add(axes[position])
            elif axes[position] == UNPROVEN and len(self._axis_of.get(path, ())) == 1:
                (axis,) = self._axis_of[path]
                if axis < tensor.ndim and tensor.shape[axis] == size:
                    axes[position] = axis


def _axis_of_one(tensor: Tensor, sample: Any) -> int:
    """The axis along which a tensor has one row, which is a value of the only sample; the first of several."""
    # of one axis less: a value that is itself a batch, and is given on as it is, has no axis of samples
    values = [value for _, value in values_of(sample) if rank(value) == tensor.ndim - 1]
    for axis in _axes_with(tensor, 1):
        if any(holds(tensor.select(axis, 0), value, at_end) for value in values for at_end in (False, True)):
            return axis
    return UNPROVEN


def _columns(tree: list[tuple[Path, Tensor]], size: int) -> Iterator[_Column]:
    """Every reading of the batch's tensors as ``size`` rows."""
    lists: dict[tuple[Path, Path], list[tuple[int, int]]] = {}
    for position, (path, tensor) in enumerate(tree):
        for axis in _axes_with(tensor, size):
            yield _Column((position,), axis, path)
        for depth, name in enumerate(path):
            if type(name) is int:
                lists.setdefault((path[:depth], path[depth + 1 :]), []).append((name, position))
    for (before, after), members in lists.items():
        if [name for name, _ in members] == list(range(size)):
            yield _Column(tuple(position for _, position in members), None, (*before, *after))


def _found(column: _Column, paths: list[Path], tensors: list[Tensor], values: list[_Values]) -> _Probe | None:
    """The value of the samples that a column holds row by row, if it also tells some of them apart."""
    size = len(values)
    some = {n: values[n] for n in range(0, size, max(1, size // _ROWS))}
    for path in _likely(paths, column, tensors):
        for at_end in (False, True):
            probe = _Probe(column, path, at_end)
            if _in_order(probe, tensors, some):
                differs = (holds(column.row(tensors, n), values[n - 1][path], at_end) is False for n in some)
                return probe if any(differs) else None
    return None


def _in_order(probe: _Probe, tensors: list[Tensor], values: dict[int, _Values]) -> bool:
    """Whether rows of a batch hold the values of the samples in the same places."""
    some = False
    for n, value in values.items():
        same = holds(probe.column.row(tensors, n), value[probe.path], probe.at_end)
        if same is False:
            return False
        some |= same is True
    return some


def _order(column: _Column, paths: list[Path], tensors: list[Tensor], values: list[_Values]) -> list[set[int]] | None:
    """For each row of a column the samples that it may be, if each of them is another's; None if it isn't comparable.

    Integers of another name are one another's permutation by chance: `_likely` leaves them out.
    """
    rows = [column.row(tensors, n) for n in range(len(values))]
    for path in _likely(paths, column, tensors):
        for at_end in (False, True):
            may_be = _alike(rows, [value[path] for value in values], at_end)
            if all(may_be) and len(set().union(*may_be)) == len(rows) and any(len(some) < len(rows) for some in may_be):
                return may_be
    return None


def _alike(rows: list[Tensor], values: list[Any], at_end: bool) -> list[set[int]]:
    """For each row the samples whose value it holds. Those with other first numbers are not compared."""
    starts = [start_of(value, row.dtype, at_end) for value, row in zip(values, rows, strict=True)]
    row_starts = [start_of(row, row.dtype, at_end) for row in rows]
    common = min(map(len, starts + row_starts))
    by_start: dict[tuple[float, ...], list[int]] = {}
    for sample, start in enumerate(starts):
        by_start.setdefault(_cut(start, common, at_end), []).append(sample)
    found = []
    for row, start in zip(rows, row_starts, strict=True):
        some = by_start.get(_cut(start, common, at_end), [])
        found.append({n for n in some if holds(row, values[n], at_end) is not False})
    return found


def _cut(start: tuple[float, ...], count: int, at_end: bool) -> tuple[float, ...]:
    return start[len(start) - count :] if at_end else start[:count]


def _joint(orders: list[list[set[int]]], ids: Sequence[int] | None) -> tuple[int, ...] | None:
    """The one order that all columns allow, but for samples of one id; None if there are several or none."""
    common = [set.intersection(*rows) for rows in zip(*orders, strict=True)]
    order: list[int] = []
    for row in common:
        if len(row) > 1 and (ids is None or len({ids[n] for n in row}) > 1):
            return None
        free = sorted(row.difference(order))
        if not free:
            return None
        order.append(free[0])
    return tuple(order)


def _likely(paths: list[Path], column: _Column, tensors: list[Tensor]) -> Iterator[Path]:
    """Paths of samples that a column may have come from: those of its name first, others if it has numbers enough.

    A few integers are by chance what other integers are; a list of samples has no name.
    """
    same_name = [path for path in paths if path[-1:] == column.path[-1:]]
    yield from sorted(same_name, key=lambda path: path != column.path)
    if column.axis is None or column.row(tensors, 0).numel() >= _ENOUGH:
        yield from islice((path for path in paths if path not in same_name), _PATHS)


def _axes_with(tensor: Tensor, size: int) -> list[int]:
    return [] if tensor.is_nested else [axis for axis, extent in enumerate(tensor.shape) if extent == size]


def _elements(probe: _Probe, tensors: list[Tensor]) -> int:
    return tensors[probe.column.tensors[0]].numel()
