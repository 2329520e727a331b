"""Ids of the user's own: of any kind, as they were, or refused by name."""

from __future__ import annotations

import datetime
import uuid
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_memsink.callbacks.runtime.loader_ids import LoaderIds
from lightning_memsink.samples.sample_ids import SampleIds
from lightning_memsink.samples.sample_keys import key_ids
from lightning_memsink.samples.sample_names import SampleNames
from tests.support.coded_rows import Idle, coded
from tests.support.loaders import LOADER, QUIET, Rows, fit

pytestmark = QUIET

B = 4
UUIDS = [uuid.UUID(int=n << 64) for n in range(B)]
KINDS: dict[str, list[Any]] = {
    "strings": ["a", "b", "ü", ""],
    "numpy strings": [np.str_(word) for word in "abcd"],
    "integers": [3, -7, 2**63 - 1, -(2**63)],
    "numpy integers": [np.int64(n) for n in (3, -7, 0, 5)],
    "unsigned": [2**63, 2**64 - 1, 1, 2**70],
    "numpy unsigned": [np.uint64(n) for n in (2**63, 2**64 - 1, 1, 2)],
    "tuples": [("doc", 1, 0.5), ("doc", 2, 0.5), ("a", (b"x", None)), ("b",)],
    "bytes": [b"a", b"\xff\x00", b"", b"abc"],
    "UUIDs": UUIDS,
    "paths": [Path("/a/b"), Path("c"), PurePosixPath("/a/c"), PureWindowsPath("C:/d")],
    "mixed": ["a", 1, ("a", 1), b"a"],
    "dates": [datetime.date(2020, 1, n + 1) for n in range(B)],
}


def batch_of(keys: Any) -> dict[str, Any]:
    return {"x": torch.ones(B, 2), "sample_id": keys}


@pytest.mark.parametrize("kind", KINDS)
def test_ids_come_back_as_they_were(kind):
    ids = SampleIds()
    found = ids.of(batch_of(KINDS[kind]), None)
    assert found is not None and len(set(found.tolist())) == B
    assert ids.names.of(found) == KINDS[kind] and ids.names.of(found.flip(0).tolist()) == KINDS[kind][::-1]
    assert torch.equal(found, torch.tensor(key_ids(KINDS[kind])))


@pytest.mark.parametrize("kind", KINDS)
def test_names_outlive_a_checkpoint_that_is_loaded_with_weights_only(kind, tmp_path):
    ids, restored = SampleIds(), SampleNames()
    found = ids.of(batch_of(KINDS[kind]), None)
    torch.save(ids.names.state_dict(), tmp_path / "names.pt")
    restored.load_state_dict(torch.load(tmp_path / "names.pt", weights_only=True))
    expected = KINDS[kind] if kind != "dates" else list(map(repr, KINDS[kind]))
    assert restored.of(found) == expected
    if kind not in ("dates", "numpy strings", "numpy integers", "numpy unsigned"):
        assert list(map(type, restored.of(found))) == list(map(type, KINDS[kind]))


def test_unsigned_tensors_have_the_ids_of_their_numbers():
    keys = torch.tensor([2**63, 2**64 - 1, 1, 7], dtype=torch.uint64)
    ids = SampleIds()
    found = ids.of(batch_of(keys), None)
    assert found.tolist() == list(key_ids(keys.tolist())) and ids.names.of(found) == keys.tolist()


@pytest.mark.parametrize(
    "array", [np.array([5, 6, 7, 8]), np.array(["a", "b", "c", "d"]), np.array([5, 2**63], np.uint64).repeat(2)]
)
def test_arrays_are_keys(array):
    ids = SampleIds()
    assert ids.names.of(ids.of(batch_of(array), None)) == array.tolist()


def test_integers_have_no_names():
    ids = SampleIds()
    ids.of(batch_of(torch.arange(B)), None)
    ids.of(batch_of([np.int64(3)] * B), None)
    assert len(ids.names) == 0 and ids.names.of([3, 4]) == [3, 4]


