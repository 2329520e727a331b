"""What is done with texts in a thread of its own: the same as at once, in order, bounded, and never lost."""

import copy
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.runtime import beside_training, visit_recorder
from lightning_memsink.callbacks.runtime.beside_training import BesideTraining
from lightning_memsink.detection.difficulty import Matching
from lightning_memsink.detection.ngram_features import EXCERPT
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.tokens import Tokens
from lightning_memsink.samples.visits import Visit
from tests.support.small_runs import TRAIN, TinyLM, fit, snapshot, train_loader, watch


def put_and_wait(self, run, then, size):
    """The slow path: each job is done when it is put."""
    then(run())


def described(run, crew):
    """All that is made of texts."""
    counts, families = crew[0].matching.counts, crew[0].visits.families.state_dict()
    state = {name: each for name, each in families.items() if name != "texts"}
    return snapshot(*run), repr(counts.state_dict()), repr(families["texts"]), repr(state)


@pytest.mark.parametrize("full", [1 << 18, 500], ids=["by steps", "by tokens"])
@pytest.mark.parametrize("loader", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_a_run_is_that_of_the_slow_path_to_the_bit(monkeypatch, full, loader):
    monkeypatch.setattr(visit_recorder, "MOST_TOKENS", full)
    crews = watch(), watch()
    beside = fit(crews[0], train=train_loader(**loader))
    monkeypatch.setattr(BesideTraining, "put", put_and_wait)
    at_once = fit(crews[1], train=train_loader())
    assert described(beside, crews[0]) == described(at_once, crews[1])
    table = Ledger.of(beside[0]).losses
    assert (table.features > 0).any(0).all() and len(table) == 204


def test_a_thread_that_is_late_changes_nothing(monkeypatch):
    crews, of_texts = (watch(), watch()), Matching.of_texts

    def late(self, *args):
        time.sleep(0.02)
        return of_texts(self, *args)

    at_once = fit(crews[0])
    monkeypatch.setattr(Matching, "of_texts", late)
    assert described(fit(crews[1]), crews[1]) == described(at_once, crews[0])


def test_no_step_waits_for_the_work_on_its_text(monkeypatch):
    """Training goes on while the thread is held up; before the evaluation all is done."""
    gate, held, of_texts = threading.Event(), [], Matching.of_texts

    class Opens(TinyLM):
        def validation_step(self, batch, batch_idx):
            held.append(gate.is_set())
            gate.set()
            return super().validation_step(batch, batch_idx)

    def blocked(self, *args):
        assert gate.wait(60)
        return of_texts(self, *args)

    monkeypatch.setattr(Matching, "of_texts", blocked)
    monkeypatch.setattr(visit_recorder, "MOST_TOKENS", 200)
    crew = watch()
    run, _ = fit(crew, Opens(), num_sanity_val_steps=0)
    assert held[0] is False and all(held[1:])
    assert (Ledger.of(run).losses.features > 0).any(0).all()


@pytest.mark.parametrize("where", ["training_step", "validation_step"])
def test_a_failed_training_leaves_its_texts_described(where, monkeypatch):
    monkeypatch.setattr(visit_recorder, "MOST_TOKENS", 200)

    class Fails(TinyLM):
        pass

    def fail(self, batch, batch_idx):
        if self.global_step == 6:
            raise RuntimeError("mine")
        return TinyLM.training_step(self, batch, batch_idx)

    setattr(Fails, where, fail)
    crew = watch()
    with pytest.raises(RuntimeError, match="mine"):
        fit(crew, Fails(), val_check_interval=6, num_sanity_val_steps=0)
    table = crew[0].table
    assert len(table) and (table.features[:, 3] > 0).all()


def test_a_long_text_costs_no_more_than_its_excerpt_and_is_described():
    long = TRAIN[torch.arange(40) % 20].repeat(1, 200)
    assert long.shape[1] > 2 * EXCERPT
    crew = watch()
    run, _ = fit(crew, train=train_loader(long, 8), max_epochs=2, val_check_interval=5)
    table = Ledger.of(run).losses
    assert len(table) == 20 and table.exposures.tolist() == [4] * 20 and (table.features[:, 0] > 0).all()
    assert float(crew[0].matching.counts.unigrams.sum()) == 80 * EXCERPT


# The queue alone ------------------------------------------------------------------------------------------------------


def test_results_come_in_order_in_the_thread_that_asks():
    beside, found = BesideTraining(), []
    for n in range(50):
        beside.put(partial(time.sleep, 0.001 * (n % 3)), lambda _, n=n: found.append((n, threading.get_ident())), 1)
    beside.settle()
    assert found == [(n, threading.get_ident()) for n in range(50)]
    beside.collect()
    assert len(found) == 50


def test_a_job_that_raises_raises_where_results_are_read_and_others_are_kept():
    beside, found = BesideTraining(), []
    beside.put(lambda: 1, found.append, 1)
    beside.put(lambda: 1 // 0, found.append, 1)
    beside.put(lambda: 2, found.append, 1)
    with pytest.raises(ZeroDivisionError):
        beside.settle()
    beside.settle()
    assert found == [1, 2]


def test_memory_is_bounded_and_what_is_larger_goes_alone(monkeypatch):
    monkeypatch.setattr(beside_training, "MOST", 10)
    beside, gate, most = BesideTraining(), threading.Event(), []
    threading.Timer(0.2, gate.set).start()
    for size in (6, 6, 30, 6):
        beside.put(gate.wait, lambda _: None, size)
        most.append(sum(job.size for job in beside._waiting))
    beside.settle()
    assert gate.is_set() and max(most) <= 30


def test_copies_begin_without_jobs_and_a_cleared_queue_hands_on_nothing():
    beside, found = BesideTraining(), []
    beside.put(lambda: 1, found.append, 1)
    twin = copy.deepcopy(beside)
    assert found == [1]
    twin.settle()
    for n in range(20):
        beside.put(partial(time.sleep, 0.001), found.append, n)
    beside.clear()
    beside.settle()
    assert found == [1] and beside._thread is None


def test_processes_agree_on_when_many_tokens_wait():
    """By what all of them have recorded together, early in the run; where there is no text, the steps alone decide."""
    recorder = LossTracker().visits
    visit = Visit(torch.arange(4), torch.ones(4), 0, Tokens(torch.zeros(4, 8192).long(), torch.ones(4, 8192) > 0), None)
    assert recorder.is_full(8, alone=False) and not recorder.is_full(7, alone=False)
    recorder._note_rate([[visit] * 3, [visit] * 4, []])
    assert [recorder.is_full(n, alone=False) for n in (3, 4, 5)] == [False, True, True]
    recorder._note_rate([[], []])
    assert not recorder.is_full(3, alone=False)
    recorder._note_rate([[replace(visit, tokens=None)], []])
    assert not recorder.is_full(10**5, alone=False)
