"""Difficulty of texts that have near-duplicates in the training text: matching features without the family's counts.

A text whose own visits are left out of the n-gram counts, but not those of its variants, seems familiar. It is compared
with controls that are as familiar by other texts, whose losses are low, and what the model knows of the family by heart
makes no gap. So of a family's texts the counts of the whole family are left out.

N  texts of families      T  tokens      S  tokens, pairs or runs of a text
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_memsink.detection.ngram_features import NgramCounts
from lightning_memsink.samples.families import Families
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.recent_texts import RecentTexts
from lightning_memsink.samples.tokens import Tokens
from lightning_memsink.samples.unique import first_of_each


class FamilyRecord:
    """The families of a run, and the texts that their difficulty is computed from.

    Args:
        counts: of n-grams in the training text, each text as often as it was visited.
        families: None begins without any.
        texts: to remember.
    """

    def __init__(self, counts: NgramCounts, families: Families | None = None, texts: RecentTexts | None = None) -> None:
        self.counts = counts
        self.families = Families() if families is None else families
        self.texts = RecentTexts() if texts is None else texts
        self._related = torch.zeros(0, dtype=torch.bool)

    def add(self, rows: Tensor, tokens: Tokens) -> None:
        """Adds the texts ``[V, T]`` of visits of samples in ``rows`` ``[V]`` of the table."""
        rows, first = first_of_each(rows)
        some = Tokens(tokens.ids[first], tokens.mask[first])
        new = self.families.add(rows, some)
        # A text that was forgotten is remembered again if it turned out to have a family.
        related = rows < len(self._related)
        related[related.clone()] = self._related[rows[related]]
        wanted = new | (related & ~self.texts.has(rows))
        self.texts.add(rows[wanted], Tokens(some.ids[wanted], some.mask[wanted]))

    def numbers(self, rows: int) -> Tensor:
        """``[rows]`` int32: the lowest row of each text's family, when all texts have been compared."""
        numbers = self.families.numbers(rows)
        sizes = torch.bincount(numbers.long(), minlength=rows)
        self._related = sizes[numbers.long()] > 1
        return numbers

    def features(self, table: LossTable, rows: Tensor, family: Tensor) -> tuple[Tensor, Tensor]:
        """Those of ``rows`` whose texts are known, and their matching features ``[N, F]`` without the family's counts.

        Args:
            table: of the samples.
            rows: all texts of some families.
            family: ``[V]`` the family of each.
        """
        has_text = self.texts.has(rows)
        exposures = table.exposures[rows].double()
        groups = torch.unique(family, return_inverse=True)[1]
        in_all, known = (torch.bincount(groups, each) for each in (exposures, exposures * has_text))
        rows, groups, exposures = rows[has_text], groups[has_text], exposures[has_text]
        # Texts of the family that were forgotten count as much as those that are known.
        weight = (exposures * (in_all / known.clamp(min=1))[groups]).float()
        features = table.features[rows].float()
        if len(rows):
            features[:, :3] = leave_family_out(self.counts, self.texts.of(rows), weight, groups)
        return rows, features

    def state_dict(self) -> dict[str, Any]:
        return {**self.families.state_dict(), "texts": self.texts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the families and the texts that are remembered."""
        texts = state.get("texts", {})
        state = {name: part for name, part in state.items() if name != "texts"}
        self.texts.load_state_dict(texts)
        self.families.load_state_dict(state)
        rows = state["rows"] if state else torch.zeros(0, dtype=torch.int64)
        self.numbers(int(rows.max()) + 1 if len(rows) else 0)


def leave_family_out(counts: NgramCounts, tokens: Tokens, exposures: Tensor, groups: Tensor) -> Tensor:
    """``[N, 3]`` unigram and bigram likelihood and familiarity of texts, by the counts of all other families' texts.

    Args:
        counts: of the training text.
        tokens: ``[N, T]``, all texts of each family.
        exposures: ``[N]`` how often each text was counted.
        groups: ``[N]`` number of its family.
    """
    text = counts.look_up(tokens.ids, tokens.mask)
    lengths = text.counted.sum(1) * exposures
    in_family = torch.bincount(groups, lengths.double())[groups, None].float()
    singles = _in_group(text.single, text.counted, exposures, groups)
    pairs = _in_group(text.pair, text.paired, exposures, groups)
    likelihood = counts.nll_without(text, singles, pairs, in_family)
    runs = _in_group(text.run, text.whole, exposures, groups)
    return torch.cat([likelihood, counts.familiarity_without(text, runs)[:, None]], 1)


def _in_group(buckets: Tensor, mask: Tensor, exposures: Tensor, groups: Tensor) -> Tensor:
    """``[N, S]`` how often each bucket was counted for all texts of the group; 0 where ``mask`` is False."""
    found = torch.zeros(buckets.shape)
    if not mask.any():
        return found
    keys = (groups[:, None] * (int(buckets.max()) + 1) + buckets)[mask]
    distinct, inverse = torch.unique(keys, return_inverse=True)
    times = torch.zeros(len(distinct), dtype=torch.float64)
    times.index_add_(0, inverse, exposures[:, None].expand(buckets.shape)[mask].double())
    found[mask] = times[inverse].float()
    return found
