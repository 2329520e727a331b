"""The suspected texts of an audit, or its controls, with what was measured of each.

N  texts      T  tokens      F  matching features
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memsink.extraction.audit.texts import Encoded, Text
from lightning_memsink.extraction.probe import ExtractionResults


@dataclass(frozen=True)
class Cohort:
    """Texts, the results of probing the model with each, and the features that they are matched on."""

    texts: Sequence[Text]
    encoded: Encoded
    results: ExtractionResults
    scores: dict[str, Tensor]
    """Membership scores, ``[N]`` by name; a larger score means more likely trained on."""
    features: Tensor
    """``[N, F]`` of difficulty: tokens (logarithm), characters per token, compressed bits per character; then of kind,
    if `with_kind_features` added them."""

    @property
    def tokens(self) -> Tensor:
        """``[N]`` number of tokens used of each text."""
        return self.encoded.mask.sum(1)


def cohort_of(texts: Sequence[Text], encoded: Encoded, results: ExtractionResults) -> Cohort:
    """The cohort of ``texts``, with membership scores and features of difficulty computed from the results."""
    loss, tokens = results.loss.double(), encoded.mask.sum(1)
    compressed = torch.tensor([len(zlib.compress(text.text.encode())) for text in texts])
    characters = torch.tensor([len(text.text) for text in texts])
    scores = {
        "loss": -loss,
        "zlib": -loss * (tokens - 1) / compressed,
        "min-k%": results.min_k.double(),
        "min-k%++": results.min_k_plus_plus.double(),
    }
    features = torch.stack([tokens.double().log(), characters / tokens, 8 * compressed / characters], 1).float()
    return Cohort(texts, encoded, results, scores, features)
