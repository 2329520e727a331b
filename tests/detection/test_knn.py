"""The search for matched controls against sorting all distances."""

import pytest
import torch

from lightning_memsink._chunks import in_blocks
from lightning_memsink.detection.kd_partition import WITHIN, Around, lots
from lightning_memsink.detection.knn import Neighbours, nearest


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("m", "k"),
    [
        (2000, 32),
        (2001, 32),
        (1025, 8),
        (1001, 8),
        (777, 32),
        (299, 8),
        (257, 32),
        (120, 16),
        (40, 40),
        (5, 32),
        (1, 1),
    ],
)
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


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38])
def test_rows_beyond_all_numbers_hide_none_of_those_beside_them(value):
    among, points = normal(999, 3), normal(50, 3, seed=1)
    expected, _ = Neighbours(among, 8).of(points)
    far = torch.ones(999, dtype=torch.bool)
    far[expected.unique()] = False
    damaged = Neighbours(among, 8)
    damaged._squares[damaged._column[far]] = value  # all but those that are found
    index, _ = damaged.of(points)
    assert torch.equal(index, expected)


def test_of_equals_the_first_are_found():
    index, squared = Neighbours(torch.ones(999, 3), 8).of(torch.zeros(5, 3))
    assert index.tolist() == [list(range(8))] * 5
    torch.testing.assert_close(squared, torch.full((5, 8), 3.0))


def test_no_points_have_no_neighbours():
    none, among = normal(0, 3), normal(20, 3, seed=1)
    for index, distances in (Neighbours(among, 4).of(none), nearest(none, among, 4)):
        assert index.shape == (0, 4) and len(distances) == 0


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


def clustered(n, seed):
    """Two clouds, one of them flat, and a few points far from all."""
    points = normal(n, 4, seed=seed)
    points[::2] = points[::2] * torch.tensor([0.1, 1.0, 0.0, 1.0]) + 3
    points[::1000] *= 20
    return points


@pytest.mark.parametrize("among", [normal(1000, 4, seed=1), clustered(1000, seed=1), torch.ones(50, 4), normal(3, 4)])
@pytest.mark.parametrize("make", [clustered, lambda n, seed: torch.zeros(n, 4)])
def test_looking_around_finds_what_looking_everywhere_finds(among, make):
    points, everyone = make(40_000, 2), Neighbours(among, 8)
    sorted_rows = lots(torch.arange(40_000), lambda rows: points[rows])
    assert torch.equal(torch.cat(sorted_rows).sort().values, torch.arange(40_000))
    for lot in sorted_rows:
        index, squared = Around(everyone).of(points[lot])
        _, apart = everyone.of(points[lot])
        torch.testing.assert_close(squared, apart, rtol=1e-5, atol=1e-4)
        own = (points[lot, None] - among[index]).square().sum(2)
        torch.testing.assert_close(own, apart, rtol=1e-5, atol=1e-4)
        assert (index.sort(1).values.diff(dim=1) > 0).all()


def test_lots_lie_together_and_leave_most_controls_out():
    points, among = normal(200_000, 3), normal(2000, 3, seed=1)
    everyone, left = Neighbours(among, 8), 0
    for lot in lots(torch.arange(200_000), lambda rows: points[rows]):
        reach = everyone.of(points[lot])[1][:, -1].quantile(WITHIN)
        kept = Around(everyone).within(reach, points[lot])
        left += len(lot) * len(among if kept is None else kept)
    assert left < 0.3 * 200_000 * 2000


def test_few_points_are_one_lot():
    assert [len(lot) for lot in lots(torch.arange(100), lambda rows: normal(len(rows), 2))] == [100]
