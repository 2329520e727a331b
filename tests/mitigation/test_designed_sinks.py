"""Which units a sample owns, and masks that reach the right rows of whatever a layer reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_memsink.attribution.hidden_layers import HiddenLayer, find_hidden_layers
from lightning_memsink.mitigation.designed_sinks import (
    Pool,
    apply_mask,
    is_overridden,
    masked,
    own_units,
    plan,
    union_fraction,
)

ODD_IDS = [0, 1, -1, 2**63 - 1, -(2**63), 2**31, -(2**40), 12345678901234567]
any_id = st.integers(-(2**63), 2**63 - 1)


@given(ids=st.lists(any_id, min_size=1, max_size=8), pool=st.integers(1, 300), data=st.data())
def test_every_id_owns_exactly_as_many_units_as_any_other(ids, pool, data):
    active = data.draw(st.integers(0, pool))
    owned = own_units(torch.tensor(ids), pool, active, seed=data.draw(any_id))
    assert owned.dtype == torch.bool and owned.shape == (len(ids), pool)
    assert owned.sum(1).tolist() == [active] * len(ids)


@pytest.mark.parametrize("sample", ODD_IDS)
def test_an_odd_id_is_an_ordinary_one(sample):
    """The published hash turned every unit on for id 0."""
    owned = own_units(torch.tensor([sample]), 200, 60)[0]
    others = own_units(torch.arange(100, 1100), 200, 60)
    assert (others & owned).sum(1).float().mean().item() == pytest.approx(60 * 60 / 200, abs=1)


def wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def mixed(number: int) -> int:
    number = wrapped((number ^ number >> 32) * -0x40A7B892E31B1A47)
    return wrapped((number ^ number >> 29) * -0x6B2FB644ECCEEE15)


def ranked(sample: int, pool: int, seed: int) -> list[int]:
    """The permutation in whole numbers: units by a hash of sample, unit and seed, equals by their number."""
    owner = mixed(wrapped(sample ^ mixed(wrapped(seed + 1))))
    low = 2 ** pool.bit_length()
    rank = {unit: mixed(wrapped(owner + mixed(unit + 1))) // low for unit in range(pool)}
    return sorted(range(pool), key=lambda unit: (rank[unit], unit), reverse=True)


@given(sample=any_id, pool=st.integers(1, 100), seed=any_id, data=st.data())
def test_units_are_the_first_of_a_permutation_that_is_the_same_on_every_machine(sample, pool, seed, data):
    active = data.draw(st.integers(0, pool))
    expected = sorted(ranked(sample, pool, seed)[:active])
    assert own_units(torch.tensor([sample]), pool, active, seed)[0].nonzero()[:, 0].tolist() == expected


def test_units_depend_on_id_size_and_seed_alone():
    """Not on the batch, the shape or the process's random state."""
    ids, seed = torch.tensor(ODD_IDS), 7
    state = torch.get_rng_state()
    owned = own_units(ids, 50, 10, seed)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(1)
    for row, sample in enumerate(ODD_IDS):
        assert torch.equal(own_units(torch.tensor([sample]), 50, 10, seed)[0], owned[row])
    packed = ids[torch.tensor([[0, 0, 1, 7], [2, 3, 3, 3]])]
    assert torch.equal(own_units(packed, 50, 10, seed), own_units(packed.flatten(), 50, 10, seed).view(2, 4, 50))
    assert not torch.equal(own_units(ids, 50, 10, seed + 1), owned)
    assert torch.equal(ids, torch.tensor(ODD_IDS))


@pytest.mark.parametrize(("pool", "active"), [(384, 115), (154, 8), (40, 4)])
@pytest.mark.parametrize("ids", [torch.arange(3000), torch.arange(3000) * 2**40 - 7, torch.arange(3000) << 48])
def test_two_ids_share_what_chance_lets_them(pool, active, ids):
    """Hypergeometric overlap in mean and variance, for neighbours too; and no unit belongs to nearly all or none."""
    owned = own_units(ids, pool, active)
    overlap = (owned[1:] & owned[:-1]).sum(1).double()
    share = active / pool
    variance = active * share * (1 - share) * (pool - active) / (pool - 1)
    assert overlap.mean().item() == pytest.approx(active * share, abs=5 * (variance / len(overlap)) ** 0.5)
    assert overlap.var().item() == pytest.approx(variance, rel=0.2)
    of_each = owned.double().mean(0)
    spread = (share * (1 - share) / len(ids)) ** 0.5
    assert (of_each - share).abs().max() < 5.5 * spread


@pytest.mark.parametrize(("active", "deleted"), [(0.3, 2), (0.3, 20), (0.05, 20)])
def test_the_plan_predicts_what_deletion_removes(active, deleted):
    pool = Pool(0.75, active)
    ids = torch.arange(50 * deleted).view(50, deleted)
    gone = torch.stack([pool.own(group, 800)[:, 200:].any(0).double().mean() for group in ids])
    assert union_fraction(active, deleted) == pytest.approx(gone.mean().item(), abs=0.01)
    assert ("as good as dropping" in plan(active, deleted)) == (gone.mean() > 0.9)


def test_a_pool_is_the_last_units_and_never_all_or_none_of_them():
    pool = Pool(0.75, 0.3)
    assert pool.dropped(8).tolist() == [True, True] + [False] * 6
    assert pool.own(torch.tensor([5]), 8)[0, :2].tolist() == [True, True]
    assert pool.own(torch.tensor([5]), 8).sum() == 2 + 2
    assert [Pool(0.99).size(2), Pool(0.01).size(2), Pool(0.5, 0.01).active(4)] == [1, 1, 1]
    with pytest.raises(ValueError, match="1 unit can't be split"):
        pool.size(1)


