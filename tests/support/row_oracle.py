"""Which samples an element depends on, found by changing one sample's elements at a time."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.losses.provenance import Lost, Rows
from lightning_memsink.losses.rule_call import tensors_in
from tests.support.following import Following

Given = Sequence["Tensor | None"]
"""For each input its owners, None for a constant."""


def run(function: Callable[..., Any], inputs: Sequence[Any], owners: Given) -> tuple[list[Tensor], list[Any]]:
    """The tensors of ``function(*inputs)``, and the provenance of each."""
    mode = Following()
    inputs = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    for value, mine in zip(inputs, owners, strict=True):
        if mine is not None:
            mode.give(value, mine)
    torch.manual_seed(0)
    with mode:
        result = function(*inputs)
    results = list(tensors_in([result]))
    return results, [mode.of(each) for each in results]


def wrong_elements(function: Callable[..., Any], inputs: Sequence[Any], owners: Given) -> list[str]:
    """Elements that depend on a sample which isn't among their readings. What is lost makes no claim.

    Only floating-point inputs are changed: a position is no value that flows on.
    """
    results, found = run(function, inputs, owners)
    wrong = []
    samples = {int(s) for mine in owners if mine is not None for s in mine.flatten()} - {-1}
    for sample in sorted(samples):
        changed = []
        for value, mine in zip(inputs, owners, strict=True):
            if mine is not None and value.is_floating_point():
                factor = torch.where(mine.expand(value.shape) == sample, 1 + 1e-6, 1.0).to(value.dtype)
                value = value * factor
            changed.append(value)
        others, _ = run(function, changed, owners)
        for number, (before, after, provenance) in enumerate(zip(results, others, found, strict=True)):
            if before.shape != after.shape or isinstance(provenance, Lost) or not before.is_floating_point():
                continue
            depends = ~torch.isclose(before, after, rtol=1e-9, atol=1e-12, equal_nan=True)
            if not bool(depends.any()):
                continue
            claimed = torch.zeros_like(depends)
            for candidate in provenance.candidates if isinstance(provenance, Rows) else ():
                claimed |= candidate.expand(before.shape) == sample
            if bool((depends & ~claimed).any()):
                readings = [c.tolist() for c in provenance.candidates] if provenance else None
                wrong.append(f"result {number} depends on sample {sample}, claimed: {readings}")
    return wrong


def assignments(inputs: Sequence[Any], most: int) -> Iterator[list[Tensor | None]]:
    """Owners for the inputs, drawn among all combinations: constant, along one axis, one sample's, with padding."""
    choices = [list(_choices(value)) if isinstance(value, Tensor) else [None] for value in inputs]
    combinations = list(itertools.product(*choices))
    random.Random(0).shuffle(combinations)
    for combination in combinations[:most]:
        if any(owners is not None for owners in combination):
            yield list(combination)


def _choices(value: Tensor) -> Iterator[Tensor | None]:
    yield None
    ones = [1] * value.ndim
    yield torch.zeros(ones, dtype=torch.long)
    yield torch.ones(ones, dtype=torch.long)
    for axis, extent in enumerate(value.shape):
        if extent > 1:
            shape = [extent if place == axis else 1 for place in range(value.ndim)]
            yield torch.arange(extent).reshape(shape)
            yield (torch.arange(extent) - 1).reshape(shape)
            yield torch.arange(extent).flip(0).reshape(shape)
            if extent > 2:
                yield (torch.arange(extent) // 2).reshape(shape)
