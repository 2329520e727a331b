"""Cases: losses of numbers, images and distributions, on batches ``(x [B, D], y [B, K])``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.capture.case import cases, family
from benchmarks.capture.data import C, D, heads, mlp, vectors_with

K = 3
numbers = family(data=vectors_with(K), network=mlp(K))
density = family(data=vectors_with(K), network=heads(mean=K, scale=K))


def of(function: Any, **options: Any) -> Any:
    return lambda model, batch: function(model(batch[0]), batch[1], **options)


def error(model: Any, batch: Any) -> Tensor:
    return model(batch[0]) - batch[1]


def log_cosh(model: Any, batch: Any) -> Tensor:
    difference = error(model, batch)
    return (difference + F.softplus(-2 * difference) - torch.log(torch.tensor(2.0))).mean()


def quantile(model: Any, batch: Any) -> Tensor:
    difference = -error(model, batch)
    return torch.max(0.9 * difference, -0.1 * difference).mean()


def huber_by_hand(model: Any, batch: Any) -> Tensor:
    size = error(model, batch).abs()
    return torch.where(size < 0.5, 0.5 * size**2, 0.5 * (size - 0.25)).mean()


def gaussian(model: Any, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.gaussian_nll_loss(out["mean"], batch[1], F.softplus(out["scale"]) + 0.1)


def gaussian_by_hand(model: Any, batch: Any) -> Tensor:
    out = model(batch[0])
    return 0.5 * (out["scale"] + (batch[1] - out["mean"]) ** 2 / out["scale"].exp()).sum(-1).mean()


def normal(model: Any, batch: Any) -> Tensor:
    out = model(batch[0])
    distribution = torch.distributions.Normal(out["mean"], F.softplus(out["scale"]) + 0.1)
    return -distribution.log_prob(batch[1]).mean()


def poisson(model: Any, batch: Any) -> Tensor:
    return F.poisson_nll_loss(model(batch[0]), batch[1].abs().round())


def single(model: Any, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]).squeeze(-1), batch[1])


def cosine(model: Any, batch: Any) -> Tensor:
    return (1 - F.cosine_similarity(model(batch[0]), batch[1])).mean()


def weighted(model: Any, batch: Any) -> Tensor:
    x, y, weight = batch
    losses = F.mse_loss(model(x), y, reduction="none").mean(1)
    return (losses * weight.abs()).sum() / weight.abs().sum()


def unweighted(model: Any, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def scaled(model: Any, batch: Any) -> Tensor:
    x, y, weight = batch
    return (F.mse_loss(model(x), y, reduction="none").mean(1) * weight.abs()).mean()


# Autoencoders, diffusion, policies -----------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """A variational autoencoder whose noise comes with the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = heads(mean=K, log_variance=K)()
        self.decoder = mlp(D, K)()

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code = self.encoder(x)
        mean, log_variance = code["mean"], code["log_variance"]
        return self.decoder(mean + noise * torch.exp(0.5 * log_variance)), mean, log_variance


def vae(model: Any, batch: Any) -> Tensor:
    decoded, mean, log_variance = model(*batch)
    divergence = -0.5 * torch.sum(1 + log_variance - mean.pow(2) - log_variance.exp(), dim=1)
    return F.mse_loss(decoded, batch[0]) + 0.1 * divergence.mean()


def vae_sum(model: Any, batch: Any) -> Tensor:
    decoded, mean, log_variance = model(*batch)
    divergence = -0.5 * torch.sum(1 + log_variance - mean**2 - log_variance.exp())
    rebuilt = F.binary_cross_entropy_with_logits(decoded, torch.sigmoid(batch[0]), reduction="sum")
    return (rebuilt + divergence) / len(batch[0])


def diffusion(model: Any, batch: Any) -> Tensor:
    x, noise, time = batch
    keep = torch.sigmoid(time)[:, None]
    return F.mse_loss(model(keep.sqrt() * x + (1 - keep).sqrt() * noise), noise)


def snr_weighted(model: Any, batch: Any) -> Tensor:
    x, noise, time = batch
    keep = torch.sigmoid(time)[:, None]
    losses = F.mse_loss(model(keep.sqrt() * x + (1 - keep).sqrt() * noise), noise, reduction="none")
    return (losses.mean(dim=list(range(1, losses.ndim))) * snr(batch)).mean()


