"""Which sample of the batch each element of its tensors belongs to.

B  samples in a batch
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_memsink.samples.batch import (
    BY_SAMPLE,
    are_samples,
    column_sizes,
    extent,
    is_graph,
    is_list,
    is_tensor_dict,
    parts_of,
    tensors_in,
)

Owners: TypeAlias = Tensor
"""int64 on the CPU, with as many axes as the tensor that it describes and extent 1 along those on which its samples do
not depend; the values are samples 0..B-1, or -1 for an element of no sample."""

Entry: TypeAlias = int | Owners | None
Axes: TypeAlias = Sequence[Any]
"""An `Entry` for each tensor of a batch, in the order of `tensors_in`: the axis of its samples, `whole` of a sample,
`UNPROVEN`; or its owners themselves, or None if they can't be known."""

UNPROVEN = -1


def whole(sample: int) -> int:
    """The entry of ``axes`` for a tensor that belongs to one sample as a whole."""
    return -2 - sample


def rows_of(batch: Any, size: int, axes: Axes | None = None, first_axis: bool = False) -> list[tuple[Tensor, Owners]]:
    """The tensors of a batch whose samples are known, each with the owners of its elements.

    A tensor with ``size`` rows has its samples along axis 0, unless another axis has that extent too. A list of
    ``size`` alike elements that can't be columns holds one sample each. Graphs say themselves which nodes and edges are
    whose, and a packed sequence which rows. Anything else is left out.

    Args:
        batch: anything that a data loader yields.
        size: B.
        axes: from the loader, which has compared samples with batches. They win over all of the above.
        first_axis: take axis 0 also where another has that extent; for what must not depend on the size of a batch.
    """
    tensors = list(tensors_in(batch))
    proven = iter(axes if axes is not None and len(axes) == len(tensors) else [UNPROVEN] * len(tensors))
    batched = any(tensor.ndim and extent(tensor) == size for tensor in _in_columns(batch))
    found = _owned(batch, _Reading(size, batched, first=first_axis), proven)
    return [(tensor, owners) for tensor, owners in found if owners is not None]


def along(axis: int, ndim: int, owners: Tensor) -> Owners:
    """Owners ``[N]`` of the places along one axis, as those of a tensor with ``ndim`` axes."""
    shape = [1] * ndim
    shape[axis] = len(owners)
    return owners.reshape(shape)


@dataclass(frozen=True)
class _Reading:
    """How the tensors below a node of the batch are read where nothing was proven."""

    size: int
    batched: bool  # whether the batch has tensors with a row for each sample
    sample: int | None = None  # to which all of it belongs
    first: bool = False  # whether the samples are along axis 0 for certain
    closed: bool = False  # whether it can be read in two ways, so not at all


def _owned(node: Any, reading: _Reading, proven: Iterator[Entry]) -> Iterator[tuple[Tensor, Owners | None]]:
    """Every tensor below ``node`` with its owners, None if unknown; takes one entry of ``proven`` for each."""
    if isinstance(node, Tensor):
        yield node, _owners(node, reading, next(proven))
    elif isinstance(node, PackedSequence):
        entry, *_ = [next(proven) for _ in tensors_in(node)]
        fits = len(node.batch_sizes) > 0 and int(node.batch_sizes[0]) == reading.size
        yield node.data, entry if isinstance(entry, Tensor) else _packed(node) if fits and not reading.closed else None
    elif is_graph(node):
        owners = None if reading.closed or reading.sample is not None else _GraphOwners(node, reading.size)
        for name, part in parts_of(node) or ():
            for tensor in tensors_in(part):
                entry = next(proven)
                by_graph = reading.sample is None and not isinstance(entry, Tensor)
                known = owners.of(name, tensor) if owners and tensor is part else None
                yield tensor, known if by_graph else _owners(tensor, reading, entry)
    else:
        for part, below in _below(node, reading):
            yield from _owned(part, below, proven)


def _below(node: Any, reading: _Reading) -> Iterator[tuple[Any, _Reading]]:
    """The parts of a container, and how each is read."""
    parts = parts_of(node) or []
    if reading.sample is not None or reading.closed:
        yield from ((part, reading) for _, part in parts)
    elif is_list(node):
        elements = [part for _, part in parts]
        columns = column_sizes(elements)
        of_tensors = all(isinstance(element, Tensor) for element in elements)
        may_be_columns = columns is None or reading.size in columns
        alike = len(elements) == reading.size and are_samples(elements)
        for n, element in parts:
            if not alike or (may_be_columns and reading.size == 1):
                yield element, reading
            elif may_be_columns or (of_tensors and reading.batched):
                yield element, replace(reading, closed=True)
            else:
                yield element, replace(reading, sample=n)
    else:
        of_all = is_tensor_dict(node) and len(node.batch_size) > 0 and node.batch_size[0] == reading.size
        by_name = BY_SAMPLE if isinstance(node, Mapping) else ()
        first = replace(reading, first=True)
        yield from ((part, first if of_all or name in by_name else reading) for name, part in parts)


