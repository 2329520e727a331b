"""Some target tokens are never trained on, always the same ones of a passage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_memsink.callbacks.mitigation import LossWeighing
from lightning_memsink.losses.per_sample import samples_by_offset
from lightning_memsink.losses.reweighting import OpenCall, OpenLoss, Unweighable
from lightning_memsink.losses.saved_tensors import NEGATIVE_LIKELIHOOD, signed
from lightning_memsink.mitigation.goldfish import dropped
from lightning_memsink.mitigation.intervention_log import InterventionLog


class Goldfish(LossWeighing):
    """Drops about one in ``k`` target tokens from the gradient, by a hash of the ``context`` targets before each.

    The others are scaled up by total over kept, so that a batch's loss stays a mean: over the kept tokens of the batch
    (in several processes, of each one's batch). The loss that is shown and the ledger's losses are over all tokens.
    Needs no other callback. Of a loss computed in chunks along time, the first ``context`` targets of each are kept.

    Args:
        k: at least 2; the paper has 4 (and says that 4/3 as much text then teaches as much).
        context: targets hashed, 13 in the paper. Fewer are in more passages the same.
        seed: another choice of tokens.
    """

    def __init__(self, k: int = 4, context: int = 13, seed: int = 0) -> None:
        if k < 2:
            raise ValueError(f"k: one in k tokens is dropped, so it is at least 2, but it is {k}.")
        if context < 1:
            raise ValueError(f"context is a number of tokens, at least 1, but it is {context}.")
        super().__init__()
        self.k, self.context, self.seed = k, context, seed
        self.interventions = InterventionLog(
            f"leaves one in {k} target tokens out of the gradient, by their context", "tokens"
        )
        self._counts: tuple[int, Tensor] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._counts = None

    def _weigh(self, opened: OpenLoss) -> None:
        self._counts = opened.batch_size, self.drop(opened)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._counts is not None:
            visits, counts = self._counts
            acted, removed = counts.tolist()
            self.interventions.add(visits, int(acted), removed)

    def drop(self, opened: OpenLoss) -> Tensor:
        """Weighs the targets, and returns ``[2]``: samples that lost one, and the share of coefficients dropped."""
        size = opened.batch_size
        texts = [
            each
            for each in opened.calls
            if each.node.name() in NEGATIVE_LIKELIHOOD and each.call.losses.numel() != size
        ]
        if not texts:
            kinds = ", ".join(dict.fromkeys(each.call.kind for each in opened.calls))
            raise Unweighable(
                f"the loss is {kinds}, with no targets [B, T] to be read. Use it where a cross entropy of tokens, "
                "without label smoothing, is trained"
            )
        outs = [out for group in _passages(texts, size) for out in self._choose(group, size)]
        coefficients = []
        for each in texts:
            weights, scale = each.call.coefficients()
            coefficients.append((weights * scale).reshape(-1))
        total = torch.stack([part.sum() for part in coefficients]).sum()
        lost = torch.stack([part[out].sum() for part, out in zip(coefficients, outs, strict=True)]).sum()
        factor = torch.where(lost < total, total / (total - lost), 0.0)
        touched = torch.zeros(size, dtype=torch.bool, device=total.device)
        for each, out in zip(texts, outs, strict=True):
            opened.weigh_runs(each, torch.where(out, 0.0, factor))
            touched[_samples(each, size)[out]] = True
        return torch.stack([touched.sum().float(), (lost / total).nan_to_num().float()])

    def _choose(self, group: Sequence[OpenCall], size: int) -> list[Tensor]:
        targets = torch.cat([each.node._saved_target.reshape(-1) for each in group])
        counted = torch.cat(
            [(each.node._saved_target != signed(each.node._saved_ignore_index)).reshape(-1) for each in group]
        )
        samples = torch.cat([_samples(each, size) for each in group])
        out = dropped(targets, samples, counted, self.k, self.context, self.seed)
        sizes = [each.call.losses.numel() for each in group]
        return list(torch.split(out, sizes))


def _passages(texts: list[OpenCall], size: int) -> list[list[OpenCall]]:
    """Calls whose targets follow on one another are one text, in the order they were made."""
    return [texts] if samples_by_offset([each.call for each in texts], size) else [[each] for each in texts]


def _samples(each: OpenCall, size: int) -> Tensor:
    """The sample of each target."""
    owners = torch.arange(size, device=each.call.losses.device) if each.owners is None else each.owners
    return owners.repeat_interleave(each.call.losses.numel() // max(1, len(owners)))
