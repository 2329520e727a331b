"""Whose loss is it: one 64-bit id for each sample of a batch.

B  samples in a batch      T  tokens of a sample      W  words of 64 bits (or, of text, tokens) hashed for a sample
"""

import warnings
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_memsink.tagging import Arrived, is_taggable, sample_ids, tagged, tensors_in, untagged
from lightning_memsink.tokens import tokens_of

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.combined_loader import CombinedLoader

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

    def attach(self, trainer: "Trainer") -> None:
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
            return tagged(loader, self._hear)
        if self.identity == "index":
            raise RuntimeError(self._no_index(f"got {_described(loader)}"))
        return loader

    def _hear(self, batches: object, ids: Tensor | None) -> None:
        """Notes the ids of a batch that a loop fetched; the user may iterate over the same loader in between."""
        for stage, arrived in self._arrived.items():
            combined = self._combined_loader(stage)
            turn = None if combined is None else combined._iterator
            for place, own in enumerate([] if turn is None else turn.iterators):
                if own is batches:
                    loader = getattr(turn, "_iterator_idx", place)  # in sequential mode there is one at a time
                    arrived.put(turn, loader, ids + (loader << _LOADER_BITS) if ids is not None and loader else ids)

    def _combined_loaders(self) -> Iterator["CombinedLoader"]:
        assert self._trainer is not None
        fit = self._trainer.fit_loop
        for loop in (fit, fit.epoch_loop.val_loop, self._trainer.validate_loop):
            if loop._combined_loader is not None:
                yield loop._combined_loader

    def _combined_loader(self, stage: Stage) -> "CombinedLoader | None":
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
        if self.identity != "content" and index is not None and _are_rows_of(index, batch, size):
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
        if not _are_rows_of(ids, {name: part for name, part in batch.items() if name != self.key}, size):
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


def batch_size(batch: Any) -> int | None:
    """B: the first extent of the batch's first tensor (of its ``input_ids``, if it has them); None without one."""
    text = batch.get("input_ids") if isinstance(batch, Mapping) else None
    first = next(_per_sample([text, batch]), None)
    return None if first is None else len(first)


def _are_rows_of(index: Tensor, batch: Any, size: int | None) -> bool:
    """Whether ``index`` holds one row for each sample. The batch's first tensor need not say: a batch of graphs begins
    with the nodes of them all, and its targets have one row a graph."""
    return size in (None, len(index)) or any(len(tensor) == len(index) for tensor in _per_sample(batch))


def content_ids(batch: Any) -> Tensor:
    """``[B]`` int64: a hash of each sample, the same in whatever batch, process, memory layout or device it sits.

    Of text, only the tokens that are not padding count, by their order: padding, labels and all else don't. Of
    anything else every tensor with B rows counts by its bits, so that dtypes differ but -0.0 and 0.0 don't.
    """
    tokens = tokens_of(batch)
    if tokens is not None:
        rank = tokens.mask.cumsum(1) - 1
        weights = _weights(tokens.ids.shape[1], tokens.ids.device)[rank]
        return mixed(_folded(tokens.ids * tokens.mask, weights) + mixed(tokens.mask.sum(1)))
    size = batch_size(batch)
    if size is None:
        raise ValueError(f"content_ids needs a batch with tensors in it, but found {_described(batch)}.")
    ids = torch.zeros((), dtype=torch.int64)
    for tensor in _per_sample(batch):
        if len(tensor) == size:
            words = _words(tensor.detach())
            weights = _weights(words.shape[1], words.device)
            ids = mixed(ids.to(words.device) * 3 + _folded(words, weights) + words.shape[1])
    return ids


def _per_sample(batch: Any) -> Iterator[Tensor]:
    return (tensor for tensor in tensors_in(batch) if tensor.ndim)


def _words(tensor: Tensor) -> Tensor:
    """``[B, W]`` int64: the bits of each row, eight bytes a word where they come out even."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    rows = (real.flatten(1) if real.ndim > 1 else real[:, None]) + 0  # turns -0.0 into 0.0
    whole = rows.shape[1] * rows.element_size() % 8 == 0
    sized = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]
    return rows.contiguous().view(torch.int64 if whole else sized).long()


def _folded(words: Tensor, weights: Tensor) -> Tensor:
    """``[B]``: the sum over ``[B, W]`` words, each times an odd weight, folded so that high bits reach low ones."""
    product = (words ^ (words >> 32)).mul_(weights)
    return product.bitwise_xor_(product >> 32).sum(1)


@lru_cache(maxsize=8)
def _weights(count: int, device: torch.device) -> Tensor:
    return mixed(torch.arange(1, count + 1, device=device) * -0x61C8864680B583EB) | 1  # 2^64 / the golden ratio


def mixed(number: Tensor) -> Tensor:
    """The finalizer of splitmix64, in int64 that wraps; https://doi.org/10.1145/2660193.2660195 (Mix13)."""
    number = (number ^ shifted(number, 30)) * -0x40A7B892E31B1A47
    number = (number ^ shifted(number, 27)) * -0x6B2FB644ECCEEE15
    return number ^ shifted(number, 31)


def shifted(number: Tensor, bits: int) -> Tensor:
    return (number >> bits) & ((1 << (64 - bits)) - 1)  # torch's shift repeats the sign


def _joined(ids: list[Tensor | None]) -> Tensor | None:
    if len(ids) == 1:
        return ids[0]
    known = [each for each in ids if each is not None]
    return torch.cat(known) if known and len(known) == len(ids) else None


def _unmatched(size: int | None, index: Tensor | None) -> str:
    return "a batch came without row numbers" if index is None else f"{len(index)} rows were fetched for {size} samples"


def _described(thing: Any) -> str:
    rows = f" over {type(thing.dataset).__name__}" if isinstance(thing, torch.utils.data.DataLoader) else ""
    return f"a {type(thing).__name__}{rows}"
