"""Cases: contrastive losses, rankings and preferences: two views of a sample, or two answers to it.

Batches are ``{"one", "two": [B, D], "y": [B]}`` unless said otherwise. In a batch of one there is nothing to contrast,
so that the truth is a formula for the rows of the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.capture.case import BATCH, cases, family
from benchmarks.capture.data import C, D, H, mlp, numbers, split, tagger, vectors_with, views

pair = family(data=views, network=mlp(H))
scored = family(data=views, network=mlp(1))
SCALE = 0.5


def both(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """``[B, H]`` unit vectors of the two views."""
    return F.normalize(model(batch["one"]), dim=-1), F.normalize(model(batch["two"]), dim=-1)


# In the batch ------------------------------------------------------------------------------------------------


def ntxent_rows(z: Tensor, partner: Tensor) -> Tensor:
    """``[2B]`` each view's loss, from the definition."""
    similarity = torch.exp(z @ z.T / SCALE)
    others = similarity.sum(1) - similarity.diagonal()
    return -torch.log(similarity.gather(1, partner[:, None])[:, 0] / others)


def simclr(model: Any, batch: Any) -> Tensor:
    z = F.normalize(model(torch.cat([batch["one"], batch["two"]])), dim=-1)
    similarity = (z @ z.T / SCALE).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    return F.cross_entropy(similarity, torch.arange(len(z)).roll(len(z) // 2))


def simclr_interleaved(model: Any, batch: Any) -> Tensor:
    z = F.normalize(model(torch.stack([batch["one"], batch["two"]], 1).flatten(0, 1)), dim=-1)
    similarity = (z @ z.T / SCALE).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
    return F.cross_entropy(similarity, torch.arange(len(z)) ^ 1)


def simclr_by_hand(model: Any, batch: Any) -> Tensor:
    z = torch.cat(both(model, batch))
    similarity = torch.exp(z @ z.T / SCALE)
    others = similarity.masked_select(~torch.eye(len(z), dtype=torch.bool)).view(len(z), -1).sum(-1)
    positive = torch.exp((z * z.roll(len(z) // 2, 0)).sum(-1) / SCALE)
    return -torch.log(positive / others).mean()


def simclr_rows(model: Any, batch: Any) -> Tensor:
    z, size = torch.cat(both(model, batch)), len(batch["y"])
    return ntxent_rows(z, torch.arange(2 * size).roll(size)).view(2, size).mean(0)


def info_nce(model: Any, batch: Any) -> Tensor:
    one, two = both(model, batch)
    return F.cross_entropy(one @ two.T / SCALE, torch.arange(len(one)))


def info_nce_rows(model: Any, batch: Any) -> Tensor:
    one, two = both(model, batch)
    similarity = one @ two.T / SCALE
    return similarity.logsumexp(1) - similarity.diagonal()


def clip(model: Any, batch: Any) -> Tensor:
    one, two = both(model, batch)
    logits = one @ two.t() / SCALE
    labels = torch.arange(len(one))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def clip_rows(model: Any, batch: Any) -> Tensor:
    one, two = both(model, batch)
    logits = one @ two.T / SCALE
    return (logits.logsumexp(1) + logits.logsumexp(0)) / 2 - logits.diagonal()


def supervised_pairs(model: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all other views ``[2B, 2B]`` and which are of the same class."""
    z, y = torch.cat(both(model, batch)), batch["y"].repeat(2)
    itself = torch.eye(len(z), dtype=torch.bool)
    similarity = (z @ z.T / SCALE).masked_fill(itself, -1e9)
    return similarity - similarity.logsumexp(1, keepdim=True), (y[:, None] == y) & ~itself


def supcon(model: Any, batch: Any) -> Tensor:
    log_p, positive = supervised_pairs(model, batch)
    return -((positive * log_p).sum(1) / positive.sum(1)).mean()


def supcon_rows(model: Any, batch: Any) -> Tensor:
    log_p, positive = supervised_pairs(model, batch)
    by_view = -(positive * log_p).sum(1) / positive.sum(1)
    return by_view.view(2, -1).mean(0)


def barlow_twins(model: Any, batch: Any) -> Tensor:
    one, two = both(model, batch)
    correlation = ((one - one.mean(0)) / one.std(0)).T @ ((two - two.mean(0)) / two.std(0)) / len(one)
    return (correlation - torch.eye(H, dtype=one.dtype)).pow(2).sum()


def hardest_triplets(model: Any, batch: Any) -> Tensor:
    z = model(batch["one"])
    distance, same = torch.cdist(z, z), batch["y"][:, None] == batch["y"]
    positive = distance.masked_fill(~same, 0).max(1).values
    negative = distance.masked_fill(same, 1e6).min(1).values
    return F.relu(positive - negative + 20).mean()


def hardest_triplets_rows(model: Any, batch: Any) -> Tensor:
    z = model(batch["one"])
    distance = torch.cdist(z, z)
    rows = []
    for anchor, y in enumerate(batch["y"]):
        same = batch["y"] == y
        nearest = distance[anchor][~same].min() if bool((~same).any()) else distance.new_tensor(1e6)
        rows.append(F.relu(distance[anchor][same].max() - nearest + 20))
    return torch.stack(rows)


def cached(model: Any, batch: Any) -> Tensor:
    """GradCache: the gradient at the representations first, then a second forward that carries it back."""
    with torch.no_grad():
        views = model(batch["one"]), model(batch["two"])
    one, two = (view.detach().requires_grad_() for view in views)
    similarity = F.normalize(one, dim=-1) @ F.normalize(two, dim=-1).T / SCALE
    gradients = torch.autograd.grad(F.cross_entropy(similarity, torch.arange(len(one))), (one, two))
    again = model(batch["one"]), model(batch["two"])
    return sum((view * gradient).sum() for view, gradient in zip(again, gradients, strict=True))


# Pairs and triplets that belong to one sample ------------------------------------------------------------------


def triplet_data() -> Any:
    return vectors_with(D, D)()


def triplet(model: Any, batch: Any) -> Tensor:
    return F.triplet_margin_loss(*(model(part) for part in batch))


def triplet_by_hand(model: Any, batch: Any) -> Tensor:
    anchor, positive, negative = model(torch.cat(batch)).chunk(3)
    near, far = (anchor - positive).pow(2).sum(-1), (anchor - negative).pow(2).sum(-1)
    return F.relu(near - far + 0.5).mean()


def cosine_embedding(model: Any, batch: Any) -> Tensor:
    return F.cosine_embedding_loss(model(batch["one"]), model(batch["two"]), 2 * batch["y"] - 1)


def hinge_embedding(model: Any, batch: Any) -> Tensor:
    distance = (model(batch["one"]) - model(batch["two"])).norm(dim=-1)
    return F.hinge_embedding_loss(distance, 2 * batch["y"] - 1)


def margin_ranking(model: Any, batch: Any) -> Tensor:
    one, two = model(batch["one"])[:, 0], model(batch["two"])[:, 0]
    return F.margin_ranking_loss(one, two, (2 * batch["y"] - 1).to(one.dtype), margin=0.3)


def bpr(model: Any, batch: Any) -> Tensor:
    return -F.logsigmoid(model(batch["one"]) - model(batch["two"])).mean()


def reward(model: Any, batch: Any) -> Tensor:
    chosen, rejected = model(torch.cat([batch["one"], batch["two"]])).squeeze(-1).chunk(2)
    return -torch.log(torch.sigmoid(chosen - rejected)).mean()


def simsiam(model: Any, batch: Any) -> Tensor:
    one, two = model(batch["one"]), model(batch["two"])
    similarity = nn.CosineSimilarity(dim=1)
    return -(similarity(one, two.detach()).mean() + similarity(two, one.detach()).mean()) * 0.5


def byol(model: Any, batch: Any) -> Tensor:
    one, two = both(model, batch)
    return (2 - 2 * (one * two.detach()).sum(-1)).mean()


def dino(model: Any, batch: Any) -> Tensor:
    student, target = model(batch["one"]), model(batch["two"]).detach()
    return torch.sum(-F.softmax(target / 0.4, -1) * F.log_softmax(student, -1), -1).mean()


# Preferences --------------------------------------------------------------------------------------------------


def preferences() -> Any:
    """Chosen and rejected answers ``[6]``, the last tokens padding (0), and a reference model's log-ratio."""
    generator, samples = numbers(), []
    for row in range(5 * BATCH):
        answers = torch.randint(1, C, (2, 6), generator=generator)
        answers[0, 6 - row % 3 :] = 0
        answers[1, 5:] = 0
        reference = torch.randn(2, generator=generator)
        samples.append({"chosen": answers[0], "rejected": answers[1], "reference": reference})
    return split(samples)


def log_likelihoods(model: Any, tokens: Tensor, average: bool = False) -> Tensor:
    """``[N]`` of the answers' next tokens."""
    labels, mask = tokens[:, 1:], tokens[:, 1:] != 0
    log_p = torch.gather(model(tokens)[:, :-1].log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)
    return (log_p * mask).sum(-1) / mask.sum(-1) if average else (log_p * mask).sum(-1)


def dpo(model: Any, batch: Any) -> Tensor:
    size = len(batch["chosen"])
    log_p = log_likelihoods(model, torch.cat([batch["chosen"], batch["rejected"]]))
    chosen, rejected = log_p[:size], log_p[size:]
    logits = (chosen - rejected) - (batch["reference"][:, 0] - batch["reference"][:, 1])
    return -F.logsigmoid(0.3 * logits).mean()


def ipo(model: Any, batch: Any) -> Tensor:
    chosen, rejected = (log_likelihoods(model, batch[name], True) for name in ("chosen", "rejected"))
    return ((chosen - rejected - 0.5) ** 2).mean()


def orpo(model: Any, batch: Any) -> Tensor:
    log_p = log_likelihoods(model, torch.cat([batch["chosen"], batch["rejected"]]), average=True)
    chosen, rejected = log_p.chunk(2)
    odds = (chosen - rejected) - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
    return -chosen.mean() - 0.2 * F.logsigmoid(odds).mean()


def sft_then_dpo(model: Any, batch: Any) -> Tensor:
    labels = batch["chosen"][:, 1:]
    nll = F.cross_entropy(model(batch["chosen"])[:, :-1].transpose(1, 2), labels, ignore_index=0, reduction="none")
    return dpo(model, batch) + 0.5 * (nll.sum(1) / (labels != 0).sum(1)).mean()


preferred = family(data=preferences, network=tagger())


PAIRS = cases(
    "pairs",
    pair("SimCLR, views joined by cat", simclr, rows=simclr_rows),
    pair("SimCLR, views interleaved", simclr_interleaved, rows=simclr_rows),
    pair("SimCLR by hand", simclr_by_hand, rows=simclr_rows),
    pair("InfoNCE in the batch", info_nce, rows=info_nce_rows, unit="of the anchor"),
    pair("CLIP, symmetric", clip, rows=clip_rows, unit="mean of both directions"),
    pair("SupCon", supcon, rows=supcon_rows),
    pair("Barlow twins", barlow_twins, weighable=False, must_refuse=True),
    pair("hardest triplets in the batch", hardest_triplets, rows=hardest_triplets_rows, unit="of the anchor"),
    pair("InfoNCE with a gradient cache", cached, rows=info_nce_rows, validation=info_nce, weighable=False),
    pair("triplet_margin_loss", triplet, data=triplet_data),
    pair("triplets by hand, joined by cat", triplet_by_hand, data=triplet_data),
    pair("cosine_embedding_loss", cosine_embedding),
    pair("hinge_embedding_loss", hinge_embedding),
    scored("margin_ranking_loss", margin_ranking),
    scored("BPR, -logsigmoid", bpr),
    scored("reward model, log(sigmoid)", reward),
    pair("SimSiam", simsiam),
    pair("BYOL", byol),
    pair("DINO", dino),
    preferred("DPO, chosen and rejected joined by cat", dpo),
    preferred("IPO, two forwards", ipo),
    preferred("ORPO", orpo, unit="nll + .2 odds ratio"),
    preferred("DPO and cross entropy", sft_then_dpo, unit="DPO + .5 nll"),
)
