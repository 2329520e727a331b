"""What every part of this package needs of Lightning: both of its namespaces, and warnings that come once.

`lightning.pytorch` and `pytorch_lightning` hold the same classes twice, and no instance of one is one of the other.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeGuard, TypeVar

from lightning.pytorch.utilities import rank_zero_warn
from lightning_utilities.core.rank_zero import WarningCache

T = TypeVar("T")


def is_a(thing: object, kind: type[T]) -> TypeGuard[T]:
    """``isinstance`` of a class of `lightning.pytorch`, or of its twin if the run has imported that."""
    module = sys.modules.get(kind.__module__.replace("lightning.pytorch", "pytorch_lightning", 1))
    return isinstance(thing, (kind, getattr(module, kind.__name__, kind)))


def without_gradients(loop: Any, work: Callable[[Any], T]) -> T:
    """``work(loop)`` in inference mode, or without gradients only, as Lightning's own evaluation loop runs."""
    package = type(loop).__module__.partition(".loops")[0]
    decorated: Callable[[Any], T] = import_module(f"{package}.loops.utilities")._no_grad_context(work)
    return decorated(loop)


def warn_once(seen: WarningCache, message: str, key: str | None = None, category: type[Warning] = UserWarning) -> None:
    """Warns on rank 0, unless ``seen`` has the ``key`` of this warning.

    By default the key is the message without its digits: a batch of another size or a loss of another value is the
    same warning. Give a key where a number is part of a name.
    """
    key = key or re.sub(r"\d+", "", message)
    if key not in seen:
        seen.add(key)
        rank_zero_warn(message, category=category)
