"""One 64-bit id for each sample of a batch: from the batch's key, the row in the data set, or a hash of the content.

B  samples in a batch
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_memsink.samples.batch import batch_size, is_index_of
from lightning_memsink.samples.hashing import content_ids, key_ids

Source = Literal["index", "content", "key"]
_IDENTITIES = ("auto", "index", "content", "key")


class SampleIds:
    """The ids of the samples in each batch.

    Args:
        identity: ``"key"``: what the batch holds under `key`. ``"index"``: the sampler's key, the row of a map-style
            data set; it travels with the sample, so workers may deliver in any order. ``"content"``: a hash, so that
            equal samples share an id. ``"auto"``: the first of key, index and content that there is.
        key: where a batch that is a mapping holds ids of the user's own: integers or strings.

    Ids are any 64-bit numbers, negative ones included, and a batch may hold one twice.
    """

    def __init__(self, identity: Literal["auto", "index", "content", "key"] = "auto", key: str = "sample_id") -> None:
        if identity not in _IDENTITIES:
            close = get_close_matches(str(identity), _IDENTITIES, n=1)
            cure = f"Did you mean {close[0]!r}?" if close else f"Choose one of {', '.join(map(repr, _IDENTITIES))}."
            raise ValueError(f"SampleIds knows no identity={identity!r}. {cure}")
        self.identity = identity
        self.key = key
        self._source: Source | None = None
        self._warned = False

    @property
    def source(self) -> str | None:
        """Where the ids of the latest batch came from: "index", "content" or "key"; None before the first."""
        return self._source

    @property
    def uses_index(self) -> bool:
        """Whether ids may be rows of the data set, so that the loaders must deliver them."""
        return self.identity in ("auto", "index")

    def of(self, batch: Any, index: Tensor | None) -> Tensor | None:
        """``[B]`` int64 ids of a batch, on the CPU; None if it has neither key, index nor tensors.

        Args:
            batch: what training_step gets.
            index: ``[B]`` rows of the samples in their data set, None if unknown.
        """
        size = batch_size(batch)
        has_key = isinstance(batch, Mapping) and self.key in batch
        if self.identity == "key" or (self.identity == "auto" and has_key):
            self._source = "key"
            return self._key_ids(batch, size)
        if self.identity != "content" and index is not None and is_index_of(index, batch, size):
            self._source = "index"
            return index
        if self.identity == "index":
            raise self.index_error(_unmatched(size, index))
        if self.identity != "content" and index is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{_unmatched(size, index)}, so collate_fn left some out or added some. Their ids are hashed from "
                f"content instead of being row numbers. To choose them, put batch[{self.key!r}] into the batch.",
                stacklevel=2,
            )
        if size is None:
            return None
        self._source = "content"
        return content_ids(batch).cpu()

    def index_error(self, found: str) -> RuntimeError:
        """The error for ``identity="index"`` where rows of the data set are unknown. ``found``: what is in the way."""
        return RuntimeError(
            f"SampleIds(identity='index') needs DataLoaders that collate the rows of a map-style data set, "
            f"but {found}. Use identity='content', or put batch[{self.key!r}] into the batch and use identity='key'."
        )

    def _key_ids(self, batch: Any, size: int | None) -> Tensor:
        if not isinstance(batch, Mapping) or self.key not in batch:
            keys = f"keys {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else "no keys"
            raise RuntimeError(
                f"SampleIds(identity='key') reads batch[{self.key!r}], but the batch is a {type(batch).__name__} with "
                f"{keys}. Let the data set return {self.key!r} with every sample, or use identity='auto'."
            )
        value = batch[self.key]
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            raise RuntimeError(
                f"SampleIds needs integers or strings in batch[{self.key!r}], but found {value.dtype}. "
                f"Return them as torch.int64."
            )
        if isinstance(value, Tensor):
            ids = value.detach().reshape(-1).to("cpu", torch.int64)
        else:
            ids = torch.tensor(key_ids(value), dtype=torch.int64)
        if not is_index_of(ids, {name: part for name, part in batch.items() if name != self.key}, size):
            raise RuntimeError(
                f"SampleIds needs one id for each sample, but batch[{self.key!r}] holds {len(ids)} ids for {size} "
                f"samples. Return one {self.key!r} with every sample."
            )
        return ids


def _unmatched(size: int | None, index: Tensor | None) -> str:
    return "a batch came without row numbers" if index is None else f"{len(index)} rows were fetched for {size} samples"
