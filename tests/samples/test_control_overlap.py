"""Controls with the input of a training sample are found, in whatever order both come."""

from __future__ import annotations

from itertools import permutations
from threading import Barrier, Thread, local

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_memsink.samples import control_overlap
from lightning_memsink.samples.control_overlap import ControlOverlap
from lightning_memsink.samples.input_prints import NO_PRINT


def hashes(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


IDS, PRINTS = hashes(5, -3, 8, 0), hashes(50, -30, 80, 100)


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_training_and_controls_may_come_in_any_order(order):
    overlap = ControlOverlap()
    steps = [
        lambda: overlap.note_controls(IDS, PRINTS),
        lambda: overlap.note_training(hashes(1, 80, 2)),
        lambda: overlap.note_training(hashes(-30, 3)),
    ]
    for step in order:
        steps[step]()
        overlap.overlap(IDS)  # asking in between changes nothing
    assert overlap.overlap(IDS).tolist() == [False, True, True, False]
    assert overlap.overlap(hashes(8, 8, 7, -3)).tolist() == [True, True, False, True]


@settings(max_examples=60, deadline=None)
@given(
    batches=st.lists(st.lists(st.integers(-20, 20), max_size=6), max_size=8),
    controls=st.lists(st.integers(-20, 20), min_size=1, max_size=10),
    after=st.integers(0, 8),
    pending=st.integers(1, 8),
)
def test_it_is_the_intersection_of_two_sets(batches, controls, after, pending):
    """Hashes are remembered in any number of batches; the oracle is a set."""
    before, control_overlap.PENDING = control_overlap.PENDING, pending
    try:
        overlap, ids = ControlOverlap(), torch.arange(len(controls))
        for n, batch in enumerate(batches):
            if n == after:
                overlap.note_controls(ids, hashes(*controls))
            overlap.note_training(hashes(*batch))
        if after >= len(batches):
            overlap.note_controls(ids, hashes(*controls))
        trained = {print for batch in batches for print in batch if print != NO_PRINT}
        assert overlap.overlap(ids).tolist() == [print in trained for print in controls]
    finally:
        control_overlap.PENDING = before


def test_what_names_no_sample_is_never_found():
    overlap = ControlOverlap()
    overlap.note_controls(hashes(1, 2), hashes(NO_PRINT, 7))
    overlap.note_training(hashes(NO_PRINT, 8))
    assert overlap.overlap(hashes(1, 2)).tolist() == [False, False]


def test_a_control_has_the_input_of_now():
    overlap = ControlOverlap()
    overlap.note_training(hashes(7))
    overlap.note_controls(hashes(1), hashes(7))
    assert overlap.overlap(hashes(1)).tolist() == [True]
    overlap.note_controls(hashes(1), hashes(9))
    assert overlap.overlap(hashes(1)).tolist() == [False]


def test_nothing_known_is_no_overlap():
    overlap = ControlOverlap()
    assert overlap.overlap(hashes()).tolist() == []
    assert overlap.overlap(IDS).tolist() == [False] * 4
    overlap.note_training(hashes(50))
    overlap.note_controls(hashes(), hashes())
    assert overlap.overlap(IDS).tolist() == [False] * 4


def test_ids_of_documents_do_not_fit_hashes_of_rows_and_are_left_out():
    overlap = ControlOverlap()
    overlap.note_controls(hashes(1, 2, 3), hashes(7, 8))
    overlap.note_training(hashes(7, 8))
    assert overlap.overlap(hashes(1, 2, 3)).tolist() == [False] * 3


def test_more_training_inputs_than_are_remembered_are_found_once_the_controls_are_known():
    overlap = ControlOverlap(most=10)
    epoch = torch.arange(1, 101)
    overlap.note_training(epoch)
    assert not bool(overlap.overlap(IDS).any())  # none is waiting any more
    overlap.note_controls(hashes(1, 2), hashes(3, 90))
    assert overlap.overlap(hashes(1, 2)).tolist() == [True, False]
    assert len(overlap.state_dict()["trained"]) == 10
    overlap.note_training(epoch)
    assert overlap.overlap(hashes(1, 2)).tolist() == [True, True]


def test_a_second_epoch_of_the_same_inputs_is_compared_now_and_then():
    overlap = ControlOverlap()
    epoch = torch.arange(1, 2 * control_overlap.PENDING + 1).split(64)
    for batch in epoch:
        assert overlap.wants_training()
        overlap.note_training(batch)
    for batch in epoch:
        overlap.note_training(batch)
    compared = sum(overlap.wants_training() for _ in range(160))
    assert compared == 160 // control_overlap.EVERY


def test_other_inputs_later_are_compared_again():
    overlap = ControlOverlap()
    for _ in range(2):
        overlap.note_training(torch.arange(1, control_overlap.PENDING + 1))
    assert not all(overlap.wants_training() for _ in range(4))
    overlap.note_training(torch.arange(10**6, 10**6 + control_overlap.PENDING))
    assert all(overlap.wants_training() for _ in range(4))


def test_repeats_within_a_small_batch_do_not_end_the_comparison():
    overlap = ControlOverlap()
    overlap.note_training(hashes(1, 2, 3))
    overlap.note_training(hashes(1, 2, 3))
    overlap.overlap(IDS)
    assert all(overlap.wants_training() for _ in range(40))


def test_new_controls_are_compared_with_what_is_remembered_and_with_what_comes():
    overlap = ControlOverlap()
    for _ in range(2):
        overlap.note_training(torch.arange(1, control_overlap.PENDING + 1))
    overlap.note_controls(hashes(1, 2), hashes(17, 10**9))
    assert overlap.overlap(hashes(1, 2)).tolist() == [True, False]
    assert all(overlap.wants_training() for _ in range(4))


def test_it_goes_on_from_a_checkpoint():
    first = ControlOverlap()
    first.note_training(hashes(50, 7))
    first.note_controls(IDS, PRINTS)
    second = ControlOverlap()
    second.load_state_dict(first.state_dict())
    assert second.overlap(IDS).tolist() == first.overlap(IDS).tolist() == [True, False, False, False]
    second.note_controls(hashes(9), hashes(7))
    second.note_training(hashes(100))
    assert second.overlap(hashes(9, 0)).tolist() == [True, True]
    assert first.overlap(hashes(9, 0)).tolist() == [False, False]


def test_a_checkpoint_of_an_older_version_has_nothing_to_go_on_from():
    overlap = ControlOverlap()
    overlap.note_training(hashes(50))
    overlap.load_state_dict({})
    overlap.note_controls(IDS, PRINTS)
    assert overlap.overlap(IDS).tolist() == [False] * 4


def test_processes_share_what_they_know(monkeypatch):
    """Each has its own controls and its own part of the training set; the last round trip is that of both."""
    processes = [ControlOverlap(), ControlOverlap()]
    processes[0].note_controls(hashes(1, 2), hashes(10, 20))
    processes[1].note_controls(hashes(3, 4), hashes(30, 40))
    processes[0].note_training(hashes(40, 5))
    processes[1].note_training(hashes(10, 30))
    together(monkeypatch, processes)
    for overlap in processes:
        assert overlap.overlap(hashes(1, 2, 3, 4)).tolist() == [True, False, True, True]
    processes[1].note_training(hashes(20))
    together(monkeypatch, processes)
    assert processes[0].overlap(hashes(1, 2, 3, 4)).tolist() == [True] * 4


def together(monkeypatch, processes):
    """Runs `exchange` of all processes in threads that wait for one another, as processes do."""
    rank, slots, barrier = local(), [None] * len(processes), Barrier(len(processes))

    def gather(value):
        slots[rank.number] = value
        barrier.wait()
        found = list(slots)
        barrier.wait()
        return found

    def run(number):
        rank.number = number
        processes[number].exchange()

    monkeypatch.setattr(control_overlap, "gather", gather)
    threads = [Thread(target=run, args=(number,)) for number in range(len(processes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)


def test_a_single_process_has_nobody_to_share_with():
    overlap = ControlOverlap()
    overlap.note_controls(IDS, PRINTS)
    overlap.note_training(hashes(50))
    overlap.exchange()
    assert overlap.overlap(IDS).tolist() == [True, False, False, False]


def test_rows_that_came_before_are_compared_now_and_then_until_other_data_may_follow():
    overlap = ControlOverlap()
    first, second = torch.arange(8), torch.arange(8, 16)
    assert overlap.wants_training(first) and overlap.wants_training(second)
    again = [overlap.wants_training(torch.cat([first, second])) for _ in range(160)]
    assert sum(again) == 10
    assert overlap.wants_training(torch.arange(12, 20)), "some of these are new"
    overlap.forget_rows()
    assert overlap.wants_training(first)
    assert all(overlap.wants_training(rows) for rows in (torch.tensor([-1]), torch.tensor([1 << 48]), None))
