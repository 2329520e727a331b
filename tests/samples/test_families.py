"""Families of near-duplicates: what is found, what isn't joined, and a thread that loses and delays nothing."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
import warnings

import pytest
import torch
from torch import Tensor

from lightning_memsink.samples import families as module
from lightning_memsink.samples.families import Families
from lightning_memsink.samples.tokens import Tokens

VOCABULARY = 5000


class World:
    """Families of texts, each made of one by changing a share of its tokens, among texts of their own."""

    def __init__(
        self,
        rate: float,
        lengths: tuple[int, int] = (48, 64),
        families: int = 20,
        members: int = 12,
        alone: int = 400,
        vocabulary: int = VOCABULARY,
        header: int = 0,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def drawn(count: int) -> Tensor:
            return torch.randint(vocabulary, (count,), generator=generator)

        start, texts, owners = drawn(header), [], []
        for family in range(families + alone):
            length = int(torch.randint(lengths[0], lengths[1] + 1, (), generator=generator))
            base = drawn(length)
            for _ in range(members if family < families else 1):
                changed = torch.rand(length, generator=generator) < (rate if family < families else 0)
                texts.append(torch.cat([start, torch.where(changed, drawn(length), base)]))
                owners.append(family)
        order = torch.randperm(len(texts), generator=generator).tolist()
        self.families, self.members = families, members
        self.owners = torch.tensor(owners)[order]
        self.tokens = padded([texts[n] for n in order])

    def add_to(self, families: Families, batch: int = 64) -> Families:
        for rows in torch.arange(len(self.owners)).split(batch):
            families.add(rows, Tokens(self.tokens.ids[rows], self.tokens.mask[rows]))
        return families

    def recall(self, numbers: Tensor) -> float:
        """Share of texts that are in the largest group of their family."""
        groups = [torch.unique(numbers[self.owners == one], return_counts=True)[1] for one in range(self.families)]
        return sum(int(sizes.max()) for sizes in groups if sizes.max() > 1) / (self.families * self.members)

    def joined_falsely(self, numbers: Tensor) -> int:
        """Pairs of texts of different families that are in one group."""
        same = numbers[:, None] == numbers
        return int((same & (self.owners[:, None] != self.owners)).sum()) // 2


def padded(texts: list[Tensor], left: bool = False) -> Tokens:
    width = max(len(text) for text in texts)
    ids, mask = torch.zeros(len(texts), width, dtype=torch.int64), torch.zeros(len(texts), width, dtype=torch.bool)
    for row, text in enumerate(texts):
        part = slice(width - len(text), None) if left else slice(len(text))
        ids[row, part], mask[row, part] = text, True
    return Tokens(ids, mask)


@pytest.mark.parametrize(("rate", "least"), [(0.05, 0.99), (0.1, 0.95), (0.2, 0.5)])
@pytest.mark.parametrize("header", [0, 32])
def test_variants_are_found_and_nothing_else(rate, least, header):
    world = World(rate, header=header)
    numbers = world.add_to(Families()).numbers(len(world.owners))
    assert world.recall(numbers) >= least
    assert world.joined_falsely(numbers) == 0


@pytest.mark.parametrize("lengths", [(16, 16), (16, 32), (200, 256), (16, 256)])
def test_variants_of_short_and_long_texts_are_found(lengths):
    world = World(0.1, lengths, seed=1)
    numbers = world.add_to(Families()).numbers(len(world.owners))
    assert world.recall(numbers) >= 0.9
    assert world.joined_falsely(numbers) == 0


@pytest.mark.parametrize("vocabulary", [32, 100])
def test_shingles_are_longer_where_there_are_few_different_tokens(vocabulary):
    world = World(0.1, (64, 128), vocabulary=vocabulary)
    families = world.add_to(Families(), batch=256)
    numbers = families.numbers(len(world.owners))
    assert families.state_dict()["length"] > 3
    assert world.recall(numbers) >= 0.9
    assert world.joined_falsely(numbers) == 0


def test_a_number_is_the_lowest_row_of_the_family():
    base = torch.arange(40)
    changed = torch.where(torch.arange(40) == 20, 999, base)
    families = Families()
    families.add(torch.tensor([9, 4]), padded([base, torch.arange(100, 140)]))
    families.add(torch.tensor([2]), padded([changed]))
    assert families.numbers(11).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 2, 10]
    assert families.numbers(3).dtype == torch.int32
    assert families.numbers(0).tolist() == []


@pytest.mark.parametrize("count", [200, 1000])
@pytest.mark.parametrize("scattered", [True, False])
@pytest.mark.parametrize("batch", [50, 1000])
def test_texts_of_a_template_are_no_family(count, scattered, batch):
    generator = torch.Generator().manual_seed(count)
    base = torch.randint(VOCABULARY, (48,), generator=generator)
    filled = torch.rand(48, generator=generator) < 0.3 if scattered else torch.arange(48) >= 32
    texts = torch.where(filled, torch.randint(VOCABULARY, (count, 48), generator=generator), base)
    families = Families()
    for rows in torch.arange(count).split(batch):
        families.add(rows, Tokens(texts[rows], torch.ones(len(rows), 48, dtype=torch.bool)))
    sizes = torch.unique(families.numbers(count), return_counts=True)[1].double()
    assert float((sizes * (sizes - 1)).sum()) / (count * (count - 1)) < 0.01


def test_families_are_found_below_a_header_longer_than_the_texts():
    world = World(0.1, (24, 32), header=200)
    numbers = world.add_to(Families()).numbers(len(world.owners))
    assert world.recall(numbers) >= 0.9
    assert world.joined_falsely(numbers) == 0


def test_nearly_equal_texts_are_one_family_however_many_there_are():
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(VOCABULARY, (1, 80), generator=generator).repeat(600, 1)
    texts[:, 40] = torch.arange(600)
    families = Families()
    for rows in torch.arange(600).split(40):
        families.add(rows, Tokens(texts[rows], torch.ones(len(rows), 80, dtype=torch.bool)))
    assert (families.numbers(600) == 0).float().mean() > 0.95


def test_a_chain_of_texts_that_overlap_is_not_one_family():
    """Windows of 64 tokens, of which each begins 32 tokens after the one before."""
    document = torch.randperm(40_000, generator=torch.Generator().manual_seed(0))[:3200]
    windows = document.unfold(0, 64, 32)
    families = Families()
    families.add(torch.arange(len(windows)), Tokens(windows, torch.ones_like(windows, dtype=torch.bool)))
    assert int(torch.unique(families.numbers(len(windows)), return_counts=True)[1].max()) <= 3


def test_padding_on_either_side_and_other_batches_change_nothing():
    world = World(0.1)
    texts = [ids[mask] for ids, mask in zip(world.tokens.ids, world.tokens.mask, strict=True)]
    expected = world.add_to(Families(), batch=64).numbers(len(texts))
    world.tokens = padded(texts, left=True)
    assert torch.equal(world.add_to(Families(), batch=64).numbers(len(texts)), expected)
    assert world.recall(world.add_to(Families(), batch=1).numbers(len(texts))) >= 0.95


def test_texts_too_short_to_compare_and_rows_of_padding_have_no_family():
    families = Families()
    families.add(torch.arange(6), padded([torch.tensor([1, 2])] * 3 + [torch.tensor([], dtype=torch.int64)] * 3))
    families.add(torch.tensor([6, 7]), padded([torch.tensor([], dtype=torch.int64)] * 2))
    families.add(torch.tensor([], dtype=torch.int64), Tokens(torch.zeros(0, 5).long(), torch.zeros(0, 5).bool()))
    families.add(torch.tensor([8, 9]), padded([torch.full((50,), 3)] * 2))
    assert families.numbers(10).tolist() == list(range(10))


def test_a_row_is_compared_once():
    families, texts = Families(), padded([torch.arange(40), torch.arange(40)])
    families.add(torch.tensor([3, 3]), texts)
    families.add(torch.tensor([3, 5]), texts)
    assert len(families) == 2
    assert families.numbers(6).tolist() == [0, 1, 2, 3, 4, 3]


def test_rows_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="not one for each"):
        Families().add(torch.arange(3), padded([torch.arange(9)]))
    with pytest.raises(ValueError, match="is not negative, but one is -1"):
        Families().add(torch.tensor([-1]), padded([torch.arange(9)]))
    with pytest.raises(ValueError, match="limit is a number of texts"):
        Families(limit=0)


def test_beyond_the_limit_texts_get_no_family_and_that_is_said_once():
    world = World(0.05, families=4, alone=20)
    families = Families(limit=30)
    with pytest.warns(UserWarning, match="compares 30 texts") as caught:
        world.add_to(families, batch=16)
    assert len(caught) == 1
    numbers = families.numbers(len(world.owners))
    assert numbers[30:].tolist() == list(range(30, len(numbers)))
    assert world.joined_falsely(numbers) == 0


def test_a_resumed_run_finds_the_same_families():
    world = World(0.1, header=40)
    expected = world.add_to(Families()).numbers(len(world.owners))
    half = len(world.owners) // 2 // 64 * 64
    first, second = Families(), Families()
    for rows in torch.arange(half).split(64):
        first.add(rows, Tokens(world.tokens.ids[rows], world.tokens.mask[rows]))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.numbers(half), first.numbers(half))
    for families in (first, second):
        world.add_to(families)
    assert torch.equal(first.numbers(len(expected)), expected)
    assert world.recall(second.numbers(len(expected))) >= 0.95
    assert world.joined_falsely(second.numbers(len(expected))) == 0


def test_the_state_is_of_tensors_and_plain_types(tmp_path):
    world = World(0.1)
    families = world.add_to(Families())
    torch.save(families.state_dict(), tmp_path / "state.pt")
    restored = Families()
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(restored.numbers(100), families.numbers(100))


def test_a_ledger_without_families_begins_anew():
    families = World(0.1).add_to(Families())
    families.load_state_dict({})
    assert len(families) == 0
    assert families.numbers(4).tolist() == [0, 1, 2, 3]
    families.add(torch.tensor([0, 2]), padded([torch.arange(40), torch.arange(40)]))
    assert families.numbers(4).tolist() == [0, 1, 0, 3]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_is_of_its_own(copied):
    world = World(0.1)
    families = world.add_to(Families())
    numbers = families.numbers(len(world.owners))
    other = copied(families)
    other.add(torch.tensor([len(numbers)]), padded([torch.arange(30)]))
    assert torch.equal(other.numbers(len(numbers)), numbers)
    assert len(families) == len(other) - 1


def test_a_pickle_is_as_large_as_what_it_holds():
    families = World(0.1, families=2, alone=20).add_to(Families())
    assert len(pickle.dumps(families)) < 1 << 19


def test_adding_waits_for_nothing_and_all_is_compared_in_the_end(monkeypatch):
    begun, may_go_on = threading.Event(), threading.Event()
    compare = module.hashes_of

    def slow(*arguments):
        begun.set()
        assert may_go_on.wait(10)
        return compare(*arguments)

    monkeypatch.setattr(module, "hashes_of", slow)
    families = Families()
    families.add(torch.tensor([0]), padded([torch.arange(40)]))
    assert begun.wait(10)
    for row in range(1, 20):
        families.add(torch.tensor([row]), padded([torch.arange(40)]))
    assert len(families) == 20
    may_go_on.set()
    assert families.numbers(20).tolist() == [0] * 20


def test_a_full_queue_bounds_what_waits(monkeypatch):
    monkeypatch.setattr(module, "WAITING", 2)
    most, compare = [], module.hashes_of

    def slow(*arguments):
        most.append(len(families._waiting))
        time.sleep(0.005)
        return compare(*arguments)

    monkeypatch.setattr(module, "hashes_of", slow)
    families = Families()
    for row in range(20):
        families.add(torch.tensor([row]), padded([torch.arange(40)]))
    assert families.numbers(20).tolist() == [0] * 20
    assert max(most) <= 2


def test_no_thread_is_left_when_nothing_waits():
    families = World(0.1).add_to(Families())
    families.settled()
    deadline = time.monotonic() + 10
    while any(thread.name == "memsink-families" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_failure_in_the_thread_is_said_once_and_ends_no_training(monkeypatch):
    world = World(0.05)
    families = Families()
    rows = torch.arange(240)
    families.add(rows, Tokens(world.tokens.ids[rows], world.tokens.mask[rows]))
    before = families.numbers(240)

    def broken(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr(module, "hashes_of", broken)
    with pytest.warns(
        UserWarning, match="stopped looking for near-duplicates after 240 texts.*MemoryError: no room"
    ) as said:
        world.add_to(families)
        families.settled()
        families.settled()
    assert len(said) == 1
    monkeypatch.undo()
    world.add_to(families)
    numbers = families.numbers(len(world.owners))
    assert torch.equal(numbers[:240], before)
    assert numbers[240:].tolist() == list(range(240, len(numbers)))
    resumed = Families()
    resumed.load_state_dict(families.state_dict())
    assert world.recall(world.add_to(resumed).numbers(len(numbers))) > 0.95


def test_no_random_number_is_drawn():
    state = torch.get_rng_state()
    World(0.1).add_to(Families()).settled()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_process_goes_on_by_itself():
    world = World(0.1)
    expected = world.add_to(Families()).numbers(len(world.owners))
    families = Families()
    half = torch.arange(len(world.owners) // 2)
    families.add(half, Tokens(world.tokens.ids[half], world.tokens.mask[half]))
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12, for a process with threads
        child = os.fork()
    if not child:
        status = 1
        try:
            recall = world.recall(world.add_to(families).numbers(len(expected)))
            status = 0 if recall >= 0.95 and world.joined_falsely(families.numbers(len(expected))) == 0 else 2
        finally:
            os.write(writing, bytes([status]))
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 1) == b"\0"
    assert world.recall(world.add_to(families).numbers(len(expected))) >= 0.95
