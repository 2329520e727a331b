"""Did designed sinks take the memorization, or did the shared weights keep it?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Certificate:
    """Placeholder until the next commit."""
