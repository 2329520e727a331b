"""Fits other people's modules with our callbacks on, and says whether what we claim of each is so.

    python -m tests.ecosystem [NAME ...]

Prints a table; a run of all cases writes it to tests/ecosystem/RESULTS.md. Exits 1 if a verdict is not as claimed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.table import Table

from tests.ecosystem.claims import CLAIMS, Claim, Finding, differences, losses_found
from tests.ecosystem.environments import ROOT, NotInstalled, environment, error_line

RESULTS = Path(__file__).with_name("RESULTS.md")
COLUMNS = ("package", "module", "torch, lightning, transformers", "weights", "losses", "verdict")
HEAD = """# Other people's modules with our callbacks on

Written by `make test-ecosystem`. Each module is fitted for two epochs from a released package, through the package's
own entry points where it has them. *Weights*: with `memsink()` on, weights, buffers and random states are those of the
same fit without it, to the bit. *Losses*: the ledger's losses of whole batches against each sample put through the
module's own training step alone, as a share of the mean loss; *controls* likewise in validation.
"""


@dataclass(frozen=True)
class Outcome:
    claim: Claim
    finding: Finding | None
    differs: list[str]  # from what is claimed

    def row(self) -> tuple[str, ...]:
        found = self.finding
        verdict = "; ".join(self.differs) or "as claimed"
        package = self.claim.package.replace("==", " ")
        if self.claim.lightning != "lightning.pytorch":
            package += f" ({self.claim.lightning})"
        if found is None:
            return package, self.claim.what, "", "", "", verdict
        versions = ", ".join(found.versions[name] for name in ("torch", "lightning", "transformers"))
        weights = "identical" if found.identical else "differ"
        return package, self.claim.what, versions, weights, losses_found(found), verdict


def run(name: str) -> Outcome:
    """The case in its environment, in a process and an empty folder of its own."""
    claim = CLAIMS[name]
    together = {one.package for one in CLAIMS.values() if one.environment == claim.environment}
    try:
        python = environment(claim.environment, sorted(together))
    except NotInstalled as why:
        return Outcome(claim, None, [f"not installed: {why}"])
    command = [str(python), "-m", "tests.ecosystem.fitting", name]
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    with TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
    if done.returncode:
        return Outcome(claim, None, [f"does not fit: {error_line(done.stderr)}"])
    finding = Finding(**json.loads(done.stdout.splitlines()[-1]))
    return Outcome(claim, finding, differences(claim, finding))


def table(outcomes: Sequence[Outcome]) -> Table:
    shown = Table(*COLUMNS, title="Other people's modules", show_lines=True)
    for outcome in outcomes:
        shown.add_row(*outcome.row())
    return shown


def page(outcomes: Sequence[Outcome]) -> str:
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(outcome.row() for outcome in outcomes)]
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    notes = [f"- **{one.claim.what}**: {one.claim.reason}" for one in outcomes if one.claim.reason]
    said = [
        f"- **{one.claim.what}**, at step {step}: {message}"
        for one in outcomes
        for step, message in (one.finding.messages if one.finding else ())
    ]
    return "\n".join(
        [HEAD, *lines, "", "## Why", "", *notes, "", "## What our callbacks said, each once", "", *said, ""]
    )


def main(names: Sequence[str]) -> int:
    outcomes = []
    for name in names or CLAIMS:
        print(f"{name} ...", file=sys.stderr)
        outcomes.append(run(name))
    console = Console(width=None if os.isatty(1) else 160, markup=False)
    console.print(table(outcomes))
    if not names:
        RESULTS.write_text(page(outcomes), encoding="utf-8")
    differing = sum(bool(outcome.differs) for outcome in outcomes)
    console.print(f"{len(outcomes) - differing} of {len(outcomes)} as claimed", highlight=False)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
