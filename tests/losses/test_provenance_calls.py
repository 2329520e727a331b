"""Every rule against brute force: an element depends on no sample but the one it is said to belong to."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_memsink.losses.provenance import owners_of_rows
from tests.support.following import batch_rows
from tests.support.row_oracle import assignments, run, wrong_elements

B = 3


class Case(NamedTuple):
    """A call whose batch is along ``axes`` of its inputs; results have it along axis ``out``, are lost ('lost'),
    or have it somewhere ('any')."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    axes: tuple[int | None, ...]
    out: int | str | None


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def positive(*shape: int) -> Tensor:
    return x(*shape).abs() + 0.1


def n(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(high))


def case(name: str, function: Callable[..., Any], *inputs: Any, axes: Any = None, out: int | str | None = 0) -> Case:
    given = axes if axes is not None else [0 if isinstance(value, Tensor) else None for value in inputs]
    return Case(name, function, inputs, tuple(given), out)


none = {"reduction": "none"}


def ctc(scores: Tensor, labels: Tensor) -> Tensor:
    lengths = torch.full((B,), len(scores)), torch.full((B,), 2)
    return F.ctc_loss(scores.log_softmax(2), labels, *lengths, **none)


def heads(query: Tensor, key: Tensor, inside: Tensor, outside: Tensor) -> Any:
    return F.multi_head_attention_forward(query, key, key, 4, 2, inside, None, None, None, False, 0.0, outside, None)


def masked_heads(query: Tensor, mask: Tensor, inside: Tensor, outside: Tensor) -> Any:
    return F.multi_head_attention_forward(
        query,
        query,
        query,
        4,
        2,
        inside,
        None,
        None,
        None,
        False,
        0.0,
        outside,
        None,
        attn_mask=mask.repeat_interleave(2, 0),
    )


