"""What every benchmark takes and returns: arguments, criteria, tables, JSON, an exit code."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import secrets
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from rich.table import Table

Result = TypeVar("Result")
PACKAGES = ("torch", "lightning", "transformers", "scikit-learn", "wandb", "lightning-memsink")


@dataclass(frozen=True)
class Criterion:
    """A measured ``value`` that must be ``>=`` or ``<=`` its ``bound``. NaN falls short."""

    name: str
    value: float
    sense: Literal[">=", "<="]
    bound: float

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.sense == ">=" else self.value <= self.bound

    def __str__(self) -> str:
        verdict = "holds      " if self.holds else "falls short"
        return f"{verdict}  {self.name}: {self.value:.4g} (bound {self.sense} {self.bound:.4g})"


@dataclass(frozen=True)
class Report:
    """The results of one benchmark. ``figure`` is its headline number, in one line."""

    name: str
    tables: Sequence[Table]
    criteria: Sequence[Criterion]
    figure: str
    settings: dict[str, Any]

    @property
    def holds(self) -> bool:
        return all(criterion.holds for criterion in self.criteria)

    def as_json(self) -> dict[str, Any]:
        criteria = [
            asdict(each) | {"value": each.value if isfinite(each.value) else None, "holds": each.holds}
            for each in self.criteria
        ]
        return {"name": self.name, "criteria": criteria, "environment": environment() | self.settings}

    def publish(self, path: Path | None = None, console: Console | None = None) -> int:
        """Prints the report and writes JSON to ``path``. Returns the exit code: 1 if a criterion falls short."""
        console = console or Console(width=None if os.isatty(1) else 110, markup=False)
        for table in self.tables:
            console.print(table)
        for criterion in self.criteria:
            console.print(str(criterion), highlight=False, soft_wrap=True)
        console.print(self.figure, highlight=False, soft_wrap=True)
        if path is not None:
            path.write_text(json.dumps(self.as_json(), indent=2) + "\n")
        return 0 if self.holds else 1


def argument_parser(name: str, description: str, *, seeds: int) -> argparse.ArgumentParser:
    """A parser with the options that every benchmark takes."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--seeds", type=int, default=seeds, help=f"number of seeds, default {seeds}")
    parser.add_argument("--first-seed", type=int, help="repeats a run; drawn at random by default")
    parser.add_argument("--quick", action="store_true", help="smaller and less certain; bounds may be missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write criteria and environment")
    return parser


def fresh_seeds(options: argparse.Namespace) -> list[int]:
    """Consecutive seeds from ``--first-seed``, or from a random number, so that nothing can be tuned on them."""
    first = options.first_seed if options.first_seed is not None else secrets.randbelow(1_000_000)
    return list(range(first, first + options.seeds))


def configure_process() -> None:
    """One thread, so that seeds reproduce and times compare; advice from libraries is silenced."""
    torch.set_num_threads(1)
    for library in ("lightning.pytorch", "transformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    for message in (".*LeafSpec", ".*does not have many workers", ".*logging interval"):
        warnings.filterwarnings("ignore", message)


def run_in_processes(work: Callable[..., Result], jobs: Sequence[tuple[Any, ...]]) -> list[Result]:
    """Results of ``work(*job)`` in the order of ``jobs``, each in a process of its own, as many at once as cores."""
    if len(jobs) < 2:
        return [work(*job) for job in jobs]
    workers = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=configure_process) as pool:
        return [one.result() for one in [pool.submit(work, *job) for job in jobs]]


def environment() -> dict[str, Any]:
    """The machine and the versions of packages; no name of a host, a person or a path."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    } | {package: _version(package) for package in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def mean_and_range(values: Sequence[float]) -> str:
    """Mean and range over seeds: ``.978 [.975, .995]``."""
    return f"{sum(values) / len(values):.3f} [{min(values):.3f}, {max(values):.3f}]"
