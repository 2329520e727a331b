"""What is known of the samples of a batch beside their losses: ids, text, features, where they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_memsink.samples.batch_rows import Axes
from lightning_memsink.samples.sample_ids import SampleIds
from lightning_memsink.samples.source_labels import NamesOf, SourceLabels, SourceOf
from lightning_memsink.samples.tagged_batch import Fetched
from lightning_memsink.samples.visits import DescribedBatch, Visit


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

    def of_training(self, batch: Any, ids: Tensor | None, axes: Axes | None) -> DescribedBatch | None:
        """The samples of a batch that is trained on, which lie along ``axes``; None if they can't be identified."""
        samples = self.of(batch, ids, axes)
        if samples is None:
            return None
        return samples._replace(sources=self.source_labels.of(batch, len(samples.ids), self.sample_ids.documents))

    def of(self, batch: Any, ids: Tensor | None, axes: Axes | None) -> DescribedBatch | None:
        """The same without sources, which held-out samples need none of."""
        if ids is None or not len(ids):
            return None
        known, rows = self.sample_ids, self.sample_ids.rows
        if rows is not None and len(rows) != len(ids):
            rows = None  # of a data set whose items are whole batches, say
        return DescribedBatch.of(batch, ids, self.features, axes, known.texts, rows)

    def of_fetched(
        self, batch: Any, rows: Tensor | None, fetched: Fetched
    ) -> tuple[DescribedBatch | None, Axes | None, bool]:
        """For `ControlProbe.evaluate`, of a batch whose ids were not read yet."""
        ids = self.sample_ids.of(batch, rows, fetched)
        documents = self.sample_ids.documents
        axes = fetched.axes if documents is None else documents.axes(batch)
        return self.of(batch, ids, axes), axes, documents is not None

    def visit(self, samples: DescribedBatch, losses: Tensor, counted: Tensor | None, step: int, epoch: int) -> Visit:
        """The visit of ``samples`` that ends. ``counted``: of the losses ``[B]``, as captured."""
        elements = self._elements(samples, counted)
        return Visit.of(samples, losses, step, epoch, elements, self._may_be_windows(samples))

    def elements_of_windows(self, samples: DescribedBatch, counted: Tensor | None) -> Tensor | None:
        """``[B]`` how many tokens each loss is of, where samples of one id may be windows of one document."""
        return self._elements(samples, counted) if self._may_be_windows(samples) else None

    def _may_be_windows(self, samples: DescribedBatch) -> bool:
        """Whether texts of one id are parts of one document: their owner has named them."""
        return self.sample_ids.source == "key" and samples.tokens is not None

    def _elements(self, samples: DescribedBatch, counted: Tensor | None) -> Tensor | None:
        """Of texts. Weights that are no numbers of tokens are not taken for such."""
        if samples.tokens is None:
            return None
        counted = None if counted is None else counted.detach().float().cpu()
        are_numbers = counted is not None and bool((counted == counted.round()).all())
        return counted if are_numbers else samples.tokens.mask.sum(1).float()
