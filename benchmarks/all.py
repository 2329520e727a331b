"""What everything costs: runs the benchmarks of cost, one after the other, and writes BENCHMARKS.md."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.reporting import environment

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


def page(parts: Sequence[Part], command: str, day: str) -> str:
    """Markdown; ``command`` is what wrote it."""
    lines = [
        "# Benchmarks",
        "",
        f"Written by `{command}`; every number is from that run. Ratios are to a plain run of the same code, "
        "interleaved with it on one machine, medians; a bound that is missed says so.",
        "",
        f"{day}. {', '.join(f'{name} {value}' for name, value in environment().items())}.",
        "",
        "| part | criteria that hold | minutes |",
        "| --- | --- | --- |",
    ]
    for part in parts:
        criteria = part.told.get("criteria", [])
        held = f"{sum(each['holds'] for each in criteria)} of {len(criteria)}" if part.told else "**it failed**"
        lines.append(f"| [{part.title}](#{_anchor(part.title)}) | {held} | {part.seconds / 60:.1f} |")
    for part in parts:
        lines += ["", f"## {part.title}", "", f"`{part.command}`", "", "```", part.printed.strip("\n"), "```"]
    return "\n".join(lines) + "\n"


def _anchor(title: str) -> str:
    """As GitHub makes it."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -")
    return kept.replace(" ", "-")


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.all", description="Writes BENCHMARKS.md.")
    parser.add_argument("--quick", action="store_true", help="smaller and less sure; bounds may be missed")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts")
    parser.add_argument("--to", type=Path, default=Path("BENCHMARKS.md"))
    options = parser.parse_args(arguments_given)
    parts = []
    for name, (title, words) in PARTS.items():
        if not options.only or name in options.only:
            parts.append(run_part(title, words, options.quick))
            print(
                f"{parts[-1].command}: {'holds' if parts[-1].holds else 'falls short'}, {parts[-1].seconds:.0f} s",
                flush=True,
            )
    words = [*(["--quick"] if options.quick else []), *(["--only", *options.only] if options.only else [])]
    options.to.write_text(page(parts, " ".join(["python -m benchmarks.all", *words]), date.today().isoformat()))
    print(options.to)
    return 0 if all(part.holds for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
