"""What is kept of a seed with ``--save``: everything to tune a detector without training again.

Tensors and plain values only, so that ``torch.load(weights_only=True)`` reads it back.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from torch import Tensor

from benchmarks.common.training import Run, token_nll
from benchmarks.detection.population import Population
from lightning_memsink.ledger import Ledger

if TYPE_CHECKING:
    from benchmarks.detection.runs import Findings


def slots_of(ledger: Ledger) -> dict[str, Any]:
    """Table, controls and flags as training left them."""
    slots = {"table": ledger.losses, "controls": ledger.controls, "flags": ledger.flags}
    return {name: deepcopy(slot.state_dict()) for name, slot in slots.items()}


def plain(population: Population, main: Run, twin: Run, texts: Tensor, trained: Tensor) -> dict[str, Any]:
    """Both runs. ``texts`` ``[N, T]`` are the tested ones; ``trained`` are the rows of ``population.tokens`` whose
    losses at every evaluation ``main`` followed.
    """
    runs = {
        name: {
            "visits": {"step": run.visit_step, "id": run.visit_id, "loss": run.visit_loss},
            "evaluation_step": run.evaluation_step,
            "control_losses": run.control_losses,
            "exact": run.exact,
            "tested_nll": token_nll(run.module, texts),
            "control_nll": token_nll(run.module, population.controls),
        }
        for name, run in (("main", main), ("twin", twin))
    }
    return runs | {"population": vars(population), "trained": trained, "trained_losses": main.followed_losses}


def results(found: Findings) -> dict[str, Any]:
    """Truth, scores and verdicts."""
    return {
        name: getattr(found, name)
        for name in ("memorization", "scores", "flagged", "flagged_after", "twins", "flag_step", "exact_at")
    }
