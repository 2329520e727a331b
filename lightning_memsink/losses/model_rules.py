"""Rules of provenance for the layers of networks: convolution, pooling, normalization, regions of images."""

from __future__ import annotations

import re

from torch import Tensor

from lightning_memsink.losses.layout_rules import unchanged
from lightning_memsink.losses.provenance import Part, Provenance, Rows, aligned, merge, reduce, rows
from lightning_memsink.losses.rule_call import Call, NotFollowed, Outcome, Rule, each, tensors_in, with_shared, within


def _spatial(call: Call) -> int:
    """Number of spatial axes, from the function's name."""
    found = re.search(r"(\d)d", call.name)
    if found is None:
        raise NotFollowed
    return int(found[1])


def convolution(call: Call) -> Outcome:
    source = call.tensor()
    mixed = range(source.ndim - _spatial(call) - 1, source.ndim)
    return with_shared(call, within(call, source, mixed), [source], call.shape)


def pool(call: Call) -> Outcome:
    """Also with the positions of maxima as a second result, and back from them."""
    source = call.tensor()
    provenance = within(call, source, range(source.ndim - _spatial(call), source.ndim))
    if "unpool" in call.name:
        indices = call.tensor(1, "indices")
        return merge(
            [(provenance, call.shape), (within(call, indices, range(-_spatial(call), 0)), call.shape)], call.shape
        )
    return provenance if isinstance(call.result, Tensor) else [provenance] * len(call.result)


def mixing(first: int, last: int | None = None) -> Rule:
    """A rule for functions that mix the axes from ``first`` on (from the end, if negative) and keep their number."""

    def rule(call: Call) -> Outcome:
        source = call.tensor()
        axes = range(source.ndim)[first:last]
        return within(call, source, axes)

    return rule


def patches(call: Call) -> Outcome:
    """``F.unfold`` and ``F.fold``: a sample's image to its patches, and back."""
    source = call.tensor()
    batched = source.ndim == (4 if call.name == "unfold" else 3)
    provenance = within(call, source, range(int(batched), source.ndim))
    ndim = len(call.shape)
    return each(provenance, lambda owners: owners.reshape([-1 if axis == 0 else 1 for axis in range(ndim)]))


def _by_sample(call: Call, operand: Tensor, ndim: int) -> Provenance | None:
    """Of an operand whose first axis is the batch, for a result of ``ndim`` axes whose first is the batch too."""
    provenance = within(call, operand, range(1, operand.ndim))
    return each(provenance, lambda owners: owners.reshape([-1] + [1] * (ndim - 1)))


def sampled(call: Call) -> Outcome:
    """grid_sample and affine_grid."""
    operands = [call.tensor(), call.get(1, "grid")]
    ndim = len(call.shape)
    parts: list[Part] = [(_by_sample(call, o, ndim), call.shape) for o in operands if isinstance(o, Tensor)]
    return merge(parts, call.shape)


def affine_grid(call: Call) -> Outcome:
    return _by_sample(call, call.tensor(0, "theta"), len(call.shape))


def layer_norm(call: Call) -> Outcome:
    """Also rms_norm; weight and bias have the last axes."""
    source, shape = call.tensor(), call.get(1, "normalized_shape")
    count = 1 if isinstance(shape, int) else len(shape)
    provenance = within(call, source, range(source.ndim - count, source.ndim))
    parts: list[Part] = [(provenance, source.shape)]
    parts += [
        call.part(weight) for weight in (call.get(2, "weight"), call.get(3, "bias")) if isinstance(weight, Tensor)
    ]
    provenance = merge(parts, source.shape)
    if isinstance(call.result, Tensor):
        return provenance
    return [provenance] * len(tensors_in([call.result]))


def group_norm(call: Call) -> Outcome:
    source = call.tensor()
    return with_shared(call, within(call, source, range(1, source.ndim)), [source], source.shape)


def instance_norm(call: Call) -> Outcome:
    source = call.tensor()
    return with_shared(call, within(call, source, range(2, source.ndim)), [source], source.shape)


