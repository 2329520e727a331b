"""Whose loss is it: one 64-bit id for each sample of a batch.

B  samples in a batch      T  tokens of a sample      W  words of 64 bits (or, of text, tokens) hashed for a sample
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_memsink.samples.dataloader_ids import Arrived, is_taggable, sample_ids, tagged, untagged

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning_memsink.samples.batch import batch_size, describe_batch, is_index_of
from lightning_memsink.samples.hashing import content_ids

Stage = Literal["train", "validate"]
Source = Literal["index", "content", "key"]
_IDENTITIES = ("auto", "index", "content", "key")
_LOADER_BITS = 48  # a row of loader n has the id (n << 48) + row: loaders stay apart, the first one's ids are its rows


class SampleIds:
    """Whose loss is it: the ids of the samples in each batch.

    Args:
        identity: ``"key"``: what the batch holds under `key`. ``"index"``: the sampler's key, the row of a map-style
            data set; it travels with the sample, so workers may deliver in any order. ``"content"``: a hash, so that
            equal samples share an id. ``"auto"``: the first of key, index and content that there is.
        key: where a batch that is a mapping holds ids of the user's own: integers or strings.

    Ids are any 64-bit numbers, negative ones included, and a batch may hold one twice. Rows of a second, third, ...
    data loader of the same step are offset by a multiple of 2^48. Train and validation ids are not kept apart.
    """

    def __init__(self, identity: Literal["auto", "index", "content", "key"] = "auto", key: str = "sample_id") -> None:
        if identity not in _IDENTITIES:
            close = get_close_matches(str(identity), _IDENTITIES, n=1)
            cure = f"Did you mean {close[0]!r}?" if close else f"Choose one of {', '.join(map(repr, _IDENTITIES))}."
            raise ValueError(f"SampleIds knows no identity={identity!r}. {cure}")
        self.identity = identity
        self.key = key
        self._source: Source | None = None
        self._trainer: Trainer | None = None
        self._warned = False
        self._arrived: dict[Stage, Arrived] = {"train": Arrived(), "validate": Arrived()}
        self._shadowed: dict[str, Any] = {}

    @property
    def source(self) -> str | None:
        """Where the ids of the latest batch came from: "index", "content" or "key"; None before the first."""
        return self._source

    def attach(self, trainer: Trainer) -> None:
        """Tags the loaders that `trainer` sets up from now on, after its strategy is done with each."""
        if self._trainer is not None:
            return
        self._trainer = trainer
        if self.identity in ("content", "key"):
            return
        strategy = trainer.strategy
        self._shadowed = {name: value for name, value in vars(strategy).items() if name == "process_dataloader"}
        process_dataloader = strategy.process_dataloader

        def process_and_tag(loader: object) -> object:
            return self._tag(process_dataloader(untagged(loader)))

        vars(strategy)["process_dataloader"] = process_and_tag

    def detach(self) -> None:
        """Leaves strategy and loaders as they were found; for `teardown` and `on_exception`."""
        if self._trainer is None:
            return
        if self.identity not in ("content", "key"):
            vars(self._trainer.strategy).pop("process_dataloader", None)
            vars(self._trainer.strategy).update(self._shadowed)
        for combined in self._combined_loaders():
            combined.flattened = [untagged(loader) for loader in combined.flattened]
        self._trainer = None
        self.clear("train")
        self.clear("validate")

    def take(self, batch: Any, stage: Stage) -> Tensor | None:
        """The ids of a batch: ``[B]`` int64 on the CPU; of several loaders, one after the other.

        Call it once for each batch that starts. None if a batch of strings, say, has neither key nor index.
        """
        arrived, combined = self._arrived[stage], self._combined_loader(stage)
        if combined is None or combined._mode == "sequential":
            return self.of(batch, arrived.take())
        try:
            parts = combined._spec.flatten_up_to(batch)
        except ValueError:  # a hook of the user's has made one batch of what the loaders gave
            return self.of(batch, _joined([arrived.take(loader) for loader in range(len(combined.flattened))]))
        # a part is None where its loader is exhausted
        return _joined([self.of(each, arrived.take(n)) for n, each in enumerate(parts) if each is not None])

    def clear(self, stage: Stage) -> None:
        """Forgets batches that were fetched and not taken. A new pass over the loaders does so by itself."""
        self._arrived[stage].clear()

    def _tag(self, loader: Any) -> object:
        if is_taggable(loader):
            return tagged(loader, self._on_fetch)
        if self.identity == "index":
            raise RuntimeError(self._no_index(f"got {describe_batch(loader)}"))
        return loader

    def _on_fetch(self, batches: object, ids: Tensor | None) -> None:
        """Notes the ids of a batch that a loop fetched; the user may iterate over the same loader in between."""
        for stage, arrived in self._arrived.items():
            combined = self._combined_loader(stage)
            turn = None if combined is None else combined._iterator
            for place, own in enumerate([] if turn is None else turn.iterators):
                if own is batches:
                    loader = getattr(turn, "_iterator_idx", place)  # in sequential mode there is one at a time
                    arrived.put(turn, loader, ids + (loader << _LOADER_BITS) if ids is not None and loader else ids)

    def _combined_loaders(self) -> Iterator[CombinedLoader]:
        assert self._trainer is not None
        fit = self._trainer.fit_loop
        for loop in (fit, fit.epoch_loop.val_loop, self._trainer.validate_loop):
            if loop._combined_loader is not None:
                yield loop._combined_loader

    def _combined_loader(self, stage: Stage) -> CombinedLoader | None:
        if self._trainer is None:
            return None
        fit = self._trainer.fit_loop
        if stage == "train":
            return fit._combined_loader
        alone = self._trainer.state.fn == "validate"
        return (self._trainer.validate_loop if alone else fit.epoch_loop.val_loop)._combined_loader

    def of(self, batch: Any, index: Tensor | None) -> Tensor | None:
        """The ids ``[B]`` of a batch whose samples are rows ``index`` ``[B]`` of their data set, if anybody knows."""
        size = batch_size(batch)
        found = isinstance(batch, Mapping) and self.key in batch
        if self.identity == "key" or (self.identity == "auto" and found):
            self._source = "key"
            return self._key_ids(batch, size)
        if self.identity != "content" and index is not None and is_index_of(index, batch, size):
            self._source = "index"
            return index
        if self.identity == "index":
            raise RuntimeError(self._no_index(_unmatched(size, index)))
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
            ids = torch.tensor(sample_ids(value), dtype=torch.int64)
        if not is_index_of(ids, {name: part for name, part in batch.items() if name != self.key}, size):
            raise RuntimeError(
                f"SampleIds needs one id for each sample, but batch[{self.key!r}] holds {len(ids)} ids for {size} "
                f"samples. Return one {self.key!r} with every sample."
            )
        return ids

    def _no_index(self, found: str) -> str:
        return (
            f"SampleIds(identity='index') needs DataLoaders that collate the rows of a map-style data set, "
            f"but {found}. Use identity='content', or put batch[{self.key!r}] into the batch and use identity='key'."
        )


def _joined(ids: list[Tensor | None]) -> Tensor | None:
    if len(ids) == 1:
        return ids[0]
    known = [each for each in ids if each is not None]
    return torch.cat(known) if known and len(known) == len(ids) else None


def _unmatched(size: int | None, index: Tensor | None) -> str:
    return "a batch came without row numbers" if index is None else f"{len(index)} rows were fetched for {size} samples"
