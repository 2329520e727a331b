"""Compares the losses that our callbacks read with those of each sample alone, in either namespace of Lightning.

B  samples in a batch
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_memsink import Ledger

MOST_CHECKED = 8  # batches of which every sample is recomputed alone


@dataclass
class LossCheck:
    """Two callbacks, one to run before ours and one after: what is computed between them would be watched.

    Args:
        alone: ``alone(module, batch)`` the loss of each sample by itself ``[B]``.
        held_out: likewise of a validation batch.
        still: puts the module in the state in which both hold.
    """

    alone: Callable[[Any, Any], Tensor] | None
    held_out: Callable[[Any, Any], Tensor] | None
    still: Callable[[Any], Any]
    expected: list[Tensor] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    mean_errors: list[float] = field(default_factory=list)
    controls: list[Tensor] = field(default_factory=list)  # of the last validation, in the order of their rows
    ledger: Ledger | None = None

    def before(self, base: type) -> Any:
        check = self

        class Expecting(base):  # type: ignore[misc]
            def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
                check.still(pl_module)
                if check.alone is not None and len(check.errors) < MOST_CHECKED:
                    with silent(pl_module), torch.enable_grad():
                        check.expected = [check.alone(pl_module, batch).detach()]

            def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
                check.controls.clear()
                check.ledger = Ledger.of(trainer)

            def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *place: int) -> None:
                check.still(pl_module)
                if check.held_out is not None:
                    with silent(pl_module), torch.no_grad():
                        check.controls.append(check.held_out(pl_module, batch))

        return Expecting()

    def after(self, base: type) -> Any:
        check = self

        class Comparing(base):  # type: ignore[misc]
            def on_train_batch_end(
                self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
            ) -> None:
                ledger = Ledger.of(trainer)
                expected = check.expected.pop() if check.expected else None
                if ledger.batch.ids is None or len(check.mean_errors) >= MOST_CHECKED:
                    return
                found = ledger.losses.last_loss[ledger.losses.index.find(ledger.batch.ids)].float()
                known = found.isfinite()
                if known.all():
                    loss = outputs["loss"] if isinstance(outputs, dict) else outputs
                    check.mean_errors.append(relative(found.mean()[None], loss.detach().reshape(1)))
                if expected is not None and known.any():
                    check.errors.append(relative(found, expected, known))

        return Comparing()

    def control_error(self) -> float | None:
        """Of the controls at the last validation, if each is known by its row in a loader that does not shuffle."""
        expected = torch.cat(self.controls) if self.controls else torch.zeros(0)
        if self.ledger is None or not len(expected) or len(self.ledger.controls) == 0:
            return None
        found, rows = self.ledger.controls, self.ledger.controls.ids
        if int(rows.max()) >= len(expected):
            return None
        latest = found.latest.float()
        return relative(latest, expected[rows], latest.isfinite()) if latest.isfinite().any() else None


def relative(found: Tensor, expected: Tensor, known: Tensor | None = None) -> float:
    """The largest difference, as a share of the expected losses' mean size; of those ``known`` where it is given.

    Infinite where there are not as many losses as samples.
    """
    if found.shape != expected.shape:
        return torch.inf
    scale = expected.abs().mean().clamp(min=1e-12)
    differences = (found - expected).abs() if known is None else (found - expected)[known].abs()
    return float(differences.max() / scale)


@contextmanager
def silent(module: Any) -> Iterator[None]:
    """A training step outside its place must not log."""
    quiet = {name: (lambda *args, **kwargs: None) for name in ("log", "log_dict")}
    vars(module).update(quiet)
    try:
        yield
    finally:
        for name in quiet:
            vars(module).pop(name)
