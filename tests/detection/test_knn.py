"""Nearest-neighbour search against sorting all distances and against scipy's k-d tree."""

import pytest
import torch
from scipy.spatial import cKDTree

from lightning_memsink._chunks import in_blocks
from lightning_memsink.detection.kd_partition import RADIUS_QUANTILE, BoxPrunedSearch, partition
from lightning_memsink.detection.knn import NearestRows, nearest


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SIZES = [
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
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("m", "k"), SIZES)
@pytest.mark.parametrize("features", [1, 5])
def test_the_nearest_rows_are_those_of_sorting_all_distances(threads, m, k, features):
    """More points than a block; the points of one feature are close together, so rounding errors would show."""
    torch.set_num_threads(threads)
    points, reference = normal(1300, features), normal(m, features, seed=1)
    index, distance = nearest(points, reference, k)
    expected = torch.cdist(points.double(), reference.double()).sort(1).values[:, :k]
    actual = (points.double()[:, None] - reference.double()[index]).norm(dim=2)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 if features > 1 else 2e-3)
    torch.testing.assert_close(distance.double(), actual.mean(1), rtol=1e-5, atol=1e-6)
    assert all(len(set(row)) == min(k, m) for row in index.tolist())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("m", "k"), SIZES)
@pytest.mark.parametrize("features", [2, 5])
def test_the_nearest_rows_are_those_of_scipys_tree(m, k, features):
    """The same rows in the same order, except where two rows are equally far up to rounding."""
    points, reference = normal(1300, features), normal(m, features, seed=1)
    index, squared = NearestRows(reference, k).query(points)
    distances, rows = cKDTree(reference.double().numpy()).query(points.double().numpy(), k=[*range(1, min(k, m) + 1)])
    torch.testing.assert_close(squared.double(), torch.from_numpy(distances).square(), rtol=1e-4, atol=1e-4)
    actual = (points.double()[:, None] - reference.double()[index]).norm(dim=2)
    torch.testing.assert_close(actual, torch.from_numpy(distances), rtol=1e-4, atol=1e-4)
    assert (index == torch.from_numpy(rows)).float().mean() > 0.999


def test_the_nearest_other_rows_are_those_of_scipys_tree_without_the_row_itself():
    reference = normal(1001, 4)
    index, distance = nearest(reference, reference, 8, leave_one_out=True)
    distances, rows = cKDTree(reference.double().numpy()).query(reference.double().numpy(), k=9)
    assert (rows[:, 0] == range(1001)).all()
    torch.testing.assert_close(distance.double(), torch.from_numpy(distances[:, 1:]).mean(1), rtol=1e-5, atol=1e-6)
    assert (index == torch.from_numpy(rows[:, 1:])).float().mean() > 0.999


def test_squared_distances_are_those_of_the_indices():
    points, reference = normal(600, 5), normal(500, 5, seed=1) + 100
    index, squared = NearestRows(reference, 8).query(points + 100)
    torch.testing.assert_close(
        squared, (points[:, None] + 100 - reference[index]).square().sum(2), rtol=1e-4, atol=1e-4
    )


def test_no_row_is_its_own_neighbour_even_among_equal_rows():
    reference = normal(700, 2).round()
    index, distance = nearest(reference, reference, 3, leave_one_out=True)
    assert (index != torch.arange(700)[:, None]).all()
    distances = torch.cdist(reference.double(), reference.double()).fill_diagonal_(torch.inf)
    torch.testing.assert_close(distance.double(), distances.sort(1).values[:, :3].mean(1))


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38])
def test_rows_with_overflowing_distances_hide_no_other_rows(value):
    reference, points = normal(999, 3), normal(50, 3, seed=1)
    expected, _ = NearestRows(reference, 8).query(points)
    far = torch.ones(999, dtype=torch.bool)
    far[expected.unique()] = False
    damaged = NearestRows(reference, 8)
    damaged._squares[damaged._column[far]] = value  # all rows except the nearest
    index, _ = damaged.query(points)
    assert torch.equal(index, expected)


def test_of_equal_rows_the_first_are_returned():
    index, squared = NearestRows(torch.ones(999, 3), 8).query(torch.zeros(5, 3))
    assert index.tolist() == [list(range(8))] * 5
    torch.testing.assert_close(squared, torch.full((5, 8), 3.0))


def test_no_points_have_no_neighbours():
    none, reference = normal(0, 3), normal(20, 3, seed=1)
    for index, distances in (NearestRows(reference, 4).query(none), nearest(none, reference, 4)):
        assert index.shape == (0, 4) and len(distances) == 0


def test_points_with_overflowing_distances_get_valid_rows_and_no_small_distance():
    points = torch.tensor([[3e38, -3e38], [torch.finfo().max, 0.0], [0.0, 0.0]])
    index, distance = nearest(points, normal(100, 2), 4)
    assert ((index >= 0) & (index < 100)).all()
    assert not (distance[:2] < 1e30).any() and distance[2] < 1


def test_an_error_in_a_block_is_raised_and_torch_keeps_its_threads():
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


@pytest.mark.parametrize(
    "reference", [normal(1000, 4, seed=1), clustered(1000, seed=1), torch.ones(50, 4), normal(3, 4)]
)
@pytest.mark.parametrize("make", [clustered, lambda n, seed: torch.zeros(n, 4)])
def test_box_pruned_search_returns_the_result_of_the_full_search(reference, make):
    points, full = make(40_000, 2), NearestRows(reference, 8)
    parts = partition(torch.arange(40_000), lambda rows: points[rows])
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(40_000))
    for part in parts:
        index, squared = BoxPrunedSearch(full).query(points[part])
        _, expected = full.query(points[part])
        torch.testing.assert_close(squared, expected, rtol=1e-5, atol=1e-4)
        actual = (points[part, None] - reference[index]).square().sum(2)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)
        assert (index.sort(1).values.diff(dim=1) > 0).all()


def test_parts_are_compact_and_leave_most_controls_out():
    points, reference = normal(200_000, 3), normal(2000, 3, seed=1)
    full, compared = NearestRows(reference, 8), 0
    for part in partition(torch.arange(200_000), lambda rows: points[rows]):
        radius = full.query(points[part])[1][:, -1].quantile(RADIUS_QUANTILE)
        kept = BoxPrunedSearch(full).rows_within(radius, points[part])
        compared += len(part) * len(reference if kept is None else kept)
    assert compared < 0.3 * 200_000 * 2000


def test_few_points_are_one_part():
    parts = partition(torch.arange(100), lambda rows: normal(len(rows), 2))
    assert [len(part) for part in parts] == [100]
