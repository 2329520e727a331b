"""Small random projections of per-sample gradients, whose inner products are those of the gradients on average.

A linear layer's gradient ``b' a`` is projected from both sides, ``(R_out b') (a R_in)``, which costs little more than
projecting its input and its output's gradient (Johnson and Lindenstrauss 1984; two-sided as in TRAK's and LoGra's
layer sketches, arXiv 2405.13954). Cosines between single samples are rough: their error falls as 1 / rank.

    B  samples in a batch    T  positions of a sample    I, O  inputs and outputs of a layer    r  rank
    D  numbers of a sketch, r * r for every layer
"""

from __future__ import annotations

import math
import zlib
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_memsink.attribution.gradient_rules import outer_of, samples_first
from lightning_memsink.attribution.module_hooks import ModuleCalls
from lightning_memsink.attribution.token_owners import TokenOwners
from lightning_memsink.attribution.unit_effects import divide_by_weights


def projection(size: int, rank: int, seed: int) -> Tensor:
    """``[size, rank]`` random signs over ``sqrt(rank)``, drawn by a generator of its own: ``R R'`` is 1 on average."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (size, rank), generator=generator).float() * 2 - 1
    return signs / math.sqrt(rank)


def sketch(left: Tensor, right: Tensor, left_projection: Tensor, right_projection: Tensor) -> Tensor:
    """``[B, r * r]`` projections of each sample's gradient, the sum over positions of ``left`` times ``right``.

    Args:
        left: ``[B, T, O]`` gradient at a linear layer's output.
        right: ``[B, T, I]`` its input.
        left_projection: ``[O, r]``.
        right_projection: ``[I, r]``.
    """
    return torch.bmm((left @ left_projection).mT, right @ right_projection).flatten(1)


def cosine(sketches: Tensor, control: Tensor) -> Tensor:
    """``[B]`` cosines in -1…1 of ``sketches`` ``[B, D]`` with ``control`` ``[D]``; 0 where either is 0."""
    lengths = sketches.norm(dim=1) * control.norm()
    return torch.where(lengths > 0, (sketches @ control) / lengths.clamp(min=torch.finfo(lengths.dtype).tiny), 0.0)


class GradientSketches:
    """`sketch` of each trainable linear layer, from `open` before a forward to `finish` after its backward.

    Sketches of one ``seed`` compare between steps, runs and processes: projections follow the layer's name. A weight
    that several layers share is sketched with each of them, under the first one's projections, and summed.

    Args:
        rank: r.
        batch_axis: where the samples are in inputs of three axes: 1 if sequences come first.
    """

    def __init__(self, model: nn.Module, rank: int = 16, seed: int = 0, batch_axis: int = 0) -> None:
        self.rank, self.seed, self.batch_axis = rank, seed, batch_axis
        self.owners: TokenOwners | None = None
        """Of the tokens, where rows hold several documents; set after `open`. Sketches are of documents then."""
        self._modules: dict[str, nn.Module] = {}
        self._first_user: dict[str, str] = {}  # the first layer with the same weight
        first_users: dict[int, str] = {}
        for name, module in model.named_modules():
            if outer_of(module) is not None:
                self._modules[name] = module
                self._first_user[name] = first_users.setdefault(id(module._parameters["weight"]), name)
        self._projections: dict[tuple[str, Literal["left", "right"]], Tensor] = {}
        self._sketches: dict[str, Tensor] = {}
        self._calls = ModuleCalls(self._modules, "output", self._read_call)

    @property
    def layers(self) -> list[str]:
        """The layers whose sketches follow one another in `finish`, ``rank ** 2`` numbers each."""
        return list(dict.fromkeys(self._first_user.values()))

    def open(self) -> None:
        """Records from the next forward on."""
        self._sketches.clear()
        self.owners = None
        self._calls.open()

    def paused(self) -> AbstractContextManager[None]:
        """Inside, a backward is not recorded."""
        return self._calls.paused()

    def finish(self, batch_size: int, weights: Tensor | None = None) -> Tensor:
        """``[B, D]`` of the samples' gradients; a layer that was not called, or whose input has no sample axis, is 0.

        Args:
            batch_size: B.
            weights: ``[B]``, each sample's weight in what was differentiated: the sketches are of the samples' own
                mean losses then. A sample of weight 0 gets zeros.
        """
        self._calls.close()
        device = next((each.device for each in self._sketches.values()), torch.device("cpu"))
        zeros = torch.zeros(batch_size, self.rank**2, device=device)
        parts = [self._sketches.get(name, zeros) for name in self.layers]
        sketches = torch.cat([part if len(part) == batch_size else zeros for part in parts], 1)
        self._sketches.clear()
        return sketches if weights is None else divide_by_weights(sketches, weights)

    def remove(self) -> None:
        """Removes the hooks; a second call does nothing."""
        self._calls.remove()
        self._sketches.clear()

    def _read_call(self, name: str, inputs: Tensor, gradient: Tensor) -> None:
        make_outer = outer_of(self._modules[name])
        if make_outer is None:  # frozen since
            return
        parts = samples_first(inputs, self.batch_axis), samples_first(gradient, self.batch_axis)
        if self.owners is not None:
            own = [self.owners.unpacked(part) for part in parts]
            if own[0] is None or own[1] is None:
                return
            parts = own[0], own[1]
        outer = make_outer(*parts)
        key = self._first_user[name]
        left = self._projection(key, "left", outer.left)
        with torch.autocast(gradient.device.type, enabled=False):
            sketched = sketch(outer.left, outer.right, left, self._projection(key, "right", outer.right))
        before = self._sketches.get(key)
        self._sketches[key] = sketched if before is None or len(before) != len(sketched) else before + sketched

    def _projection(self, name: str, side: Literal["left", "right"], like: Tensor) -> Tensor:
        cached = self._projections.get((name, side))
        if cached is None or (cached.device, cached.dtype) != (like.device, like.dtype):
            seed = zlib.crc32(f"{self.seed} {name} {side}".encode())
            cached = self._projections[name, side] = projection(like.shape[2], self.rank, seed).to(like)
        return cached
