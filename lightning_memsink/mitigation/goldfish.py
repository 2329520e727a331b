"""The goldfish loss (Hans et al. 2024, "Be like a Goldfish, Don't Memorize!"): some target tokens are never trained on.

A hash of the tokens before a target decides whether it is dropped. So a passage loses the same tokens wherever it
occurs, and a model that repeats the passage has to guess them. The published hash multiplies token ids: it does not
depend on their order, a single token id 0 decides it, and its window includes the target. The hash here has none of
these defects.

    B  samples in a batch      R  target tokens of all samples      h  context tokens
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_memsink.losses.autograd_graph import FoundCall
from lightning_memsink.losses.per_sample import terms_of
from lightning_memsink.losses.readers import is_likelihood, saved_value
from lightning_memsink.losses.reweighting import OpenLoss
from lightning_memsink.losses.sample_rows import SampleRows
from lightning_memsink.losses.unreadable import UnreadableLoss
from lightning_memsink.samples.hashing import GOLDEN_64, logical_shift, splitmix64

_BITS = 31


def dropped_targets(targets: Tensor, samples: Tensor, counted: Tensor, k: int, context: int, seed: int = 0) -> Tensor:
    """Bool ``[R]``: the targets to drop, about one in ``k``.

    A target is kept if its sample has fewer than ``context`` targets before it, or if one among those is not counted
    (padding, a masked prompt): its context is not that of the passage. So is one that is of no sample, as the first
    token of a document that another one precedes in its row.

    Args:
        targets: ``[R]`` int64 token ids, in the order of each sample's text; samples may be interleaved.
        samples: ``[R]`` number of the sample that each target belongs to; negative for none.
        counted: bool ``[R]``, False for ignored targets.
        k: one in k targets is dropped.
        context: h, the number of targets hashed.
        seed: of the hash.
    """
    drop = torch.zeros_like(counted)
    order = samples.argsort(stable=True)
    if len(order) <= context:
        return drop
    text, owner, counted = targets[order].long(), samples[order], counted[order]
    key = splitmix64(torch.full((), seed, dtype=torch.int64, device=text.device) + 1)
    weights = splitmix64(torch.arange(1, context + 1, device=text.device) * GOLDEN_64 + key) | 1
    before = (text[:-1].unfold(0, context, 1) * weights).sum(1)  # odd weights, all different: order counts
    chosen = logical_shift(splitmix64(before + key), 64 - _BITS) < (1 << _BITS) // k
    whole = counted[:-1].unfold(0, context, 1).all(1) & (owner[:-context] == owner[context:]) & counted[context:]
    drop[order[context:]] = chosen & whole & (owner[context:] >= 0)
    return drop


def drop_targets(opened: OpenLoss, k: int, context: int, seed: int = 0) -> Tensor:
    """Removes the gradient of the dropped targets from the backward of ``opened``, and scales that of the others up.

    The others are scaled by total over kept coefficients, so that the loss stays a mean over the kept targets.

    Args:
        opened: a loss before its backward.
        k, context, seed: as in `dropped_targets`.

    Returns:
        ``[2]`` on the device of the loss: the number of samples that lost a target, and the dropped share (0…1) of the
        loss's coefficients.

    Raises:
        UnreadableLoss: the loss is no cross entropy of tokens.
    """
    size = opened.batch_size
    token_losses = [each for each in opened.calls if is_likelihood(_node(each)) and each.call.losses.numel() != size]
    if not token_losses:
        kinds = ", ".join(dict.fromkeys(each.call.kind for each in opened.calls))
        raise UnreadableLoss(
            f"the loss is {kinds}, which has no targets [B, T]. Use it where a cross entropy of tokens, without label "
            "smoothing, is trained"
        )
    drops = [drop for text in _texts(token_losses, size) for drop in _dropped_in_text(text, k, context, seed)]
    coefficients = []
    for each in token_losses:
        weights, scale = each.call.coefficients()
        coefficients.append((weights * scale).reshape(-1))
    total = torch.stack([part.sum() for part in coefficients]).sum()
    lost = torch.stack([torch.where(drop, part, 0).sum() for part, drop in zip(coefficients, drops, strict=True)]).sum()
    factor = torch.where(lost < total, total / (total - lost), 0.0)
    hits = torch.zeros(size + 1, dtype=torch.int64, device=total.device)  # the last place is of targets of no sample
    for each, drop in zip(token_losses, drops, strict=True):
        opened.weigh_elements(each, torch.where(drop, 0.0, factor))
        hits.index_add_(0, _sample_of_target(each).clamp(min=-1) % (size + 1), drop.long())
    return torch.stack([(hits[:size] > 0).sum().float(), (lost / total).nan_to_num().float()])


def _texts(calls: list[FoundCall], size: int) -> list[list[FoundCall]]:
    """Groups of loss calls: the chunks of one text, in the order they were made, or each call by itself."""
    chunks = terms_of([each.call for each in calls], size)
    return [calls] if len(chunks) == 1 else [[each] for each in calls]


def _dropped_in_text(text: Sequence[FoundCall], k: int, context: int, seed: int) -> list[Tensor]:
    """A bool mask of the dropped targets for each call of ``text``."""
    targets = torch.cat([saved_value(_node(each), "target").reshape(-1) for each in text])
    counted = torch.cat(
        [(saved_value(_node(each), "target") != saved_value(_node(each), "ignore_index")).reshape(-1) for each in text]
    )
    samples = torch.cat([_sample_of_target(each) for each in text])
    drop = dropped_targets(targets, samples, counted, k, context, seed)
    return list(torch.split(drop, [each.call.losses.numel() for each in text]))


def _node(each: FoundCall) -> Node:
    """The node whose gradients are weighed."""
    return each.node if each.weigh_at is None else each.weigh_at


def _sample_of_target(each: FoundCall) -> Tensor:
    """``[R]``: the number of the sample that each target of a call belongs to."""
    assert isinstance(each.call.rows, SampleRows)  # an `OpenLoss` has no others
    return each.call.rows.flat(each.call.losses.shape, each.call.losses.device)
