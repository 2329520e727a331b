"""``memsink gate``: whether a finished run kept its budgets, as an exit code for scripts and CI."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_memsink.cli.report import read_document, report_in
from lightning_memsink.reporting.formatting import count_of, percent
from lightning_memsink.reporting.name_text import shown

KEPT, CROSSED, NO_ANSWER = 0, 1, 2
"""Exit codes."""
_EPILOG = """exit codes:
  0  every source is inside its budget
  1  a source is over its budget
  2  no answer: a source could not be judged, or there is no report with budgets
"""


def run(argv: Sequence[str]) -> int:
    """Prints a line for each source that is over its budget or undecided, and returns the exit code."""
    parser = ArgumentParser(
        prog="memsink gate",
        description="Says by its exit code whether a run kept its budgets, memsink(budget={...}).",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="the folder with the report's NAME.json, or that file")
    options = parser.parse_args(argv)
    try:
        path = report_in(options.folder)
        lines, code = verdict(_budget(read_document(path).numbers, path))
    except (KeyError, TypeError, AttributeError) as error:
        print(f"memsink gate: {options.folder} has no budgets that can be read: {error!r}", file=sys.stderr)
        return NO_ANSWER
    except (ValueError, OSError) as error:
        print(f"memsink gate: {error}", file=sys.stderr)
        return NO_ANSWER
    print(*lines, sep="\n")
    return code


def verdict(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], int]:
    """What the rows of a report's ``numbers["budget"]`` come to: lines to print, and an exit code."""
    crossed = [row for row in rows if row["state"] == "crossed"]
    undecided = [row for row in rows if row["state"] not in ("crossed", "inside")]
    lines = [f"over budget: {_numbers(row)}" for row in crossed]
    lines += [f"no answer: {_numbers(row)}: {row['reason']}" for row in undecided]
    again = [row for row in rows if row["state"] == "inside" and row.get("crossed_at") is not None]
    lines += [f"inside again: {_numbers(row)}, over budget at step {row['crossed_at']:,}" for row in again]
    inside = len(rows) - len(crossed) - len(undecided)
    lines.append(f"{inside:,} of {count_of(len(rows), 'source')} inside the budget.")
    return lines, CROSSED if crossed else NO_ANSWER if undecided or not rows else KEPT


def _budget(numbers: Mapping[str, Any], path: Path) -> list[Mapping[str, Any]]:
    rows = numbers.get("budget")
    if not isinstance(rows, list):
        raise ValueError(
            f'{path} has no budgets. Give the run some, memsink(budget={{"customer-a": 0.001, "default": 0.01}}), and '
            "evaluate it at least once."
        )
    return rows


def _numbers(row: Mapping[str, Any]) -> str:
    name, budget = shown(row["source"]), percent(row["budget"])
    if row["share"] is None:
        return f"{name} (budget {budget})"
    counts = f"{row['memorized']:,} of {row['measured']:,}"
    return f"{name}, {percent(row['share'])} memorized ({counts}), where {budget} may be"
