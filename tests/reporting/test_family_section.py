"""The report's section on families."""

from __future__ import annotations

from dataclasses import replace

import torch

from lightning_memsink.detection.family_verdicts import FamilyVerdicts
from lightning_memsink.reporting.family_section import (
    IN_TABLE,
    family_numbers,
    family_sentences,
    family_series,
    family_tables,
    has_families,
    top_families,
)
from lightning_memsink.reporting.findings import Findings
from tests.support.made_up import HASHED, made_up


def findings(family: list[int], **columns: list[float]) -> Findings:
    """Of the 24 made-up samples, of which 4, 5 and 6 are memorized; sample 7 has a hash for an id."""
    made = made_up()
    numbers = torch.tensor(family, dtype=torch.int32)
    made.table.write("family", torch.arange(24), numbers)
    families = FamilyVerdicts.of(numbers, made.table.exposures)
    made.flags.families = replace(families, **{name: torch.tensor(column) for name, column in columns.items()})
    return made.findings()


def two_families() -> Findings:
    """Samples 4 to 6, the first of which is memorized by itself, and 7 to 10, of which none is."""
    family = [*range(4), 4, 4, 4, 7, 7, 7, 7, *range(11, 24)]
    return findings(
        family,
        measured=[3, 2],
        gap=[1.5, 2.25],
        p=[0.01, 0.002],
        streak=[2, 3],
        memorized=[True, True],
        onset_step=[40, 20],
    )


def test_a_family_is_listed_with_what_it_adds_up_to():
    (grid,) = family_tables(two_families())
    assert grid.head == ("first text", "texts", "exposures", "measured", "gap", "p", "verdict", "since step")
    hashed = f"{HASHED & (2**64 - 1):016x}"
    assert grid.rows[0] == (hashed, "4", "16", "2", "2.250", "0.002", "memorized", "20")
    assert grid.rows[1] == ("4", "3", "12", "3", "1.500", "0.01", "memorized", "40")
    assert grid.caption.startswith("Families of near-duplicates")


def test_sentences_say_how_many_and_what_single_verdicts_hide():
    lines = " ".join(family_sentences(two_families()))
    assert "7 texts of 24 are near-duplicates of others, in 2 families; the largest has 4 texts." in lines
    assert "Memorized: 2 of 2 families that could be measured." in lines
    assert "Memorized though none of its texts is by its own verdict: 1 family." in lines
    assert top_families(two_families())[1].startswith("Family of sample 4: 3 texts, seen 12 times in all; gap 1.50")


def test_numbers_are_json_values_and_unknown_ones_are_none():
    unmeasured = findings([0, 0, *range(2, 24)])
    assert family_numbers(unmeasured) == {
        "families": [
            {
                "sample": "0",
                "texts": 2,
                "exposures": int(unmeasured.table.exposures[:2].sum()),
                "measured": 0,
                "gap": None,
                "p": None,
                "verdict": "undecided",
                "onset_step": None,
            }
        ]
    }
    assert "Memorized: 0 of 0 families" in family_sentences(unmeasured)[1]
    assert top_families(unmeasured) == []


def test_a_run_without_families_has_no_section():
    for found in (made_up().findings(), findings(list(range(24)))):
        assert not has_families(found)
        assert family_tables(found) == [] and family_numbers(found) == {}
        assert family_series(found.flags.families) == {}


def test_series_of_curves():
    assert family_series(two_families().flags.families) == {
        "family/count": 2.0,
        "family/memorized": 2.0,
        "family/gap": 1.875,
    }
    assert family_series(findings([0, 0, *range(2, 24)]).flags.families) == {"family/count": 1, "family/memorized": 0}


def test_names_are_shown_only_where_they_may_be():
    found = two_families()
    found.table.names.add({HASHED: "letter.txt"})
    assert family_tables(found)[0].rows[0][1] == "letter.txt"
    assert all("letter" not in cell for row in family_tables(replace(found, shows_names=False))[0].rows for cell in row)


def test_a_long_list_is_cut():
    made = made_up()
    count = IN_TABLE + 5
    families = FamilyVerdicts.of(torch.arange(count).repeat_interleave(1), torch.ones(count))
    assert len(families) == 0
    ones = torch.ones(count, dtype=torch.int64)
    made.flags.families = FamilyVerdicts(
        torch.arange(count) % 24, 2 * ones, ones, ones, torch.rand(count), torch.rand(count), ones, ones > 0, ones
    )
    made.table.write("family", torch.arange(24), torch.arange(24))
    (grid,) = family_tables(made.findings())
    assert len(grid.rows) == IN_TABLE
    assert grid.caption.startswith(f"The {IN_TABLE} of {count} families with the largest gaps")
