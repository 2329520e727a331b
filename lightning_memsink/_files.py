"""Atomic file writing: a file is complete or absent, also after a full disk or a killed process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to, renamed to ``path`` at the end. An error leaves ``path`` unchanged.

    The temporary file is ``path`` with the suffix ``.part`` appended. A killed process leaves it behind, and the next
    write replaces it.
    """
    unfinished = path.with_name(f"{path.name}.part")
    try:
        yield unfinished
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())  # without it, a power cut may leave the name without the content
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