POINTWISE = [
    case(name, getattr(F, name), x(B, 4))
    for name in "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 selu "
    "silu softplus softshrink softsign tanhshrink rrelu dropout alpha_dropout".split()
] + [
    case(name, getattr(torch, name), positive(B, 4) / 3)
    for name in "abs acos angle asin atan ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 floor frac "
    "isfinite isnan lgamma log log10 log1p log2 logit nan_to_num neg positive rad2deg reciprocal relu round rsqrt "
    "sigmoid sign sin sinc sinh sqrt square tan tanh trunc signbit logical_not isinf isposinf clone "
    "ones_like bernoulli poisson frexp".split()
    if name not in ("ones_like",)
]
BINARY = [
    case(name, getattr(torch, name), positive(B, 4), positive(B, 4))
    for name in "add sub mul div true_divide floor_divide fmod remainder pow maximum minimum fmax fmin atan2 hypot "
    "logaddexp logaddexp2 copysign eq ne lt le gt ge isclose xlogy max min heaviside ldexp float_power "
    "nextafter logical_and logical_or logical_xor multiply subtract divide".split()
] + [
    case("a + b", lambda a, b: a + b, x(B, 4), x(4), axes=(0, None)),
    case("1 - a", lambda a: 1 - a, x(B, 4)),
    case("2 / a", lambda a: 2 / a, x(B, 4)),
    case("a // 2", lambda a: a // 2, x(B, 4)),
    case("a % 2", lambda a: a % 2, x(B, 4)),
    case("2 ** a", lambda a: 2**a, x(B, 4)),
    case("-a", lambda a: -a, x(B, 4)),
    case("abs(a)", lambda a: abs(a), x(B, 4)),
    case("a & b", lambda a, b: (a > 0) & (b > 0), x(B, 4), x(B, 4)),
    case("~a", lambda a: ~(a > 0), x(B, 4)),
    case("outer sum", lambda a, b: a[:, None] + b, x(B), x(4), axes=(0, None)),
    case("mixup", lambda a: a + a.flip(0), x(B, 4), out="lost"),
    case("where", torch.where, x(B, 4) > 0, x(B, 4), x(B, 4)),
    case("lerp", torch.lerp, x(B, 4), x(B, 4), positive(B, 1)),
    case("addcmul", torch.addcmul, x(B, 4), x(B, 4), x(B, 4)),
    case("addcdiv", torch.addcdiv, x(B, 4), x(B, 4), positive(B, 4)),
    case("clamp", lambda a, b: a.clamp(min=b), x(B, 4), x(B, 1)),
    case("masked_fill", lambda a, m: a.masked_fill(m, 0.5), x(B, 4), x(B, 4) > 0),
    case("+=", lambda a, b: a.__iadd__(b), x(B, 4), x(B, 4)),
    case("add_", lambda a, b: a.add_(b), x(B, 4), x(B, 4)),
    case("copy_", lambda a, b: a.copy_(b), x(B, 4), x(B, 4), axes=(None, 0)),
    case("copy_ of a constant", lambda a, b: a.copy_(b), x(B, 4), x(4), axes=(0, None), out=None),
    case("zero_", lambda a: a.zero_(), x(B, 4), out=None),
    case("fill_", lambda a, b: a.fill_(b.sum()), x(B, 4), x(2), axes=(0, None), out=None),
    case("bernoulli_", lambda a, p: a.bernoulli_(p), x(B, 4), positive(B, 4) / 9, axes=(None, 0)),
    case("new_full", lambda a, b: a.new_full((2,), b[0]), x(B, 4), x(4), axes=(0, None), out=None),
    case("index_fill", lambda a, b: a.index_fill(1, torch.tensor([1]), b[0]), x(B, 4), x(2), axes=(0, None)),
    case("zeros_like", torch.zeros_like, x(B, 4), out=None),
    case("new_ones", lambda a: a.new_ones(3), x(B, 4), out=None),
    case("relu_", F.relu_, x(B, 4)),
    case("relu inplace", lambda a: F.relu(a, inplace=True), x(B, 4)),
    case("glu", F.glu, x(B, 4)),
    case("prelu", F.prelu, x(B, 4), x(4), axes=(0, None)),
    case("to", lambda a: a.to(torch.float32), x(B, 4)),
    case("half", lambda a: a.half(), x(B, 4)),
    case("type_as", lambda a: a.type_as(torch.ones(1)), x(B, 4)),
    case("detach", lambda a: a.detach(), x(B, 4)),
    case("data", lambda a: a.data, x(B, 4)),
    case("contiguous", lambda a: a.contiguous(), x(B, 4)),
    case("as_tensor", torch.as_tensor, x(B, 4)),
    case("new_tensor", lambda a: torch.ones(1).new_tensor([a[0], 2.0, a[2]]), x(B), out="any"),
    case("tensor of numbers", lambda a: torch.tensor([a[0], 2.0, a[2]]), x(B), out="any"),
    case("deepcopy", deepcopy, x(B, 4)),
    case("multinomial", lambda a: torch.multinomial(a, 2), positive(B, 4)),
]
REDUCTIONS = [
    case(f"{name} {dim}", lambda a, f=name, d=dim: getattr(torch, f)(a, dim=d), positive(B, 4, 2), out=0)
    for name in "sum mean nansum nanmean amax amin argmax argmin logsumexp std var median mode max min prod any all "
    "count_nonzero softmax log_softmax cumsum cumprod logcumsumexp cummax std_mean var_mean sort argsort".split()
    for dim in (1, -1)
] + [
    case("sum keepdim", lambda a: a.sum(1, keepdim=True), x(B, 4)),
    case("mean of two", lambda a: a.mean((1, 2)), x(B, 4, 2)),
    case("mean over samples", lambda a: a.mean(0), x(B, 4), out="lost"),
    case("sum of all", lambda a: a.sum(), x(B, 4), out="lost"),
    case("max of all", lambda a: a.max(), x(B, 4), out="lost"),
    case("softmax over samples", lambda a: a.softmax(0), x(B, 4), out="lost"),
    case("cumsum over samples", lambda a: a.cumsum(0), x(B, 4), out="lost"),
    case("std unbiased", lambda a: a.std(False), x(B, 4), out="lost"),
    case("norm", lambda a: a.norm(dim=1), x(B, 4)),
    case("norm p", lambda a: a.norm(2, 1), x(B, 4)),
    case("norm of all", lambda a: a.norm(), x(B, 4), out="lost"),
    case("linalg.norm", lambda a: torch.linalg.norm(a, dim=-1), x(B, 4)),
    case("linalg.vector_norm", lambda a: torch.linalg.vector_norm(a, 2, -1, True), x(B, 4)),
    case("linalg.matrix_norm", torch.linalg.matrix_norm, x(B, 4, 2)),
    case("quantile", lambda a: a.quantile(0.3, dim=1), x(B, 4)),
    case(
        "quantiles",
        lambda a, q: a.quantile(q, dim=1),
        x(B, 4),
        torch.tensor([0.3, 0.4]).double(),
        axes=(0, None),
        out="lost",
    ),
    case("topk", lambda a: a.topk(2, 1), x(B, 4)),
    case("kthvalue", lambda a: a.kthvalue(2, 1), x(B, 4)),
    case("aminmax", lambda a: a.aminmax(dim=1), x(B, 4)),
    case("normalize", F.normalize, x(B, 4)),
    case("softmin", lambda a: F.softmin(a, dim=-1), x(B, 4)),
    case("gumbel_softmax", F.gumbel_softmax, x(B, 4)),
    case("renorm", lambda a: a.renorm(2, 0, 0.1), x(B, 4)),
    case("cosine_similarity", F.cosine_similarity, x(B, 4), x(B, 4)),
    case(
        "cosine_similarity of all pairs",
        lambda a, b: F.cosine_similarity(a[:, None], b[None], dim=-1),
        x(B, 4),
        x(5, 4),
        axes=(0, None),
    ),
    case("pairwise_distance", F.pairwise_distance, x(B, 4), x(B, 4)),
    case("cdist", torch.cdist, x(B, 4), x(5, 4), axes=(0, None)),
    case("cdist of batches", torch.cdist, x(B, 5, 4), x(B, 2, 4)),
    case("dist", torch.dist, x(B, 4), x(B, 4), out="lost"),
    case("cross", lambda a, b: torch.cross(a, b, dim=1), x(B, 3), x(B, 3)),
    case("linalg.cross", torch.linalg.cross, x(B, 4, 3), x(B, 4, 3)),
    case("fft", torch.fft.fft, x(B, 4)),
    case("rfft2", torch.fft.rfft2, x(B, 4, 6)),
    case("irfft", torch.fft.irfft, x(B, 4)),
    case("stft", lambda a: torch.stft(a, 4, window=torch.ones(4).double(), return_complex=True), x(B, 16)),
    case("trace", torch.trace, x(B, 3), out="lost"),
    case("diff", torch.diff, x(B, 4)),
    case("linalg.inv", torch.linalg.inv, x(B, 2, 2)),
    case("linalg.det", torch.linalg.det, x(B, 2, 2)),
    case("linalg.solve", torch.linalg.solve, x(B, 2, 2), x(B, 2, 1)),
    case("logdet", lambda a: torch.logdet(a @ a.mT), x(B, 2, 2)),
    case("bincount", lambda a: torch.bincount(a), n(3, 5), out="lost"),
]
PRODUCTS = [
    case("linear", F.linear, x(B, 4), x(5, 4), x(5), axes=(0, None, None)),
    case("linear of sequences", F.linear, x(B, 2, 4), x(5, 4), axes=(0, None)),
    case("linear time first", F.linear, x(2, B, 4), x(5, 4), axes=(1, None), out=1),
    case("linear over samples", lambda a, w: F.linear(a.T, w), x(B, 4), x(5, B), axes=(0, None), out="lost"),
    case("@", lambda a, w: a @ w, x(B, 4), x(4, 2), axes=(0, None)),
    case("@ of batches", lambda a, b: a @ b, x(B, 2, 4), x(B, 4, 5)),
    case("@ of broadcast batches", lambda a, b: a @ b, x(2, B, 2, 4), x(B, 4, 5), axes=(1, 0), out=1),
    case("@ vector", lambda a, b: a @ b, x(B, 4), x(4), axes=(0, None)),
    case("vector @", lambda a, b: a @ b, x(4), x(4, B), axes=(None, 1)),
    case("weights @ samples", lambda w, a: w @ a, x(B), x(B, 4), axes=(None, 0), out="lost"),
    case("dot", torch.dot, x(B), x(B), out="lost"),
    case("mm", torch.mm, x(B, 4), x(4, 2), axes=(0, None)),
    case("bmm", torch.bmm, x(B, 2, 4), x(B, 4, 5)),
    case("mv", torch.mv, x(B, 4), x(4), axes=(0, None)),
    case("addmm", torch.addmm, x(2), x(B, 4), x(4, 2), axes=(None, 0, None)),
    case("baddbmm", torch.baddbmm, x(B, 2, 5), x(B, 2, 4), x(B, 4, 5)),
    case("addmv", torch.addmv, x(B), x(B, 4), x(4), axes=(None, 0, None)),
    case("addbmm", torch.addbmm, x(2, 5), x(B, 2, 4), x(B, 4, 5), axes=(None, 0, 0), out="lost"),
    case("outer", torch.outer, x(B), x(4), axes=(0, None)),
    case("inner", torch.inner, x(B, 4), x(2, 4), axes=(0, None)),
    case("tensordot", lambda a, b: torch.tensordot(a, b, dims=([1], [0])), x(B, 4), x(4, 2), axes=(0, None)),
    case("tensordot of all", torch.tensordot, x(B, 4), x(B, 4), out="lost"),
    case("einsum", lambda a, b: torch.einsum("bld,bmd->blm", a, b), x(B, 2, 4), x(B, 5, 4)),
    case("einsum ellipsis", lambda a, b: torch.einsum("...d,de->...e", a, b), x(B, 2, 4), x(4, 5), axes=(0, None)),
    case("einsum implicit", lambda a, b: torch.einsum("bd,de", a, b), x(B, 4), x(4, 5), axes=(0, None)),
    case("einsum sum", lambda a: torch.einsum("bd->d", a), x(B, 4), out="lost"),
    case("einsum move", lambda a: torch.einsum("btd->dbt", a), x(B, 2, 4), out=1),
    case("einsum diagonal", lambda a: torch.einsum("ii->i", a), x(B, B), out="lost"),
    case("bilinear", F.bilinear, x(B, 4), x(B, 2), x(5, 4, 2), x(5), axes=(0, 0, None, None)),
    case("kron", torch.kron, x(B, 4), x(2, 2), axes=(0, None), out="lost"),
    case(
        "multi_dot",
        lambda a, b, c: torch.linalg.multi_dot([a, b, c]),
        x(B, 4),
        x(4, 2),
        x(2, 3),
        axes=(0, None, None),
        out="lost",
    ),
]
PICKS = [
    case("gather", lambda a, i: a.gather(1, i), x(B, 4), n(4, B, 2)),
    case(
        "gather samples",
        lambda a, i: a.gather(0, i),
        x(B, 4),
        torch.tensor([[2], [0]]).expand(2, 4),
        axes=(0, None),
        out=None,
    ),
    case("take_along_dim", lambda a, i: torch.take_along_dim(a, i, 1), x(B, 4), n(4, B, 2)),
    case("embedding", F.embedding, n(4, B, 2), x(4, 5), axes=(0, None)),
    case("embedding of weight", torch.embedding, x(4, 5), n(4, B, 2), axes=(None, 0)),
    case("[arange, labels]", lambda a, i: a[torch.arange(B), i], x(B, 4), n(4, B)),
    case("[:, idx]", lambda a, i: a[:, i], x(B, 4), n(4, 2), axes=(0, None)),
    case("one_hot", lambda i: F.one_hot(i, 5), n(4, B)),
    case("index_select", lambda a, i: a.index_select(1, i), x(B, 4), n(4, 2), axes=(0, None)),
    case("tril", torch.tril, x(B, 4, 4)),
    case("masked_scatter", lambda a, m, b: a.masked_scatter(m, b), x(B, 4), x(B, 4) > 0, x(B, 4), out="lost"),
    case("searchsorted", torch.searchsorted, x(4).sort().values, x(B, 2), axes=(None, 0)),
    case("scatter by hand", lambda i: torch.zeros(B, 5).scatter_(1, i[:, None], 1.0), n(5, B)),
    case(
        "scatter of a larger source",
        lambda i, a: torch.zeros(5, B).double().scatter(0, i, a),
        n(5, 2, B),
        x(4, B),
        axes=(None, 1),
        out=1,
    ),
    case("index_add", lambda i, a: torch.zeros(5, 2).double().index_add(0, i, a), n(5, B), x(B, 2), out="any"),
    case(
        "index_put",
        lambda i, a: torch.zeros(5, 2).double().index_put((i,), a),
        torch.tensor([3, 0, 4]),
        x(B, 2),
        out="any",
    ),
    case("set rows", lambda a, b: a.__setitem__(slice(0, 2), b) or a, x(B, 2), x(2, 2), axes=(None, 0), out="any"),
    case("set columns", lambda a, b: a.__setitem__((slice(None), slice(0, 2)), b) or a, x(B, 4), x(B, 2)),
    case(
        "set masked",
        lambda a, m, b: a.__setitem__(m, b) or a,
        x(B, 2),
        torch.tensor([True, False, True]),
        x(2, 2),
        axes=(0, None, None),
    ),
    case("repeat a constant", lambda a, i: a.repeat_interleave(i), x(B), n(3, B) + 1, axes=(None, 0), out="any"),
    case("scatter_add", lambda i, a: torch.zeros(B, 5).double().scatter_add(1, i, a), n(5, B, 4), x(B, 4)),
]
LOSSES = [
    case(name, lambda a, b, f=name: getattr(F, f)(a, b, **none), x(B, 4), x(B, 4))
    for name in "mse_loss l1_loss smooth_l1_loss huber_loss poisson_nll_loss kl_div soft_margin_loss "
    "hinge_embedding_loss binary_cross_entropy_with_logits".split()
] + [
    case(
        "binary_cross_entropy", lambda a, b: F.binary_cross_entropy(a, b, **none), x(B, 4).sigmoid(), x(B, 4).sigmoid()
    ),
    case(
        "pos_weight",
        lambda a, b, w: F.binary_cross_entropy_with_logits(a, b, pos_weight=w, **none),
        x(B, 4),
        x(B, 4).sigmoid(),
        positive(4),
        axes=(0, 0, None),
    ),
    case("gaussian_nll", lambda a, b, v: F.gaussian_nll_loss(a, b, v, **none), x(B, 4), x(B, 4), positive(B, 4)),
    case("gaussian_nll rows", lambda a, b, v: F.gaussian_nll_loss(a, b, v, **none), x(B, 4), x(B, 4), positive(B)),
    case("cross_entropy", lambda a, b: F.cross_entropy(a, b, **none), x(B, 4), n(4, B)),
    case("cross_entropy of maps", lambda a, b: F.cross_entropy(a, b, **none), x(B, 4, 2, 2), n(4, B, 2, 2)),
    case("cross_entropy of soft targets", lambda a, b: F.cross_entropy(a, b, **none), x(B, 4), x(B, 4).softmax(1)),
    case("cross_entropy of one", lambda a, b: F.cross_entropy(a, b, **none), x(4), n(4), axes=(None, None), out=None),
    case("cross_entropy mean", F.cross_entropy, x(B, 4), n(4, B), out="lost"),
    case("cross_entropy smooth", lambda a, b: F.cross_entropy(a, b, label_smoothing=0.1, **none), x(B, 4), n(4, B)),
    case(
        "cross_entropy weighted",
        lambda a, b, w: F.cross_entropy(a, b, weight=w, **none),
        x(B, 4),
        n(4, B),
        positive(4),
        axes=(0, 0, None),
    ),
    case("nll_loss", lambda a, b: F.nll_loss(a.log_softmax(1), b, **none), x(B, 4), n(4, B)),
    case(
        "ctc",
        lambda a, b: F.ctc_loss(a.log_softmax(2), b, torch.full((B,), 6), torch.full((B,), 2), **none),
        x(6, B, 5),
        n(4, B, 2) + 1,
        axes=(1, 0),
    ),
    case(
        "ctc joined",
        lambda a, b: F.ctc_loss(a.log_softmax(2), b, torch.full((B,), 6), torch.full((B,), 2), **none),
        x(6, B, 5),
        n(4, 2 * B) + 1,
        axes=(1, None),
    ),
    case(
        "triplet", lambda a, b, c: F.triplet_margin_loss(a, b, c, margin=9.0, **none), x(B, 4), x(B, 4) + 1, x(B, 4) * 2
    ),
    case(
        "cosine_embedding", lambda a, b, c: F.cosine_embedding_loss(a, b, c.sign(), **none), x(B, 4), x(B, 4) + 1, x(B)
    ),
    case(
        "margin_ranking",
        lambda a, b, c: F.margin_ranking_loss(a, b, c.sign(), margin=3.0, **none),
        x(B),
        x(B) + 1,
        x(B),
    ),
    case("multi_margin", lambda a, b: F.multi_margin_loss(a, b, **none), x(B, 4), n(4, B)),
    case("multilabel_margin", lambda a, b: F.multilabel_margin_loss(a, b, **none), x(B, 4), n(4, B, 4)),
    case(
        "multilabel_soft_margin", lambda a, b: F.multilabel_soft_margin_loss(a, b, **none), x(B, 4), x(B, 4).sigmoid()
    ),
]
LAYERS = [
    case("conv1d", F.conv1d, x(B, 2, 6), x(4, 2, 3), x(4), axes=(0, None, None)),
    case("conv2d", F.conv2d, x(B, 2, 6, 5), x(4, 2, 3, 3), axes=(0, None)),
    case("conv3d", F.conv3d, x(B, 2, 4, 4, 4), x(4, 2, 3, 3, 3), axes=(0, None)),
    case("conv_transpose2d", F.conv_transpose2d, x(B, 2, 3, 3), x(2, 4, 3, 3), axes=(0, None)),
    case("conv of one", F.conv2d, x(2, 6, 5), x(4, 2, 3, 3), axes=(None, None), out=None),
    *[
        case(name, lambda a, f=name: getattr(F, f)(a, 2), x(B, 2, 6, 6))
        for name in "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d".split()
    ],
    case("lp_pool2d", lambda a: F.lp_pool2d(a, 2, 2), x(B, 2, 6, 6)),
    case("fractional_max_pool2d", lambda a: F.fractional_max_pool2d(a, 2, output_size=3), x(B, 2, 6, 6)),
    case("max_pool2d with indices", lambda a: F.max_pool2d(a, 2, return_indices=True), x(B, 2, 6, 6)),
    case("max_unpool2d", lambda a: F.max_unpool2d(*F.max_pool2d(a, 2, return_indices=True), 2), x(B, 2, 6, 6)),
    case("interpolate", lambda a: F.interpolate(a, scale_factor=2), x(B, 2, 3, 3)),
    case("pixel_shuffle", lambda a: F.pixel_shuffle(a, 2), x(B, 4, 3, 3)),
    case("pixel_unshuffle", lambda a: F.pixel_unshuffle(a, 2), x(B, 4, 4, 4)),
    case("channel_shuffle", lambda a: F.channel_shuffle(a, 2), x(B, 4, 3, 3)),
    case("F.unfold", lambda a: F.unfold(a, 2), x(B, 2, 3, 3)),
    case("F.fold", lambda a: F.fold(a, (3, 3), 2), x(B, 8, 4)),
    case("grid_sample", lambda a, g: F.grid_sample(a, g.tanh(), align_corners=False), x(B, 2, 4, 4), x(B, 3, 3, 2)),
    case("affine_grid", lambda a: F.affine_grid(a, [B, 1, 3, 4], align_corners=False), x(B, 2, 3)),
    case("layer_norm", lambda a, w: F.layer_norm(a, (4,), w), x(B, 2, 4), x(4), axes=(0, None)),
    case("layer_norm of all", lambda a: F.layer_norm(a, (B, 4)), x(B, 4), out="lost"),
    case("rms_norm", lambda a: F.rms_norm(a, (4,)), x(B, 4)),
    case("group_norm", lambda a: F.group_norm(a, 2), x(B, 4, 3)),
    case("instance_norm", lambda a: F.instance_norm(a), x(B, 2, 3, 3)),
    case("batch_norm eval", lambda a, m, v: F.batch_norm(a, m, v), x(B, 4), x(4), positive(4), axes=(0, None, None)),
    case("local_response_norm", lambda a: F.local_response_norm(a, 2), x(B, 4, 3)),
    case("dropout2d", F.dropout2d, x(B, 4, 3, 3)),
    case("attention", F.scaled_dot_product_attention, x(B, 2, 5, 4), x(B, 2, 6, 4), x(B, 2, 6, 3)),
    case(
        "attention masked",
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, attn_mask=m),
        x(B, 2, 5, 4),
        x(B, 2, 6, 4),
        x(B, 2, 6, 3),
        x(B, 1, 1, 6),
    ),
    case(
        "attention grouped",
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        x(B, 4, 5, 4),
        x(B, 2, 6, 4),
        x(B, 2, 6, 3),
    ),
    case("attention over samples", F.scaled_dot_product_attention, x(B, 4), x(B, 4), x(B, 4), out="lost"),
    case(
        "gru_cell",
        lambda a, h, w, u: torch.gru_cell(a, h, w, u),
        x(B, 4),
        x(B, 2),
        x(6, 4),
        x(6, 2),
        axes=(0, 0, None, None),
    ),
    case(
        "lstm_cell",
        lambda a, h, c, w, u: torch.lstm_cell(a, (h, c), w, u),
        x(B, 4),
        x(B, 2),
        x(B, 2),
        x(8, 4),
        x(8, 2),
        axes=(0, 0, 0, None, None),
    ),
    case("masked heads", masked_heads, x(5, B, 4), x(B, 5, 5), x(12, 4), x(4, 4), axes=(1, 0, None, None), out="heads"),
    case("isin", torch.isin, n(4, B, 2), n(4, 2), axes=(0, None)),
    case("embedding_bag", lambda i, w: F.embedding_bag(i, w), n(4, B, 2), x(4, 5), axes=(0, None)),
    case(
        "multi_head_attention", heads, x(5, B, 4), x(6, B, 4), x(12, 4), x(4, 4), axes=(1, 1, None, None), out="heads"
    ),
]
NEWER = {
    "_grouped_mm": case(
        "grouped_mm",
        lambda a, w, o: torch._grouped_mm(a, w, offs=o),
        x(B, 16).bfloat16(),
        x(2, 16, 16).bfloat16(),
        torch.tensor([1, 3]).int(),
        axes=(0, None, None),
    ),
    "linear_cross_entropy": case(
        "linear_cross_entropy",
        lambda a, w, y: F.linear_cross_entropy(a, w, y, reduction="none"),
        x(B, 4),
        x(5, 4),
        n(5, B),
        axes=(0, None, 0),
    ),
}
"""Functions that the oldest torch does not have."""

