"""Rules of provenance for products of matrices: matmul, linear, einsum, outer products.

In ``[n, k] @ [k, m]`` the row of the left matrix and the column of the right one are both readings of whose an element
is, if owners are constant along the axis that is summed. A sum over an axis along which owners vary is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_memsink.losses.provenance import (
    SUMMED,
    Lost,
    Owners,
    Part,
    Provenance,
    Rows,
    collapse,
    merge,
)
from lightning_memsink.losses.rule_call import Call, NotFollowed, Outcome, Rule

Operand = tuple["Provenance | None", Sequence[int], Sequence[Any]]
"""Provenance, shape, and a label for each axis; a label that the result lacks is summed over."""


def contract(operands: Sequence[Operand], output: Sequence[Any], shape: Sequence[int]) -> Provenance | None:
    """Provenance of a sum of products, as einsum writes it. ``output`` labels the axes of the result."""
    parts: list[Part] = []
    for provenance, extents, labels in operands:
        if provenance is None:
            continue
        if len(set(labels)) != len(labels):
            raise NotFollowed
        by_label = dict(zip(labels, extents, strict=True))
        placed = [by_label.get(label, 1) for label in output]
        if isinstance(provenance, Rows):
            summed = [axis for axis, label in enumerate(labels) if label not in output]
            kept = [
                owners for owners in map(lambda o: collapse(o, summed), provenance.candidates) if owners is not None
            ]
            if not kept:
                return Lost(SUMMED)
            order = [labels.index(label) for label in output if label in by_label] + summed
            provenance = Rows(tuple([_placed(owners, order, labels, output) for owners in kept]))
        parts.append((provenance, placed))
    return merge(parts, shape)


def _placed(owners: Owners, order: list[int], labels: Sequence[Any], output: Sequence[Any]) -> Owners:
    extents = dict(zip(labels, owners.shape, strict=True))
    if order != sorted(order):
        owners = owners.permute(order)
    return owners.reshape([extents.get(label, 1) for label in output])


def linear(call: Call) -> Outcome:
    source, weight = call.tensor(), call.tensor(1, "weight")
    bias = call.get(2, "bias")
    provenance = call.of(source)
    if call.of(weight) is None and (bias is None or call.of(bias) is None):
        if isinstance(provenance, Rows) and source.ndim == len(call.shape):
            if all(owners.shape[-1] == 1 for owners in provenance.candidates):
                return provenance
    batch = list(range(source.ndim - 1))
    labels = ["out", "in"][2 - weight.ndim :]
    operands: list[Operand] = [(provenance, source.shape, [*batch, "in"]), (call.of(weight), weight.shape, labels)]
    output = [*batch, "out"] if weight.ndim == 2 else batch
    return _plus(call, bias, contract(operands, output, call.shape))


def _plus(call: Call, addend: Any, provenance: Provenance | None) -> Provenance | None:
    if not isinstance(addend, Tensor) or call.of(addend) is None:
        return provenance
    return merge([(provenance, call.shape), call.part(addend)], call.shape)


def product(call: Call, left: Tensor, right: Tensor) -> Provenance | None:
    """Provenance of ``left @ right``."""
    if left.ndim == 0 or right.ndim == 0:
        raise NotFollowed
    batch = list(range(max(left.ndim, right.ndim) - 2))
    ours = [*batch[len(batch) - max(0, left.ndim - 2) :], "n", "k"] if left.ndim > 1 else ["k"]
    theirs = [*batch[len(batch) - max(0, right.ndim - 2) :], "k", "m"] if right.ndim > 1 else ["k"]
    output = [*batch, *(["n"] if left.ndim > 1 else []), *(["m"] if right.ndim > 1 else [])]
    return contract(
        [(call.of(left), left.shape, ours), (call.of(right), right.shape, theirs)], output, call.result.shape
    )


def matmul(call: Call) -> Outcome:
    left = call.tensor(0, "input", "self", "vec1")
    right = call.tensor(1, "other", "mat2", "vec", "tensor", "vec2")
    return product(call, right, left) if call.name == "__rmatmul__" else product(call, left, right)


def added_product(call: Call) -> Outcome:
    """addmm, baddbmm, addmv: ``input + left @ right``."""
    left, right = call.tensor(1, "mat1", "batch1", "mat"), call.tensor(2, "mat2", "batch2", "vec")
    return _plus(call, call.tensor(), product(call, left, right))


def outer(call: Call) -> Outcome:
    first, second = call.tensor(0, "input", "self"), call.tensor(1, "vec2", "other")
    operands = [(*call.part(first), ["n"]), (*call.part(second), ["m"])]
    return contract(operands, ["n", "m"], call.shape)


def added_outer(call: Call) -> Outcome:
    operands = [(*call.part(call.tensor(1, "vec1")), ["n"]), (*call.part(call.tensor(2, "vec2")), ["m"])]
    return _plus(call, call.tensor(), contract(operands, ["n", "m"], call.shape))


def inner(call: Call) -> Outcome:
    first, second = call.tensor(), call.tensor(1, "other")
    ours = [*[f"l{axis}" for axis in range(first.ndim - 1)], "k"]
    theirs = [*[f"r{axis}" for axis in range(second.ndim - 1)], "k"]
    operands = [(*call.part(first), ours), (*call.part(second), theirs)]
    return contract(operands, [*ours[:-1], *theirs[:-1]], call.shape)


def tensordot(call: Call) -> Outcome:
    first, second = call.tensor(0, "a"), call.tensor(1, "b")
    dims = call.get(2, "dims", default=2)
    if isinstance(dims, int):
        dims = list(range(first.ndim - dims, first.ndim)), list(range(dims))
    ours: list[Any] = [f"l{axis}" for axis in range(first.ndim)]
    theirs: list[Any] = [f"r{axis}" for axis in range(second.ndim)]
    left, right = ([axes] if isinstance(axes, int) else list(axes) for axes in dims)
    for number, (a, b) in enumerate(zip(left, right, strict=True)):
        ours[a] = theirs[b] = number
    output = [label for label in [*ours, *theirs] if isinstance(label, str)]
    return contract([(*call.part(first), ours), (*call.part(second), theirs)], output, call.shape)


def einsum(call: Call) -> Outcome:
    equation = call.get(0, "equation")
    if not isinstance(equation, str):
        raise NotFollowed
    tensors = list(call.args[1:])
    if len(tensors) == 1 and isinstance(tensors[0], (list, tuple)):
        tensors = list(tensors[0])
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(tensors):
        raise NotFollowed
    labels = [_labels(term, tensor.ndim) for term, tensor in zip(terms, tensors, strict=True)]
    if arrow:
        result = _labels(output, len(call.shape))
    else:  # the ellipsis, then labels that occur once, in order
        letters = "".join(terms).replace(".", "")
        named = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
        wide = len(call.shape) - len(named)
        result = [*range(-wide, 0), *named]
    operands: list[Operand] = [(*call.part(tensor), label) for tensor, label in zip(tensors, labels, strict=True)]
    return contract(operands, result, call.shape)


def _labels(term: str, ndim: int) -> list[Any]:
    """Letters; the axes of an ellipsis are numbered from its end, as broadcasting aligns them."""
    before, dots, after = term.partition("...")
    wide = ndim - len(before) - len(after) if dots else 0
    return [*before, *range(-wide, 0), *after]


def bilinear(call: Call) -> Outcome:
    first, second, weight = call.tensor(0, "input1"), call.tensor(1, "input2"), call.tensor(2, "weight")
    batch = list(range(first.ndim - 1))
    operands: list[Operand] = [
        (*call.part(first), [*batch, "i"]),
        (*call.part(second), [*batch, "j"]),
        (*call.part(weight), ["o", "i", "j"]),
    ]
    return _plus(call, call.get(3, "bias"), contract(operands, [*batch, "o"], call.shape))


RULES: dict[str, Rule] = {
    "linear": linear,
    **dict.fromkeys("matmul mm bmm mv dot vdot __matmul__ __rmatmul__ __imatmul__ linalg_matmul".split(), matmul),
    **dict.fromkeys("addmm baddbmm addmv".split(), added_product),
    "outer": outer,
    "ger": outer,
    "addr": added_outer,
    "inner": inner,
    "tensordot": tensordot,
    "einsum": einsum,
    "bilinear": bilinear,
}
