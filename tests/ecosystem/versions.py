"""Runs a core of our own tests with the oldest and with the newest releases that pyproject.toml allows.

    python -m tests.ecosystem.versions [oldest | newest]

torch is TORCH in both, or TORCH_OLDEST in the first: its old releases come without CUDA only from an index of their
own, which pip must know (PIP_EXTRA_INDEX_URL). Exits 1 if a set can't be installed or a test fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from tests.ecosystem.environments import ROOT, TORCH, NotInstalled, environment, error_line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CORE = (
    "attribution/test_gradient_norms",
    "callbacks/test_callbacks",
    "callbacks/test_extraction_probe",
    "callbacks/test_hook_contract",
    "callbacks/test_memsinks",
    "callbacks/test_namespaces",
    "callbacks/test_sample_gradient_mask",
    "callbacks/test_sink_dropout",
    "callbacks/test_sink_gradient_mask",
    "callbacks/test_sink_localizer",
    "cli/test_cli",
    "cli/test_recipes",
    "losses/test_capture",
    "losses/test_capture_runs",
    "losses/test_per_sample",
    "mitigation/test_goldfish",
    "reporting/test_html_page",
    "reporting/test_parquet",
    "reporting/test_reporting",
    "reporting/test_wandb",
    "samples/test_hashing",
    "samples/test_sample_ids",
)
SHOWN = ("torch", "lightning", "transformers", "torchmetrics", "wandb", "jsonargparse", "pyarrow", "rich")


def oldest() -> list[str]:
    """Each dependency at the lower bound of its range, but torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = []
    for one in map(Requirement, project["dependencies"]):
        (floor,) = [part.version for part in one.specifier if part.operator == ">="]
        extras = f"[{','.join(one.extras)}]" if one.extras else ""
        floors += [f"{one.name}{extras}=={floor}"] * (one.name != "torch")
    return floors


def run(name: str) -> tuple[str, ...]:
    """A row of the table: name, versions, the last line of pytest."""
    pinned = oldest() if name == "oldest" else []
    torch = os.environ.get("TORCH_OLDEST", TORCH) if name == "oldest" else TORCH
    extra = "pytest", "pytest-xdist", "hypothesis", "html5lib", "jsonschema", "tensorboard"
    try:
        python = environment(name, [*pinned, *extra, "scikit-learn"], torch, extras="[report]")
    except NotInstalled as why:
        return name, "", f"not installed: {why}"
    program = "from importlib.metadata import version; print(*[f'{name} {version(name)}' for name in %r], sep=', ')"
    versions = subprocess.run(
        [python, "-c", program % (SHOWN,)], capture_output=True, text=True, check=True
    ).stdout.strip()
    # Their own warnings are no failure of ours: other versions warn of other things.
    command = [str(python), "-m", "pytest", "-W", "default", "-n", "2", "-p", "no:cacheprovider"]
    command += [f"tests/{one}.py" for one in CORE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return name, versions, "\n".join([*failed, lines[-1] if lines else error_line(done.stderr)])


def main(names: Sequence[str]) -> int:
    table = Table("set", "versions", "tests", title="Oldest and newest", show_lines=True)
    rows = [run(name) for name in names or ("oldest", "newest")]
    for row in rows:
        table.add_row(*row)
    Console(width=None if os.isatty(1) else 160, markup=False).print(table)
    return int(any("passed" not in row[2] or "FAILED" in row[2] or "ERROR" in row[2] for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
