"""Every benchmark that README.md, BENCHMARKS.md, its own page or the Makefile names starts under that name."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"python -m benchmarks\.([a-z_]+)((?: --[a-z-]+(?: [\w./]+)?)*)")
DOCUMENTED = sorted(
    {
        (name, *options.split())
        for page in ("README.md", "BENCHMARKS.md", "Makefile", "docs/verdicts-calibration.md")
        for name, options in COMMAND.findall(" ".join((ROOT / page).read_text().split()))
    }
)
NAMES = sorted({name for name, *_ in DOCUMENTED})


def test_all_benchmarks_are_documented():
    assert NAMES == sorted(
        "all averaging calibration capture detection device faults findings growth host_cost".split()
        + "localization mitigation overfitting overhead scale".split()
    )


@pytest.mark.parametrize("command", DOCUMENTED, ids=" ".join)
def test_the_options_of_a_documented_command_are_known(command, capsys):
    name, *options = command
    room = ROOT / "benchmarks" / name
    module = import_module(f"benchmarks.{name}.benchmark" if room.is_dir() else f"benchmarks.{name}")
    with pytest.raises(SystemExit) as end:
        module.main([*options, "--help"])
    assert end.value.code == 0
    usage = capsys.readouterr().out
    assert usage.startswith(f"usage: python -m benchmarks.{name} ")
    for option in options:
        assert not option.startswith("--") or option in usage


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_prints_its_help_in_a_process_of_its_own(name):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(f"usage: python -m benchmarks.{name} ")
