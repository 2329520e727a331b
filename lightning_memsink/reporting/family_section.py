"""What a report says of families: texts that are near-duplicates, and whether what they share is memorized."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lightning_memsink.detection.family_verdicts import FamilyVerdicts
from lightning_memsink.reporting.document import NAMES, Grid
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.formatting import count_of
from lightning_memsink.reporting.gap_units import short
from lightning_memsink.reporting.name_text import names_of, shown

IN_TABLE, IN_SENTENCES, IN_NUMBERS = 20, 5, 1000
"""Families that the table lists, that the summary describes in sentences, and whose numbers the JSON file has."""


def has_families(findings: Findings) -> bool:
    """Whether any two texts are near-duplicates."""
    families = findings.flags.families
    return families is not None and len(families) > 0


def family_sentences(findings: Findings) -> list[str]:
    """How many families there are and what they show that verdicts on single texts don't."""
    families = findings.flags.families or FamilyVerdicts.none()
    memorized, measured = int(families.memorized.sum()), int((families.measured > 0).sum())
    lines = [
        f"{count_of(int(families.texts.sum()), 'text')} of {len(findings.table):,} are near-duplicates of others, in "
        f"{_families(len(families))}; the largest has {int(families.texts.max()) if len(families) else 0:,} texts.",
        f"Memorized: {memorized:,} of {_families(measured)} that could be measured. The losses of a memorized family's "
        "texts are far below those of controls that are as difficult without the family. Each of its texts by itself "
        "may look learned only, since the others give most of it away.",
    ]
    hidden = _hidden(findings, families)
    if hidden:
        lines.append(f"Memorized though none of its texts is by its own verdict: {_families(hidden)}.")
    return lines


def top_families(findings: Findings) -> list[str]:
    """The memorized families with the largest gaps, for a terminal."""
    return [
        f"Family of sample {row['sample']}: {count_of(row['texts'], 'text')}, seen {row['exposures']:,} times in all; "
        f"gap {short(row['gap'], findings.unit)}."
        for row in family_rows(findings, IN_SENTENCES)
        if row["verdict"] == "memorized"
    ]


def family_tables(findings: Findings) -> list[Grid]:
    """A row a family, those with the largest gaps first."""
    rows = family_rows(findings, IN_TABLE)
    if not rows:
        return []
    cells: list[tuple[str, ...]] = [
        (
            row["sample"],
            f"{row['texts']:,}",
            f"{row['exposures']:,}",
            f"{row['measured']:,}",
            "" if row["gap"] is None else f"{row['gap']:.3f}",
            "" if row["p"] is None else f"{row['p']:.2g}",
            row["verdict"],
            "" if row["onset_step"] is None else f"{row['onset_step']:,}",
        )
        for row in rows
    ]
    head: tuple[str, ...] = ("first text", "texts", "exposures", "measured", "gap", "p", "verdict", "since step")
    names = names_of(findings.table.names, [row["id"] for row in rows]) if findings.shows_names else [None] * len(rows)
    if any(name is not None for name in names):
        head = (head[0], NAMES, *head[1:])
        cells = [(cell[0], shown(name), *cell[1:]) for cell, name in zip(cells, names, strict=True)]
    count = len(findings.flags.families or ())
    which = "Families" if count <= IN_TABLE else f"The {IN_TABLE} of {count:,} families with the largest gaps"
    caption = (
        f"{which} of near-duplicates, by id or hash of the text that was recorded first. Exposures are those of all "
        f"texts, the gap their mean in {findings.unit}, p twice the mean of theirs"
    )
    return [Grid(head, cells, caption)]


def family_rows(findings: Findings, most: int = IN_NUMBERS) -> list[dict[str, Any]]:
    """The numbers of each family as JSON has them, those with the largest gaps first and unmeasured ones last."""
    families = findings.flags.families
    if families is None or not len(families):
        return []
    order = families.gap.nan_to_num(-math.inf).argsort(descending=True, stable=True)[:most].tolist()
    ids = findings.table.ids[families.family[order]].tolist()
    rows = []
    for at, sample in zip(order, ids, strict=True):
        gap, p, onset = float(families.gap[at]), float(families.p[at]), int(families.onset_step[at])
        rows.append(
            {
                "id": sample,
                "sample": str(sample) if 0 <= sample < 2**40 else f"{sample & (2**64 - 1):016x}",
                "texts": int(families.texts[at]),
                "exposures": int(families.exposures[at]),
                "measured": int(families.measured[at]),
                "gap": gap if math.isfinite(gap) else None,
                "p": p if math.isfinite(p) else None,
                "verdict": families.word(at),
                "onset_step": onset if onset >= 0 else None,
            }
        )
    return rows


def family_numbers(findings: Findings) -> Mapping[str, Any]:
    """For the JSON file: ``families``, only where there are any."""
    if not has_families(findings):
        return {}
    return {"families": [{name: value for name, value in row.items() if name != "id"} for row in family_rows(findings)]}


def family_series(families: FamilyVerdicts | None) -> dict[str, float]:
    """``family/count``, ``family/memorized`` and ``family/gap``, a mean of the measured; empty without families."""
    if families is None or not len(families):
        return {}
    gaps = families.gap[torch.isfinite(families.gap)]
    series = {"family/count": float(len(families)), "family/memorized": float(families.memorized.sum())}
    return series | ({"family/gap": float(gaps.mean())} if len(gaps) else {})


def _families(number: int) -> str:
    return "1 family" if number == 1 else f"{number:,} families"


def _hidden(findings: Findings, families: FamilyVerdicts) -> int:
    """Memorized families of which no text is memorized by its own verdict."""
    own = findings.flags.memorized
    family = findings.table.family[: len(own)].long()
    shown_by = torch.zeros(len(findings.table), dtype=torch.bool)
    shown_by[family[own & (family >= 0)]] = True
    return int((families.memorized & ~shown_by[families.family]).sum())
