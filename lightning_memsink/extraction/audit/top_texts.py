"""A closer look at the texts that stand out most: what the model really says, whether it says so after any beginning,
and, if wanted, which units carry them.

C  texts looked at      U  units of a hidden layer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_memsink._evaluation import isolated_eval
from lightning_memsink.attribution.attribute import attribute
from lightning_memsink.attribution.hidden_layers import HiddenLayer, find_hidden_layers
from lightning_memsink.attribution.unit_effects import shares
from lightning_memsink.detection.statistics import LN2
from lightning_memsink.extraction.audit.model_loading import Subject
from lightning_memsink.extraction.audit.texts import Encoded
from lightning_memsink.extraction.functional import prior_log_ratio, suffix_log_prob
from lightning_memsink.extraction.metrics import edit_similarity
from lightning_memsink.localization.concentration import Concentration, NotTested, concentration_test
from lightning_memsink.localization.locate import locate
from lightning_memsink.localization.sinks import Sinks

OTHER_BEGINNINGS = 4
"""Of controls, that a text's rest is tried after."""


@dataclass(frozen=True)
class TopTexts:
    """At the texts of ``rows``, ``[C]`` places among the suspected ones."""

    rows: list[int]
    similarity: Tensor
    """``[C]`` 1 minus the edit distance of what greedy generation says and the text's rest, by the longer one's length
    in characters."""
    own_beginning: Tensor
    """``[C]`` bits by which the rest is likelier after the text's own beginning than after those of controls. Small for
    what is said after anything."""


def examine_top_texts(
    subject: Subject, suspects: Encoded, controls: Encoded, rows: Sequence[int], prefix: int,
    advance: Callable[[int], object],
) -> TopTexts:  # fmt: skip
    """``rows``: of ``suspects``, each longer than ``prefix``. One generation and one forward each."""
    long = (controls.mask.sum(1) >= prefix).nonzero().flatten()
    others = controls.tokens[long[:: max(1, len(long) // OTHER_BEGINNINGS)][:OTHER_BEGINNINGS], :prefix]
    said, true, ratios = [], [], []
    for row in rows:
        tokens = suspects.tokens[row, : int(suspects.mask[row].sum())]
        rest = tokens[prefix:]
        said.append(subject.tokenizer.decode(_generated(subject, tokens[:prefix], len(rest))))
        true.append(subject.tokenizer.decode(rest))
        ratios.append(_ratio(subject, tokens, others, prefix) if len(others) else torch.tensor([torch.nan]))
        advance(1)
    own = torch.cat([torch.zeros(0), *ratios]) / LN2
    return TopTexts(list(rows), edit_similarity(said, true) if said else torch.zeros(0), own)


@torch.no_grad()
def _generated(subject: Subject, start: Tensor, many: int) -> Tensor:
    # Without an end: the text goes on, and what is compared with it is as long.
    config = {"do_sample": False, "max_new_tokens": many, "eos_token_id": None, "pad_token_id": 0}
    found: Tensor = subject.model.generate(start[None], attention_mask=torch.ones_like(start)[None], **config)
    return found[0, len(start) :]


@torch.no_grad()
def _ratio(subject: Subject, tokens: Tensor, others: Tensor, prefix: int) -> Tensor:
    """``[1]`` nats."""
    rest = tokens[prefix:].expand(len(others), -1)
    shown = torch.cat([tokens[None], torch.cat([others, rest], 1)])
    log_probs = suffix_log_prob(subject.model(input_ids=shown).logits, shown, prefix)
    return prior_log_ratio(log_probs[:1], log_probs[None, 1:])


@dataclass(frozen=True)
class LocalizedUnits:
    """Which units carry the texts called memorized, more than controls."""

    sinks: Sinks
    concentration: Concentration | NotTested


def locate_units(
    subject: Subject, suspects: Encoded, targets: Sequence[int], controls: Encoded, likes: Sequence[int],
    fraction: float, batch_size: int,
) -> LocalizedUnits:  # fmt: skip
    """``targets``: rows of ``suspects``; ``likes``: of ``controls``, those most like them.

    Raises:
        ValueError: the model has no hidden layers that are known.
    """
    layers = find_hidden_layers(subject.model)
    with isolated_eval(subject.model):
        target, control = (
            _shares(subject, layers, some, rows, batch_size) for some, rows in ((suspects, targets), (controls, likes))
        )
    flagged, unflagged = (torch.cat(list(each.values()), 1).abs() for each in (target, control))
    return LocalizedUnits(locate(target, control, fraction), concentration_test(flagged, unflagged))


def _shares(
    subject: Subject, layers: Sequence[HiddenLayer], encoded: Encoded, rows: Sequence[int], batch_size: int
) -> dict[str, Tensor]:
    """Signed, ``[N, U]`` by layer."""
    parts = []
    for chosen in torch.tensor(rows).split(batch_size):
        mask = encoded.mask[chosen]
        width = int(mask.sum(1).max())
        shown, mask = encoded.tokens[chosen, :width], mask[:, :width]
        inputs = {"input_ids": shown, "attention_mask": mask.long(), "labels": shown.where(mask, -100)}
        parts.append(attribute(partial(_loss, subject, inputs), layers, len(chosen)))
    return shares({layer.name: torch.cat([part[layer.name] for part in parts]) for layer in layers}, signed=True)


def _loss(subject: Subject, inputs: dict[str, Tensor]) -> Tensor:
    loss: Tensor = subject.model(**inputs).loss
    return loss
