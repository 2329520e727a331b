"""Designed sinks: a pool of hidden units of which each sample owns a few, and the masks that switch them.

A sample trains with the shared units and its own pool units, and the served model has no pool: what only its own units
store of a sample is removed with them (MemSinks and its sequence-tied dropout, Ghosal et al. 2025; for vision,
example-tied dropout, Maini et al. 2023). The published hash turns all units on for id 0, misses the intended density
in narrow pools, and gives one unit to nearly all ids. Here each id gets a pseudorandom permutation of its own, of which
it owns the same number of units as any other.

    B  samples in a batch      T  tokens      U  units of a layer, the pool being the last of them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_memsink.attribution.hidden_layers import HiddenLayer
from lightning_memsink.samples.hashing import mix_

_OVERRIDDEN: WeakSet[nn.Module] = WeakSet()
"""Modules whose mask is currently set by `masked`."""


@dataclass(frozen=True)
class Pool:
    """Which units of a layer are the pool, and which of them each sample owns.

    Args:
        pool_fraction: share of a layer's units, its last ones, that are the pool.
        active_fraction: share of the pool that each id owns, the same units in all layers of equal size.
        seed: of the assignment of units to ids.

    Raises:
        ValueError: a fraction is not strictly between 0 and 1.
    """

    pool_fraction: float = 0.75
    active_fraction: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pool_fraction", "active_fraction"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ValueError(f"{name} is a share strictly between 0 and 1, but it is {value}.")

    def size(self, units: int) -> int:
        """Number of pool units in a layer: at least one, and at least one unit stays shared."""
        if units < 2:
            raise ValueError(f"A layer of {units} unit can't be split into shared units and a pool. Leave it out.")
        return min(max(round(self.pool_fraction * units), 1), units - 1)

    def active(self, units: int) -> int:
        """Number of pool units that each sample owns: at least one."""
        return max(round(self.active_fraction * self.size(units)), 1)

    def own(self, ids: Tensor, units: int) -> Tensor:
        """Bool ``[*ids.shape, U]``: the shared units and the pool units that each of ``ids`` owns."""
        owned = own_units(ids, self.size(units), self.active(units), self.seed)
        shared = owned.new_ones(()).expand(*ids.shape, units - self.size(units))
        return torch.cat([shared, owned], -1)

    def dropped(self, units: int) -> Tensor:
        """Bool ``[U]``: the shared units only, as in the served model."""
        return torch.arange(units) < units - self.size(units)

    def without(self, ids: Tensor, units: int) -> Tensor:
        """float32 ``[U]``: a factor for each unit, 0 for those that any of ``ids`` ``[N]`` owns, 1 for shared ones.

        The rest of the pool gets ``active / size``, the share of it that was on at a time in training. At full
        strength, it breaks the model.
        """
        kept = ~self.own(ids, units).any(0) | self.dropped(units)
        return torch.where(self.dropped(units), 1.0, kept * self.active(units) / self.size(units))


def own_units(ids: Tensor, pool: int, active: int, seed: int = 0) -> Tensor:
    """Which of ``pool`` units each id owns: the first ``active`` of a pseudorandom permutation.

    Stateless: depends on ids, sizes and seed only, on every machine and device; global random state is unchanged.

    Args:
        ids: int64, any shape, any value. Equal ids own the same units; two different ids share ``active**2 / pool`` on
            average.

    Returns:
        Bool ``[*ids.shape, pool]``, exactly ``active`` true in every row.

    Raises:
        ValueError: ``active`` is not in 0…``pool``.
    """
    if not 0 <= active <= pool:
        raise ValueError(f"active is a number of units between 0 and pool={pool}, but it is {active}.")
    if ids.ndim > 1:  # by token: most tokens have the id of another one
        unique, inverse = ids.unique(return_inverse=True)
        return own_units(unique, pool, active, seed)[inverse]
    if not active or not len(ids):
        return torch.zeros(*ids.shape, pool, dtype=torch.bool, device=ids.device)
    number, unit_keys, start = _unit_keys(pool, seed, ids.device)
    rank = mix_(mix_(ids.long() ^ start)[:, None] + unit_keys)
    low = (1 << pool.bit_length()) - 1
    rank &= ~low  # the low bits get the unit's number, so that all ranks of a row differ
    rank |= number
    last = rank.topk(active, -1, sorted=False).values.amin(-1, keepdim=True)
    return rank >= last


@lru_cache(maxsize=32)
def _unit_keys(pool: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of `own_units` that are the same in every step: unit numbers ``[pool]``, their hashes ``[pool]`` and
    that of the seed. Cached: must not be written to."""
    number = torch.arange(pool, device=device)
    return number, mix_(number + 1), mix_(torch.full((), seed, dtype=torch.int64, device=device) + 1)


def union_fraction(active_fraction: float, deleted: int) -> float:
    """Expected share, 0…1, of the pool that ``deleted`` ids own together.

    >>> round(union_fraction(0.3, 20), 4), round(union_fraction(0.013, 20), 2)
    (0.9992, 0.23)
    """
    return 1.0 - (1.0 - active_fraction) ** deleted


