"""Provenance of the result of any torch call: `follow` finds the rule for a function and applies it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from lightning_memsink.losses import (
    index_rules,
    join_rules,
    layout_rules,
    loss_rules,
    model_rules,
    pick_rules,
    piece_rules,
    pointwise_rules,
    product_rules,
    reduction_rules,
    sequence_rules,
    write_rules,
)
from lightning_memsink.losses.pointwise_rules import is_pointwise, pointwise
from lightning_memsink.losses.provenance import Lost, Provenance, Rows
from lightning_memsink.losses.rule_call import Call, ProvenanceOf, Rule, SamplesMixed, constant, tensors_in

RULES: dict[str, Rule] = {
    **pointwise_rules.RULES,
    **layout_rules.RULES,
    **piece_rules.RULES,
    **join_rules.RULES,
    **index_rules.RULES,
    **pick_rules.RULES,
    **write_rules.RULES,
    **reduction_rules.RULES,
    **product_rules.RULES,
    **loss_rules.RULES,
    **model_rules.RULES,
    **sequence_rules.RULES,
}
"""By name of the function. ``F.name`` comes first for a function of ``torch.nn.functional``; a name with a trailing
underscore falls back to the name without."""

FUNCTIONAL = "torch.nn.functional"
SETTERS = frozenset(("__setitem__", "data.__set__"))
IN_PLACE = frozenset(
    f"__i{name}__" for name in "add sub mul div truediv floordiv mod pow and or xor lshift rshift matmul".split()
)
OF_SHAPES_ALONE = frozenset(
    {
        *layout_rules.RULES.values(),
        *piece_rules.RULES.values(),
        *reduction_rules.RULES.values(),
        index_rules.getitem,
        join_rules.tile,
        join_rules.pad,
    }
    - {
        layout_rules.set_data,
        layout_rules.as_strided,
        layout_rules.index_fill,
        layout_rules.squeeze_in_place,
        layout_rules.broadcast_tensors,
    }
)
PLAIN = frozenset((int, float, bool, str, torch.dtype, torch.device, torch.memory_format))
MOST_REMEMBERED = 512
LARGEST_REMEMBERED = 2**16  # elements: half a MiB
_remembered: dict[Any, tuple[Provenance, Any]] = {}
MOST_FUNCTIONS = 4096  # rules found once are kept; a program calls a few hundred functions
_found: dict[Any, tuple[str, str, Rule | None]] = {}


def changes_in_place(func: Any) -> bool:
    """Whether the function changes its first argument, which then has the provenance that `follow` gives.

    ``out=`` and ``inplace=True`` are arguments: there the result is the changed tensor itself.
    """
    name = _rule_of(func)[0]
    return name in SETTERS or name in IN_PLACE or (name[-1:] == "_" and name[-2:] != "__")


def follow(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, result: Any, provenance_of: ProvenanceOf
) -> Any:
    """Provenance of the result of ``func(*args, **kwargs)``; for several tensors a list, in the order of `tensors_in`.

    It is None if no argument depends on the batch, if the result doesn't, or if it holds no tensor. For
    ``x[index] = y`` it is that of ``x`` afterwards. ``provenance_of`` gives the arguments' before the call. Nothing is
    raised: a result that can't be followed is `Lost`, with the function's name.
    """
    known = _tracked(args, provenance_of)
    if kwargs and not isinstance(known, Rows):
        known = _tracked(kwargs.values(), provenance_of) or known
    if known is None:
        return None
    name, label, rule = _rule_of(func)
    if name in SETTERS:
        result = args[0]
    single = isinstance(result, Tensor)
    results = [result] if single else tensors_in([result])
    if not results:
        return None
    if isinstance(known, Lost) and rule is not constant and rule is not layout_rules.set_data:
        return known if single else [known] * len(results)
    try:
        if rule is None:
            raise NotImplementedError
        outcome: Any = _outcome(rule, Call(func, name, args, kwargs or {}, result, provenance_of))
        outcomes = [outcome] if single else outcome
        if all(_fits(provenance, tensor) for provenance, tensor in zip(outcomes, results, strict=True)):
            return outcome
        reason = f"{label}, whose rows can't be followed"
    except SamplesMixed as mixed:
        reason = str(mixed)
    except Exception:  # whatever it is, the user's step must go on
        reason = f"{label}, whose rows can't be followed"
    lost = Lost(reason)
    return lost if single else [lost] * len(results)


def _outcome(rule: Rule, call: Call) -> Any:
    """What the rule says; remembered for rules that look at nothing but shapes, since layers repeat one another."""
    if rule not in OF_SHAPES_ALONE or not call.args:
        return rule(call)
    source, result = call.args[0], call.result
    provenance = call.of(source) if isinstance(source, Tensor) else None
    rest = _hashable(call.args[1:])
    if provenance is None or rest is None:
        return rule(call)
    options = _hashable(call.kwargs.items()) if call.kwargs else ()
    shape = result.shape if isinstance(result, Tensor) else len(result)
    key = (call.func, id(provenance), source.shape, source.dtype, shape, rest, options)
    if options is not None and (entry := _remembered.get(key)) is not None:
        return entry[1]
    outcome = rule(call)
    if options is not None:
        if len(_remembered) >= MOST_REMEMBERED:
            _remembered.clear()
        sole = outcome if isinstance(outcome, Rows) else None
        if sole is None or sum(owners.numel() for owners in sole.candidates) <= LARGEST_REMEMBERED:
            _remembered[key] = provenance, outcome
    return outcome


def _hashable(values: Iterable[Any]) -> tuple[Any, ...] | None:
    """The values as a key, or None if one of them is a tensor or of an unknown kind."""
    key: list[Any] = []
    for value in values:
        if isinstance(value, (tuple, list)):
            inner = _hashable(value)
            if inner is None:
                return None
            key.append(inner)
        elif isinstance(value, slice):
            bounds = _hashable((value.start, value.stop, value.step))
            if bounds is None:
                return None
            key.append(("slice", *bounds))
        elif value is None or value is Ellipsis or type(value) in PLAIN:
            key.append((type(value), value))  # True is not 1
        else:
            return None
    return tuple(key)


def _tracked(values: Iterable[Any], provenance_of: ProvenanceOf) -> Provenance | None:
    """The first provenance that is known among nested arguments, else one that is lost, else None."""
    found: Provenance | None = None
    for value in values:
        if isinstance(value, Tensor):
            provenance = provenance_of(value)
        elif isinstance(value, (list, tuple)):
            provenance = _tracked(value, provenance_of)
        elif isinstance(value, dict):
            provenance = _tracked(value.values(), provenance_of)
        else:
            continue
        if provenance is not None:
            if isinstance(provenance, Rows):
                return provenance
            found = provenance
    return found


def _fits(provenance: Provenance | None, tensor: Tensor) -> bool:
    if not isinstance(provenance, Rows):
        return True
    shape = tensor.shape
    for owners in provenance.candidates:
        extents = owners.shape
        if extents != shape:
            if len(extents) != len(shape):
                return False
            for extent, full in zip(extents, shape, strict=True):
                if extent != 1 and extent != full:
                    return False
    return True


def _rule_of(func: Any) -> tuple[str, str, Rule | None]:
    """The function's name, how a reason names it, and its rule."""
    try:
        return _found[func]
    except KeyError:
        pass
    if len(_found) >= MOST_FUNCTIONS:
        _found.clear()
    found = _found[func] = _find(func)
    return found


