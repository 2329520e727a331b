"""The top texts of an audit, those with the largest gaps: the generated continuations, and the effect of the prefix.

C  top texts
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_memsink.detection.statistics import LN2
from lightning_memsink.extraction.audit.model_loading import Subject
from lightning_memsink.extraction.audit.texts import Encoded
from lightning_memsink.extraction.functional import prior_log_ratio, suffix_log_prob
from lightning_memsink.extraction.metrics import edit_similarity

OTHER_PREFIXES = 4
"""Prefixes of controls after which the suffix of a top text is scored."""


@dataclass(frozen=True)
class TopTexts:
    """Results for the ``C`` suspected texts in ``rows``."""

    rows: list[int]
    similarity: Tensor
    """``[C]`` in 0…1: 1 minus the edit distance in characters between what greedy decoding generates and the text's
    suffix, divided by the length of the longer one."""
    prefix_bits: Tensor
    """``[C]`` bits by which the suffix is more likely after the text's own prefix than after those of controls. Small
    for a suffix that is likely after any prefix; NaN if no control is long enough."""


def examine_top_texts(
    subject: Subject,
    suspects: Encoded,
    controls: Encoded,
    rows: Sequence[int],
    prefix: int,
    advance: Callable[[int], object],
) -> TopTexts:
    """Generates after the prefix of each top text, and scores its suffix after prefixes of controls.

    Args:
        subject: the model.
        suspects: all suspected texts.
        controls: all controls.
        rows: the top texts, rows of ``suspects``; each is longer than ``prefix``.
        prefix: tokens that the model is given.
        advance: is called with 1 after each text.
    """
    long = (controls.mask.sum(1) >= prefix).nonzero().flatten()
    others = controls.tokens[long[:: max(1, len(long) // OTHER_PREFIXES)][:OTHER_PREFIXES], :prefix]
    generated, suffixes, ratios = [], [], []
    for row in rows:
        tokens = suspects.tokens[row, : int(suspects.mask[row].sum())]
        suffix = tokens[prefix:]
        generated.append(subject.tokenizer.decode(_generate(subject, tokens[:prefix], len(suffix))))
        suffixes.append(subject.tokenizer.decode(suffix))
        ratios.append(_prior_log_ratio(subject, tokens, others, prefix) if len(others) else torch.tensor([torch.nan]))
        advance(1)
    bits = torch.cat([torch.zeros(0), *ratios]) / LN2
    return TopTexts(list(rows), edit_similarity(generated, suffixes) if generated else torch.zeros(0), bits)


@torch.no_grad()
def _generate(subject: Subject, prefix: Tensor, length: int) -> Tensor:
    """The ``length`` tokens that greedy decoding generates after ``prefix``."""
    # No end-of-sequence token, so that the continuation has the length of the suffix that it is compared with.
    options = {"do_sample": False, "max_new_tokens": length, "eos_token_id": None, "pad_token_id": 0}
    tokens: Tensor = subject.model.generate(prefix[None], attention_mask=torch.ones_like(prefix)[None], **options)
    return tokens[0, len(prefix) :]


@torch.no_grad()
def _prior_log_ratio(subject: Subject, tokens: Tensor, others: Tensor, prefix: int) -> Tensor:
    """``[1]`` nats."""
    suffix = tokens[prefix:].expand(len(others), -1)
    sequences = torch.cat([tokens[None], torch.cat([others, suffix], 1)])
    log_probs = suffix_log_prob(subject.model(input_ids=sequences).logits, sequences, prefix)
    return prior_log_ratio(log_probs[:1], log_probs[None, 1:])
