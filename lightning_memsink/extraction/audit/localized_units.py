"""The hidden units that carry the texts called memorized.

N  texts      U  units of a hidden layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lightning_memsink._evaluation import isolated_eval
from lightning_memsink.attribution.attribute import attribute
from lightning_memsink.attribution.hidden_layers import HiddenLayer, find_hidden_layers
from lightning_memsink.attribution.unit_effects import shares
from lightning_memsink.extraction.audit.model_loading import Subject
from lightning_memsink.extraction.audit.texts import Encoded
from lightning_memsink.localization.concentration import Concentration, NotTested, concentration_test
from lightning_memsink.localization.locate import locate
from lightning_memsink.localization.sinks import Sinks


@dataclass(frozen=True)
class LocalizedUnits:
    """Units that carry the texts called memorized more than controls, and a test of how concentrated they are."""

    sinks: Sinks
    concentration: Concentration | NotTested


def locate_units(
    subject: Subject, memorized: Encoded, controls: Encoded, fraction: float, batch_size: int
) -> LocalizedUnits:
    """Units whose signed shares of the loss differ most between texts called memorized and similar controls.

    Args:
        subject: the model.
        memorized: texts called memorized.
        controls: controls similar to them.
        fraction: share of all units that is localized.
        batch_size: texts in a forward pass.

    Raises:
        ValueError: the model has no known hidden layers.
    """
    layers = find_hidden_layers(subject.model)
    with isolated_eval(subject.model):
        target, control = (_signed_shares(subject, layers, texts, batch_size) for texts in (memorized, controls))
    flagged, unflagged = (torch.cat(list(each.values()), 1).abs() for each in (target, control))
    return LocalizedUnits(locate(target, control, fraction), concentration_test(flagged, unflagged))


def _signed_shares(
    subject: Subject, layers: Sequence[HiddenLayer], texts: Encoded, batch_size: int
) -> dict[str, Tensor]:
    """By layer, ``[N, U]``: each unit's share of a text's loss, with its sign."""
    parts = []
    for rows in torch.arange(len(texts.mask)).split(batch_size):
        batch = texts.select(rows)
        labels = batch.tokens.where(batch.mask, -100)
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask.long(), "labels": labels}
        parts.append(attribute(partial(_loss, subject, inputs), layers, len(rows)))
    return shares({layer.name: torch.cat([part[layer.name] for part in parts]) for layer in layers}, signed=True)


def _loss(subject: Subject, inputs: dict[str, Tensor]) -> Tensor:
    loss: Tensor = subject.model(**inputs).loss
    return loss
