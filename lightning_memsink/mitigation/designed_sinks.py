"""Sinks by design: a pool of hidden units that every sample owns a few of, and masks that give each sample its own.

A sample trains with the shared units and its own pool units; serving leaves the pool out. What only its own units know
of a sample goes with them (MemSinks, SeqTD; for vision: example-tied dropout, Maini et al. 2023). The published hash
turns everything on for id 0, misses the wanted density in narrow pools and gives one unit to nearly all; here every id
gets exactly as many units as any other, by a permutation of its own.

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

_OVERRIDDEN: WeakSet[nn.Module] = WeakSet()
"""Modules whose mask is fixed by `masked` for the moment."""


@dataclass(frozen=True)
class Pool:
    """Which units of a layer are reserved, and how many of them a sample owns.

    ``pool_fraction`` of a layer's units, its last ones, are the pool; each id owns ``active_fraction`` of the pool,
    the same units in all layers of equal size. ``seed`` chooses another assignment.

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
        """Pool units of a layer: at least one, and one at least is left to all."""
        if units < 2:
            raise ValueError(f"A layer of {units} unit can't be split into shared units and a pool. Leave it out.")
        return min(max(round(self.pool_fraction * units), 1), units - 1)

    def active(self, units: int) -> int:
        """Pool units of each sample: at least one."""
        return max(round(self.active_fraction * self.size(units)), 1)

    def own(self, ids: Tensor, units: int) -> Tensor:
        """Bool ``[*ids.shape, U]``: the shared units and those that each of ``ids`` owns."""
        owned = own_units(ids, self.size(units), self.active(units), self.seed)
        shared = owned.new_ones(()).expand(*ids.shape, units - self.size(units))
        return torch.cat([shared, owned], -1)

    def dropped(self, units: int) -> Tensor:
        """Bool ``[U]``: the shared units only, as the model is served."""
        return torch.arange(units) < units - self.size(units)

    def without(self, ids: Tensor, units: int) -> Tensor:
        """float32 ``[U]``: all units but those that any of ``ids`` ``[N]`` owns.

        What is left of the pool counts as much as in training, a share of ``active`` in ``size`` at a time. At full
        strength it breaks the model.
        """
        kept = ~self.own(ids, units).any(0) | self.dropped(units)
        return torch.where(self.dropped(units), 1.0, kept * self.active(units) / self.size(units))


def own_units(ids: Tensor, pool: int, active: int, seed: int = 0) -> Tensor:
    """Which of ``pool`` units each id owns: the ``active`` first of a pseudorandom permutation.

    Stateless: ids, sizes and seed decide alone, on every machine and device; no global random state is touched.

    Args:
        ids: int64, any shape, any value. Equal ids own equal units; two others share ``active**2 / pool`` on average.

    Returns:
        Bool ``[*ids.shape, pool]``, exactly ``active`` true in every row.

    Raises:
        ValueError: ``active`` is not in 0…``pool``.
    """
    if not 0 <= active <= pool:
        raise ValueError(f"active is a number of units between 0 and pool={pool}, but it is {active}.")
    if ids.ndim > 1:  # of tokens, few are of different documents
        unique, inverse = ids.unique(return_inverse=True)
        return own_units(unique, pool, active, seed)[inverse]
    if not active or not len(ids):
        return torch.zeros(*ids.shape, pool, dtype=torch.bool, device=ids.device)
    number, spread, start = _spread(pool, seed, ids.device)
    rank = _mix_(_mix_(ids.long() ^ start)[:, None] + spread)
    low = (1 << pool.bit_length()) - 1
    rank &= ~low  # the unit's number in the low bits: no two ranks of a row are equal
    rank |= number
    last = rank.topk(active, -1, sorted=False).values.amin(-1, keepdim=True)
    return rank >= last


