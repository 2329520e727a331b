"""The original keys of samples whose ids are hashes of them."""

from __future__ import annotations

import pathlib
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

Plain = Any
"""None, numbers, strings, and lists of these: what ``torch.load(weights_only=True)`` reads back."""


class SampleNames:
    """From 64-bit ids to the keys that they stand for, of keys that are no such integers.

    It stays on the machine: nothing but the run's own checkpoints, tables and reports reads it.

    Args:
        most: names that are kept. Later samples are known by their number.
    """

    def __init__(self, most: int = 1_000_000) -> None:
        self.most = most
        self._by_id: dict[int, Any] = {}
        self._new: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, names: Mapping[int, Any]) -> None:
        """Adds the keys of some ids; a known id keeps its key."""
        for id, key in names.items():
            if id not in self._by_id and len(self._by_id) < self.most:
                self._by_id[id] = self._new[id] = key

    def of(self, ids: Iterable[int]) -> list[Any]:
        """The keys of ids (a tensor, too), as they were; an id without a name is its own."""
        return [self._by_id.get(int(id), int(id)) for id in ids]

    def new(self) -> list[Plain]:
        """The names added since `take_new` was called last."""
        return [[id, _as_plain(key)] for id, key in self._new.items()]

    def take_new(self) -> list[Plain]:
        """The names added since the last call, for other processes' `add_plain`."""
        new, self._new = self.new(), {}
        return new

    def add_plain(self, names: Iterable[Plain]) -> None:
        """Adds the names that another process took."""
        self.add({id: _from_plain(key) for id, key in names})
        self._new = {}

    def state_dict(self) -> dict[str, Any]:
        return {"names": [[id, _as_plain(key)] for id, key in self._by_id.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the names; a checkpoint of an older version has none."""
        self._by_id, self._new = {}, {}
        self.add({id: _from_plain(key) for id, key in state.get("names", [])})


def _as_plain(key: Any) -> Plain:
    """A key as its kind and its text. A key of a kind that isn't listed here comes back as its repr."""
    if isinstance(key, str):
        return ["str", str(key)]
    if isinstance(key, int):
        return ["int", str(int(key))]
    if isinstance(key, bytes):
        return ["bytes", key.hex()]
    if isinstance(key, uuid.UUID):
        return ["uuid", str(key)]
    if isinstance(key, pathlib.PurePath):
        return [type(key).__name__, str(key)]
    if type(key) is tuple:
        return ["tuple", [_as_plain(part) for part in key]]
    if isinstance(key, float):
        return ["float", key.hex()]
    if key is None:
        return ["none", ""]
    if hasattr(key, "item") and hasattr(key, "dtype"):
        return _as_plain(key.item())
    return ["repr", repr(key)]


def _from_plain(plain: Plain) -> Any:
    kind, text = plain
    if kind == "tuple":
        return tuple(map(_from_plain, text))
    return _READERS.get(kind, str)(text)


def _path(kind: type[pathlib.PurePath]) -> Any:
    """A path as the class it had; a path of another operating system as a pure one."""

    def read(text: str) -> pathlib.PurePath:
        try:
            return kind(text)
        except NotImplementedError:
            return (pathlib.PureWindowsPath if "Windows" in kind.__name__ else pathlib.PurePosixPath)(text)

    return read


_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
_READERS: dict[str, Any] = {
    "int": int,
    "bytes": bytes.fromhex,
    "uuid": uuid.UUID,
    "float": float.fromhex,
    "none": lambda text: None,
} | {name: _path(getattr(pathlib, name)) for name in _PATHS}
