"""Rules of provenance for reductions and for functions that mix the elements along an axis: sum, softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_memsink.losses.pick_rules import ordered
from lightning_memsink.losses.pointwise_rules import pointwise
from lightning_memsink.losses.product_rules import contract
from lightning_memsink.losses.provenance import Lost, Provenance, merge, reduce
from lightning_memsink.losses.rule_call import Call, NotFollowed, Outcome, Rule, each, narrowed, tensors_in, within

REASONS = {
    "mean": "a mean over the samples",
    "nanmean": "a mean over the samples",
    "sum": "a sum over the samples",
    "nansum": "a sum over the samples",
    "softmax": "a softmax over the samples",
    "log_softmax": "a softmax over the samples",
    "std": "a deviation over the samples",
    "var": "a variance over the samples",
}


def axes_of(value: Any, ndim: int) -> Sequence[int]:
    """The axes that a ``dim`` argument names; all for None and for an empty tuple.

    Raises:
        NotFollowed: It is something else.
    """
    if value is None or (isinstance(value, (tuple, list)) and not value):
        return range(ndim)
    if isinstance(value, bool):
        raise NotFollowed
    if isinstance(value, int):
        return [value]
    if isinstance(value, (tuple, list)) and all(isinstance(axis, int) for axis in value):
        return value
    raise NotFollowed


def _reason(call: Call) -> str:
    return REASONS.get(call.name, f"{call.name} over the samples")


def reduction(position: int = 1, default: Any = None) -> Rule:
    """A rule for a reduction whose ``dim`` is the argument at ``position``. Several results share one provenance."""

    def rule(call: Call) -> Outcome:
        source = call.tensor(0, "input", "self", "A", "x")
        result = call.result if isinstance(call.result, Tensor) else call.result[0]
        axes = axes_of(call.get(position, "dim", "axis", default=default), source.ndim)
        keepdim = result.ndim == source.ndim
        provenance = reduce(call.of(source), source.shape, axes, keepdim, _reason(call))
        return provenance if isinstance(call.result, Tensor) else [provenance] * len(call.result)

    return rule


def deviation(call: Call) -> Outcome:
    """std, var, std_mean, var_mean: the second argument may be ``unbiased``."""
    if isinstance(call.get(1, "dim"), bool):
        source = call.tensor()
        provenance = reduce(call.of(source), source.shape, range(source.ndim), False, _reason(call))
        return provenance if isinstance(call.result, Tensor) else [provenance] * len(call.result)
    return reduction()(call)


def extreme(call: Call) -> Outcome:
    """max, min and median: of all elements, along an axis with indices, or of two tensors."""
    second = call.get(1, "dim", "other")
    if isinstance(second, Tensor):
        return pointwise(call)
    if second is None:
        return reduction(99)(call)
    return ordered(call)


def along(position: int = 1, default: Any = None) -> Rule:
    """A rule for functions that keep the shape and mix the elements along ``dim``: softmax, cumsum, normalize."""

    def rule(call: Call) -> Outcome:
        source = call.tensor()
        axes = axes_of(call.get(position, "dim", "axis", default=default), source.ndim)
        provenance = reduce(call.of(source), source.shape, axes, True, _reason(call))
        return provenance if isinstance(call.result, Tensor) else [provenance] * len(call.result)

    return rule


def softmax(call: Call) -> Outcome:
    """``F.softmax`` has a third argument before ``dtype``, and may have no ``dim``."""
    source, dim = call.tensor(), call.get(1, "dim", "axis")
    if dim is None:
        dim = 0 if source.ndim in (0, 1, 3) else 1
    return reduce(call.of(source), source.shape, [dim], True, _reason(call))


def gumbel_softmax(call: Call) -> Outcome:
    source = call.tensor(0, "logits")
    return reduce(call.of(source), source.shape, [call.get(4, "dim", default=-1)], True, _reason(call))


def renorm(call: Call) -> Outcome:
    source, kept = call.tensor(), call.get(2, "dim")
    axes = [axis for axis in range(source.ndim) if axis != kept % source.ndim]
    return reduce(call.of(source), source.shape, axes, True, _reason(call))


def _pairs(call: Call, axes_of_result: Sequence[int] | None, shape: Sequence[int]) -> Provenance | None:
    """Two tensors that broadcast to ``shape``, combined elementwise and mixed along some axes, or along all."""
    operands = [call.tensor(0, "x1", "input"), call.tensor(1, "x2", "other")]
    ndim = len(shape)
    mixed = range(ndim) if axes_of_result is None else [axis % ndim for axis in axes_of_result]
    parts = []
    for operand in operands:
        own = [axis - ndim + operand.ndim for axis in mixed if axis >= ndim - operand.ndim]
        parts.append((within(call, operand, own), narrowed(operand, own)))
    return merge(parts, shape)


def of_pairs(position: int, default: int | None) -> Rule:
    """A rule for two tensors that are compared elementwise and reduced along an axis, or along all."""

    def rule(call: Call) -> Outcome:
        first, second = call.tensor(0, "x1", "input"), call.tensor(1, "x2", "other")
        shape = torch.broadcast_shapes(first.shape, second.shape)
        axes = list(range(len(shape))) if default is None else [call.get(position, "dim", default=default)]
        return reduce(_pairs(call, axes, shape), shape, axes, call.result.ndim == len(shape))

    return rule


def cross(call: Call) -> Outcome:
    dim = call.get(2, "dim", default=-1 if call.name == "linalg_cross" else None)
    if dim is None:
        dim = next(axis for axis, extent in enumerate(call.tensor().shape) if extent == 3)
    return _pairs(call, [dim], call.shape)


def cdist(call: Call) -> Outcome:
    first, second = call.tensor(0, "x1"), call.tensor(1, "x2")
    batch = list(range(len(call.shape) - 2))
    ours, theirs = batch[len(batch) - first.ndim + 2 :], batch[len(batch) - second.ndim + 2 :]
    operands = [(*call.part(first), [*ours, -1, -3]), (*call.part(second), [*theirs, -2, -3])]
    return contract(operands, [*batch, -1, -2], call.shape)


def diff(call: Call) -> Outcome:
    if call.get(3, "prepend") is not None or call.get(4, "append") is not None:
        raise NotFollowed
    return along(2, -1)(call)


def quantile(call: Call) -> Outcome:
    """Of one level: several give an axis in front."""
    level = call.get(1, "q")
    if isinstance(level, Tensor) and level.ndim:
        raise NotFollowed
    return reduction(2)(call)


def searchsorted(call: Call) -> Outcome:
    """Of values among sorted sequences, one for all or one a row; ``bucketize`` takes them the other way round."""
    places = (1, 0) if call.name == "bucketize" else (0, 1)
    sequence, value = call.tensor(places[0], "sorted_sequence", "boundaries"), call.get(places[1], "input")
    found = within(call, sequence, [-1])
    part = (each(found, lambda owners: owners.reshape(())), ()) if sequence.ndim == 1 else (found, call.shape)
    return merge([part, call.part(value)], call.shape)


def pdist(call: Call) -> Outcome:
    return Lost("distances between samples")


def matrices(call: Call) -> Outcome:
    """A function of each matrix in the last two axes (linalg's): they must be one sample's."""
    parts = []
    results = tensors_in([call.result])
    for operand in call.operands():
        if call.of(operand) is not None:
            if operand.ndim < 2:
                raise NotFollowed
            whole = each(within(call, operand, [-1, -2]), lambda owners: owners[..., 0, 0])
            parts.append((whole, operand.shape[:-2]))
    batch = torch.broadcast_shapes(*[shape for _, shape in parts])
    merged = merge(parts, batch)
    found = [_with_axes(merged, result.ndim - len(batch)) for result in results]
    return found[0] if isinstance(call.result, Tensor) else list(found)


def _with_axes(provenance: Provenance | None, count: int) -> Provenance | None:
    if count < 0:
        raise NotFollowed
    return each(provenance, lambda owners: owners.reshape(list(owners.shape) + [1] * count))


def spectrum(position: int, default: Any) -> Rule:
    """A rule for Fourier transforms, whose axes may get other extents."""

    def rule(call: Call) -> Outcome:
        source = call.tensor()
        axes = axes_of(call.get(position, "dim", default=default), source.ndim)
        return within(call, source, axes)

    return rule


def short_spectrum(call: Call) -> Outcome:
    """``stft`` of signals in the last axis, to frequencies and frames; ``istft`` back."""
    source = call.tensor()
    if call.name == "stft":
        added = len(call.shape) - source.ndim
        return each(within(call, source, [-1]), lambda owners: owners.reshape(list(owners.shape) + [1] * added))
    return each(within(call, source, [-1, -2]), lambda owners: owners[..., 0])


def trace(call: Call) -> Outcome:
    source = call.tensor()
    return reduce(call.of(source), source.shape, [0, 1], False, _reason(call))


RULES: dict[str, Rule] = {
    **dict.fromkeys(
        "sum mean nansum nanmean prod amax amin argmax argmin logsumexp special_logsumexp any all count_nonzero "
        "aminmax nanmedian".split(),
        reduction(),
    ),
    **dict.fromkeys("norm linalg_norm linalg_vector_norm".split(), reduction(2)),
    **dict.fromkeys("quantile nanquantile".split(), quantile),
    "linalg_matrix_norm": reduction(2, (-2, -1)),
    **dict.fromkeys("std var std_mean var_mean".split(), deviation),
    **dict.fromkeys("max min median nanmedian".split(), extreme),
    **dict.fromkeys(
        "softmax log_softmax softmin special_softmax special_log_softmax _softmax _log_softmax _safe_softmax".split(),
        softmax,
    ),
    **dict.fromkeys("cumsum cumprod logcumsumexp cummax cummin".split(), along()),
    "diff": diff,
    "normalize": along(2, 1),
    "gumbel_softmax": gumbel_softmax,
    "renorm": renorm,
    "cosine_similarity": of_pairs(2, 1),
    "pairwise_distance": of_pairs(99, -1),
    "dist": of_pairs(99, None),
    "linalg_vecdot": of_pairs(99, -1),
    "cross": cross,
    "linalg_cross": cross,
    "cdist": cdist,
    "pdist": pdist,
    "trace": trace,
    **{f"fft_{name}": spectrum(2, -1) for name in "fft ifft rfft irfft hfft ihfft".split()},
    **{f"fft_{name}": spectrum(2, (-2, -1)) for name in "fft2 ifft2 rfft2 irfft2 hfft2 ihfft2".split()},
    **{f"fft_{name}": spectrum(2, None) for name in "fftn ifftn rfftn irfftn hfftn ihfftn".split()},
    **{f"fft_{name}": spectrum(1, None) for name in "fftshift ifftshift".split()},
    "stft": short_spectrum,
    "istft": short_spectrum,
    "searchsorted": searchsorted,
    "bucketize": searchsorted,
    **dict.fromkeys(
        "linalg_inv linalg_det linalg_slogdet linalg_cholesky linalg_qr linalg_svd linalg_svdvals linalg_eigh "
        "linalg_eigvalsh linalg_solve linalg_pinv linalg_matrix_exp inverse det logdet slogdet cholesky matrix_exp "
        "linalg_solve_triangular matrix_power linalg_matrix_power".split(),
        matrices,
    ),
}