def test_numpy_and_python_name_one_sample():
    assert key_ids([np.str_("a"), ("a", np.int64(3))]) == key_ids(["a", ("a", 3)])


def test_names_are_bounded_and_those_of_other_processes_join():
    names, other = SampleNames(most=3), SampleNames()
    names.add({n: str(n) for n in range(5)})
    assert names.of(range(5)) == ["0", "1", "2", 3, 4]
    other.add({9: ("x", 9)})
    new = other.take_new()
    assert other.take_new() == []
    fresh = SampleNames()
    fresh.add_plain(new)
    assert fresh.of([9]) == [("x", 9)] and fresh.take_new() == []


def test_a_checkpoint_of_an_older_version_has_no_names():
    names = SampleNames()
    names.add({1: "a"})
    names.load_state_dict({})
    assert len(names) == 0


class Anonymous:
    """Its repr is an address."""


REFUSED: dict[str, tuple[Any, str]] = {
    "None": ([1, None, 2, 3], "but found None. Return integers or strings"),
    "NaN": ([1, float("nan"), 2, 3], "but found nan."),
    "floats": ([0.5, 1.5, 2.5, 3.5], "but found 0.5, a float."),
    "numpy floats": (np.ones(B), "but found 1.0, a float."),
    "whole floats": ([0.0, 1.0, 2.0, 3.0], "but found 0.0, a float."),
    "float tensor": (torch.ones(B), "but found torch.float32. Return them as torch.int64."),
    "bool tensor": (torch.ones(B) > 0, "but found torch.bool. Return them as torch.int64."),
    "bools": ([True, False, True, False], "but found True, a bool."),
    "addresses": ([Anonymous() for _ in range(B)], "Anonymous object at 0x"),
    "functions": ([lambda: 1] * B, "whose name is an address that differs in every run"),
    "one string": ("abcd", "but found one str, 'abcd'. Return a list with one for each sample."),
    "one string of another length": ("abc", "but found one str, 'abc'."),
    "one bytes": (b"abcd", "but found one bytes, b'abcd'."),
    "a dict": ({"a": [1, 2, 3, 4]}, "but found a dict. Return a list"),
    "dicts": ([{"a": 1}] * B, "a dict that isn't hashable"),
    "lists": ([[1, 2]] * B, "a list that isn't hashable"),
    "sets": ({1, 2, 3, 4}, "but found a set, which has no order"),
    "frozen sets": ([frozenset({"a", "b"})] * B, "whose elements have no order"),
    "a number": (7, "but found a int. Return a list"),
    "too few": ([1, 2, 3], "holds 3 ids for 4 samples"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("identity", ["auto", "key"])
def test_keys_that_cannot_be_ids_are_refused_by_name_at_the_first_batch(name, identity):
    keys, message = REFUSED[name]
    with pytest.raises(RuntimeError) as caught:
        SampleIds(identity).of(batch_of(keys), None)
    assert message in str(caught.value) and "batch['sample_id']" in str(caught.value)


class Keyed(Dataset[dict[str, Any]]):
    def __init__(self, key: Any) -> None:
        self.key = key

    def __len__(self) -> int:
        return 10

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"x": coded(row, 3), "sample_id": self.key(row)}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [4, 3, 2, 1])
@pytest.mark.parametrize(
    "key",
    [lambda row: ("doc", row), lambda row: (row, row % 2), lambda row: f"doc-{row}", lambda row: row - 4],
    ids=["tuple", "tuple of integers", "string", "integer"],
)
def test_own_ids_pass_through_torchs_own_collate(key, batch_size, workers):
    """It makes columns of tuples: as many as a tuple has parts, which may be as many as there are samples."""
    ids = LoaderIds(SampleIds())
    watch, _, _ = fit(DataLoader(Keyed(key), batch_size, num_workers=workers), ids=ids, model=Idle())
    taken = [ids.sample_ids.names.of(batch) for batch in watch.taken["train"]]
    assert [name for batch in taken for name in batch] == [key(row) for row in range(10)] * 2


