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
from lightning_memsink.attribution.unit_effects import divide_by_weights


def projection(size: int, rank: int, seed: int) -> Tensor:
    """``[size, rank]`` of random signs over ``sqrt(rank)``, from a generator of its own: ``R R'`` is 1 on average."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(2, (size, rank), generator=generator).float() * 2 - 1
    return signs / math.sqrt(rank)


def sketch(left: Tensor, right: Tensor, left_projection: Tensor, right_projection: Tensor) -> Tensor:
    """``[B, r * r]`` of each sample's gradient, the sum over positions of ``left`` times ``right``.

    Args:
        left: ``[B, T, O]`` gradient at a linear layer's output.
        right: ``[B, T, I]`` its input.
        left_projection: ``[O, r]``.
        right_projection: ``[I, r]``.
    """
    return torch.bmm((left @ left_projection).mT, right @ right_projection).flatten(1)


def cosine(sketches: Tensor, control: Tensor) -> Tensor:
    """``[B]``, in [-1, 1]: of each of ``sketches`` ``[B, D]`` with ``control`` ``[D]``; 0 where either is 0."""
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
        self._modules: dict[str, nn.Module] = {}
        self._home: dict[str, str] = {}
        homes: dict[int, str] = {}
        for name, module in model.named_modules():
            if outer_of(module) is not None:
                self._modules[name] = module
                self._home[name] = homes.setdefault(id(module._parameters["weight"]), name)
        self._projections: dict[tuple[str, Literal["left", "right"]], Tensor] = {}
        self._sketches: dict[str, Tensor] = {}
        self._calls = ModuleCalls(self._modules, "output", self._on_pair)

    @property
    def layers(self) -> list[str]:
        """Whose sketches follow one another in `finish`, ``rank ** 2`` numbers each."""
        return list(dict.fromkeys(self._home.values()))

    def open(self) -> None:
        """From the next forward on."""
        self._sketches.clear()
        self._calls.open()

    def paused(self) -> AbstractContextManager[None]:
        """Inside, a backward passes unseen."""
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
        nothing = torch.zeros(batch_size, self.rank**2, device=device)
        parts = [self._sketches.get(name, nothing) for name in self.layers]
        whole = torch.cat([part if len(part) == batch_size else nothing for part in parts], 1)
        self._sketches.clear()
        return whole if weights is None else divide_by_weights(whole, weights)

    def remove(self) -> None:
        """Takes the hooks away; a second time does nothing."""
        self._calls.remove()
        self._sketches.clear()

    def _on_pair(self, name: str, given: Tensor, gradient: Tensor) -> None:
        outer = outer_of(self._modules[name])
        if outer is None:
            return
        part = outer(samples_first(given, self.batch_axis), samples_first(gradient, self.batch_axis))
        home = self._home[name]
        left = self._projection(home, "left", part.left)
        with torch.autocast(gradient.device.type, enabled=False):
            each = sketch(part.left, part.right, left, self._projection(home, "right", part.right))
        before = self._sketches.get(home)
        self._sketches[home] = each if before is None or len(before) != len(each) else before + each

    def _projection(self, name: str, side: Literal["left", "right"], like: Tensor) -> Tensor:
        known = self._projections.get((name, side))
        if known is None or (known.device, known.dtype) != (like.device, like.dtype):
            seed = zlib.crc32(f"{self.seed} {name} {side}".encode())
            known = self._projections[name, side] = projection(like.shape[2], self.rank, seed).to(like)
        return known