def _find(func: Any) -> tuple[str, str, Rule | None]:
    name, label, is_torch = _name_of(func)
    if not is_torch:
        return name, label, RULES.get(name) if "::" in name else None
    if getattr(func, "__module__", None) == FUNCTIONAL and f"F.{name}" in RULES:
        return name, label, RULES[f"F.{name}"]
    for candidate in (name, name[:-1] if name.endswith("_") and not name.startswith("__") else name):
        if candidate in RULES:
            return name, label, RULES[candidate]
        if is_pointwise(candidate):
            return name, label, pointwise
    return name, label, None


def _name_of(func: Any) -> tuple[str, str, bool]:
    """The name by which rules know a function, the one by which people do, and whether it is torch's own."""
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        packet = func.overloadpacket if isinstance(func, OpOverload) else func
        namespace, _, name = packet._qualified_op_name.partition("::")
        label = f"torch.ops.{namespace}.{name}"
        return (name, label, True) if namespace == "aten" else (f"{namespace}::{name}", label, False)
    name, module = getattr(func, "__name__", str(func)), getattr(func, "__module__", None) or ""
    if name in ("__get__", "__set__", "__delete__"):
        owner = getattr(func.__self__, "__name__", "a property")
        return (owner if name == "__get__" else f"{owner}.{name}"), f"Tensor.{owner}", True
    if not module or module == "torch._tensor":
        return name, f"Tensor.{name}", True
    is_torch = module == "torch" or module.startswith("torch.")
    public = {"torch._C._nn": FUNCTIONAL, "torch.functional": "torch", "torch._C._linalg": "torch.linalg"}
    return name, f"{public.get(module, module)}.{name}", is_torch
