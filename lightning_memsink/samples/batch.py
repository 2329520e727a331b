"""The tensors of a batch and its number of samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor


def batch_size(batch: Any) -> int | None:
    """B: the first extent of the batch's first tensor (of its ``input_ids``, if it has them); None without one."""
    text = batch.get("input_ids") if isinstance(batch, Mapping) else None
    first = next(tensors_by_sample([text, batch]), None)
    return None if first is None else len(first)


def is_index_of(index: Tensor, batch: Any, size: int | None) -> bool:
    """Whether ``index`` holds one row for each sample, where ``size`` is the batch's `batch_size`.

    Any tensor of the batch may have as many rows: a batch of graphs begins with the nodes of all graphs, and only its
    targets have one row a graph.
    """
    return size in (None, len(index)) or any(len(tensor) == len(index) for tensor in tensors_by_sample(batch))


def tensors_by_sample(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch that have rows, so no scalars."""
    return (tensor for tensor in tensors_in(batch) if tensor.ndim)


def describe(thing: Any) -> str:
    """The type of a batch or a loader for messages: "a DataLoader over Rows"."""
    dataset = f" over {type(thing.dataset).__name__}" if isinstance(thing, torch.utils.data.DataLoader) else ""
    return f"a {type(thing).__name__}{dataset}"


def tensors_in(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, depth first, through mappings, sequences and dataclasses."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from tensors_in(part)
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from tensors_in(part)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from tensors_in(getattr(batch, field.name))
