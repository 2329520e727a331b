"""The formulas against gradients written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from lightning_memsink.attribution import ghost_norms
from lightning_memsink.attribution.ghost_norms import (
    Convolution,
    Convolved,
    Dense,
    EmbeddingRows,
    Outer,
    convolution_weight_gradient,
    dense,
    gram,
    outer_squared_norm,
    rows_squared_norm,
    squared_norm,
    tie,
)

sizes = st.integers(1, 6)
seeds = st.integers(0, 2**16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(batch=sizes, positions=st.integers(1, 12), outputs=sizes, inputs=sizes, seed=seeds)
def test_an_outer_products_norm_is_that_of_the_sum(batch, positions, outputs, inputs, seed):
    left, right = normal(batch, positions, outputs, seed=seed), normal(batch, positions, inputs, seed=seed + 1)
    oracle = torch.einsum("bto,bti->boi", left.double(), right.double()).square().sum((1, 2)).float()
    assert_close(outer_squared_norm(left, right), oracle, rtol=1e-5, atol=1e-6)
    both_forms = (gram(left) * gram(right)).sum((1, 2)), ghost_norms._dense_squared_norm(left, right)
    for form in both_forms:
        assert_close(form, oracle, rtol=1e-5, atol=1e-5)


def test_few_written_out_gradients_are_held_at_once(monkeypatch):
    left, right = normal(5, 3, 4), normal(5, 3, 4, seed=1)
    whole = ghost_norms._dense_squared_norm(left, right)
    monkeypatch.setattr(ghost_norms, "MAX_ELEMENTS", 32)
    assert_close(ghost_norms._dense_squared_norm(left, right), whole)


@settings(max_examples=40, deadline=None)
@given(batch=sizes, positions=st.integers(1, 12), width=st.integers(1, 12), table=sizes, seed=seeds)
def test_rows_named_twice_add_up(batch, positions, width, table, seed):
    """More positions than features take the other way."""
    ids = torch.randint(table, (batch, positions), generator=torch.Generator().manual_seed(seed))
    gradients = normal(batch, positions, width, seed=seed)
    oracle = []
    for sample in range(batch):
        written = torch.zeros(table, width)
        for position in range(positions):
            written[ids[sample, position]] += gradients[sample, position]
        oracle.append(written.square().sum())
    assert_close(rows_squared_norm(ids, gradients), torch.stack(oracle), rtol=1e-5, atol=1e-5)


OUTER, MORE = Outer(normal(3, 5, 7), normal(3, 5, 4, seed=1)), Outer(normal(3, 2, 7, seed=2), normal(3, 2, 4, seed=3))
ROWS = EmbeddingRows(torch.tensor([[0, 6, 6], [1, 2, 3], [5, 5, 5]]), normal(3, 3, 4, seed=4))
AGAIN = EmbeddingRows(torch.tensor([[0, 1], [1, 4], [5, 6]]), normal(3, 2, 4, seed=5))
KERNEL = Convolved(
    normal(3, 4, 9), normal(3, 7, 9, seed=6), torch.empty(7, 4, 1), Convolution((1,), (1,), (1,), groups=1)
)


@pytest.mark.parametrize(
    "parts",
    [
        [OUTER],
        [ROWS],
        [KERNEL],
        [OUTER, MORE],
        [ROWS, AGAIN],
        [OUTER, ROWS],
        [ROWS, OUTER, MORE, AGAIN],
        [KERNEL, KERNEL],
        [OUTER, Dense(normal(3, 28, seed=7))],
    ],
    ids=lambda parts: "+".join(type(part).__name__ for part in parts),
)
def test_contributions_to_one_parameter_are_added_before_the_norm(parts):
    shape = torch.Size((7, 4))
    oracle = sum(dense(part, shape) for part in parts).square().sum(1)
    assert_close(squared_norm(parts, shape), oracle, rtol=1e-5, atol=1e-5)


def test_a_tied_matrix_needs_no_more_than_the_rows_that_are_read():
    tied = tie(OUTER, ROWS.ids)
    assert tied.picked.shape == (3, 5, 3)
    assert_close(squared_norm([tied, ROWS], torch.Size((7, 4))), squared_norm([OUTER, ROWS], torch.Size((7, 4))))
    assert_close(squared_norm([tied], torch.Size((7, 4))), squared_norm([OUTER], torch.Size((7, 4))))
    with pytest.raises(ValueError, match="tied"):
        squared_norm([tied, ROWS, AGAIN], torch.Size((7, 4)))


@settings(max_examples=30, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.integers(1, 2),
    channels=st.integers(1, 4),
    outputs=st.integers(1, 9),
    seed=seeds,
)
def test_patches_make_the_convolution(kernel, stride, dilation, channels, outputs, seed):
    how = Convolution(kernel, stride, (dilation, dilation), groups=1)
    image, weight = normal(2, channels, 7, 8, seed=seed), normal(outputs, channels, *kernel, seed=seed + 1)
    output = functional.conv2d(image, weight, stride=stride, dilation=dilation)
    by_patch = weight.flatten(1) @ how.patches(image).flatten(4).flatten(1, 3)
    assert_close(by_patch, output.flatten(2), rtol=1e-5, atol=1e-5)
    gradient = normal(*output.shape, seed=seed + 2)
    oracle = convolution_weight_gradient(image, gradient, weight, how).square().sum(1)
    assert_close(squared_norm([Convolved(image, gradient, weight, how)], weight.shape), oracle, rtol=1e-5, atol=1e-5)
    patches = how.patches(image).flatten(4).flatten(1, 3)
    assert_close(ghost_norms.patch_gram(image, output.shape[2:], how), patches.mT @ patches, rtol=1e-5, atol=1e-5)


def test_a_small_map_of_many_channels_needs_no_patches(monkeypatch):
    """Products of pixels are made once; without them, the patches are written out."""
    how, weight = Convolution((3, 3), (1, 1), (1, 1), groups=1), torch.empty(64, 64, 3, 3)
    image, gradient = normal(2, 64, 6, 6), normal(2, 64, 4, 4, seed=1)
    oracle = convolution_weight_gradient(image, gradient, weight, how).square().sum(1)
    by_pixels = squared_norm([Convolved(image, gradient, weight, how)], weight.shape)
    monkeypatch.setattr(ghost_norms, "patch_gram", lambda *_: pytest.fail("patches were not written out"))
    with pytest.raises(pytest.fail.Exception):
        squared_norm([Convolved(image, gradient, weight, how)], weight.shape)
    monkeypatch.setattr(ghost_norms, "_pixel_gram_is_cheaper", lambda *_: False)
    assert_close(by_pixels, oracle, rtol=1e-5, atol=1e-5)
    assert_close(squared_norm([Convolved(image, gradient, weight, how)], weight.shape), oracle, rtol=1e-5, atol=1e-5)
