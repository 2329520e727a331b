"""One 64-bit id for each sample of a batch: from the batch's key, the row in the data set, or a hash of the content.

B  samples in a batch      D  documents, which are the samples where rows hold several      R  rows
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_memsink.samples.batch import batch_size, describe_tensors, is_index_of, is_surely_batched, tensors_in
from lightning_memsink.samples.documents import Documents, Segments, documents_in, whole_text_in
from lightning_memsink.samples.hashing import content_ids, text_ids
from lightning_memsink.samples.joined_rows import rows_of_documents
from lightning_memsink.samples.sample_keys import joined_columns, key_ids, named_keys, plain_keys, without_rows
from lightning_memsink.samples.sample_names import SampleNames
from lightning_memsink.samples.tagged_batch import LOST, SINGLE, Fetched
from lightning_memsink.samples.text_batches import TextBatches
from lightning_memsink.samples.tokens import Tokens, tokens_of

Source = Literal["index", "content", "key"]
_IDENTITIES = ("auto", "index", "content", "key")


class SampleIds:
    """The ids of the samples in each batch.

    Args:
        identity: ``"key"``: what the batch holds under `key`. ``"index"``: the sampler's key, the row of a map-style
            data set; it travels with the sample, so workers may deliver in any order. ``"content"``: a hash, so that
            equal samples share an id. ``"auto"``: the key if there is one; else the content of batches of tokens, since
            a text is one sample wherever it stands; else the index, else the content.
        key: where a batch that is a mapping holds ids of the user's own: integers, strings, tuples, or anything else
            whose repr is the same in every run. Numbers ``[R, T]`` also say which document each token is of.
        segments: ``segments(batch) -> [R, T]``: the document of each token, where the batch doesn't say it.

    Ids are any 64-bit numbers, negative ones included, and a batch may hold one twice. `names` has the keys that are
    no such numbers as they were.
    """

    def __init__(
        self,
        identity: Literal["auto", "index", "content", "key"] = "auto",
        key: str = "sample_id",
        segments: Segments | None = None,
    ) -> None:
        if identity not in _IDENTITIES:
            close = get_close_matches(str(identity), _IDENTITIES, n=1)
            cure = f"Did you mean {close[0]!r}?" if close else f"Choose one of {', '.join(map(repr, _IDENTITIES))}."
            raise ValueError(f"SampleIds knows no identity={identity!r}. {cure}")
        self.identity = identity
        self.key = key
        self.segments = segments
        self.names = SampleNames()
        self.documents: Documents | None = None
        """Of the latest batch, if they are its samples."""
        self.texts: Tokens | None = None
        """``[D, L]`` those of `documents`, if they have any; ``[B, T]`` those of rows whose content is the ids'."""
        self.rows: Tensor | None = None
        """``[B]`` int64: the row of the data set that each sample of the latest batch came from, if known."""
        self.takes_rows = False
        """Whether "auto" takes the index of batches of tokens: so did the version that wrote the restored ledger."""
        self._source: Source | None = None
        self._warned: set[str] = set()
        self._text_batches = TextBatches()
        self._has_columns: bool | None = None  # whether own ids are tuples that default_collate has made columns of

    @property
    def source(self) -> str | None:
        """Where the ids of the latest batch came from: "index", "content" or "key"; None before the first."""
        return self._source

    def restore(self, source: str | None) -> None:
        """Goes on as a saved ledger was written: from ``source``, or ``"older"`` if its version did not save it."""
        self.takes_rows = source in ("older", "index")
        self._source = source if source in ("index", "content", "key") else None  # type: ignore[assignment]

    @property
    def uses_index(self) -> bool:
        """Whether ids may be rows of the data set, so that the loaders must deliver them."""
        return self.identity in ("auto", "index")

    def needs_index(self, batch: Any) -> bool:
        """Whether this batch's ids are rows of the data set, if these are known."""
        return self.uses_index and not self.reads_key(batch) and not self._is_by_content(batch)

    def is_of_texts(self, batch: Any) -> bool:
        """Whether this batch's samples are texts, wherever they stand, although no one has asked for it."""
        return self._is_by_content(batch) and not self.reads_key(batch)

    def reads_key(self, batch: Any) -> bool:
        """Whether the batch itself says its ids."""
        return self.identity == "key" or (self.identity == "auto" and isinstance(batch, Mapping) and self.key in batch)

    def of(self, batch: Any, index: Tensor | None, fetched: Fetched | None = None) -> Tensor | None:
        """``[B]`` int64 ids of a batch, on the CPU; None if it has no key, no index and shows no samples.

        Args:
            batch: what training_step gets.
            index: ``[B]`` rows of the samples in their data set, None if unknown.
            fetched: what else the loader says of the batch.

        Raises:
            RuntimeError: for ids that can't be ids, or not of this batch, with what to type.
        """
        fetched = fetched or Fetched()
        self.documents, self.texts, self.rows = self._documents_in(batch, fetched.lengths), None, index
        if self.documents is not None:
            ids = self._ids_of_documents(batch, self.documents, index, fetched)
            if self.documents is not None:
                return ids
        rows = len(index) if index is not None and not fetched.refusal else fetched.rows
        size = batch_size(batch, rows, fetched.axes)
        if self.reads_key(batch):
            self._source = "key"
            return self._key_ids(batch, size, rows)
        usable = index is not None and is_index_of(index, batch, size, fetched.axes)
        if not usable:
            self.rows = None
        if size is not None and self._is_by_content(batch):
            return self._content_ids(batch, size, fetched)
        if self.identity != "content" and index is not None and usable:
            self._source = "index"
            if fetched.names:
                self.names.add(fetched.names)
            return index
        found = fetched.refusal or _unmatched(size, index)
        if self.identity == "index":
            raise self.index_error(found)
        if fetched.refusal and not _shows_samples(batch, size, fetched.refusal):
            self._warn_of(
                "no ids",
                f"{found}, so its samples have no ids, and no losses are recorded for them. Put "
                f"batch[{self.key!r}] with one id for each sample into the batch.",
            )
            return None
        if self.identity != "content" and (index is not None or fetched.refusal) and fetched.refusal != SINGLE:
            self._warn_of(
                "hashed",
                f"{found}{'' if fetched.refusal else ', so collate_fn left some out or added some'}. Their ids are "
                "hashed from content instead of being row numbers. To choose them, put "
                f"batch[{self.key!r}] into the batch.",
            )
        return self._content_ids(batch, size, fetched)

    def index_error(self, found: str) -> RuntimeError:
        """The error for ``identity="index"`` where rows of the data set are unknown. ``found``: what is in the way."""
        return RuntimeError(
            f"SampleIds(identity='index') needs DataLoaders that collate the rows of a map-style data set, "
            f"but {found}. Use identity='content', or put batch[{self.key!r}] into the batch and use identity='key'."
        )

    def _is_by_content(self, batch: Any) -> bool:
        return self.identity == "auto" and not self.takes_rows and self._text_batches.has(batch)

    def _documents_in(self, batch: Any, lengths: Tensor | None) -> Documents | None:
        length = None if lengths is None else int(lengths.sum())
        try:
            return documents_in(batch, self.key, self.segments, length)
        except Exception as error:  # in the user's function; it must not end the training
            self._warn_of("segments", f"{error} Until then each row of a batch is taken for one sample.")
            return None

    def _ids_of_documents(
        self, batch: Any, documents: Documents, index: Tensor | None, fetched: Fetched
    ) -> Tensor | None:
        """``[D]`` ids. Sets `documents` to None if the user's ids are those of rows."""
        self.rows = None if index is None else rows_of_documents(documents, index, fetched.lengths)
        text = whole_text_in(batch)
        self.texts = None if text is None else documents.texts(text)
        if documents.keys is not None and self.identity in ("auto", "key"):
            self._source = "key"
            return documents.keys
        if self.reads_key(batch):
            self._source = "key"
            return self._keys_of_documents(batch, documents)
        if self.identity == "index":
            if index is not None and fetched.lengths is not None and len(index) == documents.count:
                self._source = "index"
                return index
            raise self.index_error(f"rows of its batches hold several documents, found in {documents.found_in}")
        if self.texts is None:
            self._warn_of(
                "no text",
                f"The documents in the rows of a batch have no tokens to be known by, {describe_tensors(batch)}: no "
                f"losses are recorded for them. Put batch[{self.key!r}] with one id for each document into the batch.",
            )
            return None
        self._source = "content"
        return text_ids(self.texts)

    def _keys_of_documents(self, batch: Any, documents: Documents) -> Tensor | None:
        value = batch[self.key] if isinstance(batch, Mapping) and self.key in batch else None
        by_row = documents.given_by_row(value)
        found = plain_keys(value if by_row is None else by_row)
        count, rows = documents.count, documents.row_count
        if isinstance(found, str):
            raise RuntimeError(f"SampleIds needs integers or strings in batch[{self.key!r}], but found {found}.")
        if len(found) == count:
            numbers = key_ids(found)
            self.names.add(named_keys(numbers, found))
            return torch.tensor(numbers, dtype=torch.int64)
        if len(found) != rows:
            raise RuntimeError(
                f"SampleIds needs one id for each document, but batch[{self.key!r}] holds {len(found)} ids for {count} "
                f"documents in {rows} rows, found in {documents.found_in}. Return one {self.key!r} with every document."
            )
        self.documents = self.texts = None
        self._warn_of(
            "rows",
            f"batch[{self.key!r}] names the {rows} rows of a batch, in which {documents.found_in} shows {count} "
            "documents: losses and verdicts are those of whole rows. Give one id for each document to have theirs.",
        )
        return None

    def _content_ids(self, batch: Any, size: int | None, fetched: Fetched) -> Tensor | None:
        if not any(True for _ in tensors_in(batch)):
            return None
        texts = tokens_of(batch, fetched.axes)
        if texts is not None and size in (None, len(texts.ids)):
            self.texts, self._source = texts, "content"
            return text_ids(texts).cpu()
        try:
            ids = content_ids(batch, size, fetched.axes).cpu()
        except ValueError:
            self._warn_of(
                "no number",
                f"The number of samples in a batch can't be read from its tensors, {describe_tensors(batch)}: no "
                f"losses are recorded for them. Put batch[{self.key!r}] with one id for each sample into the batch.",
            )
            return None
        self._source = "content"
        return ids

    def _key_ids(self, batch: Any, size: int | None, rows: int | None) -> Tensor:
        if not isinstance(batch, Mapping) or self.key not in batch:
            keys = f"keys {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else "no keys"
            raise RuntimeError(
                f"SampleIds(identity='key') reads batch[{self.key!r}], but the batch is a {type(batch).__name__} with "
                f"{keys}. Let the data set return {self.key!r} with every sample, or use identity='auto'."
            )
        value = without_rows(batch[self.key])
        others = {name: part for name, part in batch.items() if name != self.key}
        found: list[Any] | str = self._joined(value, batch_size(others, size)) or plain_keys(value)
        if isinstance(found, str):
            raise RuntimeError(f"SampleIds needs integers or strings in batch[{self.key!r}], but found {found}.")
        numbers = key_ids(found)
        ids = torch.tensor(numbers, dtype=torch.int64)
        if len(ids) != rows and not is_index_of(ids, others, batch_size(others, size)):
            raise RuntimeError(
                f"SampleIds needs one id for each sample, but batch[{self.key!r}] holds {len(ids)} ids for {size} "
                f"samples. Return one {self.key!r} with every sample."
            )
        self.names.add(named_keys(numbers, found))
        return ids

    def _joined(self, value: Any, size: int | None) -> list[tuple[Any, ...]] | None:
        """Tuples that `default_collate` has made columns of; None if the ids are no such columns."""
        if self._has_columns is False:
            return None
        try:
            columns = joined_columns(value, size, self._has_columns is True)
        except ValueError as error:
            raise RuntimeError(
                f"SampleIds needs one id for each sample in batch[{self.key!r}], but found {error}. "
                "Return one string for each sample."
            ) from None
        if size is not None and size > 1 and isinstance(value, (list, tuple)):
            self._has_columns = columns is not None
        return columns

    def _warn_of(self, kind: str, message: str) -> None:
        """Warns once of each kind, whatever its numbers and names are."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=3)


def _unmatched(size: int | None, index: Tensor | None) -> str:
    return "a batch came without row numbers" if index is None else f"{len(index)} rows were fetched for {size} samples"


def _shows_samples(batch: Any, size: int | None, refusal: str) -> bool:
    """Whether the batch's rows are samples although the loader can't say which: their content can be hashed.

    Not where rows were put into another order: in other batches the same samples have their rows' ids.
    """
    return size is not None and refusal != LOST and (refusal != SINGLE or is_surely_batched(batch))
