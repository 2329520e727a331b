"""The tensors of a batch and its number of samples.

A batch is a nest of mappings, sequences, dataclasses and containers of libraries that are recognized by what they have,
not by their class: graphs (`num_graphs`), TensorDicts (`batch_size`), packed sequences.

B  samples in a batch
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

BY_SAMPLE = ("input_ids", "attention_mask", "token_type_ids", "labels")
"""Names of a mapping whose tensors of two axes are ``[B, T]`` by convention of every tokenizer and model library."""
_PLAIN = {int, float, bool, complex, str, bytes, type(None)}


def batch_size(batch: Any, rows: int | None = None, axes: Sequence[int] | None = None) -> int | None:
    """B, the number of samples of a batch, where the batch shows it; None where it can be read in several ways.

    A tensor with rows says its first extent; a list says its length if its elements are alike, as samples are, and what
    its elements say if they agree, as ``[x, y]`` does. All tensors together must leave one number.

    Args:
        batch: anything that a data loader yields.
        rows: how many samples the loader fetched. It is the answer wherever a part of the batch agrees with it.
        axes: where the samples lie in each tensor, proven at the loader (`samples.collate_layout`).
    """
    if rows is not None and (_shows(batch, rows) or _is_proven(batch, rows, axes)):
        return rows
    by_tensors, by_others = _readings(batch)
    if by_tensors is None:
        return _only(by_others)
    if len(by_tensors) > 1 and by_others:
        by_tensors &= by_others
    return _only(by_tensors)


def is_index_of(index: Tensor, batch: Any, size: int | None, axes: Sequence[int] | None = None) -> bool:
    """Whether ``index`` can hold one row for each sample of a batch, where ``size`` is its `batch_size`.

    Any part of the batch may have as many rows: a batch of graphs begins with the nodes of all graphs, and only its
    targets have one row a graph. A batch that shows no number at all doesn't contradict.
    """
    rows = len(index)
    if size == rows or _shows(batch, rows) or _is_proven(batch, rows, axes):
        return True
    return size is None and _readings(batch) == (None, None)


def is_surely_batched(batch: Any) -> bool:
    """Whether a batch shows by itself that it is one, and not a single sample without a sample axis.

    It has tensors of different ranks with as many rows, as images ``[B, C, H, W]`` and labels ``[B]`` are, and no bare
    numbers or words beside them.
    """
    by_tensors, _ = _readings(batch)
    ranks = {tensor.ndim for tensor in tensors_by_sample(batch)}
    bare = any(type(part) in _PLAIN and part is not None for _, part in parts_of(batch) or ())
    return by_tensors is not None and len(by_tensors) == 1 and len(ranks) > 1 and not bare


def tensors_by_sample(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch that have rows, so no scalars."""
    return (tensor for tensor in tensors_in(batch) if tensor.ndim)


def describe(thing: Any) -> str:
    """The type of a batch or a loader for messages: "a DataLoader over Rows"."""
    dataset = f" over {type(thing.dataset).__name__}" if isinstance(thing, torch.utils.data.DataLoader) else ""
    return f"a {type(thing).__name__}{dataset}"


