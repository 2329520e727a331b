"""Rules of provenance for functions of each element by itself, with broadcasting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_memsink.losses.provenance import Provenance, merge, of_mask, reduce
from lightning_memsink.losses.rule_call import Call, NotFollowed, Outcome, Rule, constant, with_shared


def pointwise(call: Call) -> Outcome:
    """Of all tensors among the arguments, which broadcast to the result."""
    found = _of_operands(call)
    is_mask = isinstance(call.result, Tensor) and call.result.dtype == torch.bool
    return of_mask(found) if is_mask and not isinstance(found, list) else found


def _of_operands(call: Call) -> Outcome:
    of = call.of
    operands = [a for a in call.args if isinstance(a, Tensor)] if not call.kwargs else call.operands()
    parts = [(found, operand.shape) for operand in operands if (found := of(operand)) is not None]
    if not isinstance(call.result, Tensor):
        if any(tuple(shape) != tuple(call.result[0].shape) for _, shape in parts):
            raise NotFollowed
        return [merge(parts, call.result[0].shape)] * len(call.result)
    shape = call.result.shape
    first = parts[0][0] if parts else None
    if all(found is first and extents == shape for found, extents in parts):
        return first
    for _, extents in parts:
        if extents != shape and torch.broadcast_shapes(extents, shape) != shape:
            raise NotFollowed
    return merge(parts, shape)


def where(call: Call) -> Outcome:
    if len(call.args) + len(call.kwargs) < 3:  # one argument: the positions of its nonzero elements
        from lightning_memsink.losses.pick_rules import nonzero

        return nonzero(call)
    return pointwise(call)


def gated(call: Call) -> Outcome:
    """``F.glu``: halves an axis, along which owners must be the same."""
    source = call.tensor()
    axis = call.get(1, "dim", default=-1)
    return reduce(call.of(source), source.shape, [axis], True, "a gate between samples")


def is_in(call: Call) -> Outcome:
    """``isin``: of each element, among test elements that all share."""
    elements = call.tensor(0, "elements")
    return with_shared(call, call.of(elements), [elements], call.shape)


def drawn_rows(call: Call) -> Outcome:
    """``multinomial``: draws from the distribution in the last axis."""
    source = call.tensor()
    return reduce(call.of(source), source.shape, [-1], True, "a draw among the samples")


def is_pointwise(name: str) -> bool:
    """Whether torch says of each of the function's overloads on tensors that it is pointwise."""
    packet: Any = getattr(torch.ops.aten, name, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return False
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    on_tensors = [o for o in overloads if any(str(a.type) == "Tensor" for a in o._schema.arguments)]
    return bool(on_tensors) and all(torch.Tag.pointwise in overload.tags for overload in on_tensors)


def pair(first: tuple[Provenance | None, Any], second: tuple[Provenance | None, Any]) -> Provenance | None:
    """Merged, in the shape that both broadcast to."""
    return merge([first, second], torch.broadcast_shapes(first[1], second[1]))


FUNCTIONS = """
abs absolute acos acosh add addcdiv addcmul angle arccos arccosh arcsin arcsinh arctan arctan2 arctanh asin asinh atan
atan2 atanh bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil clamp clamp_max
clamp_min clip complex conj_physical copysign cos cosh deg2rad digamma div divide eq erf erfc erfinv exp exp2 expm1 fix
float_power floor floor_divide fmax fmin fmod frac frexp gcd ge greater greater_equal gt heaviside hypot i0 igamma
igammac isclose isfinite isinf isnan isneginf isposinf isreal lcm ldexp le lerp less less_equal lgamma log log10 log1p
log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit lt masked_fill maximum minimum mul
multiply mvlgamma nan_to_num ne neg negative nextafter not_equal polar polygamma positive pow rad2deg reciprocal
remainder round rsqrt rsub sgn sigmoid sign signbit sin sinc sinh special_expit special_entr special_log1p
special_expm1 special_ndtr special_log_ndtr special_erfinv special_exp2 special_gammainc special_gammaincc special_i0
special_logit special_multigammaln special_polygamma special_psi special_round special_sinc binomial special_xlogy
special_xlog1py special_erf special_erfc special_gammaln special_digamma sqrt square sub subtract tan tanh true_divide
trunc xlogy celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu log_sigmoid logsigmoid mish prelu_ relu
relu6 rrelu selu silu softplus softshrink softsign tanhshrink threshold _threshold dropout alpha_dropout native_dropout
bernoulli poisson normal fake_quantize_per_tensor_affine __and__ __or__ __xor__ __invert__ __lshift__ __rshift__
__rand__ __ror__ __rxor__ __iand__ __ior__ __ixor__ __ilshift__ __irshift__ __add__ __radd__ __iadd__ __sub__ __rsub__
__isub__ __mul__ __rmul__ __imul__ __div__ __rdiv__ __idiv__ __truediv__ __rtruediv__ __itruediv__ __floordiv__
__rfloordiv__ __ifloordiv__ __mod__ __rmod__ __imod__ __pow__ __rpow__ __ipow__ __eq__ __ne__ __lt__ __le__ __gt__
__ge__ __neg__ __pos__ __abs__ __rlshift__ __rrshift__
"""

CONSTANTS = """
zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty
new_empty_strided zero_ normal_ uniform_ random_ exponential_ geometric_ cauchy_ log_normal_
_shape_as_tensor _has_compatible_shallow_copy_type
"""

RULES: dict[str, Rule] = {
    **dict.fromkeys(FUNCTIONS.split(), pointwise),
    **dict.fromkeys(CONSTANTS.split(), constant),
    "where": where,
    "glu": gated,
    "isin": is_in,
    "multinomial": drawn_rows,
}
