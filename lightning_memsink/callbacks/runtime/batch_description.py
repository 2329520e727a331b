"""What is known of the samples of a batch beside their losses: ids, text, features, where they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_memsink.samples.batch_rows import Axes
from lightning_memsink.samples.sample_ids import SampleIds
from lightning_memsink.samples.source_labels import NamesOf, SourceLabels, SourceOf
from lightning_memsink.samples.tagged_batch import Fetched
from lightning_memsink.samples.visits import DescribedBatch


class BatchDescription:
    """Describes the batch whose ids `sample_ids` has read last.

    Args:
        sample_ids: of the run.
        features: ``features(batch) -> [B, F]``, or None.
        source, names: where a batch says the sources of its samples, as `SourceLabels` takes them.
    """

    def __init__(
        self,
        sample_ids: SampleIds,
        features: Callable[[Any], Tensor] | None,
        source: SourceOf | None,
        names: NamesOf | None = None,
    ) -> None:
        self.sample_ids = sample_ids
        self.features = features
        self.source_labels = SourceLabels(source, names)

    @property
    def is_packed(self) -> bool:
        """Whether rows of that batch hold several samples."""
        return self.sample_ids.documents is not None

    def of_training(self, batch: Any, ids: Tensor | None, axes: Axes | None, readable: Any) -> DescribedBatch | None:
        """The samples of a batch that is trained on, which lie along ``axes``; None if they can't be identified.

        ``readable``: the same batch in host memory, if it can be read there. The user's functions get what a step gets.
        """
        samples = self.of(batch, ids, axes, readable)
        if samples is None:
            return None
        given = batch if callable(self.source_labels.source) else readable
        return samples._replace(sources=self.source_labels.of(given, len(samples.ids), self.sample_ids.documents))

    def of(self, batch: Any, ids: Tensor | None, axes: Axes | None, readable: Any) -> DescribedBatch | None:
        """The same without sources, which held-out samples need none of."""
        if ids is None or not len(ids):
            return None
        known, rows = self.sample_ids, self.sample_ids.rows
        if rows is not None and len(rows) != len(ids):
            rows = None  # of a data set whose items are whole batches, say
        extra = None if self.features is None else self.features(batch)
        return DescribedBatch.of(readable, ids, extra, axes, known.texts, rows)

    def of_fetched(
        self, batch: Any, rows: Tensor | None, fetched: Fetched
    ) -> tuple[DescribedBatch | None, Axes | None, bool]:
        """For `ControlProbe.evaluate`, of a batch whose ids were not read yet."""
        ids = self.sample_ids.of(batch, rows, fetched)
        documents = self.sample_ids.documents
        axes = fetched.axes if documents is None else documents.axes(batch)
        return self.of(batch, ids, axes, batch), axes, documents is not None

    def may_be_windows(self, samples: DescribedBatch) -> bool:
        """Whether texts of one id are parts of one document: their owner has named them."""
        return self.sample_ids.source == "key" and samples.tokens is not None
