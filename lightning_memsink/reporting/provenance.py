"""What a run was set to: for the config of a logger, and for the report."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from typing import Any

PLAIN = (bool, int, float, str, type(None))


def settings_of(callbacks: Iterable[object]) -> dict[str, Any]:
    """By class name, for every callback of this package: its plain arguments, as far as it keeps them readable."""
    ours = [callback for callback in callbacks if type(callback).__module__.startswith("lightning_memsink.")]
    return {type(callback).__name__: _arguments(callback) for callback in ours}


def _arguments(callback: object) -> dict[str, Any]:
    """Arguments found among the attributes, or among the fields of an attribute that is a dataclass of settings."""
    found = dict(vars(callback))
    for value in vars(callback).values():
        if is_dataclass(value) and not isinstance(value, type):
            found |= asdict(value)
    return {
        name: found[name] for name in signature(type(callback)).parameters if isinstance(found.get(name, ...), PLAIN)
    }


def seed() -> int | None:
    """What Lightning's ``seed_everything`` was last given; None if nobody called it."""
    told = os.environ.get("PL_GLOBAL_SEED", "")
    return int(told) if told.isdigit() else None


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {package: _version(package) for package in ("lightning-memsink", "lightning", "torch", "transformers")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
