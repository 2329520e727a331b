"""The map of the code names rooms and files that exist, and every room."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_memsink"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def named() -> set[str]:
    """Rooms end with a slash, files with .py; both also without backticks, in the picture."""
    return set(re.findall(r"(?<![\w/.])((?:\w+/)+(?:\w+\.py)?|\w+\.py)(?![\w/])", TEXT)) - {"lightning_memsink/"}


def test_every_room_and_file_that_is_named_exists():
    assert len(named()) > 30
    assert [name for name in sorted(named()) if not (PACKAGE / name).exists()] == []


def test_every_room_is_named():
    rooms = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("__init__.py")} - {"./"}
    assert rooms - named() == set()


def test_every_callback_has_a_place_in_the_way_of_a_batch():
    from lightning.pytorch import Callback

    import lightning_memsink

    kinds = [getattr(lightning_memsink, name) for name in lightning_memsink.__all__]
    callbacks = [kind.__name__ for kind in kinds if isinstance(kind, type) and issubclass(kind, Callback)]
    elsewhere = {"ExtractionProbe", "MemSinkProgressBar"}  # no training batch passes through them
    assert {name for name in callbacks if f"`{name}`" not in TEXT} <= elsewhere
