"""Unit effects of one batch, outside of training.

B  samples in a batch      U  units of a hidden layer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_memsink.attribution.hidden_layers import HiddenLayer
from lightning_memsink.attribution.unit_effects import margins, sample_weights
from lightning_memsink.attribution.unit_recorder import UnitRecorder
from lightning_memsink.losses.autograd_graph import find_loss_calls
from lightning_memsink.losses.per_sample import in_batch_order


def attribute(
    model_loss: Callable[[], Tensor],
    layers: Sequence[HiddenLayer],
    batch_size: int,
    objective: Literal["loss", "margin"] = "loss",
) -> dict[str, Tensor]:
    """Signed unit effects ``[B, U]`` by layer of one batch, outside of training. No parameter's ``.grad`` is written.

    Args:
        model_loss: runs the forward and returns the scalar loss, whose rows are those of the samples one after the
            other. Frozen parameters are fine.
        objective: ``"loss"``: by how many nats a sample's own mean loss would rise without the unit. ``"margin"``: how
            much lower its `margins` would be. Either way a unit with a positive effect helps the sample.

    Raises:
        ValueError: the loss has no graph, or a layer has no ``[B, U]`` effects.
        RuntimeError: from torch, under reentrant checkpointing, which can't be differentiated outside ``backward()``.
    """
    hidden: list[Tensor] = []

    def make_differentiable(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        inputs = args[0] if args else None
        if not isinstance(inputs, Tensor) or not torch.is_grad_enabled():
            return None
        hidden.append(inputs if inputs.requires_grad else inputs.detach().requires_grad_())
        return hidden[-1], *args[1:]

    handles = [layer.module.register_forward_pre_hook(make_differentiable) for layer in layers]
    recorder = UnitRecorder(layers)
    try:
        recorder.open()
        with torch.enable_grad():
            loss = model_loss()
            if not loss.requires_grad or not hidden:
                raise ValueError("attribute needs a loss with its graph: drop no_grad and detach from model_loss.")
            calls = in_batch_order(find_loss_calls(loss), batch_size) if objective == "loss" else []
            torch.autograd.grad(loss if objective == "loss" else -margins(loss), hidden, allow_unused=True)
        effects = recorder.finish(batch_size, sample_weights(calls, batch_size))
    finally:
        recorder.remove()
        for handle in handles:
            handle.remove()
    if recorder.left_out:
        name, reason = next(iter(recorder.left_out.items()))
        raise ValueError(f"attribute found no effects [{batch_size}, U] in {name}: {reason}.")
    return effects