def batch_norm(call: Call) -> Outcome:
    """Statistics of the batch aside, a row stays its sample's. In evaluation it is pointwise."""
    source, training = call.tensor(), call.get(5, "training", default=False)
    provenance = within(call, source, range(1, source.ndim)) if training else call.of(source)
    return with_shared(call, provenance, [source], source.shape)


def grouped_product(call: Call) -> Outcome:
    """``F.grouped_mm(rows, matrices, offs=...)``: runs of rows, each times a matrix of its own (experts)."""
    source, offsets = call.tensor(), call.get(2, "offs")
    if source.ndim != 2 or call.tensor(1, "mat2", "weight").ndim != 3:
        raise NotFollowed
    return with_shared(call, within(call, source, [1]), [source, offsets], call.shape)


def prelu(call: Call) -> Outcome:
    return with_shared(call, call.of(call.tensor()), [call.tensor()], call.shape)


def embedding_bag(call: Call) -> Outcome:
    """``F.embedding_bag(input, weight)`` of bags ``[N, L]``."""
    source = call.tensor()
    if source.ndim != 2:
        raise NotFollowed
    given = call.kwargs.get("per_sample_weights")
    parts: list[Part] = [(within(call, source, [1]), call.shape)]
    if isinstance(given, Tensor):
        parts.append((within(call, given, [1]), call.shape))
    return with_shared(call, merge(parts, call.shape), [source, given], call.shape)


def regions(call: Call) -> Outcome:
    """torchvision's roi_align and its like: a row of boxes ``[K, 5]`` is of the image that its first number names."""
    images, boxes = call.tensor(), call.tensor(1, "rois")
    provenance = within(call, images, range(1, images.ndim))
    ndim = call.result.ndim if isinstance(call.result, Tensor) else call.result[0].ndim
    if isinstance(provenance, Rows):
        numbers = boxes[:, 0].detach().long().cpu()
        provenance = rows(
            owners.reshape(-1).expand(images.shape[0])[numbers].reshape([-1] + [1] * (ndim - 1))
            for owners in provenance.candidates
        )
    elif provenance is None:
        provenance = each(within(call, boxes, [1]), lambda owners: owners.reshape([-1] + [1] * (ndim - 1)))
    return provenance if isinstance(call.result, Tensor) else [provenance] * len(call.result)


def kept_boxes(call: Call) -> Outcome:
    """``nms``: positions among the boxes of one image."""
    boxes, scores = call.tensor(0, "dets"), call.tensor(1, "scores")
    whole = [(reduce(call.of(o), o.shape, range(o.ndim)), ()) for o in (boxes, scores)]
    return each(merge(whole, ()), lambda owners: aligned(owners, 1))


POOLS = "max_pool avg_pool adaptive_avg_pool adaptive_max_pool lp_pool fractional_max_pool max_unpool"

RULES: dict[str, Rule] = {
    **{f"conv{axes}d": convolution for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": convolution for axes in (1, 2, 3)},
    **{
        f"{name}{axes}d{suffix}": pool
        for name in POOLS.split()
        for axes in (1, 2, 3)
        for suffix in ("", "_with_indices")
    },
    **dict.fromkeys("interpolate upsample instance_mean".split(), mixing(2)),
    "pixel_shuffle": mixing(-3),
    "pixel_unshuffle": mixing(-3),
    "channel_shuffle": mixing(1, 2),
    "native_channel_shuffle": mixing(1, 2),
    "local_response_norm": mixing(1, 2),
    "F.unfold": patches,
    "fold": patches,
    "im2col": patches,
    "grid_sample": sampled,
    "affine_grid": affine_grid,
    **dict.fromkeys("layer_norm rms_norm native_layer_norm".split(), layer_norm),
    "group_norm": group_norm,
    "instance_norm": instance_norm,
    "batch_norm": batch_norm,
    **dict.fromkeys("dropout1d dropout2d dropout3d feature_dropout feature_alpha_dropout".split(), unchanged),
    "prelu": prelu,
    **dict.fromkeys("grouped_mm _grouped_mm transformers::grouped_mm_fallback".split(), grouped_product),
    "F.embedding_bag": embedding_bag,
    **{f"torchvision::{name}": regions for name in ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool")},
    "torchvision::nms": kept_boxes,
}
