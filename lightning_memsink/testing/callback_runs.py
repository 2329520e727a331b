"""Runs of a callback beside its companions, for `callback_checks`; runs that several checks share are kept."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_memsink.testing.failures import failure
from lightning_memsink.testing.small_run import (
    EPOCHS,
    NEVER_REPEATED,
    TRAIN,
    SmallLM,
    companions,
    facts,
    fit,
    loader,
    quiet,
    random_state,
)
from lightning_memsink.testing.traces import traces

Factory = Callable[[], Callback]
"""Returns a new callback at each call."""


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def run(
    rule: str,
    factory: Factory,
    first: bool = False,
    backwards: bool = False,
    more: Sequence[Callback] = (),
    **options: Any,
) -> tuple[Trainer, SmallLM, Callback]:
    """Trainer, module and callback of a run beside the callback's companions; an exception breaks the ``rule``."""
    callback = factory()
    others = companions(callback)[:: -1 if backwards else 1]
    module = SmallLM()
    try:
        trainer, _ = fit([*([callback] * first), *others, *([callback] * (not first)), *more], module, **options)
        return trainer, module, callback
    except Exception as error:
        raise failure(
            rule,
            type(callback).__name__,
            f"after {module.steps_begun} begun steps, {short(error)}",
            "a training that runs to its end",
            "The exception above this one has the place.",
        ) from error


def facts_of(rule: str, factory: Factory, **options: Any) -> dict[str, Any]:
    """What a run with the callback ends with."""
    return facts(*run(rule, factory, **options))


@lru_cache(maxsize=2)
def reference_run(factory: Factory) -> dict[str, Any]:
    """What a run with the callback listed last ends with, and its checkpoint before the last epoch."""
    with quiet(), tempfile.TemporaryDirectory() as folder:
        keep = ModelCheckpoint(
            folder, every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True, filename="{epoch}"
        )
        trainer, module, callback = run("Training runs with the callback", factory, more=[keep])
        end = facts(trainer, module, callback)
        return copy.deepcopy(
            {
                "facts": end,
                "weights": module.state_dict(),
                "state": callback.state_dict(),
                "random state": random_state(),
                "checkpoint": (Path(folder) / f"epoch={EPOCHS - 2}.ckpt").read_bytes(),
            }
        )


@lru_cache
def plain_run(repeated: bool) -> dict[str, Any]:
    """What a run without callbacks ends with."""
    with quiet():
        _, module = fit([], tokens=TRAIN, epochs=EPOCHS) if repeated else fit([], tokens=NEVER_REPEATED, epochs=1)
        return {"weights": module.state_dict(), "random state": random_state()}


@lru_cache
def left_without(end: type[BaseException] | None) -> frozenset[str]:
    return left_after([], end)


def left_after(callbacks: Sequence[Callback], end: type[BaseException] | None) -> frozenset[str]:
    """Hooks and attributes that are there after a run in whose tenth step ``end`` was raised; None: nothing was."""
    module, train_loader = SmallLM(end), loader(TRAIN, 8)
    expected: tuple[type[BaseException], ...] = () if end is None else (end, SystemExit)
    with quiet():
        try:
            fit(callbacks, module, epochs=2, train_loader=train_loader)
        except expected:  # Lightning turns Ctrl-C into the end of the program
            pass
    return traces(module, train_loader)
