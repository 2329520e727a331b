"""The search for matched controls against sorting all distances."""

import pytest
import torch

from lightning_memsink.blocks import in_blocks
from lightning_memsink.neighbours import Neighbours, nearest


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("m", "k"), [(2000, 32), (777, 32), (120, 16), (40, 40), (5, 32), (1, 1)])
@pytest.mark.parametrize("features", [1, 5])
def test_it_finds_what_sorting_all_distances_finds(threads, m, k, features):
    """More points than a block; the points of one feature lie close together, so that rounding could tell."""
    torch.set_num_threads(threads)
    points, among = normal(1300, features), normal(m, features, seed=1)
    index, distance = nearest(points, among, k)
    ranked = torch.cdist(points.double(), among.double()).sort(1).values[:, :k]
    found = (points.double()[:, None] - among.double()[index]).norm(dim=2)
    torch.testing.assert_close(found, ranked, rtol=0, atol=2e-6 if features > 1 else 2e-3)
    torch.testing.assert_close(distance.double(), found.mean(1), rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == min(k, m) for row in index.tolist())
    assert torch.get_num_threads() == threads


def test_squared_distances_are_those_of_the_indices():
    points, among = normal(600, 5), normal(500, 5, seed=1) + 100
    index, squared = Neighbours(among, 8).of(points + 100)
    torch.testing.assert_close(squared, (points[:, None] + 100 - among[index]).square().sum(2), rtol=1e-4, atol=1e-4)


def test_nobody_is_its_own_neighbour_though_others_are_equal():
    among = normal(700, 2).round()
    index, distance = nearest(among, among, 3, fellows=True)
    assert (index != torch.arange(700)[:, None]).all()
    apart = torch.cdist(among.double(), among.double()).fill_diagonal_(torch.inf)
    torch.testing.assert_close(distance.double(), apart.sort(1).values[:, :3].mean(1))


def test_points_beyond_all_numbers_get_some_neighbours_and_no_small_distance():
    points = torch.tensor([[3e38, -3e38], [torch.finfo().max, 0.0], [0.0, 0.0]])
    index, distance = nearest(points, normal(100, 2), 4)
    assert ((index >= 0) & (index < 100)).all()
    assert not (distance[:2] < 1e30).any() and distance[2] < 1


def test_an_error_in_a_block_is_not_lost_and_leaves_torch_its_threads():
    torch.set_num_threads(2)

    def fail(part):
        if part.start:
            raise ValueError("in a thread")

    with pytest.raises(ValueError, match="in a thread"):
        in_blocks(1000, fail, size=100)
    assert torch.get_num_threads() == 2