def snr(batch: Any) -> Tensor:
    return torch.exp(batch[2]).clamp(max=2)


def masked_patches(model: Any, batch: Any) -> Tensor:
    x, noise = batch
    mask = (noise > 0).to(x.dtype)
    return (((model(x * (1 - mask)) - x) ** 2) * mask).sum() / mask.sum()


def patches(batch: Any) -> Tensor:
    count = (batch[1] > 0).sum(1).double()
    return count / count.sum()


def policy(model: Any, batch: Any) -> Tensor:
    """PPO: clipped surrogate, value and entropy; ``y`` are action, advantage and return."""
    x, y = batch
    out = model(x)
    distribution = torch.distributions.Categorical(logits=out["policy"])
    ratio = (distribution.log_prob((y[:, 0].abs() * 2).long() % C) + 1.5).exp()
    surrogate = torch.min(ratio * y[:, 1], ratio.clamp(0.8, 1.2) * y[:, 1])
    value = F.mse_loss(out["value"].squeeze(-1), y[:, 2])
    return -surrogate.mean() + 0.5 * value - 0.01 * distribution.entropy().mean()


def reinforce(model: Any, batch: Any) -> Tensor:
    x, y = batch
    log_p = model(x)["policy"].log_softmax(-1)[torch.arange(len(y)), (y[:, 0].abs() * 2).long() % C]
    return -(log_p * y[:, 1]).mean()


REGRESSION = cases(
    "numbers",
    numbers("mse_loss", of(F.mse_loss)),
    numbers(
        "mse_loss, sum",
        of(F.mse_loss, reduction="sum"),
        alone=of(F.mse_loss),
        shares=lambda b: torch.full((len(b[1]),), float(K)),
    ),
    numbers("l1_loss", of(F.l1_loss)),
    numbers("smooth_l1_loss", of(F.smooth_l1_loss, beta=0.3)),
    numbers("huber_loss", of(F.huber_loss, delta=0.4)),
    numbers("square by hand", lambda m, b: (error(m, b) ** 2).mean()),
    numbers("absolute value by hand", lambda m, b: error(m, b).abs().mean()),
    numbers("squared norm by hand", lambda m, b: error(m, b).pow(2).sum(-1).mean(), unit="sum over outputs"),
    numbers("Huber by hand", huber_by_hand),
    numbers(
        "root of the mean square", lambda m, b: F.mse_loss(m(b[0]), b[1]).sqrt(), weighable=False, must_refuse=True
    ),
    numbers("log-cosh by hand", log_cosh),
    numbers("quantile loss by hand", quantile),
    numbers("one output", single, data=vectors_with(0), network=mlp(1)),
    numbers("cosine_similarity", cosine),
    numbers(
        "weights of samples, normalized",
        weighted,
        data=vectors_with(K, 0),
        alone=unweighted,
        shares=lambda b: b[2].abs() / b[2].abs().sum(),
    ),
    numbers("weights of samples, plain mean", scaled, data=vectors_with(K, 0), also=lambda b: 1 / b[2].abs()),
    density("gaussian_nll_loss", gaussian),
    density(
        "Gaussian by hand",
        gaussian_by_hand,
        also=lambda b: torch.full((len(b[1]),), 2.0),
        unit="with or without its factor of .5",
    ),
    density("torch.distributions.Normal", normal),
    numbers("poisson_nll_loss", poisson),
    numbers("variational autoencoder", vae, data=vectors_with(K), network=Autoencoder, unit="mse + .1 KL"),
    numbers("variational autoencoder, sum over B", vae_sum, network=Autoencoder, unit="sum of both"),
    numbers("diffusion", diffusion, data=vectors_with(D, 0), network=mlp(D)),
    numbers(
        "diffusion, weighted by noise",
        snr_weighted,
        data=vectors_with(D, 0),
        network=mlp(D),
        also=lambda b: 1 / snr(b),
    ),
    numbers("masked patches", masked_patches, data=vectors_with(D), network=mlp(D), shares=patches),
    numbers("PPO", policy, network=heads(policy=C, value=1), unit="sum of its three terms"),
    numbers(
        "REINFORCE", reinforce, network=heads(policy=C), also=lambda b: 1 / b[1][:, 1].abs(), unit="advantage times nll"
    ),
)
