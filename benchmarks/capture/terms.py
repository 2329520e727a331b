"""Cases: several losses in a step, views, parts with labels, penalties, losses by hand, and adversaries."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.capture.case import cases, family
from benchmarks.capture.classes import cross_entropy
from benchmarks.capture.data import C, D, Heads, heads, mlp, vectors, views

classes = family(data=vectors, network=mlp())
tasks = family(data=vectors, network=heads(label=C, value=D))
viewed = family(data=views, network=mlp())


def two_losses(model: Any, batch: Any) -> Tensor:
    out = model(batch[0])
    return 0.5 * F.mse_loss(out["value"], batch[0]) + 2.0 * F.cross_entropy(out["label"], batch[1])


def deep_supervision(model: Any, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(out["last"], batch[1]) + 0.4 * F.cross_entropy(out["middle"], batch[1])


def same_factor(model: Any, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(out["last"], batch[1]) + F.cross_entropy(out["middle"], batch[1])


def r_drop(model: Any, batch: Any) -> Tensor:
    out = model(batch[0])
    p, q = out["last"], out["middle"]
    forth = F.kl_div(F.log_softmax(p, -1), F.softmax(q, -1), reduction="none").sum(-1).mean()
    back = F.kl_div(F.log_softmax(q, -1), F.softmax(p, -1), reduction="none").sum(-1).mean()
    return 0.5 * (F.cross_entropy(p, batch[1]) + F.cross_entropy(q, batch[1])) + 0.25 * (forth + back)


class Uncertain(Heads):
    """Weighs two losses by learned uncertainties."""

    def __init__(self) -> None:
        super().__init__(label=C, value=D)
        self.log_variance = nn.Parameter(torch.tensor([0.1, -0.2]))


def uncertain(model: Any, batch: Any, penalty: bool = True) -> Tensor:
    out, log_variance = model(batch[0]), model.net.log_variance
    losses = torch.stack([F.cross_entropy(out["label"], batch[1]), F.mse_loss(out["value"], batch[0])])
    total = (torch.exp(-log_variance) * losses).sum()
    return total + 0.01 * log_variance.sum() if penalty else total


def by_task(model: Any, batch: Any) -> Tensor:
    out, first = model(batch[0]), batch[1] < 2
    loss = out["label"].sum() * 0
    if first.any():
        loss = loss + F.cross_entropy(out["label"][first], batch[1][first])
    if (~first).any():
        loss = loss + F.mse_loss(out["value"][~first], batch[0][~first])
    return loss


def by_task_parts(model: Any, batch: Any) -> Tensor:
    out, first = model(batch[0]), batch[1] < 2
    values = (out["value"] - batch[0]).square().mean(1)
    labels = F.cross_entropy(out["label"], batch[1], reduction="none")
    return torch.where(first, labels / first.sum().clamp(min=1), values / (~first).sum().clamp(min=1))


def two_row_counts(model: Any, batch: Any) -> Tensor:
    out = model(batch[0])
    tokens = out["value"].view(len(batch[1]), 2, 3)  # two tokens a sample, of three classes
    return F.cross_entropy(out["label"], batch[1]) + F.cross_entropy(
        tokens.flatten(0, 1), (batch[1] % 3).repeat_interleave(2)
    )


# Views and partly labelled batches ------------------------------------------------------------------------------


def views_cat(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(torch.cat([batch["one"], batch["two"]])), batch["y"].repeat(2))


def views_stack(model: Any, batch: Any) -> Tensor:
    x = torch.stack([batch["one"], batch["two"]], dim=1)  # [B, 2, D]
    return F.cross_entropy(model(x.flatten(0, 1)), batch["y"].repeat_interleave(2))


def views_first(model: Any, batch: Any) -> Tensor:
    logits = model(torch.stack([batch["one"], batch["two"]]))  # [2, B, C]
    return F.cross_entropy(logits.view(-1, C), batch["y"].expand(2, -1).reshape(-1))


def views_in_turn(model: Any, batch: Any) -> Tensor:
    return 0.5 * sum(F.cross_entropy(model(batch[name]), batch["y"]) for name in ("one", "two"))


def consistency(model: Any, batch: Any) -> Tensor:
    one, two = model(torch.cat([batch["one"], batch["two"]])).chunk(2)
    return F.cross_entropy(one, batch["y"]) + 0.5 * F.mse_loss(two.softmax(-1), one.detach().softmax(-1))


SURE = 0.25


def fixmatch(model: Any, batch: Any) -> Tensor:
    """All samples have labels for one view, and pseudo-labels for the other where the model is sure."""
    one, two = model(torch.cat([batch["one"], batch["two"]])).chunk(2)
    confidence, pseudo = one.detach().softmax(-1).max(-1)
    mask = (confidence > SURE).to(one.dtype)
    return F.cross_entropy(one, batch["y"]) + (F.cross_entropy(two, pseudo, reduction="none") * mask).mean()


def partly_labelled(model: Any, batch: Any) -> Tensor:
    """Half of the batch has labels; the other half has those that the model guesses."""
    some = (len(batch["y"]) + 1) // 2
    loss = F.cross_entropy(model(batch["one"][:some]), batch["y"][:some])
    if some < len(batch["y"]):
        pseudo = model(batch["one"][some:]).detach().argmax(-1)
        loss = loss + F.cross_entropy(model(batch["two"][some:]), pseudo)
    return loss


def partly_labelled_rows(model: Any, batch: Any) -> Tensor:
    some = (len(batch["y"]) + 1) // 2
    labelled = F.cross_entropy(model(batch["one"]), batch["y"], reduction="none")
    pseudo = model(batch["one"]).detach().argmax(-1)
    guessed = F.cross_entropy(model(batch["two"]), pseudo, reduction="none")
    return torch.cat([labelled[:some], guessed[some:]])


def halves(batch: Any) -> Tensor:
    some = (len(batch["y"]) + 1) // 2
    return torch.cat(
        [torch.full((some,), 1 / some), torch.full((len(batch["y"]) - some,), 1 / max(1, len(batch["y"]) - some))]
    ).double()


def mixed(model: Any, batch: Any, reduction: str = "mean") -> Tensor:
    order = torch.arange(len(batch[1])).roll(1)
    logits = model(0.7 * batch[0] + 0.3 * batch[0][order])
    losses = (F.cross_entropy(logits, y, reduction=reduction) for y in (batch[1], batch[1][order]))
    return 0.7 * next(losses) + 0.3 * next(losses)


# Penalties ------------------------------------------------------------------------------------------------------


def weights_of(model: Any) -> Tensor:
    return torch.cat([parameter.flatten() for parameter in model.parameters()])


def l1_penalty(model: Any, batch: Any) -> Tensor:
    return 0.01 * weights_of(model).abs().sum()


def large_penalty(model: Any, batch: Any) -> Tensor:
    return 2.0 * weights_of(model).pow(2).sum()


def drift_penalty(model: Any, batch: Any) -> Tensor:
    return 0.1 * sum(((weight - 0.1) ** 2).mean() for weight in model.parameters())


def penalized(penalty: Any) -> dict[str, Any]:
    """A step with a penalty that belongs to no sample."""
    return {
        "step": lambda model, batch: cross_entropy(model, batch) + penalty(model, batch),
        "alone": cross_entropy,
        "rest": penalty,
    }


def active(model: Any, batch: Any) -> Tensor:
    hidden = model.net.body(batch[0])
    return F.cross_entropy(model.net.heads["label"](hidden), batch[1]) + 0.1 * hidden.pow(2).mean()


def balance(model: Any, batch: Any, size: float = 0.01) -> Tensor:
    """A load-balancing loss as mixtures of experts have: of the whole batch, not of a sample."""
    gates = model(batch[0])["gate"].softmax(-1)
    return size * (gates.mean(0) * F.one_hot(gates.argmax(-1), 3).to(gates.dtype).mean(0)).sum()


def label_loss(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0])["label"], batch[1])


def gradient_penalty(model: Any, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_()
    with torch.enable_grad():
        logits = model(x)
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    return F.cross_entropy(logits, batch[1]) + 0.5 * ((slope.norm(2, dim=1) - 1) ** 2).mean()


TERMS = cases(
    "several losses",
    tasks("two losses with factors", two_losses, unit=".5 mse + 2 cross entropy"),
    classes("deep supervision", deep_supervision, network=heads(last=C, middle=C), unit="last + .4 middle"),
    classes("two losses of one kind", same_factor, network=heads(last=C, middle=C), unit="their sum"),
    classes("R-drop", r_drop, network=heads(last=C, middle=C), unit="sum of its four terms"),
    tasks(
        "learned uncertainties",
        uncertain,
        network=Uncertain,
        alone=lambda m, b: uncertain(m, b, penalty=False),
        rest=lambda m, b: 0.01 * m.net.log_variance.sum(),
        unit="sum of both with their factors",
    ),
    tasks("a loss for each kind of sample", by_task, contributions=by_task_parts, unit="that of its kind"),
    tasks("two losses of different row counts", two_row_counts, network=heads(label=C, value=D), unit="their sum"),
    viewed("two views, cat", views_cat, unit="mean of both views"),
    viewed("two views, interleaved", views_stack, unit="mean of both views"),
    viewed("two views, stacked in front", views_first, unit="mean of both views"),
    viewed("two views, a forward each", views_in_turn, unit="mean of both views"),
    viewed("consistency of two views", consistency, unit="cross entropy + .5 mse"),
    viewed("FixMatch", fixmatch, unit="both terms where it is sure"),
    viewed(
        "half of the batch labelled",
        partly_labelled,
        rows=partly_labelled_rows,
        shares=halves,
        unit="that of its half",
    ),
    classes("mixup", mixed, rows=lambda m, b: mixed(m, b, "none"), weighable=False, unit="of the mixed row"),
    classes("L1 penalty on the weights", **penalized(l1_penalty)),
    classes("L2 penalty of several times the loss", **penalized(large_penalty), lr=0.01),
    classes("penalty on drift", **penalized(drift_penalty)),
    classes(
        "load balancing of experts",
        lambda m, b: label_loss(m, b) + balance(m, b),
        network=heads(label=C, gate=3),
        alone=label_loss,
        rest=balance,
    ),
    classes(
        "load balancing as large as the loss",
        lambda m, b: label_loss(m, b) + balance(m, b, 4.0),
        network=heads(label=C, gate=3),
        alone=label_loss,
        rest=lambda m, b: balance(m, b, 4.0),
    ),
    classes("penalty on activations", active, network=heads(label=C), unit="cross entropy + .1 penalty"),
    classes("gradient penalty", gradient_penalty, unit="cross entropy + .5 penalty"),
    classes("a loss that is only logged", lambda m, b: (m.log("mse", m(b[0]).square().mean()), cross_entropy(m, b))[1]),
    classes("step returns a dict", lambda m, b: {"loss": cross_entropy(m, b), "logits": 1}),
)