@lru_cache(maxsize=32)
def _spread(pool: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What `own_units` needs of its numbers alone, which are the same in every step: not to be written to."""
    number = torch.arange(pool, device=device)
    return number, _mix_(number + 1), _mix_(torch.full((), seed, dtype=torch.int64, device=device) + 1)


def union_fraction(active_fraction: float, deleted: int) -> float:
    """Expected share of the pool that ``deleted`` ids own together, 0…1.

    >>> round(union_fraction(0.3, 20), 4), round(union_fraction(0.013, 20), 2)
    (0.9992, 0.23)
    """
    return 1.0 - (1.0 - active_fraction) ** deleted


def plan(active_fraction: float, deleted: int) -> str:
    """What deleting some ids alone would take from all others, in a sentence.

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
    """``hidden`` times ``mask``, in the dtype of ``hidden``; None where the rows of ``hidden`` are not the mask's.

    Args:
        hidden: ``[B, ..., U]``, ``[T, B, U]`` or ``[B, U, ...]`` as the layer's axes tell; ``[B * T, U]``, where some
            models have put all tokens in a row; or a nested tensor, as torch's encoder makes of padded batches.
        mask: ``[U]``, by sample ``[B, U]``, or by token ``[B, T, U]``.
        tokens: T, for a mask by sample on tokens in a row. Without it such rows are not the mask's.
    """
    if hidden.is_nested:
        parts = hidden.unbind()
        each = [mask] * len(parts) if mask.ndim == 1 else list(mask)
        if len(each) != len(parts):
            return None
        pairs = zip(parts, each, strict=True)
        masked_parts = [part * (own[: len(part)] if own.ndim > 1 else own).to(part) for part, own in pairs]
        nested: Tensor = torch.nested.as_nested_tensor(masked_parts, layout=hidden.layout)
        return nested
    shaped = _laid_out(hidden, mask, layer, tokens)
    return None if shaped is None else hidden * shaped.to(hidden)


def _laid_out(hidden: Tensor, mask: Tensor, layer: HiddenLayer, tokens: int | None) -> Tensor | None:
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
    in_a_row = hidden.ndim == 2 and layer.batch_axis == 0
    if mask.ndim == 2:
        fits = in_a_row and tokens is not None and len(hidden) == len(mask) * tokens
        return mask.repeat_interleave(tokens or 1, 0) if fits else None
    if in_a_row and len(hidden) == len(mask) * mask.shape[1]:
        return mask.flatten(0, 1)
    by_token = mask.transpose(0, 1) if layer.batch_axis == 1 else mask
    return by_token if by_token.shape == hidden.shape else None


@contextmanager
def masked(layers: Sequence[HiddenLayer], mask: Callable[[int], Tensor], tokens: int | None = None) -> Iterator[None]:
    """Within, every hidden layer is multiplied by ``mask(U)``, and the masks of a `MemSinks` callback give way.

    So ``masked(layers, pool.dropped)`` is how the model is served, and
    ``masked(layers, lambda units: pool.own(ids, units))`` gives each sample of one batch its own units. Arguments as in
    `apply_mask`.

    Raises:
        ValueError: from the forward, where a layer's rows are not the mask's.
    """
    masks = {units: mask(units) for units in {layer.units for layer in layers}}
    mine = {layer.module for layer in layers} - set(_OVERRIDDEN)

    def by(layer: HiddenLayer) -> Callable[[Tensor], Tensor]:
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
            stack.callback(register_input_hook(layer, by(layer)).remove)
        stack.callback(_OVERRIDDEN.difference_update, mine)
        _OVERRIDDEN.update(mine)
        yield


def is_overridden(layer: HiddenLayer) -> bool:
    """Whether `masked` decides over this layer at the moment."""
    return layer.module in _OVERRIDDEN


def register_input_hook(layer: HiddenLayer, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """A hook that changes what ``layer`` reads, before any other hook sees it."""

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        (name, hidden), *rest = kwargs.items()
        return args, {name: change(hidden), **dict(rest)}

    return layer.module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)


def _mix_(number: Tensor) -> Tensor:
    """Spreads every bit over the others, in place: two rounds of xor-shift and odd multiplication, int64 that wraps."""
    number ^= number >> 32
    number *= -0x40A7B892E31B1A47
    number ^= number >> 29
    number *= -0x6B2FB644ECCEEE15
    return number
