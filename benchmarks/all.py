"""What everything costs: runs the benchmarks of cost, one after the other, and writes BENCHMARKS.md.

Parts that are not run anew stay as they were, each with the day and the versions of its own run.
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

from benchmarks.common.criteria import environment

PARTS = {
    "tracking": ("Watching", ("overhead", "--tracking")),
    "attribution": (
        "Saying where: attribution and gradient norms, beside other libraries",
        ("overhead", "--attribution"),
    ),
    "mitigation": ("Acting", ("overhead", "--mitigation")),
    "growth": ("Growth with batch, sequence, width, depth and data set", ("growth",)),
    "scale": ("Millions of samples: ledger, detector, checkpoint, report", ("scale",)),
}
"""By name: the heading, and the benchmark's module and options."""


@dataclass(frozen=True)
class Part:
    """One benchmark that was run. ``told`` is its JSON, empty if it failed."""

    title: str
    command: str
    printed: str
    told: dict[str, Any]
    seconds: float

    @property
    def holds(self) -> bool:
        return bool(self.told) and all(each["holds"] for each in self.told["criteria"])

    def section(self, day: str) -> str:
        """Markdown."""
        criteria = self.told.get("criteria", [])
        held = f"{sum(each['holds'] for each in criteria)} of {len(criteria)}" if self.told else "**it failed**, none"
        about = f"`{self.command}`: {held} criteria hold; {self.seconds / 60:.1f} minutes on {day}."
        ran_with = self.told.get("environment", {})
        versions = ", ".join(f"{name} {ran_with[name]}" for name in (*environment(), "seeds") if name in ran_with)
        return "\n".join([f"## {self.title}", "", about, "", versions, "", "```", self.printed.strip("\n"), "```", ""])


ABOUT = re.compile(r"`.+`: (?P<held>.+) criteria hold; (?P<minutes>.+) minutes on (?P<day>.+)\.")
"""What a section says of itself."""


def run_part(title: str, words: Sequence[str], quick: bool) -> Part:
    """In a process of its own, so that no benchmark warms up another's memory."""
    words = [*words, *(["--quick"] if quick else [])]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "told.json"
        command = [sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:]]
        ran = subprocess.run([*command, "--json", str(file)], capture_output=True, text=True)
        told = json.loads(file.read_text()) if file.is_file() else {}
    printed = ran.stdout if told else ran.stdout + ran.stderr[-2000:]
    return Part(
        title, " ".join(["python -m", f"benchmarks.{words[0]}", *words[1:]]), printed, told, time.perf_counter() - start
    )


def page(sections: Mapping[str, str]) -> str:
    """Markdown, of sections by title."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks.all`; every number is from a run of the command above it. Ratios are to a "
        "plain run of the same code, interleaved with it on one machine, medians; a bound that is missed says so.",
        "",
        "| part | criteria that hold | minutes | day |",
        "| --- | --- | --- | --- |",
    ]
    for title, text in sections.items():
        about = ABOUT.search(text)
        if about is not None:
            lines.append(f"| [{title}](#{_anchor(title)}) | {about['held']} | {about['minutes']} | {about['day']} |")
    return "\n".join([*lines, "", *sections.values()])


def sections_of(text: str) -> dict[str, str]:
    """By title, what such a page holds."""
    _, *parts = re.split(r"^## ", text, flags=re.MULTILINE)
    return {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in parts}


def _anchor(title: str) -> str:
    """As GitHub makes it."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -")
    return kept.replace(" ", "-")


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description="Writes BENCHMARKS.md.")
    parser.add_argument("--quick", action="store_true", help="smaller and less sure; bounds may be missed")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts; the others stay as they were")
    parser.add_argument("--to", type=Path, default=Path("BENCHMARKS.md"))
    options = parser.parse_args(arguments_given)
    sections = sections_of(options.to.read_text()) if options.only and options.to.is_file() else {}
    parts = []
    for name, (title, words) in PARTS.items():
        if not options.only or name in options.only:
            part = run_part(title, words, options.quick)
            print(f"{part.command}: {'holds' if part.holds else 'falls short'}, {part.seconds:.0f} s", flush=True)
            parts.append(part)
            sections[title] = part.section(date.today().isoformat())
            told = [each for each, _ in PARTS.values() if each in sections]
            options.to.write_text(page({each: sections[each] for each in told}))  # an hour of others stays
    print(options.to)
    return 0 if all(part.holds for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
