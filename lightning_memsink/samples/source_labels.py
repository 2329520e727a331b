"""The label of each sample's source, read from a batch.

B  samples in a batch      R  rows      D  documents, which are the samples where rows hold several      T  tokens
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_memsink.samples.documents import Documents, text_in
from lightning_memsink.samples.sample_keys import without_rows
from lightning_memsink.samples.sources import Labels, label_text

SourceOf = str | Callable[[Any], Any]
"""A key of the batch, or a function of it that returns labels."""
NamesOf = Mapping[Any, str] | Sequence[str]
DEFAULT_KEY = "source"


class SourceLabels:
    """Reads the labels of batches by `source_labels`, and says once of each kind of them why it can't be read.

    Args:
        source: a key of the batch, or a function of it. None reads nothing.
        names: labels for what the batch has instead, by number or by value: ``["books", "web"]``,
            ``{"cc-by": "open"}``. What has no name keeps its own.
    """

    def __init__(self, source: SourceOf | None = DEFAULT_KEY, names: NamesOf | None = None) -> None:
        if source is not None and not isinstance(source, str) and not callable(source):
            raise ValueError(
                f"source is a key of the batch or a function of it, but it is a {type(source).__name__}: {source!r}."
            )
        if isinstance(names, (str, bytes)) or not isinstance(names, (Mapping, Sequence, type(None))):
            raise ValueError(f"names is a list or a mapping of labels, but it is a {type(names).__name__}: {names!r}.")
        self.source = source
        pairs = names.items() if isinstance(names, Mapping) else enumerate(names or ())
        self._names = {label_text(value): label_text(name) for value, name in pairs}
        self._has_warned = False

    def of(self, batch: Any, size: int, documents: Documents | None) -> Labels | None:
        """The labels of a batch of ``size`` samples; None where it has none, or they can't be read."""
        if self.source is None:
            return None
        try:
            labels = source_labels(batch, size, documents, self.source)
            return None if labels is None else [self._names.get(label, label) for label in labels]
        except Exception as error:  # in the user's function, or labels that fit nothing; it must not end the training
            if not self._has_warned:
                self._has_warned = True
                found = str(error) if isinstance(error, UnfitLabels) else _raised(self.source, error)
                warnings.warn(f"{found} Until then such samples have no source.", stacklevel=2)
            return None


class UnfitLabels(ValueError):
    """Labels that fit neither the samples of a batch nor its rows; the message says what was found and expected."""


def source_labels(
    batch: Any, size: int, documents: Documents | None = None, source: SourceOf = DEFAULT_KEY
) -> Labels | None:
    """The label of each sample of a batch; None if the batch has nothing under the default key.

    Labels are given by sample (B, or D documents), by row (each document inherits its row's), as a list a row of labels
    of its documents, as integers ``[R, T]`` by token (the first token of a document says its source), or as one string
    for the whole batch. Labels of two kinds with the same text are the same. None, NaN and, in tensors, negative
    numbers are no label.

    Args:
        batch: what training_step gets.
        size: the number of its samples, B or D.
        documents: where rows hold several, which are the samples then.
        source: a key of the batch, or a function of it.

    Raises:
        UnfitLabels: the labels fit none of these, or the batch has no such key.
    """
    if isinstance(source, str):
        name = f"batch[{source!r}]"
        if not isinstance(batch, Mapping) or source not in batch:
            if source == DEFAULT_KEY:
                return None
            keys = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else f"none: it is a {_kind(batch)}"
            raise UnfitLabels(
                f"source={source!r} names a key of the batch, and its keys are {keys}. Give one of them or a function, "
                "memsink(source=lambda batch: ...)."
            )
        value = batch[source]
    else:
        name = f"{getattr(source, '__name__', _kind(source))}(batch), given as source=,"
        value = source(batch)
    if value is None:
        return None
    labels = _labels(value, batch, size, documents)
    if labels is None:
        rows = size if documents is None else documents.row_count
        expected = f"{size} labels, one a sample" if documents is None else f"{size} labels, one a document, or {rows}"
        by_row = "" if documents is None else ", one a row, or a list for each row with a label for each document,"
        raise UnfitLabels(
            f"{name} holds {_found(value)}, and expected are {expected}{by_row} or integers like the tokens. Let the "
            "data set return one label with every sample, or turn sources off with memsink(source=None)."
        )
    return labels


def _labels(value: Any, batch: Any, size: int, documents: Documents | None) -> Labels | None:
    if isinstance(value, (str, bytes)):
        return [label_text(value)] * size
    if isinstance(value, Tensor):
        if value.is_nested or value.is_floating_point() or value.is_complex():
            return None
        value = value.detach().cpu()
        if not value.ndim:
            return [_of_number(int(value))] * size
        tokens = text_in(batch) if documents is None else documents.owners
        if tokens is not None and value.shape == tokens.shape and (value.ndim > 1 or len(value) != size):
            return _by_token(value, batch, size, documents)
        value = value[:, 0] if value.ndim == 2 and value.shape[1] == 1 else value
        return _spread([_of_number(number) for number in value.tolist()], size, documents) if value.ndim == 1 else None
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return None
    by_row = None if documents is None else documents.given_by_row(value)
    if by_row is not None and all(map(_is_label, by_row)):
        return [label_text(label) for label in by_row]
    value = without_rows(value) if documents is None else value
    texts = [label_text(label) if _is_label(label) else "" for label in value]
    return _spread(texts, size, documents) if all(map(_is_label, value)) else None


def _spread(labels: Labels, size: int, documents: Documents | None) -> Labels | None:
    """Labels by sample: as they are, or those of rows for each document."""
    if len(labels) == size:
        return labels
    if documents is None or len(labels) != documents.row_count:
        return None
    return [labels[row] for row in documents.rows.tolist()]


def _by_token(value: Tensor, batch: Any, size: int, documents: Documents | None) -> Labels | None:
    """The label of the first token of each document, or of each row if these are the samples."""
    if documents is not None:
        return [_of_number(number) for number in value.reshape(-1)[documents.first_places].tolist()]
    if value.ndim != 2 or len(value) != size or not value.shape[1]:
        return None
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    is_text = mask.detach().cpu() > 0 if isinstance(mask, Tensor) and mask.shape == value.shape else value == value
    return [_of_number(int(row[place])) for row, place in zip(value, is_text.int().argmax(1), strict=True)]


def _of_number(number: int) -> str | None:
    return None if number < 0 else str(number)


def _is_label(label: Any) -> bool:
    """Whether it can be one label: hashable, and no tensor of several numbers."""
    if isinstance(label, Tensor):
        return label.numel() == 1
    return getattr(label, "__hash__", None) is not None


def _found(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {value.dtype} {'nested' if value.is_nested else list(value.shape)}".replace("torch.", "")
    return f"a {_kind(value)} of {len(value)}" if isinstance(value, (list, tuple)) else f"a {_kind(value)}"


def _raised(source: SourceOf, error: Exception) -> str:
    name = source if isinstance(source, str) else getattr(source, "__name__", _kind(source))
    return f"{name}(batch), given as source=, raised {type(error).__name__}: {error}. Correct it."


def _kind(thing: Any) -> str:
    return type(thing).__name__