def plan(active_fraction: float, deleted: int) -> str:
    """A sentence on how much of the pool the deletion of ``deleted`` ids removes, for all other ids too.

    >>> plan(0.3, 2)
    'Deleting 2 ids removes 51 % of the pool at active_fraction=0.3.'
    >>> plan(0.3, 20)
    'Deleting 20 ids removes 99.9 % of the pool at active_fraction=0.3: as good as dropping it.'
    """
    share = union_fraction(active_fraction, deleted)
    rest = ": as good as dropping it" if share > 0.9 else ""
    return (
        f"Deleting {deleted} ids removes {100 * share:.3g} % of the pool at active_fraction={active_fraction:g}{rest}."
    )


def apply_mask(hidden: Tensor, mask: Tensor, layer: HiddenLayer, tokens: int | None = None) -> Tensor | None:
    """``hidden`` times ``mask``, in the dtype of ``hidden``; None if the rows of ``hidden`` don't match the mask.

    Args:
        hidden: ``[B, ..., U]``, ``[T, B, U]`` or ``[B, U, ...]`` by the layer's axes; ``[B * T, U]``, as some models
            flatten it; or a nested tensor, as torch's encoder makes of padded batches.
        mask: ``[U]``, by sample ``[B, U]``, or by token ``[B, T, U]``.
        tokens: T, needed for a mask by sample on a flattened ``hidden``; without it, these don't match.
    """
    if hidden.is_nested:
        parts = hidden.unbind()
        masks = [mask] * len(parts) if mask.ndim == 1 else list(mask)
        if len(masks) != len(parts):
            return None
        pairs = zip(parts, masks, strict=True)
        masked_parts = [part * (own[: len(part)] if own.ndim > 1 else own).to(part) for part, own in pairs]
        nested: Tensor = torch.nested.as_nested_tensor(masked_parts, layout=hidden.layout)
        return nested
    shaped = _broadcastable(hidden, mask, layer, tokens)
    return None if shaped is None else hidden * shaped.to(hidden, non_blocking=True)


def _broadcastable(hidden: Tensor, mask: Tensor, layer: HiddenLayer, tokens: int | None) -> Tensor | None:
    """``mask`` in a shape that broadcasts with ``hidden``; None if their rows don't match."""
    unit, batch = layer.unit_axis % hidden.ndim, layer.batch_axis % hidden.ndim
    if hidden.shape[unit] != mask.shape[-1] or (unit == batch and mask.ndim > 1):
        return None
    shape = [1] * hidden.ndim
    shape[unit] = hidden.shape[unit]
    if mask.ndim == 1:
        return mask.view(shape)
    shape[batch] = hidden.shape[batch]
    if mask.ndim == 2 and len(mask) == hidden.shape[batch]:
        return mask.view(shape)
    is_flat = hidden.ndim == 2 and layer.batch_axis == 0
    if mask.ndim == 2:
        fits = is_flat and tokens is not None and len(hidden) == len(mask) * tokens
        return mask.repeat_interleave(tokens or 1, 0) if fits else None
    if is_flat and len(hidden) == len(mask) * mask.shape[1]:
        return mask.flatten(0, 1)
    by_token = mask.transpose(0, 1) if layer.batch_axis == 1 else mask
    return by_token if by_token.shape == hidden.shape else None


@contextmanager
def masked(layers: Sequence[HiddenLayer], mask: Callable[[int], Tensor], tokens: int | None = None) -> Iterator[None]:
    """Within, every hidden layer is multiplied by ``mask(U)``, which replaces the masks of a `MemSinks` callback.

    ``masked(layers, pool.dropped)`` gives the served model, and ``masked(layers, lambda units: pool.own(ids, units))``
    gives each sample of one batch its own units. Arguments as in `apply_mask`.

    Raises:
        ValueError: from the forward, if a layer's rows don't match the mask.
    """
    masks = {units: mask(units) for units in {layer.units for layer in layers}}
    added = {layer.module for layer in layers} - set(_OVERRIDDEN)

    def masking(layer: HiddenLayer) -> Callable[[Tensor], Tensor]:
        def change(hidden: Tensor) -> Tensor:
            changed = apply_mask(hidden, masks[layer.units], layer, tokens)
            if changed is None:
                raise ValueError(
                    f"{layer.name} reads {list(hidden.shape)}, which a mask {list(masks[layer.units].shape)} does not "
                    "fit. A mask is [U], [B, U] by sample or [B, T, U] by token."
                )
            return changed

        return change

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(register_input_hook(layer, masking(layer)).remove)
        stack.callback(_OVERRIDDEN.difference_update, added)
        _OVERRIDDEN.update(added)
        yield


def is_overridden(layer: HiddenLayer) -> bool:
    """Whether `masked` currently sets the mask of this layer."""
    return layer.module in _OVERRIDDEN


def register_input_hook(layer: HiddenLayer, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Registers a forward pre-hook, before all others, that replaces the input of ``layer`` by ``change(input)``."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        (name, hidden), *rest = kwargs.items()
        return args, {name: change(hidden), **dict(rest)}

    return layer.module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