@pytest.mark.parametrize("options", [{"pool_fraction": 0}, {"pool_fraction": 1}, {"active_fraction": 1.5}])
def test_a_fraction_that_is_none_is_refused(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} is a share strictly between 0 and 1"):
        Pool(**options)


def test_deleting_ids_leaves_the_rest_of_the_pool_at_its_strength_in_training():
    pool, ids = Pool(0.5, 0.25), torch.tensor([3, 4])
    kept = pool.without(ids, 32)
    owned = own_units(torch.tensor([3]), 16, 4)[0] | own_units(torch.tensor([4]), 16, 4)[0]
    assert kept.tolist() == [1.0] * 16 + [0.0 if gone else 0.25 for gone in owned]
    assert pool.without(ids[:0], 32).tolist() == [1.0] * 16 + [0.25] * 16


# Masks on activations -------------------------------------------------------------------------------------------------

LAYOUTS = {
    "batch": ((3, 6), {}, False),
    "tokens": ((3, 4, 6), {}, False),
    "time first": ((4, 3, 6), {"batch_axis": 1}, False),
    "heads between": ((3, 2, 4, 6), {}, False),
    "channels": ((3, 6, 5, 5), {"unit_axis": 1}, False),
    "tokens in a row": ((12, 6), {}, False),
    "by token": ((3, 4, 6), {}, True),
    "by token, time first": ((4, 3, 6), {"batch_axis": 1}, True),
    "by token, in a row": ((12, 6), {}, True),
}


def at(index: tuple[int, ...], layout: str) -> tuple[int, int, int]:
    """Sample, token and unit at a place of the activation."""
    if layout.endswith("in a row"):
        return index[0] // 4, index[0] % 4, index[1]
    if layout == "channels":
        return index[0], 0, index[1]
    if layout.endswith("time first"):
        return index[1], index[0], index[2]
    return index[0], index[-2] if len(index) > 2 else 0, index[-1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_number_meets_the_mask_of_its_sample_token_and_unit(layout, dtype):
    shape, axes, by_token = LAYOUTS[layout]
    layer = HiddenLayer("layer", nn.Identity(), 6, **axes)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 4, 6, generator=generator) < 0.5
    mask = mask if by_token else mask[:, 0]
    hidden = torch.randn(shape, generator=generator).to(dtype)
    expected = hidden.clone()
    for index in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        sample, token, unit = at(tuple(index), layout)
        if not (mask[sample, token, unit] if by_token else mask[sample, unit]):
            expected[tuple(index)] = 0
    found = apply_mask(hidden, mask, layer, tokens=4)
    assert found.dtype == dtype
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("hidden", "mask"),
    [((5, 4, 6), (3, 6)), ((12, 6), (3, 6)), ((3, 4, 7), (6,)), ((3, 5, 6), (3, 4, 6)), ((6,), (3, 6))],
)
def test_rows_that_are_not_the_masks_are_told(hidden, mask):
    layer = HiddenLayer("mlp.down", nn.Identity(), 6)
    assert apply_mask(torch.ones(hidden), torch.ones(mask), layer) is None
    message = r"mlp.down reads \[.*which a mask \[.*does not fit"
    with pytest.raises(ValueError, match=message), masked([layer], lambda units: torch.ones(mask)):
        layer.module(torch.ones(hidden))


@pytest.mark.filterwarnings("ignore:.*nested tensors.*prototype")
@pytest.mark.parametrize("mask", [(6,), (2, 6), (2, 4, 6)], ids=str)
def test_nested_rows_are_masked_each_by_its_own(mask):
    layer, parts = HiddenLayer("layer", nn.Identity(), 6), [torch.randn(4, 6), torch.randn(2, 6)]
    kept = torch.rand(mask) < 0.5
    found = apply_mask(torch.nested.nested_tensor(parts), kept, layer)
    for row, (got, part) in enumerate(zip(found.unbind(), parts, strict=True)):
        own = kept if kept.ndim == 1 else kept[row]
        assert torch.equal(got, part * (own[: len(part)] if own.ndim == 2 else own))
    assert apply_mask(torch.nested.nested_tensor(parts), torch.ones(3, 6), layer) is None


class TwoBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 16)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def test_masked_is_the_model_with_units_set_to_zero_and_ends_with_its_block():
    model, x, pool = TwoBlocks(), torch.randn(3, 6), Pool(0.5, 0.5)
    layers = find_hidden_layers(model)
    plain = model(x)
    with masked(layers, pool.dropped):
        found = model(x)
        assert all(is_overridden(layer) for layer in layers)
        with masked(layers[:1], pool.dropped):  # a second one inside changes nothing here
            assert torch.equal(model(x), found)
        assert is_overridden(layers[0])
    first, act, down, _, last = model.blocks
    hidden = act(first(x)) * (torch.arange(16) < 8)
    expected = last(act(down(hidden)) * (torch.arange(6) < 3))
    assert_close(found, expected)
    assert torch.equal(model(x), plain) and not any(is_overridden(layer) for layer in layers)
    assert all(not module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="does not fit"), masked(layers, lambda units: torch.ones(2, units)):
        model(x)
    assert torch.equal(model(x), plain)


def test_a_module_called_by_keyword_is_masked_too():
    class ByName(TwoBlocks):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[2](input=self.blocks[1](self.blocks[0](x)))

    model, x, pool = ByName(), torch.randn(3, 6), Pool(0.5)
    with masked(find_hidden_layers(model)[:1], pool.dropped):
        assert_close(model(x), model.blocks[2](torch.relu(model.blocks[0](x)) * (torch.arange(16) < 8)))
