"""Cases: losses of tokens, in the layouts that people flatten, mask, cut and shuffle them into.

Batches are ``{"x", "y": [B, T]}``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.capture.case import BATCH, cases, family
from benchmarks.capture.data import (
    CLASS_WEIGHT,
    IGNORED,
    C,
    T,
    counted,
    numbers,
    tagger,
    time_major,
    tokens,
)

ragged = family(data=tokens(), network=tagger(), shares=counted)
whole = family(data=tokens(ragged=False), network=tagger())
square = family(data=tokens(BATCH), network=tagger(), shares=counted)


def flat(model: Any, batch: Any, **options: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]).view(-1, C), batch["y"].view(-1), **options)


def transposed(model: Any, batch: Any) -> Tensor:
    logits = model(batch["x"].t())  # [T, B, C]
    return F.cross_entropy(logits.reshape(-1, C), batch["y"].t().reshape(-1))


def transposed_logits(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]).transpose(0, 1).reshape(-1, C), batch["y"].t().flatten())


def shifted(model: Any, batch: Any) -> Tensor:
    logits, labels = model(batch["x"])[:, :-1].contiguous(), batch["y"][:, 1:].contiguous()
    return F.cross_entropy(logits.view(-1, C), labels.view(-1))


def padded_labels(model: Any, batch: Any) -> Tensor:
    labels = F.pad(batch["y"], (0, 1), value=IGNORED)[..., 1:].contiguous()
    return F.cross_entropy(model(batch["x"]).view(-1, C), labels.view(-1))


def counted_but_first(batch: Any) -> Tensor:
    return counted({"y": batch["y"][:, 1:]})


def unreduced(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"].clamp(min=0), reduction="none")
    return losses, (batch["y"] != IGNORED).to(losses.dtype)


def masked_mean(model: Any, batch: Any) -> Tensor:
    losses, mask = unreduced(model, batch)
    return (losses * mask).sum() / mask.sum()


def mean_of_means(model: Any, batch: Any) -> Tensor:
    losses, mask = unreduced(model, batch)
    return ((losses * mask).sum(1) / mask.sum(1)).mean()


def masked_plain_mean(model: Any, batch: Any) -> Tensor:
    losses, mask = unreduced(model, batch)
    return (losses * mask).mean()


def selected_losses(model: Any, batch: Any) -> Tensor:
    losses, mask = unreduced(model, batch)
    return losses[mask.bool()].mean()


def selected_tokens(model: Any, batch: Any) -> Tensor:
    mask = batch["y"] != IGNORED
    return F.cross_entropy(model(batch["x"])[mask], batch["y"][mask])


def masked_select(model: Any, batch: Any) -> Tensor:
    mask = batch["y"] != IGNORED
    logits = model(batch["x"]).masked_select(mask[..., None]).view(-1, C)
    return F.cross_entropy(logits, batch["y"].masked_select(mask))


def token_weights(model: Any, batch: Any) -> Tensor:
    losses, mask = unreduced(model, batch)
    weights = mask * torch.linspace(0.5, 2, losses.shape[1]).to(losses.dtype)
    return (losses * weights).sum() / weights.sum()


def by_token_weight(batch: Any) -> Tensor:
    weights = ((batch["y"] != IGNORED) * torch.linspace(0.5, 2, batch["y"].shape[1])).sum(1).double()
    return weights / weights.sum()


def class_weights(model: Any, batch: Any, **options: Any) -> Tensor:
    logits = model(batch["x"])
    return F.cross_entropy(logits.view(-1, C), batch["y"].view(-1), CLASS_WEIGHT.to(logits.dtype), **options)


def by_class_weights(batch: Any) -> Tensor:
    weights = torch.where(batch["y"] == IGNORED, 0, CLASS_WEIGHT[batch["y"].clamp(min=0)]).sum(1).double()
    return weights / weights.sum()


def per_item(model: Any, batch: Any) -> Tensor:
    num_items_in_batch = 40  # of all accumulated batches, as transformers counts them
    return flat(model, batch, reduction="sum") / num_items_in_batch


def items(batch: Any) -> Tensor:
    return (batch["y"] != IGNORED).sum(1).double()


def last_token(model: Any, batch: Any) -> Tensor:
    last = (batch["y"] != IGNORED).sum(1) - 1
    rows = torch.arange(len(last))
    return F.cross_entropy(model(batch["x"])[rows, last], batch["y"][rows, last])


def gathered_positions(model: Any, batch: Any) -> Tensor:
    positions = torch.tensor([[0, 2, 3]]).expand(len(batch["x"]), -1)
    logits = model(batch["x"]).gather(1, positions[..., None].expand(-1, -1, C))
    return F.cross_entropy(logits.flatten(0, 1), batch["y"].gather(1, positions).flatten())


def by_position(model: Any, batch: Any) -> Tensor:
    logits = model(batch["x"])
    return sum(F.cross_entropy(logits[:, t], batch["y"][:, t]) for t in range(T)) / T


def shuffled(model: Any, batch: Any) -> Tensor:
    order = torch.randperm(len(batch["x"]), generator=numbers(11))
    return flat(model, {"x": batch["x"][order], "y": batch["y"][order]})


def half(select: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """A step that trains on some of the samples, and the others' lack of a loss."""

    def chosen(batch: Any) -> Tensor:
        rows = torch.arange(len(batch["x"]))
        return torch.isin(rows, select(rows)) if len(rows) > 1 else torch.tensor([True])

    def step(model: Any, batch: Any) -> Tensor:
        return flat(model, {key: select(value).contiguous() for key, value in batch.items()})

    def rows(model: Any, batch: Any) -> Tensor:
        losses = F.cross_entropy(model(batch["x"]).transpose(1, 2), batch["y"], reduction="none").sum(1)
        return torch.where(chosen(batch), losses / items(batch).to(losses.dtype), torch.nan)

    def shares(batch: Any) -> Tensor:
        count = items(batch) * chosen(batch)
        return count / count.sum()

    return {"step": step, "rows": rows, "shares": shares, "unit": "none for samples left out"}