def _owners(tensor: Tensor, reading: _Reading, entry: Entry) -> Owners | None:
    """Owners of one tensor, by what was proven of it at the loader, else by its place and shape."""
    if tensor.is_nested or entry is None:
        return None
    if isinstance(entry, Tensor):
        return entry if entry.ndim == tensor.ndim else None
    if entry < UNPROVEN and whole(entry) < reading.size:
        return torch.full([1] * tensor.ndim, whole(entry))
    if 0 <= entry < tensor.ndim and tensor.shape[entry] == reading.size:
        return along(entry, tensor.ndim, torch.arange(reading.size))
    if reading.sample is not None:
        return torch.full([1] * tensor.ndim, reading.sample)
    if reading.closed or not tensor.ndim or tensor.shape[0] != reading.size:
        return None
    if reading.size > 1 and not reading.first and reading.size in tensor.shape[1:]:
        return None
    return along(0, tensor.ndim, torch.arange(reading.size))


def _packed(packed: PackedSequence) -> Owners:
    """Owners of the rows of a packed sequence: at each time the longest ones come first, in sorted order."""
    rows = torch.cat([torch.arange(count) for count in packed.batch_sizes.tolist()])
    order = packed.sorted_indices
    return along(0, packed.data.ndim, rows if order is None else order.cpu()[rows])


class _GraphOwners:
    """Owners of the tensors of a graph of torch_geometric, or of several as one.

    A joined graph remembers in host memory where each one's part of a tensor begins. Only where it doesn't, its batch
    vector and edges are read, which waits for their device.
    """

    def __init__(self, graph: Any, size: int) -> None:
        self._graph = graph
        self._size = size
        slices = getattr(graph, "_slice_dict", None)
        self._slices = slices if isinstance(slices, dict) else {}

    @cached_property
    def _nodes(self) -> Tensor | None:
        """``[N]``: the sample of each node; -1 of those that a neighbour loader has put around its samples."""
        nodes = getattr(self._graph, "batch", None)
        if isinstance(nodes, Tensor):
            return nodes.cpu()
        owners = torch.arange(int(self._graph.num_nodes or 0))
        if self._is_neighbourhood:
            return torch.where(owners < self._size, owners, -1)
        return torch.zeros_like(owners) if self._size == 1 else None

    @cached_property
    def _edges(self) -> Tensor | None:
        """``[E]``: the sample of each edge's source."""
        edges = getattr(self._graph, "edge_index", None)
        if not isinstance(edges, Tensor) or edges.ndim != 2 or self._nodes is None or self._is_neighbourhood:
            return None
        return self._nodes[edges[0].cpu()]

    @property
    def _is_neighbourhood(self) -> bool:
        seeds, nodes = getattr(self._graph, "batch_size", None), getattr(self._graph, "batch", None)
        return nodes is None and seeds == self._size

    def of(self, name: Any, tensor: Tensor) -> Owners | None:
        """Of the tensor under a name; None where its extents fit several levels, or none."""
        if not tensor.ndim or tensor.is_nested or name == "ptr":
            return None
        axis = tensor.ndim - 1 if "index" in str(name) or name == "face" else 0
        places = tensor.shape[axis]
        counts = self._counts("x" if name == "batch" else name, places)
        if counts is not None:
            return along(axis, tensor.ndim, torch.arange(self._size).repeat_interleave(counts))
        if "edge" in str(name):
            edges = self._edges
            return along(axis, tensor.ndim, edges) if edges is not None and len(edges) == places else None
        nodes = self._nodes
        if nodes is not None and len(nodes) == places and (places != self._size or name == "batch" or self._size == 1):
            return along(axis, tensor.ndim, nodes)
        if places == self._size and (nodes is None or len(nodes) != places):
            return along(axis, tensor.ndim, torch.arange(self._size))
        return None

    def _counts(self, name: Any, places: int) -> Tensor | None:
        """``[B]``: how many places each graph has along the axis that they were joined on, if the graph remembers."""
        slices = self._slices.get(name)
        if not isinstance(slices, Tensor) or slices.shape != (self._size + 1,) or int(slices[-1]) != places:
            return None
        return slices.cpu().diff()


def _in_columns(node: Any) -> Iterator[Tensor]:
    """The tensors of a batch that are in no list which may be one of samples."""
    if isinstance(node, Tensor):
        yield node
        return
    parts = [part for _, part in parts_of(node) or ()]
    if not is_list(node) or not are_samples(parts):
        for part in parts:
            yield from _in_columns(part)
