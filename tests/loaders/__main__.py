"""Runs the tests of this folder in an environment with all packages that they need, and lists what held.

    python -m tests.loaders

Writes tests/loaders/RESULTS.md. Exits 1 if a test fails, is skipped or can't be run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

from tests.ecosystem import environments

PACKAGES = ("transformers", "datasets", "trl", "litdata", "webdataset", "torchdata")
TESTED_WITH = ("pytest>=8",)
RESULTS = Path(__file__).with_name("RESULTS.md")
HEAD = """# Other people's loaders with our callbacks on

Written by `make test-loaders`. Each test fits a small model for two epochs with `memsink()`: each text is one sample
with all of its visits, its losses are those of the text alone, and weights are those of the same fit without us, to the
bit.

"""


def versions(python: Path) -> dict[str, str]:
    """Of the packages, and of what they were tested under."""
    names = ("torch", "lightning", *PACKAGES)
    code = f"from importlib.metadata import version; print(*map(version, {names!r}))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(names, found, strict=True))


def rows(report: Path) -> Iterator[tuple[str, str, str]]:
    """Package, test and outcome of each test in a JUnit report."""
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((part.tag for part in case if part.tag in ("failure", "error", "skipped")), "holds")
        module = case.get("classname", "").rpartition(".")[2] or case.get("name", "").rpartition(".")[2]
        yield module.removeprefix("test_"), case.get("name", "").removeprefix("test_").replace("_", " "), outcome


def main() -> int:
    environments.KEPT = environments.ROOT / ".venv-loaders"
    python = environments.environment("all", [*PACKAGES, *TESTED_WITH])
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "tests/loaders", f"--junitxml={report}"]
        code = subprocess.run(command, cwd=environments.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        found = list(rows(report))
    known = versions(python)
    under = ", ".join(f"{name} {known[name]}" for name in ("torch", "lightning", "transformers"))
    lines = [f"Under {under}.", "", "| package | test | outcome |", "| --- | --- | --- |"]
    lines += [f"| {package} {known.get(package, '')} | {test} | {outcome} |" for package, test, outcome in found]
    RESULTS.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    return int(code != 0 or any(outcome != "holds" for *_, outcome in found))


if __name__ == "__main__":
    sys.exit(main())
