"""A second look at data that can't be fetched twice, changes, or comes in other shapes than one text a row."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, IterableDataset, RandomSampler

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.runtime.second_look import Look
from lightning_memsink.callbacks.runtime.second_look_batches import LookBatch
from lightning_memsink.callbacks.runtime.second_look_reservoir import Reservoir
from lightning_memsink.samples.hashing import text_ids
from lightning_memsink.samples.tokens import Tokens
from tests.support.looking import Looks, watched
from tests.support.small_runs import Rows, TinyLM, control_loader, fit, noise, trainer

TEXTS = noise(50, seed=8)


def ids_of(tokens: Tensor) -> list[int]:
    return text_ids(Tokens(tokens, torch.ones_like(tokens, dtype=torch.bool))).tolist()


@torch.no_grad()
def loss_of(module: Any, tokens: Tensor) -> float:
    return float(module.loss({"input_ids": tokens[None]}))


def looked(train: Any, identity: Any = "auto", model: TinyLM | None = None, **options: Any) -> tuple[Any, Looks]:
    """A run of two epochs, with a look at the end of each."""
    tracker, looks = watched(options.pop("mode", "validation_step"), LossTracker(identity, families=False), **options)
    module = model or TinyLM()
    trainer([tracker, looks], max_epochs=2, val_check_interval=None).fit(module, train, control_loader())
    return module, looks


def assert_all_are_right(module: Any, looks: Looks, look: Look, count: int = len(TEXTS)) -> None:
    """Of the last look, under the weights of which training ended."""
    text_of = dict(zip(ids_of(TEXTS), TEXTS, strict=True))
    ids = looks.tracker.table.ids[look.rows].tolist()
    assert len(set(ids)) == len(ids) == count
    truth = torch.tensor([loss_of(module, text_of[id]) for id in ids])
    torch.testing.assert_close(look.losses, truth)


class Raising(Rows):
    """Some rows can be read once."""

    def __init__(self, tokens: Tensor, broken: set[int]) -> None:
        super().__init__(tokens)
        self.broken, self.read = broken, set[int]()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index in self.broken and index in self.read:
            raise OSError(f"row {index} is gone")
        self.read.add(index)
        return super().__getitem__(index)


class RaisingTogether(Raising):
    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("kind", [Raising, RaisingTogether])
def test_rows_that_raise_are_left_out_and_said_once(kind):
    with pytest.warns(UserWarning, match="could not measure 3 of 50 samples again") as said:
        tracker, looks = watched(at="on_train_epoch_end")
        _, module = fit(
            [tracker, looks], train=DataLoader(kind(TEXTS, {3, 20, 41}), 8), max_epochs=1, val_check_interval=None
        )
    assert_all_are_right(module, looks, looks.looks[0], 47)
    assert len([each for each in said if "could not measure" in str(each.message)]) == 1


def test_a_data_set_that_can_be_read_only_once_gives_no_look_and_training_goes_on():
    with pytest.warns(UserWarning, match=r"could not measure samples again .*OSError: row \d+ is gone.*recheck=0"):
        tracker, looks = watched(at="on_train_epoch_end")
        run, _ = fit(
            [tracker, looks],
            train=DataLoader(Raising(TEXTS, set(range(50))), 8),
            max_epochs=1,
            val_check_interval=None,
        )
    assert [len(look.rows) for look in looks.looks] == [0] and run.global_step == 7


class Anew(Rows):
    """Every epoch the texts lie in other rows, all but the first ten."""

    epoch = 0

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        moved = index if index < 10 else 10 + (index - 10 + 7 * self.epoch) % 40
        return super().__getitem__(moved)


class NextEpoch(Looks):
    """The data changes just before the look."""

    data: Anew

    def look(self, trainer: Any, pl_module: Any) -> None:
        self.data.epoch += 1
        super().look(trainer, pl_module)


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_that_hold_other_samples_by_now_are_not_measured(workers):
    data = Anew(TEXTS)
    tracker = LossTracker(families=False)
    looks = NextEpoch(tracker, at="on_train_epoch_end", pick=lambda known: torch.arange(0, known, 2))
    looks.data = data
    train = DataLoader(data, 5, num_workers=workers)
    with pytest.warns(UserWarning, match=r"could not measure 20 of 25 .* bring other samples"):
        _, module = fit([tracker, looks], train=train, max_epochs=1, val_check_interval=None)
    assert looks.looks[0].rows.tolist() == [0, 2, 4, 6, 8]
    assert_all_are_right(module, looks, looks.looks[0], 5)


class OwnBatches(DataLoader):
    """A loader that changes its batches, counts them, and leaves out one of them."""

    def __iter__(self) -> Iterator[Any]:
        self.passes = getattr(self, "passes", 0) + 1
        for n, batch in enumerate(super().__iter__()):
            if n != 2:
                yield {"input_ids": batch["input_ids"].flip(1)}


def test_a_loader_that_changes_its_batches_changes_those_of_a_look():
    loader = OwnBatches(Rows(TEXTS.flip(1)), 8)
    with pytest.warns(UserWarning, match=r"could not measure \d+ of 40"):  # which rows came last isn't known any more
        module, looks = looked(loader, at="on_train_epoch_end")
    assert loader.passes == 2
    assert_all_are_right(module, looks, looks.looks[-1], 26)


LOADERS: dict[str, Any] = {
    "batch sampler": lambda rows: DataLoader(rows, batch_sampler=BatchSampler(RandomSampler(rows), 7, True)),
    "buckets": lambda rows: DataLoader(rows, batch_sampler=[[*range(10)], [*range(10, 45)], [*range(45, 50)]]),
    "several data sets": lambda rows: DataLoader(ConcatDataset([rows, rows]), 8),
    "from the end": lambda rows: DataLoader(rows, 8, sampler=[-n for n in range(1, 51)]),
    "names": lambda rows: DataLoader(
        {f"text {n}": rows[n] for n in range(50)}, 8, sampler=[f"text {n}" for n in range(50)]
    ),
    "drop_last": lambda rows: DataLoader(rows, 8, shuffle=True, drop_last=True),
}


BY_NAME = [("names", "index")]


@pytest.mark.parametrize(
    ("name", "identity"), [*product(sorted(LOADERS.keys() - {"names"}), ["content", "index"]), *BY_NAME]
)
def test_any_loader_over_rows_will_do(name, identity):
    tracker, looks = watched("validation_step", LossTracker(identity, families=False))
    looks.measured = lambda module, rows: torch.tensor([loss_of(module, TEXTS[text_of(row)]) for row in rows.tolist()])

    def text_of(row: int) -> int:
        (named,) = tracker.table.names.of([(tracker.table.ids if name == "names" else tracker.table.first_row)[row]])
        return int(str(named).removeprefix("text ")) % 50

    fit([tracker, looks], train=LOADERS[name](Rows(TEXTS)), max_epochs=2, val_check_interval=None)
    last = looks.looks[-1]
    assert len(last.rows) == len(tracker.table) and not looks.second.keeps_batches
    torch.testing.assert_close(last.losses, looks.truth[-1])


class Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"input_ids": tokens} for tokens in TEXTS)


class Batches:
    """An iterable of batches that name their samples."""

    parts = TEXTS.split(10)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, n: int) -> dict[str, Any]:
        return {"input_ids": self.parts[n], "sample_id": ids_of(self.parts[n])}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[n] for n in range(len(self)))


STREAMS: dict[str, Any] = {
    "stream": lambda: DataLoader(Stream(), 10),
    "batches by key": lambda: DataLoader(Batches(), None),  # type: ignore[arg-type]
    "iterable": Batches,
    "two loaders": lambda: {"a": DataLoader(Rows(TEXTS[:25]), 5), "b": DataLoader(Rows(TEXTS[25:]), 5)},
}


class OfTwo(TinyLM):
    """Takes batches of two loaders."""

    def loss(self, batch: Any) -> Tensor:
        return super().loss(
            batch if "a" not in batch else {"input_ids": torch.cat([*(batch[n]["input_ids"] for n in "ab")])}
        )


@pytest.mark.parametrize("mode", ["validation_step", "training"])
@pytest.mark.parametrize("name", STREAMS)
def test_of_streams_some_batches_are_kept(name, mode):
    module, looks = looked(STREAMS[name](), "auto", OfTwo(), mode=mode, samples=30)
    assert looks.second.keeps_batches and not looks.second.refusal
    assert [len(look.rows) % 10 for look in looks.looks] == [0, 0]
    assert len(looks.second._reservoir) == 3  # batches, of two epochs' ten; one may be kept of both epochs
    assert_all_are_right(module, looks, looks.looks[-1], len(looks.looks[-1].rows))
    looks.second.detach()
    assert len(looks.second._reservoir) == 0


def offer(reservoir: Reservoir, batch: Any, ids: Tensor) -> None:
    reservoir.offer(len(ids), lambda: LookBatch(batch, ids, None, False))


def test_a_batch_is_described_only_if_it_is_kept():
    reservoir, described = Reservoir(4), []

    def describe() -> LookBatch:
        described.append(1)
        return LookBatch(torch.zeros(2), torch.arange(2), None, False)

    for _ in range(1000):
        reservoir.offer(2, describe)
    assert len(reservoir) == 2 and len(described) < 40  # of two places about 2 + 2 log(1000 / 2) = 14


def test_the_batches_that_are_kept_are_a_uniform_sample():
    """Of 20 batches, each is kept in 4 of 20 runs; the standard error of 2,000 runs is .009."""
    counts = torch.zeros(20)
    for seed in range(2000):
        reservoir = Reservoir(8, seed)
        for n in range(20):
            offer(reservoir, {"x": torch.zeros(2, 1)}, torch.tensor([2 * n, 2 * n + 1]))
        for batch in reservoir.batches(torch.device("cpu"), 99):
            counts[int(batch.ids[0]) // 2] += 1
    assert counts.sum() == 8000 and ((counts / 2000 - 0.2).abs() < 4 * 0.009).all()


def test_a_batch_that_is_kept_shares_nothing_with_the_step():
    reservoir = Reservoir(8)
    x = torch.ones(2, 3, requires_grad=True)
    batch = {"x": x * 2, "list": ["a"]}
    offer(reservoir, batch, torch.arange(2))
    batch["x"].data.zero_()
    batch["list"].append("b")
    for _ in range(2):
        (kept,) = reservoir.batches(torch.device("cpu"), 8)
        assert kept.batch["x"].tolist() == [[2.0] * 3] * 2 and not kept.batch["x"].requires_grad
        assert kept.batch["list"] == ["a"]
        kept.batch["x"].zero_()  # as a step may


@pytest.mark.parametrize(
    ("samples", "sizes", "held"), [(8, [9], 1), (8, [2, 2, 2, 2], 4), (8, [2, 2, 2, 2, 4, 4], 2), (0, [2], 0)]
)
def test_never_more_samples_are_kept_than_asked_for_or_one_batch(samples, sizes, held):
    reservoir = Reservoir(samples)
    for size in sizes:
        offer(reservoir, torch.zeros(size), torch.arange(size))
    assert len(reservoir) == held
    assert sum(len(batch.ids) for batch in reservoir._kept) <= max(samples, sizes[0])
