"""Unit effects: activation x gradient of each hidden unit and sample, to first order the effect of zeroing the unit.

B  samples in a batch      U  units of a hidden layer      D  documents, where rows of the batch hold several
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_memsink._host_copy import on_host
from lightning_memsink.attribution.token_owners import of_documents
from lightning_memsink.losses.autograd_graph import walk
from lightning_memsink.losses.loss_call import LossCall
from lightning_memsink.losses.per_sample import terms_of
from lightning_memsink.losses.readers import is_likelihood, saved_value
from lightning_memsink.losses.sample_rows import SampleAxisLost


def unit_effects(hidden: Tensor, gradient: Tensor, batch_axis: int = 0, unit_axis: int = -1) -> Tensor:
    """``[B, U]`` ``-sum_t h * dL/dh``: by how much the loss would rise, to first order, if the unit were zero.

    Chang et al., "Do localization methods actually localize memorized data in LLMs?", NAACL 2024.

    Args:
        hidden: activations with a batch and a unit axis; all others (tokens, space) are summed over.
        gradient: same shape, of the differentiated number with respect to ``hidden``.

    Returns:
        float32 (float64 of float64), in the unit of the differentiated number.

    Raises:
        ValueError: batch and units are the same axis.
    """
    batch, unit = batch_axis % hidden.ndim, unit_axis % hidden.ndim
    if batch == unit:
        raise ValueError(f"hidden activations {list(hidden.shape)} have units, but no batch axis {batch_axis}")
    precise = torch.promote_types(hidden.dtype, torch.float32)
    product = hidden.detach().to(precise) * gradient.detach().to(precise)
    rest = [axis for axis in range(hidden.ndim) if axis not in (batch, unit)]
    effects = product.sum(rest) if rest else product
    return -(effects if batch < unit else effects.T)


def document_effects(hidden: Tensor, gradient: Tensor, owners: Tensor, count: int, unit_axis: int = -1) -> Tensor:
    """``[D, U]``: `unit_effects` of the documents in the rows, of which effects are sums over tokens.

    Args:
        hidden: activations with axes of tokens and an axis of units.
        gradient: same shape.
        owners: the document of each token, as `token_owners.at_tokens` gives them.
        count: D.
        unit_axis: of ``hidden``.
    """
    precise = torch.promote_types(hidden.dtype, torch.float32)
    product = hidden.detach().to(precise) * gradient.detach().to(precise)
    return -of_documents(product, owners, count, unit_axis)


def shares(effects: Mapping[str, Tensor], signed: bool = False) -> dict[str, Tensor]:
    """Each unit's effect as a share of the summed sizes of all effects on the same sample.

    Shares, because the gradient of a memorized sample vanishes with its loss: sizes would hide it. Signs, because sizes
    alone also select units that raise a sample's loss, and zeroing those compensates for the others: at 5 % of units
    the target's loss rises half as far.

    Args:
        effects: ``[B, U]`` by layer.
        signed: keep the sign of each effect: positive where the unit lowers the sample's loss.

    Returns:
        ``[B, U]`` by layer, in 0…1, or in -1…1 if ``signed``; the sizes of a sample's shares sum to 1 over *all*
        layers. An all-zero row stays zero.
    """
    if not effects:
        return {}
    largest = torch.stack([effect.abs().amax(1) for effect in effects.values()]).amax(0)[:, None]
    scale = torch.where(largest > 0, largest, 1)  # the sum can neither underflow nor overflow
    if signed:  # scaled only where the sum overflows: each division rounds, and localized units depend on these bits
        scale = torch.where(_total_size(effects).isfinite(), 1, scale)
    scaled = {name: (effect if signed else effect.abs()) / scale for name, effect in effects.items()}
    total = _total_size(scaled)
    return {name: effect / torch.where(total > 0, total, 1) for name, effect in scaled.items()}


def _total_size(effects: Mapping[str, Tensor]) -> Tensor:
    """``[B, 1]`` sum of the sizes of all effects on a sample."""
    return torch.stack([effect.abs().sum(1) for effect in effects.values()]).sum(0)[:, None]


def concatenated(by_layer: Mapping[str, Tensor], sizes: Mapping[str, int], batch_size: int) -> Tensor:
    """Float32 ``[B, sum(sizes)]`` on the CPU of values ``[B, U]`` by layer, in the order of ``sizes``.

    A layer of ``sizes`` without values gets zeros.
    """
    known = dict(zip(by_layer, on_host(list(by_layer.values())), strict=True))
    return torch.cat([known.get(name, torch.zeros(batch_size, units)) for name, units in sizes.items()], 1)


def divide_by_weights(values: Tensor, weights: Tensor, power: int = 1) -> Tensor:
    """``values`` per unit of each sample's weight in the loss, so of its own mean loss; 0 where the weight is 0.

    Args:
        values: ``[B, ...]``, from the gradient of the differentiated loss: linear in it, or of degree ``power``.
        weights: ``[B]`` from `sample_weights`.
        power: 2 for squared norms.
    """
    weights = weights.detach().to(values).reshape(-1, *[1] * (values.ndim - 1))
    return torch.where(weights == 0, 0.0, values / weights.pow(power))


def sample_weights(calls: Sequence[LossCall], batch_size: int, loss_scale: float = 1.0) -> Tensor | None:
    """``[B]`` weight of each sample's own mean loss in the number that was differentiated, after backward.

    ``1 / B`` under a batch mean; token counts over their sum under a token mean; times the factors of accumulation and
    gradient scaling. A sample's effects divided by it are nats of its own loss.

    Args:
        calls: of the step's loss, from `find_loss_calls` before backward.
        loss_scale: as `terms_of` takes it; matters only where a step has more than one loss.

    Returns:
        0 where no element of the sample counted. None if there is no sample axis.
    """
    try:
        terms = terms_of(calls, batch_size, loss_scale) if calls else []
    except SampleAxisLost:
        return None
    if not terms:
        return None
    present = torch.stack([term.weights != 0 for term in terms])
    weights = torch.stack([term.weights * term.scale for term in terms]).where(present, 0.0).sum(0)
    factors = torch.stack([present[n] * term.factor for n, term in enumerate(terms)]).sum(0)
    return weights / torch.where(factors == 0, 1.0, factors)


def margins(loss: Tensor) -> Tensor:
    """Sum over counted tokens of log p(target) minus the largest other log p, differentiable, before backward.

    A memorized sample's loss has no gradient left; its margin has. Differentiate it with ``retain_graph=True``.

    Raises:
        ValueError: no cross entropy (``nll_loss``) in the graph behind ``loss``.
    """
    nodes = [node for node, _ in walk(loss.grad_fn, stop=is_likelihood) if is_likelihood(node)]
    if not nodes:
        raise ValueError(
            "margins need a cross entropy whose log-probabilities autograd kept, but found none behind "
            f"{loss.grad_fn.name() if loss.grad_fn is not None else 'a loss without a graph'}. Use objective='loss'."
        )
    saved = [[saved_value(node, name) for name in ("self", "target", "ignore_index")] for node in nodes]
    return torch.stack([_margin(*values) for values in saved]).sum()


def _margin(log_probs: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Of ``[N, C, ...]`` log-probabilities and ``[N, ...]`` classes."""
    counted = target != ignore_index
    index = torch.where(counted, target, 0).unsqueeze(1)
    target_log_probs = log_probs.gather(1, index)
    best_other = log_probs.scatter(1, index, -torch.inf).amax(1, keepdim=True)
    return torch.where(counted.unsqueeze(1), target_log_probs - best_other, 0.0).float().sum()