def describe_tensors(batch: Any, most: int = 4) -> str:
    """The shapes of a batch's first tensors for messages: "x [4, 3], y [5]"."""
    shapes = [f"{'.'.join(map(str, path)) or 'a tensor'} {_shape(tensor)}" for path, tensor in leaves(batch)]
    return (", ".join(shapes[:most]) + (", ..." if len(shapes) > most else "")) or "no tensors"


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, depth first, through mappings, sequences, dataclasses, graphs and TensorDicts."""
    if isinstance(batch, Tensor):
        yield batch
        return
    parts: Iterable[Any]
    if type(batch) is dict:
        parts = batch.values()
    elif type(batch) in (list, tuple):
        parts = () if _is_plain(batch) else batch
    else:
        parts = (part for _, part in parts_of(batch) or ())
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        else:
            yield from tensors_in(part)


def is_on_host(batch: Any) -> bool:
    """Whether all tensors of a batch are in host memory, where reading them waits for nothing."""
    return all(tensor.is_cpu for tensor in tensors_in(batch))


def leaves(batch: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """The tensors of `tensors_in`, each with the keys, positions and names of attributes that lead to it."""
    if isinstance(batch, Tensor):
        yield path, batch
        return
    for name, part in parts_of(batch) or ():
        yield from leaves(part, (*path, name))


def parts_of(node: Any) -> list[tuple[Any, Any]] | None:
    """Names and values of what a container holds; None for anything else."""
    if isinstance(node, (Tensor, str, bytes)) or _is_plain(node):
        return None
    if isinstance(node, Mapping):
        return list(node.items())
    if is_named_tuple(node):
        return list(zip(node._fields, node, strict=True))
    if isinstance(node, (list, tuple)):
        return list(enumerate(node))
    if is_graph(node):
        return list(node.to_dict().items())
    if is_tensor_dict(node):
        return list(node.items())
    if is_dataclass(node) and not isinstance(node, type):
        return [(field.name, getattr(node, field.name)) for field in fields(node)]
    return None


def is_named_tuple(node: Any) -> bool:
    """Whether its elements have names: it is columns, never a list of samples."""
    return isinstance(node, tuple) and hasattr(node, "_fields")


def is_list(node: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    """Whether its elements have no names, so that they may be samples or columns."""
    return isinstance(node, (list, tuple)) and not is_named_tuple(node)


def is_graph(node: Any) -> bool:
    """Whether it is a graph, or several as one, of torch_geometric."""
    return hasattr(type(node), "num_nodes") and callable(getattr(type(node), "to_dict", None))


def is_tensor_dict(node: Any) -> bool:
    """Whether it is a TensorDict or a tensorclass: tensors with common leading extents."""
    return isinstance(getattr(node, "batch_size", None), torch.Size) and callable(getattr(node, "items", None))


def graphs_in(node: Any) -> int:
    """Number of samples in a graph of torch_geometric: graphs, or the nodes that a neighbour loader was asked for."""
    seeds = getattr(node, "batch_size", None)
    count = getattr(node, "num_graphs", None)
    return next((each for each in (count, seeds) if isinstance(each, int) and not isinstance(each, bool)), 1)


def extent(tensor: Tensor) -> int:
    """The first extent of a tensor with rows; a nested tensor has no shape, but a number of rows."""
    return int(tensor.size(0))


def are_samples(elements: Sequence[Any]) -> bool:
    """Whether the elements of a list are alike as samples of one data set are: the same keys, ranks and dtypes."""
    kinds = [_kind(element) for element in elements]
    return bool(kinds) and all(kind == kinds[0] for kind in kinds)


def column_sizes(elements: Iterable[Any]) -> frozenset[int] | None:
    """The numbers of samples on which columns agree; empty if they contradict, None if none of them says any."""
    said = [sizes for sizes, _ in map(_readings, elements) if sizes is not None]
    return frozenset.intersection(*said) if said else None


def _readings(node: Any) -> tuple[frozenset[int] | None, frozenset[int] | None]:
    """The numbers of samples that the tensors of a node allow, and those that its lists of other things do.

    None where there are none of the kind; empty where they contradict each other.
    """
    if isinstance(node, Tensor):
        return (frozenset({extent(node)}) if node.ndim else None), None
    if isinstance(node, PackedSequence):
        return frozenset({int(node.batch_sizes[0]) if len(node.batch_sizes) else 0}), None
    if is_graph(node):
        return frozenset({graphs_in(node)}), None
    if is_tensor_dict(node) and len(node.batch_size):
        return frozenset({node.batch_size[0]}), None
    if _is_plain(node):
        return None, _union(None, len(node), len(set(map(type, node))) < 2)
    named = parts_of(node)
    if named is None:
        return None, None
    parts = [part for _, part in named]
    columns = column_sizes(parts)
    others = [sizes for _, sizes in map(_readings, parts) if sizes]
    beside = frozenset.intersection(*others) if others else None
    if isinstance(node, Mapping):
        return _with_text(node, columns), beside
    if not is_list(node):
        return columns, beside
    if not any(True for _ in tensors_in(node)):
        return None, _union(beside, len(parts), are_samples(parts))
    if all(is_graph(part) and graphs_in(part) == 1 for part in parts):
        columns = None  # a graph is a sample, and no column of them
    return (columns if _is_text(parts, columns) else _union(columns, len(parts), are_samples(parts))), beside


def _with_text(batch: Mapping[Any, Any], columns: frozenset[int] | None) -> frozenset[int] | None:
    """The readings of a mapping: ``input_ids`` ``[B, T]`` decide where others contradict, and ``[T]`` are no batch."""
    text = batch.get("input_ids")
    if not isinstance(text, Tensor) or text.is_nested:
        return columns
    if text.ndim < 2:
        return frozenset()
    return columns or frozenset({len(text)})


def _is_text(parts: list[Any], columns: frozenset[int] | None) -> bool:
    """Whether a list is of columns because a ``[B, T]`` tensor of tokens comes first, and all have as many rows."""
    first = parts[0]
    if not isinstance(first, Tensor) or first.ndim != 2 or not columns or len(parts) < 2:
        return False
    return not (first.is_floating_point() or first.is_complex() or first.dtype == torch.bool)


def _shows(node: Any, rows: int) -> bool:
    """Whether a part of a batch can be read as that many samples."""
    closed = is_graph(node) or isinstance(node, (Tensor, PackedSequence))
    if not closed and any(_shows(part, rows) for _, part in parts_of(node) or ()):
        return True
    by_tensors, by_others = _readings(node)
    return rows in (by_tensors or ()) or (by_tensors is None and rows in (by_others or ()))


def _is_proven(batch: Any, rows: int, axes: Sequence[int] | None) -> bool:
    """Whether a tensor of the batch has that many samples along the axis that was proven at the loader."""
    tensors = list(tensors_in(batch)) if axes else []
    if not axes or len(tensors) != len(axes):
        return False
    pairs = zip(tensors, axes, strict=True)
    return any(0 <= axis < tensor.ndim and tensor.size(axis) == rows for tensor, axis in pairs)


def _is_plain(node: Any) -> bool:
    """Whether it is a list of numbers and words alone: token ids of a sample may be many, and hold no tensor."""
    return is_list(node) and set(map(type, node)) <= _PLAIN


def _only(sizes: frozenset[int] | None) -> int | None:
    return next(iter(sizes)) if sizes is not None and len(sizes) == 1 else None


def _union(sizes: frozenset[int] | None, size: int, counts: bool) -> frozenset[int] | None:
    return (sizes or frozenset()) | {size} if counts else sizes


def _kind(element: Any) -> Any:
    """What is alike in all samples of a data set: not their extents, and not the lengths of their lists."""
    if isinstance(element, Tensor):
        return "tensor", element.ndim, element.dtype
    if isinstance(element, Mapping):
        return "mapping", tuple((name, _kind(part)) for name, part in element.items())
    if isinstance(element, tuple):
        return "tuple", tuple(map(_kind, element))
    if isinstance(element, list):
        return "list", frozenset(map(type, element)) if _is_plain(element) else frozenset(map(_kind, element))
    return type(element)


def _shape(tensor: Tensor) -> str:
    return "nested" if tensor.is_nested else str(list(tensor.shape))
