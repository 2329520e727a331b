"""Fits one case four times in this process, and says what our callbacks saw and whether they left a trace.

    python -m tests.ecosystem.fitting NAME

1. plain: without us, twice, for what is not reproducible by itself proves nothing. 2. watched: the same seed with
``memsink()``. Weights and the states of the random generators afterwards must be equal to the bit. 3. checked: watched
again, the module in evaluation mode (no dropout, running statistics of batch norms), so that each sample can be put
through the module's own training step alone; its loss there must be the one in the ledger.

B  samples in a batch
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_memsink import Ledger, memsink
from tests.ecosystem.claims import CLAIMS, Finding
from tests.ecosystem.loss_check import LossCheck


@dataclass(frozen=True)
class Case:
    """Somebody else's module.

    Args:
        fit: ``fit(callbacks, **trainer_options)`` the module, trained as the package's users train it.
        alone: ``alone(module, batch)`` the loss of each sample by itself ``[B]``; None where no such thing exists.
        held_out: likewise of a validation batch; None where it is the same.
        still: turns off what makes a sample's loss depend on chance or on the other samples.
    """

    fit: Callable[..., Any]
    alone: Callable[[Any, Any], Tensor] | None = None
    held_out: Callable[[Any, Any], Tensor] | None = None
    still: Callable[[Any], Any] = lambda module: module.eval()


def one_by_one(split: Callable[[Any, int], Any], size: Callable[[Any], int]) -> Callable[[Any, Any], Tensor]:
    """``alone`` by the module's own training step, on batches of one that ``split(batch, sample)`` gives."""

    def alone(module: Any, batch: Any) -> Tensor:
        steps = [module.training_step(split(batch, sample), 0) for sample in range(size(batch))]
        return torch.stack([step["loss"] if isinstance(step, dict) else step for step in steps]).reshape(-1)

    return alone


def rows(batch: Any, sample: int) -> Any:
    """The batch of one, of any nest of tensors whose first axis is the sample's."""
    if isinstance(batch, Tensor):
        return batch[sample : sample + 1].clone()  # a step may mix its batch in place
    if isinstance(batch, Mapping):
        return {key: rows(part, sample) for key, part in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(rows(part, sample) for part in batch)
    return batch


@contextmanager
def recorded_warnings(keeper: Keeper) -> Iterator[list[tuple[int, str]]]:
    """Every warning, as often as it is issued, with the step of the Trainer."""
    messages: list[tuple[int, str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *where: messages.append((keeper.step, str(message)))
        yield messages


def seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def trace(module: Any) -> list[Tensor]:
    """All that a fit leaves behind: weights, buffers, random states."""
    state = [value for value in module.state_dict().values() if isinstance(value, Tensor)]
    python = torch.tensor(random.getstate()[1])
    numpy = torch.from_numpy(np.random.get_state()[1].astype(np.int64))
    return [*state, torch.get_rng_state(), python, numpy]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True)
    )


class Keeper:
    """Keeps the Trainer that a package makes for itself."""

    trainer: Any = None

    @property
    def step(self) -> int:
        return 0 if self.trainer is None else int(self.trainer.global_step)

    def as_callback(self, base: type) -> Any:
        keeper = self

        class Keeping(base):  # type: ignore[misc]
            def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
                keeper.trainer = trainer

        return Keeping()


def examine(name: str) -> Finding:
    """What a fit of the case with our callbacks on comes to."""
    claim = CLAIMS[name]
    case: Case = import_module(f"tests.ecosystem.modules.{claim.module}").CASES[name]
    base = import_module(claim.lightning).Callback
    options = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "max_epochs": 2}

    start = Path.cwd()

    def fit(callbacks: list[Any], keeper: Keeper) -> tuple[list[Tensor], list[tuple[int, str]]]:
        os.chdir(mkdtemp(dir=start))  # files of one fit must not affect the next
        with recorded_warnings(keeper) as messages:
            seeded()
            module = case.fit([*callbacks, keeper.as_callback(base)], **options)
        return trace(module), messages

    (plain, before), (again, _) = fit([], Keeper()), fit([], Keeper())
    keeper = Keeper()
    watched, messages = fit(memsink(path=None), keeper)
    ledger = Ledger.of(keeper.trainer)
    theirs = {message for _, message in before}
    ours = [(step, message) for step, message in messages if message not in theirs]
    check = LossCheck(case.alone, case.held_out or case.alone, case.still)
    fit([check.before(base), *memsink(path=None, flush_every=1), check.after(base)], Keeper())
    return Finding(
        versions={package: version(package) for package in ("torch", "lightning", "transformers", "numpy")},
        steps=int(keeper.trainer.global_step),
        samples=len(ledger.losses),
        visits=int(ledger.losses.exposures.sum()),
        controls=len(ledger.controls),
        tracked=int(ledger.losses.last_loss.isfinite().sum()),
        reproducible=same(plain, again),
        identical=same(plain, watched),
        messages=ours,
        error=max(check.errors, default=None),
        mean_error=max(check.mean_errors, default=None),
        control_error=check.control_error(),
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    found = examine(sys.argv[1])
    print(json.dumps(vars(found)))
