"""The factor between the loss that the user returned and the number that is differentiated."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def loss_scale(trainer: Trainer) -> float:
    """The factor that Lightning multiplied the loss by before backward: of accumulation, and of the AMP scaler if any.

    Reading the scale of a scaler waits for the device.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = float(scaler.get_scale()) if scaler is not None else 1.0
    return scale / trainer.accumulate_grad_batches if trainer.lightning_module.automatic_optimization else scale