CASES = [*POINTWISE, *BINARY, *REDUCTIONS, *PRODUCTS, *PICKS, *LOSSES, *LAYERS]
CASES += [each for name, each in NEWER.items() if hasattr(torch, name) or hasattr(F, name)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_element_depends_on_a_sample_that_it_is_not_said_to_belong_to(case):
    for owners in assignments(case.inputs, 30):
        assert wrong_elements(case.function, case.inputs, owners) == [], [
            o if o is None else o.tolist() for o in owners
        ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_of_a_batch_are_followed(case):
    owners = [
        batch_rows(B, value.ndim, axis) if isinstance(value, Tensor) and axis is not None else None
        for value, axis in zip(case.inputs, case.axes, strict=True)
    ]
    results, found = run(case.function, case.inputs, owners)
    for number, (result, provenance) in enumerate(zip(results, found, strict=True)):
        mine = owners_of_rows(provenance, result.shape)
        if case.out in ("lost", None):
            assert mine is None or case.name in ("gather samples",), (case.name, mine)
            continue
        if case.out == "any":
            continue
        axis = (1, 0)[number] if case.out == "heads" else case.out
        assert mine is not None, (case.name, number, provenance)
        assert torch.equal(mine, batch_rows(B, result.ndim, axis).expand(result.shape)), case.name
