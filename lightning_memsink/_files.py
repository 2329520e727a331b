"""Files that are whole or not there: nobody reads the half of one that a full disk or a kill has left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to, which takes its name at the end. After an error ``path`` is as it was.

    What a kill leaves has one name, ``path`` with ``.part`` behind, and is overwritten the next time.
    """
    unfinished = path.with_name(f"{path.name}.part")
    try:
        yield unfinished
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())  # else a power cut may leave the name and not the content
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
