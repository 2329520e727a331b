"""A long document that is cut into windows is one sample: a visit a pass, the mean over all of its tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.windows import join_windows


def record(
    table: LossTable, ids: list[int], losses: list[float], tokens: list[int], windows: list[int], epoch: int, step: int
) -> Tensor:
    """One flush of windows at one step."""
    which, steps = torch.tensor(ids), torch.full((len(ids),), step)
    merged, elements, is_part = join_windows(
        *(table, table.rows_of(which), torch.tensor(losses), torch.tensor(tokens), torch.tensor(windows)),
        torch.full((len(ids),), epoch),
        steps,
    )
    return table.record(which, merged, steps, elements, is_part)


def test_windows_of_a_pass_are_one_visit_whose_loss_is_the_mean_over_tokens():
    table = LossTable()
    record(table, [7, 8, 7, 7], [1.0, 5.0, 2.0, 4.0], [10, 3, 20, 10], [1, 2, 3, 4], 0, 5)
    assert table.exposures.tolist() == [1, 1]
    assert table.last_loss.tolist() == pytest.approx([(10 + 40 + 40) / 40, 5.0])
    assert table.first_loss.float().tolist() == pytest.approx([2.25, 5.0])
    record(table, [7, 7], [1.0, 1.0], [20, 10], [3, 1], 1, 50)  # of the next epoch, shuffled
    record(table, [7], [3.0], [10], [4], 1, 60)
    assert table.exposures.tolist() == [2, 1]
    assert table.last_loss[0] == pytest.approx((20 + 10 + 30) / 40)
    assert table.first_loss[0] == 2.25 and table.first_step[0] == 5 and table.last_step[0] == 60


def test_a_window_that_comes_again_begins_a_visit():
    table = LossTable()
    record(table, [7, 7, 7, 7], [1.0, 3.0, 2.0, 6.0], [10, 10, 10, 10], [1, 2, 1, 2], 0, 5)
    assert table.exposures.tolist() == [2] and table.last_loss.tolist() == [4.0]
    record(table, [7], [9.0], [10], [1], 0, 6)
    assert table.exposures.tolist() == [3] and table.last_loss.tolist() == [9.0]


@pytest.mark.parametrize("unknown", [float("nan"), float("inf")])
def test_a_window_without_a_loss_adds_nothing(unknown):
    table = LossTable()
    record(table, [7, 7], [unknown, 3.0], [10, 10], [1, 2], 0, 5)
    assert table.exposures.tolist() == [1] and table.last_loss.tolist() == [3.0]
    record(table, [7, 7], [unknown, unknown], [10, 10], [1, 2], 1, 9)
    assert table.exposures.tolist() == [2] and table.last_loss.tolist() == [3.0]
    record(table, [7, 7], [2.0, unknown], [10, 10], [1, 2], 2, 12)
    assert table.last_loss.tolist() == [2.0]


def test_an_open_visit_survives_a_checkpoint():
    table, whole = LossTable(), LossTable()
    record(whole, [7, 8, 7], [1.0, 2.0, 3.0], [10, 5, 30], [1, 2, 3], 0, 5)
    record(table, [7, 8], [1.0, 2.0], [10, 5], [1, 2], 0, 5)
    restored = LossTable()
    restored.load_state_dict(table.state_dict())
    record(restored, [7], [3.0], [30], [3], 0, 5)
    assert restored.last_loss.tolist() == whole.last_loss.tolist() == [2.5, 2.0]
    assert restored.exposures.tolist() == [1, 1] and restored.first_loss.tolist() == whole.first_loss.tolist()


def test_windows_of_controls_are_the_mean_over_their_tokens():
    controls = ControlTable()
    controls.begin(3)
    controls.add(torch.tensor([4, 9]), torch.tensor([1.0, 2.0]), torch.zeros(2, 1), torch.tensor([10.0, 5.0]))
    controls.add(torch.tensor([4]), torch.tensor([4.0]), torch.zeros(1, 1), torch.tensor([20.0]))
    controls.close_evaluation([controls.collected])
    assert controls.ids.tolist() == [4, 9] and controls.latest.tolist() == [3.0, 2.0]
