"""Rules of provenance for views and copies that leave each element as it is: reshape, transpose, split, expand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from lightning_memsink.losses.provenance import (
    MOST_ELEMENTS,
    Owners,
    Rows,
    aligned,
    compress,
    rows,
)
from lightning_memsink.losses.rule_call import Call, NotFollowed, Outcome, Rule, each, not_followed, with_shared
from lightning_memsink.samples.documents import COUNTS_FOR_NONE


def expanded(owners: Owners, shape: Sequence[int], axes: Sequence[int]) -> Owners:
    """With the full extents along ``axes``, without memory.

    Raises:
        NotFollowed: They are too many to be copied.
    """
    full = list(owners.shape)
    for axis in axes:
        full[axis] = shape[axis]
    result = owners.expand(full)
    if result.numel() > MOST_ELEMENTS:
        raise NotFollowed
    return result


@lru_cache(maxsize=4096)
def _axis_groups(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Axes of two shapes in groups of equal product, from the front; axes of extent 1 are in none."""
    ours = [axis for axis, extent in enumerate(before) if extent != 1]
    theirs = [axis for axis, extent in enumerate(after) if extent != 1]
    groups = []
    while ours and theirs:
        group = [ours.pop(0)], [theirs.pop(0)]
        left, right = before[group[0][0]], after[group[1][0]]
        while left != right:
            if left < right:
                group[0].append(ours.pop(0))
                left *= before[group[0][-1]]
            else:
                group[1].append(theirs.pop(0))
                right *= after[group[1][-1]]
        groups.append(group)
    return groups


def regroup(owners: Owners, before: Sequence[int], after: Sequence[int]) -> Owners:
    """Owners of a tensor of shape ``before`` after a reshape to ``after``, exactly."""
    if 0 in before:
        return owners.new_full([1] * len(after), -1)
    if owners.numel() == 1:
        return owners.reshape([1] * len(after))
    extents = [1] * len(after)
    full: list[int] = []
    uncertain = False
    for ours, theirs in _axis_groups(tuple(before), tuple(after)):
        if all(owners.shape[axis] == 1 for axis in ours):
            continue
        for axis in theirs:
            extents[axis] = after[axis]
        if len(ours) > 1:
            full += ours
        uncertain = uncertain or len(theirs) > 1
    if full:
        owners = expanded(owners, before, full)
    owners = owners.reshape(extents)
    return compress(owners) if uncertain else owners


def unchanged(call: Call) -> Outcome:
    """The first tensor's own: a copy, a cast, a move, or a function that leaves the layout as it is."""
    source = call.tensor()
    if source.shape != call.shape:
        raise NotFollowed
    return call.of(source)


def reshape(call: Call) -> Outcome:
    source = call.tensor()
    if source.dtype != call.result.dtype:  # a view as another dtype: its elements are parts of elements
        raise NotFollowed
    provenance = call.of(source)
    if not isinstance(provenance, Rows) or source.shape == call.shape:
        return provenance
    before, after = source.shape, call.shape
    return each(provenance, lambda owners: regroup(owners, before, after))


def rearrange(call: Call) -> Outcome:
    """The function itself, applied to the owners: it moves axes, or elements along axes, whatever their extents."""
    return each(
        call.of(call.tensor()), lambda owners: call.func(owners.view(owners.shape), *call.args[1:], **call.kwargs)
    )


def squeeze_in_place(call: Call) -> Outcome:
    """``squeeze_``: the shape before is gone, the number of axes is not."""
    provenance = call.of(call.tensor())
    dim = call.get(1, "dim")
    if not isinstance(dim, int) or not isinstance(provenance, Rows):
        raise NotFollowed
    if provenance.candidates[0].ndim == len(call.shape):
        return provenance
    return each(provenance, lambda owners: owners.squeeze(dim))


def expand(call: Call) -> Outcome:
    ndim = len(call.shape)
    return each(call.of(call.tensor()), lambda owners: aligned(owners, ndim))


def broadcast_tensors(call: Call) -> Outcome:
    operands = call.operands()
    return [
        each(call.of(operand), lambda owners, ndim=result.ndim: aligned(owners, ndim))  # type: ignore[misc]
        for operand, result in zip(operands, call.result, strict=True)
    ]


def on_whole_axes(*axes: int) -> Rule:
    """A rule for a function that reads elements along given axes: it is applied to owners with their full extents."""

    def rule(call: Call) -> Outcome:
        source = call.tensor()
        provenance = call.of(source)
        if not isinstance(provenance, Rows):
            return provenance
        chosen = [axis % source.ndim for axis in axes] or range(source.ndim)
        return rows(
            call.func(expanded(owners, source.shape, chosen).clone(), *call.args[1:], **call.kwargs)
            for owners in provenance.candidates
        )

    return rule


def roll(call: Call) -> Outcome:
    dims = call.get(2, "dims")
    return rearrange(call) if dims is not None and dims != () else on_whole_axes()(call)


def diagonal(call: Call) -> Outcome:
    source = call.tensor()
    provenance = call.of(source)
    if not isinstance(provenance, Rows):
        return provenance
    offset = call.get(1, "offset", default=0)
    usual = (-2, -1) if call.name == "linalg_diagonal" else (0, 1)
    first, second = call.get(2, "dim1", default=usual[0]), call.get(3, "dim2", default=usual[1])
    axes = [first % source.ndim, second % source.ndim]
    return rows(
        expanded(owners, source.shape, axes).diagonal(offset, first, second) for owners in provenance.candidates
    )