def test_own_ids_stand_beside_samples_along_the_second_axis():
    def time_major(samples: Any) -> dict[str, Any]:
        return {"x": torch.stack([one["x"] for one in samples], 1), "sample_id": [one["sample_id"] for one in samples]}

    ids = LoaderIds(SampleIds())
    watch, _, _ = fit(DataLoader(Keyed(lambda row: f"s{row}"), 5, collate_fn=time_major), ids=ids, model=Idle())
    assert [len(taken) for taken in watch.taken["train"]] == [5, 5] * 2


def test_columns_that_may_be_samples_are_refused():
    with pytest.raises(RuntimeError, match=r"may be 2 tuples or columns of tuples. Return one string"):
        SampleIds().of(
            default_collate([{"x": 1.0, "sample_id": ("a", "b")}, {"x": 1.0, "sample_id": ("c", "d")}]), None
        )


def test_columns_are_remembered_for_a_last_batch_that_may_be_either():
    ids = SampleIds()
    samples = [{"x": float(n), "sample_id": (f"a{n}", f"b{n}")} for n in range(5)]
    ids.of(default_collate(samples[:3]), None)
    last = ids.of(default_collate(samples[3:]), None)
    assert ids.names.of(last) == [("a3", "b3"), ("a4", "b4")]
    listed = SampleIds()
    for some in (samples[:3], samples[3:]):
        found = listed.of({"x": torch.ones(len(some)), "sample_id": [one["sample_id"] for one in some]}, None)
        assert listed.names.of(found) == [one["sample_id"] for one in some]


class Named(Dataset[dict[str, Any]]):
    """A data set whose keys are words, as a mapping or an object store has."""

    def __getitem__(self, key: Any) -> dict[str, Any]:
        return Rows()[int(key[-1] if isinstance(key, (tuple, str)) else 0)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "keys", [["r1", "r3", "r2", "r5"], [("a", 1), ("a", 3), ("b", 2), ("b", 5)]], ids=["str", "tuple"]
)
def test_keys_of_a_sampler_that_are_no_integers_have_names(keys, workers):
    ids = LoaderIds(SampleIds())
    watch, model, _ = fit(DataLoader(Named(), 2, sampler=keys, num_workers=workers), ids=ids)
    assert [ids.sample_ids.names.of(batch) for batch in watch.taken["train"]] == [keys[:2], keys[2:]] * 2
    assert model.rows["train"] == [[1, 3], [2, 5]] * 2


def test_names_of_a_second_loader_are_its_own():

    ids = LoaderIds(SampleIds())
    loaders = [DataLoader(Named(), 2, sampler=["r1", "r3"]), DataLoader(Named(), 2, sampler=["r1", "r3"])]
    watch, _, _ = fit(CombinedLoader(loaders, "min_size"), ids=ids, model=Idle())
    (batch, _) = watch.taken["train"]
    assert ids.sample_ids.names.of(batch) == ["r1", "r3"] * 2 and len(set(batch)) == 4
    assert (batch[2] - batch[0]) % 2**64 == LOADER


def test_keys_of_a_sampler_that_cannot_be_ids_are_named_and_content_is_hashed():
    keys = [Anonymous() for _ in range(4)]
    with pytest.warns(UserWarning, match=r"the sampler's keys can't be ids: .*at 0x.*hashed from content") as caught:
        watch, _, _ = fit(DataLoader(Named(), 2, sampler=keys))
    assert watch.ids.sample_ids.source == "content"
    assert sum("can't be ids" in str(each.message) for each in caught) == 1
    with pytest.raises(RuntimeError, match=r"needs DataLoaders that .*the sampler's keys can't be ids"):
        fit(DataLoader(Named(), 2, sampler=keys), ids=LoaderIds(SampleIds("index")))
