"""Runs the benchmarks of cost and of verdicts, one after the other, and writes their results to BENCHMARKS.md.

Parts that are not run again keep their results, with the day and the versions of their own run; a machine without a GPU
keeps those of one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.criteria import environment

PARTS = {
    "tracking": ("Measuring", ("overhead", "--tracking")),
    "attribution": (
        "Attribution and gradient norms, beside other libraries",
        ("overhead", "--attribution"),
    ),
    "mitigation": ("Mitigation", ("overhead", "--mitigation")),
    "host": ("What the host does at high token rates", ("host_cost",)),
    "growth": ("Growth with batch, sequence, width, depth and data set", ("growth",)),
    "overfitting": ("Runs that know their data by heart", ("overfitting",)),
    "scale": ("Millions of samples: ledger, detector, checkpoint, report", ("scale",)),
    "device": ("On a GPU: correctness, waits, time and memory", ("device",)),
}
"""Heading of the section, and the benchmark's module and options, by name."""


@dataclass(frozen=True)
class Part:
    """One benchmark that was run. ``results`` is its JSON, empty if it failed."""

    title: str
    command: str
    printed: str
    results: dict[str, Any]
    seconds: float

    @property
    def holds(self) -> bool:
        return bool(self.results) and all(each["holds"] for each in self.results["criteria"])

    def section(self, day: str) -> str:
        """The part as Markdown."""
        criteria = self.results.get("criteria", [])
        holding = (
            f"{sum(each['holds'] for each in criteria)} of {len(criteria)}" if self.results else "**it failed**, none"
        )
        summary = f"`{self.command}`: {holding} criteria hold; {self.seconds / 60:.1f} minutes on {day}."
        ran_with = self.results.get("environment", {})
        versions = ", ".join(
            f"{name} {ran_with[name]}" for name in ("card", *environment(), "seeds") if name in ran_with
        )
        return "\n".join(
            [f"## {self.title}", "", summary, "", versions, "", "```", self.printed.strip("\n"), "```", ""]
        )


SUMMARY = re.compile(r"`.+`: (?P<holding>.+) criteria hold; (?P<minutes>.+) minutes on (?P<day>.+)\.")
"""The second paragraph of a section."""


def run_part(title: str, arguments: Sequence[str], quick: bool) -> Part:
    """Runs one benchmark in a process of its own, so that none starts with memory that another has warmed up."""
    arguments = [*arguments, *(["--quick"] if quick else [])]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        command = [sys.executable, "-m", f"benchmarks.{arguments[0]}", *arguments[1:]]
        process = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True)
        results = json.loads(file.read_text()) if file.is_file() else {}
    printed = process.stdout if results else process.stdout + process.stderr[-2000:]
    shown = " ".join(["python -m", f"benchmarks.{arguments[0]}", *arguments[1:]])
    return Part(title, shown, printed, results, time.perf_counter() - start)


def page(sections: Mapping[str, str]) -> str:
    """The whole page as Markdown, from its sections by title."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks.all`; every number is from a run of the command above it. Ratios are to a "
        "plain run of the same code, interleaved with it on one machine, medians; a missed bound is marked as such.",
        "",
        "| part | criteria that hold | minutes | day |",
        "| --- | --- | --- | --- |",
    ]
    for title, text in sections.items():
        summary = SUMMARY.search(text)
        if summary is not None:
            lines.append(
                f"| [{title}](#{_anchor(title)}) | {summary['holding']} | {summary['minutes']} | {summary['day']} |"
            )
    return "\n".join([*lines, "", *sections.values()])


def sections_of(text: str) -> dict[str, str]:
    """The sections of such a page by title."""
    _, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    return {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in parts}


def _anchor(title: str) -> str:
    """The anchor that GitHub makes of a heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -")
    return kept.replace(" ", "-")


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description="Writes BENCHMARKS.md.")
    parser.add_argument("--quick", action="store_true", help="smaller and less certain; bounds may be missed")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="runs these parts; the others keep their results")
    parser.add_argument("--to", type=Path, default=Path("BENCHMARKS.md"))
    options = parser.parse_args(arguments_given)
    sections = sections_of(options.to.read_text()) if options.to.is_file() else {}
    names = options.only or [name for name in PARTS if name != "device" or torch.cuda.is_available()]
    parts = []
    for name, (title, arguments) in PARTS.items():
        if name in names:
            part = run_part(title, arguments, options.quick)
            print(f"{part.command}: {'holds' if part.holds else 'falls short'}, {part.seconds:.0f} s", flush=True)
            parts.append(part)
            sections[title] = part.section(date.today().isoformat())
            titles = [each for each, _ in PARTS.values() if each in sections]
            options.to.write_text(
                page({each: sections[each] for each in titles})
            )  # after each part: keeps them if one fails
    print(options.to)
    return 0 if all(part.holds for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