def unfold(call: Call) -> Outcome:
    """``Tensor.unfold``: windows along an axis, in a new last axis."""
    source = call.tensor()
    axis, size, step = call.get(1, "dimension"), call.get(2, "size"), call.get(3, "step")

    def windows(owners: Tensor) -> Tensor:
        if owners.ndim == 0 or owners.shape[axis] == 1:
            return owners.unsqueeze(-1) if owners.ndim else owners.unsqueeze(0)
        return compress(owners.unfold(axis, size, step))

    return each(call.of(source), windows)


def diag(call: Call) -> Outcome:
    """``torch.diag``: of a matrix its diagonal; of a vector a matrix, followed if it is one sample's."""
    source = call.tensor()
    if source.ndim == 2:
        offset = call.get(1, "diagonal", default=0)
        provenance = call.of(source)
        if not isinstance(provenance, Rows):
            return provenance
        return rows(expanded(owners, source.shape, (0, 1)).diagonal(offset) for owners in provenance.candidates)
    return diag_embed(call)


def diag_embed(call: Call) -> Outcome:
    def embedded(owners: Tensor) -> Tensor:
        if owners.shape[-1] != 1 or len(call.args) > 2 or {"dim1", "dim2"} & set(call.kwargs):
            raise NotFollowed
        return owners.unsqueeze(-1)

    return each(call.of(call.tensor()), embedded)


def complex_parts(call: Call) -> Outcome:
    """``view_as_real`` and ``view_as_complex``: the two parts of a number are in a last axis."""
    if call.name == "view_as_real":
        return each(call.of(call.tensor()), lambda owners: owners.unsqueeze(-1))

    def whole(owners: Tensor) -> Tensor:
        if owners.shape[-1] != 1:
            raise NotFollowed
        return owners.squeeze(-1)

    return each(call.of(call.tensor()), whole)


def as_strided(call: Call) -> Outcome:
    """The same strides over a storage that holds the owners; memory outside the tensor belongs to nothing known."""
    source, result = call.tensor(), call.result
    start, unknown = source.storage_offset(), COUNTS_FOR_NONE - 1

    def strided(owners: Owners) -> Owners:
        full = expanded(owners, source.shape, range(source.ndim))
        ends = [_last(tensor) for tensor in (source, result)]
        storage = owners.new_full([max(ends) + 1], unknown)
        storage.as_strided(source.shape, source.stride(), start).copy_(full)
        moved = compress(storage.as_strided(result.shape, result.stride(), result.storage_offset()))
        if bool((moved == unknown).any()):
            raise NotFollowed
        return moved

    return each(call.of(source), strided)


def _last(tensor: Tensor) -> int:
    """The place in its storage of a tensor's last element."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return int(tensor.storage_offset() + sum((extent - 1) * stride for extent, stride in steps))


def index_fill(call: Call) -> Outcome:
    source = call.tensor()
    return with_shared(call, call.of(source), [source, call.get(2, "index")], call.shape)


def one_hot(call: Call) -> Outcome:
    return each(call.of(call.tensor(0, "tensor", "input")), lambda owners: owners.unsqueeze(-1))


def set_data(call: Call) -> Outcome:
    """``x.data = y``, ``x.copy_(y)``, ``x.fill_(y)``, ``x.bernoulli_(y)``: ``y``, broadcast to the shape of ``x``."""
    ndim = call.tensor().ndim
    source = call.get(1, "src", "other", "value", "p")
    return each(call.of(source), lambda owners: aligned(owners, ndim)) if isinstance(source, Tensor) else None


COPIES = (
    "alias alias_copy clone conj contiguous cpu cuda data dequantize detach detach_copy fill_diagonal_ imag lift_fresh "
    "pin_memory real requires_grad_ resolve_conj resolve_neg to type type_as xpu bfloat16 bool byte char "
    "__deepcopy__ share_memory_ to_dense cdouble cfloat double float half int long short tril triu _conj _neg_view"
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(COPIES.split(), unchanged),
    **dict.fromkeys(
        "view reshape view_as reshape_as flatten unflatten ravel squeeze unsqueeze atleast_1d atleast_2d atleast_3d "
        "_reshape_alias _unsafe_view view_copy squeeze_copy unsqueeze_copy".split(),
        reshape,
    ),
    **dict.fromkeys(
        "permute transpose t T mT H mH adjoint movedim moveaxis swapaxes swapdims unsqueeze_ t_ transpose_ swapaxes_ "
        "swapdims_ flip fliplr flipud rot90 __reversed__ permute_copy transpose_copy t_copy".split(),
        rearrange,
    ),
    "index_fill": index_fill,
    "squeeze_": squeeze_in_place,
    **dict.fromkeys("expand expand_as broadcast_to expand_copy".split(), expand),
    "broadcast_tensors": broadcast_tensors,
    "roll": roll,
    **dict.fromkeys("diagonal linalg_diagonal diagonal_copy".split(), diagonal),
    "diag": diag,
    "one_hot": one_hot,
    "diag_embed": diag_embed,
    "unfold": unfold,
    "view_as_real": complex_parts,
    "view_as_complex": complex_parts,
    **dict.fromkeys("copy_ fill_ bernoulli_".split(), set_data),
    "data.__set__": set_data,
    "as_strided": as_strided,
    "as_strided_": not_followed,
}
