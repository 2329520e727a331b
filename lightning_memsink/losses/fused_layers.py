"""Encoder layers that torch computes by one kernel in evaluation, unless a mode watches the calls within them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeGuard

from torch import Tensor, nn

from lightning_memsink.losses.provenance import Rows
from lightning_memsink.losses.step_watch import StepWatch


def fused_layers(module: nn.Module) -> list[nn.TransformerEncoderLayer]:
    """The layers of ``module`` that torch may compute by one kernel: its own, and not those that a user derived."""
    return [part for part in module.modules() if is_fused(part)]


def is_fused(module: nn.Module) -> TypeGuard[nn.TransformerEncoderLayer]:
    """Whether torch may compute a module by one kernel, which it does while no module within has a hook."""
    if type(module) is not nn.TransformerEncoderLayer:
        return False
    return bool(module.self_attn.batch_first and module.activation_relu_or_gelu)


@contextmanager
def passed_by(watch: StepWatch, layers: Iterable[nn.TransformerEncoderLayer]) -> Iterator[None]:
    """Within it the watch stays out of ``layers`` in evaluation, and knows what they return by what they get.

    Such a layer mixes the places of a sample, and no samples.
    """
    changed = [layer for layer in layers if "forward" not in vars(layer)]
    try:
        for layer in changed:
            vars(layer)["forward"] = _by_the_way(watch, layer.forward, layer)
        yield
    finally:
        for layer in changed:
            vars(layer).pop("forward", None)


def _by_the_way(
    watch: StepWatch, forward: Callable[..., Tensor], layer: nn.TransformerEncoderLayer
) -> Callable[..., Tensor]:
    @wraps(forward)
    def run(src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if layer.training or not _is_of_one_sample_a_row(watch, src):
            return forward(src, *args, **kwargs)
        with watch.suspended():
            result = forward(src, *args, **kwargs)
        watch.note_same_rows(src, result)
        return result

    return run


def _is_of_one_sample_a_row(watch: StepWatch, tensor: Any) -> bool:
    """Whether a tensor ``[B, T, D]`` is known to be of one sample a row. Of ``[T, D]`` the layer mixes all rows."""
    known = None if watch.is_packed or tensor.ndim != 3 else watch.known(tensor)
    rows = None if known is None or known.is_dynamic else known.provenance
    return isinstance(rows, Rows) and all(owners[:1].numel() == 1 for owners in rows.candidates)
