"""`lightning.pytorch` and `pytorch_lightning`: the same classes twice, and no instance of one is one of the other."""

from __future__ import annotations

import sys
from typing import TypeGuard, TypeVar

T = TypeVar("T")


def is_a(thing: object, kind: type[T]) -> TypeGuard[T]:
    """``isinstance`` of a class of `lightning.pytorch`, or of its twin if the run has imported that."""
    module = sys.modules.get(kind.__module__.replace("lightning.pytorch", "pytorch_lightning", 1))
    return isinstance(thing, (kind, getattr(module, kind.__name__, kind)))