def index_select(value: Tensor) -> Tensor:
    return value.index_select(0, torch.tensor([3, 1, 0]))


def in_chunks(model: Any, batch: Any) -> Tensor:
    logits, labels = model(batch["x"]).view(-1, C), batch["y"].view(-1)
    losses = [F.cross_entropy(a, b, reduction="sum") for a, b in zip(logits.split(10), labels.split(10), strict=True)]
    return sum(losses) / (labels != IGNORED).sum()


def mean_of_chunks(model: Any, batch: Any) -> Tensor:
    logits, labels = model(batch["x"]).view(-1, C), batch["y"].view(-1)
    parts = zip(logits.chunk(4), labels.chunk(4), strict=True)
    return torch.stack([F.cross_entropy(a, b) for a, b in parts]).mean()


def micro_batches(model: Any, batch: Any) -> Tensor:
    loss = 0
    for x, y in zip(batch["x"].chunk(2), batch["y"].chunk(2), strict=True):
        loss = loss + F.cross_entropy(model(x).view(-1, C), y.reshape(-1), reduction="sum")
    return loss / (batch["y"] != IGNORED).sum()


def mean_of_micro_batches(model: Any, batch: Any) -> Tensor:
    parts = list(zip(batch["x"].chunk(2), batch["y"].chunk(2), strict=True))
    return sum(flat(model, {"x": x.contiguous(), "y": y.contiguous()}) for x, y in parts) / len(parts)


def one_by_one(model: Any, batch: Any) -> Tensor:
    losses = [F.cross_entropy(model(x), y) for x, y in zip(batch["x"], batch["y"], strict=True)]
    return torch.stack(losses).mean()


def stepwise(model: Any, batch: Any) -> Tensor:
    loss = 0
    for t in range(T):
        loss = loss + F.cross_entropy(model(batch["x"][:, t]), batch["y"][:, t]) / T
    return loss


