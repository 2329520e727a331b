"""Names of samples as text: the keys of the user's own that 64-bit ids stand for, as reports and tables show them.

Names may be personal data, so they stay on this machine: no logger and no terminal, which loggers record, shows one.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from pathlib import PurePath
from typing import Any

from lightning_memsink.samples.sample_names import SampleNames

MOST = 80
"""Characters of a name in a table."""


def names_of(names: SampleNames, ids: Iterable[int]) -> list[str | None]:
    """The names of ids, which are Python's integers; None for an id that has none."""
    ids = list(ids)
    if not len(names):
        return [None] * len(ids)
    keys = zip(ids, names.of(ids), strict=True)
    return [None if type(key) is int and key == id else text_of(key) for id, key in keys]


def text_of(key: Any) -> str:
    """A key as text that any file can hold: the same before and after a checkpoint.

    Strings, integers, UUIDs and paths are their own text; anything else is its repr. Half of a surrogate pair, as in a
    file name of another encoding, is shown as its number.
    """
    if isinstance(key, (str, int, uuid.UUID, PurePath)):
        text = str(key)
    elif isinstance(key, bytes):
        text = repr(bytes(key))
    else:
        text = repr(_plain(key))
    return text.encode("utf-8", "backslashreplace").decode()


def shown(name: str | None) -> str:
    """A name as a cell of a table: one line without control characters, and without its middle if it is long.

    Empty for None; a name of spaces only is in quotation marks.
    """
    if name is None:
        return ""
    if not name.strip():
        name = repr(name)
    visible = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in name)
    return visible if len(visible) <= MOST else f"{visible[: MOST // 2]}…{visible[1 - MOST // 2 :]}"


def _plain(key: Any) -> Any:
    """A NumPy scalar as Python's, also within tuples."""
    if type(key) is tuple:
        return tuple(map(_plain, key))
    return key.item() if hasattr(key, "item") and hasattr(key, "dtype") else key
