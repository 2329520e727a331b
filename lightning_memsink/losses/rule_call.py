"""A torch call as the rules of provenance see it: its arguments, its result, and the provenance of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lightning_memsink.losses.provenance import Lost, Part, Provenance, Rows, aligned, merge, reduce

ProvenanceOf: TypeAlias = Callable[[Tensor], "Provenance | None"]
Outcome: TypeAlias = "Provenance | list[Provenance | None] | None"
"""What belongs to a result: a list for a result of several tensors."""


class NotFollowed(Exception):
    """This call's rows can't be followed."""


class SamplesMixed(Exception):
    """The call mixes samples, in a way for which there are words."""


class Call:
    """One torch call. ``shape`` is that of its result, if that is a tensor."""

    __slots__ = ("args", "func", "kwargs", "name", "of", "result")

    def __init__(
        self,
        func: Any,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
        provenance_of: ProvenanceOf,
    ) -> None:
        self.func, self.name, self.args, self.kwargs = func, name, args, kwargs
        self.result, self.of = result, provenance_of

    @property
    def shape(self) -> Sequence[int]:
        shape: Sequence[int] = self.result.shape
        return shape

    def get(self, position: int, *names: str, default: Any = None) -> Any:
        """The argument at ``position``, or by any of its names."""
        if position < len(self.args):
            return self.args[position]
        for name in names:
            if name in self.kwargs:
                return self.kwargs[name]
        return default

    def tensor(self, position: int = 0, *names: str) -> Tensor:
        """As `get`.

        Raises:
            NotFollowed: The argument is no tensor.
        """
        value = self.get(position, *(names or ("input", "self")))
        if not isinstance(value, Tensor):
            raise NotFollowed
        return value

    def part(self, value: Any) -> Part:
        """Provenance and shape of an operand; a number is a constant."""
        return (self.of(value), value.shape) if isinstance(value, Tensor) else (None, ())

    def operands(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return tensors_in(self.args) + tensors_in(self.kwargs.values())


def within(call: Call, operand: Tensor, axes: Iterable[int], reason: str = "") -> Provenance | None:
    """Provenance of an operand whose elements along ``axes`` are mixed; extents of 1 are left there.

    Raises:
        SamplesMixed: These elements are not one sample's.
    """
    before = call.of(operand)
    after = reduce(before, operand.shape, axes, True, reason or f"{call.name} over the samples")
    if isinstance(after, Lost) and after is not before:
        raise SamplesMixed(after.reason)
    return after


def narrowed(operand: Tensor, axes: Iterable[int]) -> list[int]:
    """The shape of ``operand`` with extent 1 along ``axes``."""
    mixed = {axis % operand.ndim for axis in axes} if operand.ndim else set()
    return [1 if axis in mixed else extent for axis, extent in enumerate(operand.shape)]


def with_shared(
    call: Call, provenance: Provenance | None, own: Sequence[Any], shape: Sequence[int]
) -> Provenance | None:
    """Provenance after whatever else the call was given, beside the tensors ``own``: weights that all elements share.

    Raises:
        SamplesMixed: The weights are not one sample's, nor constants.
    """
    for operand in call.operands():
        if call.of(operand) is not None and not any(operand is mine for mine in own):
            shared = within(call, operand, range(operand.ndim), "weights that are made of several samples")
            shared = each(shared, lambda owners: owners.reshape(()))
            provenance = merge([(provenance, shape), (shared, ())], shape)
    return provenance


Rule: TypeAlias = Callable[[Call], Outcome]


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """Tensors in nested tuples, lists and dicts, depth first."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found


def each(provenance: Provenance | None, change: Callable[[Tensor], Tensor]) -> Provenance | None:
    """Every reading through ``change``, which keeps extents of 1 wherever owners are constant."""
    if not isinstance(provenance, Rows):
        return provenance
    return Rows(tuple([change(owners) for owners in provenance.candidates]))


def sole(provenance: Provenance | None, ndim: int) -> Tensor | None:
    """The one reading with ``ndim`` axes, or None for a constant.

    Raises:
        NotFollowed: There are several readings, or it is lost.
    """
    if provenance is None:
        return None
    if isinstance(provenance, Lost) or len(provenance.candidates) != 1:
        raise NotFollowed
    return aligned(provenance.candidates[0], ndim)


def constant(call: Call) -> Outcome:
    """The result does not depend on the batch: its values come from shapes and random numbers.

    Raises:
        NotFollowed: A value that fills it may depend on the batch.
    """
    if any(call.of(operand) is not None for operand in call.operands()[1:]):
        raise NotFollowed
    return [None] * len(tensors_in([call.result])) if not isinstance(call.result, Tensor) else None


def not_followed(call: Call) -> Outcome:
    raise NotFollowed


def lost_with(reason: str) -> Rule:
    """A rule for functions that mix samples in a way for which there is a word."""

    def rule(call: Call) -> Outcome:
        if isinstance(call.result, Tensor):
            return Lost(reason)
        return [Lost(reason) for _ in tensors_in([call.result])]

    return rule
