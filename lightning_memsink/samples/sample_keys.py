"""Keys that samples are known by: as 64-bit ids, and which of them can't be ids.

B  samples in a batch
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]+")


def key_ids(keys: Iterable[Any]) -> array[int]:
    """Keys as signed 64-bit numbers: an integer is its own id, any other key is hashed by its repr."""
    try:
        return array("q", keys)
    except (TypeError, OverflowError):
        return array("q", [_key_id(key) for key in keys])


def named_keys(ids: Iterable[int], keys: Iterable[Any]) -> dict[int, Any]:
    """The keys that are no signed 64-bit integers, by their ids."""
    return {id: key for id, key in zip(ids, keys, strict=True) if not _is_own_id(key)}


def plain_keys(value: Any) -> list[Any] | str:
    """The keys under a batch's own name as Python's objects, one a sample; else a message that says what was found.

    Integers of more than 63 bits stay what they are, and what `torch.utils.data.default_collate` makes of tuples, a
    list of columns, is put together again by `joined_columns`.
    """
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            return f"{value.dtype}. Return them as torch.int64"
        return list(value.detach().reshape(-1).cpu().tolist())
    if isinstance(value, (str, bytes)):
        return f"one {type(value).__name__}, {_short(value)}. Return a list with one for each sample"
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        return f"a {type(value).__name__}. Return a list with one for each sample"
    if isinstance(value, (set, frozenset)):
        return f"a {type(value).__name__}, which has no order. Return a list with one for each sample"
    keys = value.tolist() if hasattr(value, "tolist") else list(value)
    keys = [key.item() if isinstance(key, Tensor) and not key.ndim else key for key in keys]
    refusal = refusal_of(keys)
    return f"{refusal}. Return integers or strings that stay the same in every run" if refusal else keys


def without_rows(value: Any) -> Any:
    """Of lists with one thing each, these things: what is given by row, where each row has a single document."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(part, list) and len(part) == 1 for part in value):
        return [thing for (thing,) in value]
    return value


def joined_columns(value: Any, size: int | None, certain: bool = False) -> list[tuple[Any, ...]] | None:
    """The tuples of B samples that `default_collate` has made columns of; None if ``value`` is no list of columns.

    ``certain``: earlier batches had columns.

    Raises:
        ValueError: if it may be both, a list of samples' tuples and a list of columns.
    """
    if not isinstance(value, (list, tuple)) or not value:
        return None
    lengths = {len(part) if _is_column(part) else -1 for part in value}
    if len(lengths) > 1 or -1 in lengths:
        return None
    (length,) = lengths
    certain = certain or any(isinstance(part, Tensor) for part in value)
    if size is not None and length != size:
        return None
    if not certain and (size is None or len(value) == size):
        if size is not None and size > 1:
            raise ValueError(f"{_short(value)}, which may be {size} tuples or columns of tuples")
        return None
    columns = [part.tolist() if isinstance(part, Tensor) else part for part in value]
    return list(zip(*columns, strict=True))


def refusal_of(keys: Iterable[Any]) -> str:
    """The first key that can't be an id, and why; empty if all can."""
    for key in keys:
        if key is None:
            return "None"
        if isinstance(key, bool) or type(key).__name__ in ("bool_", "bool"):
            return f"{key}, a bool"
        if isinstance(key, float) or isinstance(getattr(key, "dtype", None), torch.dtype):
            return "nan" if isinstance(key, float) and math.isnan(key) else f"{_short(key)}, a {type(key).__name__}"
        try:
            hash(key)
        except TypeError:
            return f"{_short(key)}, a {type(key).__name__} that isn't hashable"
        if isinstance(key, frozenset):
            return f"{_short(key)}, whose elements have no order"
        if not isinstance(key, (int, str, bytes)) and _ADDRESS.search(repr(key)):
            return f"{_short(key)}, whose name is an address that differs in every run"
    return ""


def _key_id(key: Any) -> int:
    if _is_own_id(key):
        return int(key)
    return int.from_bytes(blake2b(repr(_unwrapped(key)).encode(), digest_size=8).digest(), "little", signed=True)


def _unwrapped(key: Any) -> Any:
    """A NumPy scalar as Python's: its repr is another in every version."""
    if isinstance(key, tuple):
        return tuple(map(_unwrapped, key)) if type(key) is tuple else key
    return key.item() if hasattr(key, "item") and hasattr(key, "dtype") else key


def _is_own_id(key: Any) -> bool:
    try:
        array("q", [key])
    except (TypeError, OverflowError):
        return False
    return True


def _is_column(part: Any) -> bool:
    """Whether it may be what `default_collate` makes of one place of a tuple: a tensor or words, one a sample."""
    if isinstance(part, Tensor):
        return part.ndim == 1
    return isinstance(part, (list, tuple)) and bool(part) and set(map(type, part)) <= {str, bytes}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]}..."
