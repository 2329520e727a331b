"""Random chains of layout operations on a tensor that holds in each element the number of its own sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_memsink.losses.provenance import Lost
from tests.support.following import Following, batch_rows

MOST = 600  # elements; a chain that repeats more is cut
OF_NO_SAMPLE = -1


def choose(draw: Any, choices: Sequence[Any]) -> Any:
    """One of several, by its place, so that a program can be run again on other numbers."""
    return choices[draw(st.integers(0, len(choices) - 1))]


def axis_of(draw: Any, x: Tensor) -> int:
    return draw(st.integers(-x.ndim, x.ndim - 1))


def positions(draw: Any, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))


def reshape(draw: Any, x: Tensor) -> Tensor:
    left, shape = x.numel(), []
    for _ in range(draw(st.integers(0, 3))):
        factor = choose(draw, [f for f in range(1, left + 1) if left % f == 0])
        shape.append(factor)
        left //= factor
    shape.append(left)
    return x.reshape(shape) if draw(st.booleans()) else x.contiguous().view(*shape)


def flatten(draw: Any, x: Tensor) -> Tensor:
    start = draw(st.integers(0, x.ndim - 1))
    return x.flatten(start, draw(st.integers(start, x.ndim - 1)))


def permute(draw: Any, x: Tensor) -> Tensor:
    order = draw(st.permutations(range(x.ndim)))
    a, b = axis_of(draw, x), axis_of(draw, x)
    return choose(draw, [x.permute(order), x.permute(*order), x.transpose(a, b), x.movedim(a, b), x.swapaxes(a, b)])


def matrix_transpose(draw: Any, x: Tensor) -> Tensor:
    if x.ndim < 2:
        return x
    return choose(draw, [x.mT, x.mH, x.adjoint()]) if x.ndim > 2 else choose(draw, [x.T, x.t(), x.mT])


def unsqueeze(draw: Any, x: Tensor) -> Tensor:
    return x.unsqueeze(draw(st.integers(-x.ndim - 1, x.ndim)))


def squeeze(draw: Any, x: Tensor) -> Tensor:
    return x.squeeze(axis_of(draw, x)) if draw(st.booleans()) else x.squeeze()


def cat(draw: Any, x: Tensor) -> Tensor:
    axis = axis_of(draw, x)
    constant = torch.full_like(x, OF_NO_SAMPLE)
    choices = [x, x.flip(axis), constant, x[:0] if axis % x.ndim == 0 else x]
    others = [choose(draw, choices) for _ in range(draw(st.integers(0, 2)))]
    return torch.cat([x, *others], axis)


def stack(draw: Any, x: Tensor) -> Tensor:
    axis = draw(st.integers(-x.ndim - 1, x.ndim))
    parts = [x, choose(draw, [x, x.flip(0), torch.full_like(x, OF_NO_SAMPLE)])]
    joined = [torch.stack(parts, axis), torch.hstack(parts), torch.vstack(parts), torch.dstack(parts)]
    return choose(draw, [*joined, torch.column_stack(parts)])


def piece(draw: Any, x: Tensor) -> Tensor:
    axis, count = axis_of(draw, x), draw(st.integers(1, 3))
    parts = choose(
        draw, [x.chunk(count, axis), x.split(count, axis), x.tensor_split(count, axis), x.unbind(axis), list(x)]
    )
    return choose(draw, list(parts)) if len(parts) else x


def rejoin(draw: Any, x: Tensor) -> Tensor:
    axis, count = axis_of(draw, x), draw(st.integers(1, 3))
    parts = list(x.chunk(count, axis))
    return torch.cat([parts[place] for place in draw(st.permutations(range(len(parts))))], axis)


def index(draw: Any, x: Tensor) -> Tensor:
    entries: list[Any] = []
    left = list(x.shape)
    masks = 0
    while left and draw(st.booleans()):
        extent = left.pop(0)
        if extent == 0:
            entries.append(slice(None))
            continue
        kind = choose(draw, ["int", "slice", "none", "tensor", "column", "list", "mask", "scalar"])
        if kind == "mask" and masks:
            kind = "slice"
        if kind == "int":
            entries.append(draw(st.integers(-extent, extent - 1)))
        elif kind == "slice":
            entries.append(slice(draw(st.integers(0, extent)), None, draw(st.integers(1, 2))))
        elif kind == "none":
            entries += [None, slice(None)]
        elif kind == "tensor":
            entries.append(positions(draw, extent, 2))
        elif kind == "column":
            entries.append(positions(draw, extent, 2, 1))
        elif kind == "list":
            entries.append([draw(st.integers(0, extent - 1)), 0])
        elif kind == "scalar":
            entries.append(torch.tensor(draw(st.integers(0, extent - 1))))
        else:
            masks += 1
            mask = positions(draw, 2, extent).bool()
            mask[:] = False
            mask[: min(2, extent)] = True  # two elements, or one, broadcast with the other tensors
            entries.append(mask.roll(draw(st.integers(0, 3))))
    if draw(st.booleans()) and len(left):
        entries.append(...)
    return x[tuple(entries)]


def mask(draw: Any, x: Tensor) -> Tensor:
    rank = draw(st.integers(1, x.ndim))
    chosen = positions(draw, 2, *x.shape[:rank]).bool()
    return choose(draw, [x[chosen], x[chosen.nonzero(as_tuple=True)], x[..., None][chosen]])


def masked_select(draw: Any, x: Tensor) -> Tensor:
    return x.masked_select(positions(draw, 2, *x.shape[-1:]).bool())


def repeat(draw: Any, x: Tensor) -> Tensor:
    times, axis = draw(st.integers(1, 3)), axis_of(draw, x)
    counts = positions(draw, 3, x.shape[axis])
    choices = [
        x.repeat(times, *[1] * x.ndim),
        x.repeat(*[1] * (x.ndim - 1), times),
        x.tile(times),
        x.repeat_interleave(times, axis),
        x.repeat_interleave(counts, axis),
        x.repeat_interleave(times),
        x.expand(times, *x.shape),
        torch.broadcast_to(x, (times, *x.shape)),
    ]
    return choose(draw, choices)


def turn(draw: Any, x: Tensor) -> Tensor:
    axis, by = axis_of(draw, x), draw(st.integers(-2, 2))
    choices = [x.flip(axis), x.roll(by, axis), x.roll(by), x.flip(list(range(x.ndim))), torch.flipud(x)]
    if x.ndim > 1:
        choices += [x.rot90(by, (0, 1)), torch.fliplr(x)]
    return choose(draw, choices)


def pick(draw: Any, x: Tensor) -> Tensor:
    axis = axis_of(draw, x)
    extent = x.shape[axis]
    chosen = positions(draw, extent, 3)
    along = positions(draw, extent, *[2 if a == axis % x.ndim else e for a, e in enumerate(x.shape)])
    start = draw(st.integers(0, extent - 1))
    order = torch.rand(x.shape, generator=torch.Generator().manual_seed(extent)).argsort(axis)
    choices = [
        x.index_select(axis, chosen),
        x.gather(axis, along),
        torch.take_along_dim(x, along, axis),
        x.gather(axis, order),
        x.narrow(axis, start, extent - start),
        x.select(axis, start),
        x.take(positions(draw, x.numel(), 4)),
        x.sort(axis).values,
        x.topk(1, axis).values,
        x[(*[slice(None)] * (axis % x.ndim), chosen)],
    ]
    return choose(draw, choices)


def window(draw: Any, x: Tensor) -> Tensor:
    axis = axis_of(draw, x)
    whole = x.contiguous()
    choices = [
        x.unfold(axis, min(2, x.shape[axis]), 1),
        whole.as_strided((x.numel() - 1 or 1, 2), (1, min(1, x.numel() - 1))),
    ]
    if x.ndim > 1:
        choices += [x.diagonal(draw(st.integers(-1, 1))), x.diagonal(0, -1, 0)]
    return choose(draw, choices)


def pad(draw: Any, x: Tensor) -> Tensor:
    widths = [draw(st.integers(0, 2)) for _ in range(2 * draw(st.integers(1, x.ndim)))]
    return F.pad(x, widths, value=OF_NO_SAMPLE)


def write(draw: Any, x: Tensor) -> Tensor:
    extent = x.shape[0]
    order = torch.randperm(extent, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    target = torch.full((extent + 1, *x.shape[1:]), OF_NO_SAMPLE)
    kind = draw(st.integers(0, 6))
    if kind == 0:
        target[order] = x
    elif kind == 1:
        target[1:] = x
    elif kind == 2:
        target.index_copy_(0, order, x)
    elif kind == 3:
        target = (target + 1).index_add(0, order, x)  # a place that nothing is added to holds 0
        target[extent] = OF_NO_SAMPLE
    elif kind == 4:
        target = target.scatter(0, order.reshape(-1, *[1] * (x.ndim - 1)).expand_as(x), x)
    elif kind == 5:
        target.index_put_((order,), x)
    else:
        target = x.clone()
        target[order[:1]] = x[order[:1]]
        target[0] = x[extent - 1]
    return target


def sequences(draw: Any, x: Tensor) -> Tensor:
    rows = [row[: 1 + number % max(1, len(row))] if row.ndim else row[None] for number, row in enumerate(x)]
    return torch.nn.utils.rnn.pad_sequence(rows, draw(st.booleans()), padding_value=OF_NO_SAMPLE)


OPERATIONS = [reshape, flatten, permute, matrix_transpose, unsqueeze, squeeze, cat, stack, piece, rejoin, index, mask]
OPERATIONS += [masked_select, repeat, turn, pick, window, pad, write, sequences]


def start(draw: Any) -> tuple[Tensor, int]:
    """A batch, and the axis of its samples."""
    size = draw(st.integers(1, 4))
    shape = draw(st.lists(st.integers(1, 4), max_size=2))
    axis = draw(st.integers(0, len(shape)))
    shape.insert(axis, size)
    return torch.arange(size).reshape([size if a == axis else 1 for a in range(len(shape))]).expand(shape).clone(), axis


def test_owners_through_random_layouts_are_exact():
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()

    @settings(
        max_examples=400,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    @given(st.data())
    def follow_one(data):
        draw = data.draw
        x, axis = start(draw)
        mode = Following()
        mode.give(x, batch_rows(x.shape[axis], x.ndim, axis))
        names = []
        with mode:
            for _ in range(draw(st.integers(1, 6))):
                if x.ndim == 0 or x.numel() == 0 or x.numel() > MOST:
                    break
                operation = choose(draw, OPERATIONS)
                names.append(operation.__name__)
                x = operation(draw, x)
        counts["draws"] += 1
        provenance = mode.of(x)
        if isinstance(provenance, Lost):
            counts["lost"] += 1
            reasons[f"{names}: {provenance.reason}"] += 1
            return
        owners = mode.owners(x)
        if owners is None:  # only constants are left
            assert bool((x == OF_NO_SAMPLE).all()), names
            return
        assert bool(((owners == x) | (x == OF_NO_SAMPLE)).all()), (names, x, provenance)

    follow_one()
    assert counts["draws"] >= 400
    assert counts["lost"] <= 0.05 * counts["draws"], reasons
    print(counts, reasons)
