"""What stands between a loss as the user returned it and the number that is differentiated."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def loss_scale(trainer: Trainer) -> float:
    """What Lightning multiplied the loss by before backward: accumulation, and the AMP scaler where there is one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    return scale / trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else scale
