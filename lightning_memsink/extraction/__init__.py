"""Extraction, membership inference and canaries, and the audit of a finished model."""

from typing import Any

from lightning_memsink._moved import resolve


def __getattr__(name: str) -> Any:
    """Functions that were here when this package was one module, with a DeprecationWarning."""
    return resolve("extraction", "extraction.functional", name)
