"""Settings, seed and versions of a run, for the config of a logger and for the report."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from inspect import signature
from typing import Any

PLAIN = (bool, int, float, str, type(None))


def settings_of(callbacks: Iterable[object]) -> dict[str, Any]:
    """The plain arguments of every callback of this package, by class name, as far as it keeps them as attributes."""
    ours = [callback for callback in callbacks if type(callback).__module__.startswith("lightning_memsink.")]
    return {type(callback).__name__: _arguments(callback) for callback in ours}


def _arguments(callback: object) -> dict[str, Any]:
    """Arguments among the attributes, or among the fields of an attribute that is a dataclass of settings."""
    values = dict(vars(callback))
    for value in vars(callback).values():
        if is_dataclass(value) and not isinstance(value, type):
            values |= asdict(value)
    return {
        name: values[name] for name in signature(type(callback)).parameters if isinstance(values.get(name, ...), PLAIN)
    }


def seed() -> int | None:
    """The last seed given to Lightning's ``seed_everything``; None if it was not called."""
    value = os.environ.get("PL_GLOBAL_SEED", "")
    return int(value) if value.isdigit() else None


def versions() -> dict[str, str]:
    """The versions of the packages that the numbers depend on."""
    return {package: _version(package) for package in ("lightning-memsink", "lightning", "torch", "transformers")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
