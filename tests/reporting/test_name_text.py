"""Names of samples as text: one for every kind of key, and the same before and after a checkpoint."""

from __future__ import annotations

import datetime
import uuid
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import numpy as np
import pytest

from lightning_memsink.reporting.name_text import MOST, names_of, shown, text_of
from lightning_memsink.samples.sample_keys import key_ids, named_keys
from lightning_memsink.samples.sample_names import SampleNames


class Page(NamedTuple):
    book: str
    number: int


TEXTS = [
    ("Jane Doe", "Jane Doe"),
    (np.str_("Jane Doe"), "Jane Doe"),
    ("ü\n|", "ü\n|"),
    ("", ""),
    ("a\udcff", "a\\udcff"),
    (2**63, "9223372036854775808"),
    (np.uint64(2**64 - 1), "18446744073709551615"),
    (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    (Path("a/b.png"), "a/b.png"),
    (PureWindowsPath("c:\\d"), "c:\\d"),
    (b"\xff\x00", "b'\\xff\\x00'"),
    (np.bytes_(b"ab"), "b'ab'"),
    (("a", 3, 0.5, None), "('a', 3, 0.5, None)"),
    ((np.str_("a"), (np.int64(3), b"x")), "('a', (3, b'x'))"),
    (Page("a", 3), "Page(book='a', number=3)"),
    (datetime.date(2020, 1, 2), "datetime.date(2020, 1, 2)"),
]


@pytest.mark.parametrize(("key", "text"), TEXTS)
def test_a_key_has_one_text_before_and_after_a_checkpoint(key, text):
    names, restored = SampleNames(), SampleNames()
    (id,) = key_ids([key])
    names.add(named_keys([id], [key]))
    restored.load_state_dict(names.state_dict())
    assert text_of(key) == text
    assert names_of(names, [id]) == names_of(restored, [id]) == [text]
    assert text.encode().decode() == text


@pytest.mark.parametrize("id", [0, 5, -7, 2**63 - 1, -(2**63)])
def test_an_integer_has_no_name_beside_samples_that_have(id):
    names = SampleNames()
    names.add({11: "Jane Doe"})
    assert names_of(names, [id, 11, id]) == [None, "Jane Doe", None]
    assert names_of(SampleNames(), [id]) == [None]


def test_names_of_another_process_are_shown():
    """What `LossTracker` sends between processes when it records visits."""
    first, second = SampleNames(), SampleNames()
    first.add({1: "Jane Doe"})
    second.add({2: ("doc", 3), 3: b"\xff"})
    second.add({2: ("doc", 3)})
    sent = second.take_new()
    first.take_new()
    first.add_plain(sent)
    assert names_of(first, [1, 2, 3, 4]) == ["Jane Doe", "('doc', 3)", "b'\\xff'", None]
    assert second.take_new() == [] and first.take_new() == [], "nothing is sent twice"


def test_a_cell_is_one_line_of_visible_signs():
    assert shown(None) == ""
    assert shown("Zoë Müller 3") == "Zoë Müller 3"
    assert shown("") == "''" and shown("  ") == "'  '"
    assert shown("a\nb\tc\x00\u202ed\u2028") == "a\\nb\\tc\\x00\\u202ed\\u2028"
    assert shown(text_of("\ud800")) == "\\ud800"


def test_a_long_name_keeps_both_ends():
    name = "".join(str(n % 10) for n in range(MOST))
    assert shown(name) == name
    short = shown(f"{name}x")
    assert len(short) == MOST
    assert short == f"{name[: MOST // 2]}…{name[-(MOST // 2 - 2) :]}x"