def sequence_log_likelihood(model: Any, batch: Any) -> Tensor:
    mask = batch["y"] != IGNORED
    log_p = model(batch["x"]).log_softmax(-1).gather(-1, batch["y"].clamp(min=0)[..., None])[..., 0]
    return -(log_p * mask).sum(-1).mean()


SEQUENCES = cases(
    "tokens",
    ragged("[B, T] flattened", flat),
    ragged("[B, C, T]", lambda m, b: F.cross_entropy(m(b["x"]).transpose(1, 2), b["y"])),
    ragged("transposed in the step, [T, B] flattened", transposed),
    ragged("logits transposed, flattened", transposed_logits),
    ragged("time-major loss [T, C, B]", lambda m, b: F.cross_entropy(m(b["x"].t()).transpose(1, 2), b["y"].t())),
    square("B equal to T, [B, T] flattened", flat),
    square("B equal to T, transposed and flattened", transposed),
    square("B equal to T, time-major loss", lambda m, b: F.cross_entropy(m(b["x"].t()).transpose(1, 2), b["y"].t())),
    ragged("shifted by one, [:, :-1]", shifted, shares=counted_but_first),
    ragged("shifted by one, padded labels", padded_labels, shares=counted_but_first),
    ragged(
        "ignored class 0",
        lambda m, b: flat(m, {"x": b["x"], "y": b["y"].clamp(min=0)}, ignore_index=0),
        shares=lambda b: (b["y"] > 0).sum(1).double() / (b["y"] > 0).sum(),
    ),
    ragged("label smoothing of tokens", lambda m, b: flat(m, b, label_smoothing=0.1)),
    ragged("class weights of tokens", class_weights, shares=by_class_weights),
    ragged(
        "class weights and smoothing of tokens",
        lambda m, b: class_weights(m, b, label_smoothing=0.1),
        shares=by_class_weights,
    ),
    ragged("a sum over tokens", lambda m, b: flat(m, b, reduction="sum"), alone=flat, shares=items),
    ragged("a sum over num_items", per_item, alone=flat, shares=lambda b: items(b) / 40),
    ragged("masked mean", masked_mean),
    ragged("masked losses, plain mean", masked_plain_mean, alone=masked_mean, shares=lambda b: items(b) / (BATCH * T)),
    ragged("mean of the samples' means", mean_of_means, shares=None),
    ragged("losses picked by a mask", selected_losses),
    ragged("tokens picked by a mask", selected_tokens),
    ragged("masked_select", masked_select),
    ragged("weights of tokens", token_weights, shares=by_token_weight),
    ragged(
        "summed log-likelihoods of sequences",
        sequence_log_likelihood,
        shares=None,
        also=lambda b: 1 / items(b),
        unit="summed, as the step does",
    ),
    ragged("last tokens by index", last_token, shares=None),
    whole("positions by gather", gathered_positions),
    whole("a loss for each position", by_position),
    whole("a forward for each position", stepwise),
    ragged("a forward for each sample", one_by_one, shares=None),
    ragged("shuffled in the step", shuffled),
    ragged("the first half of the batch", **half(lambda value: value[: (len(value) + 1) // 2])),
    ragged("every other sample", **half(lambda value: value[1::2] if len(value) > 1 else value)),
    ragged("index_select of samples", **half(index_select)),
    ragged("chunks of tokens", in_chunks),
    whole("mean of chunks' means", mean_of_chunks, alone=flat),
    ragged("micro-batches, summed", micro_batches),
    whole("micro-batches, mean of means", mean_of_micro_batches),
    ragged("collated as [T, B]", flat, data=tokens(collate=time_major), shares=lambda b: counted({"y": b["y"].t()})),
    square(
        "collated as [T, B], B equal to T",
        flat,
        data=tokens(BATCH, collate=time_major),
        shares=lambda b: counted({"y": b["y"].t()}),
    ),
)
