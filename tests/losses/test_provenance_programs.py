"""Random programs of layout changes, arithmetic and reductions: each element depends on its own sample alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_memsink.losses.provenance import Lost, Rows
from tests.losses.test_provenance_layouts import MOST, OPERATIONS, choose, start
from tests.support.following import Following, batch_rows


class Recorded:
    """Draws of a program, to run it again on other numbers."""

    def __init__(self, draw: Any = None, drawn: list[Any] | None = None) -> None:
        self.draw, self.drawn, self.place = draw, drawn if drawn is not None else [], 0

    def __call__(self, strategy: Any) -> Any:
        if self.draw is not None:
            self.drawn.append(self.draw(strategy))
            return self.drawn[-1]
        self.place += 1
        return self.drawn[self.place - 1]


def arithmetic(draw: Any, x: Tensor) -> Tensor:
    """With a rearrangement of itself of the same shape: rows of different samples may meet."""
    axis = draw(st.integers(0, x.ndim - 1))
    other = [x, x.flip(axis), x.exp(), x[:1], x.detach()][draw(st.integers(0, 4))]
    return [x + other, x * other, torch.maximum(x, other), torch.where(x > 0, x, other)][draw(st.integers(0, 3))]


def reduction(draw: Any, x: Tensor) -> Tensor:
    axis, keepdim = draw(st.integers(-x.ndim, x.ndim - 1)), draw(st.booleans())
    kind = draw(st.integers(0, 6))
    if kind == 0:
        return x.sum(axis, keepdim=keepdim)
    if kind == 1:
        return x.mean(axis, keepdim)
    if kind == 2:
        return x.softmax(axis)
    if kind == 3:
        return x.cumsum(axis)
    if kind == 4:
        return x.logsumexp(axis, keepdim)
    if kind == 5:
        return F.layer_norm(x, x.shape[axis % x.ndim :])
    return x.amax(axis, keepdim)


def product(draw: Any, x: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, 3 * x.shape[-1], dtype=x.dtype).reshape(3, -1)
    if x.ndim > 1 and draw(st.booleans()):
        return torch.einsum("...ij,...kj->...ik", x, x.cos())
    return F.linear(x, weight)


LAYOUTS = [each for each in OPERATIONS if each.__name__ != "write"]
"""Without writes: these put positions, which are no numbers that could be changed a little."""
MIXING = [arithmetic, reduction, product]


def run(x: Tensor, draw: Any, mode: Following, names: list[str]) -> Tensor | None:
    """The result of a program, or None where it is not a number of one reading any more."""
    with mode:
        for _ in range(draw(st.integers(1, 5))):
            if x.ndim == 0 or x.numel() == 0 or x.numel() > MOST:
                break
            operation = choose(draw, LAYOUTS if draw(st.booleans()) else MIXING)
            names.append(operation.__name__)
            x = operation(draw, x)
            provenance = mode.of(x)
            if isinstance(provenance, Rows) and len(provenance.candidates) > 1:
                return None  # what a later reduction drops is a statistic of the batch
    return x


def test_no_program_gives_an_element_to_a_sample_that_it_does_not_depend_on_alone():
    counts: Counter[str] = Counter()

    @settings(
        max_examples=500,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(st.data())
    def run_one(data):
        record = Recorded(data.draw)
        layout, axis = start(record)
        size = layout.shape[axis]
        owners = batch_rows(size, layout.ndim, axis)
        first = torch.rand(layout.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.4
        mode, names = Following(), []
        result = run(mode.give(first.clone(), owners), record, mode, names)
        counts["programs"] += 1
        if result is None or isinstance(mode.of(result), Lost) or not result.is_floating_point():
            counts["no claim"] += 1
            return
        claimed = mode.owners(result)
        for sample in range(size):
            changed = first * torch.where(owners == sample, 1 + 1e-6, 1.0)
            again = Recorded(drawn=record.drawn)
            start(again)
            second = run(changed, again, Following(), [])
            assert second is not None
            counts["own"] += bool((result != second).any())
            depends = ~torch.isclose(result, second, rtol=1e-10, atol=1e-14, equal_nan=True)
            if claimed is None:
                assert not bool(depends.any()), names
            else:
                assert not bool((depends & (claimed != sample)).any()), (names, sample, mode.of(result))

    run_one()
    assert counts["programs"] >= 500
    assert counts["own"] >= 200, counts  # samples on which a result did depend
    assert counts["no claim"] <= 0.5 * counts["programs"], counts
