"""Which of Lightning's strategies a callback can work under; checked at the start of fit.

Strategies that are allowed were tested with real processes (``make test-distributed``). A strategy that could not be
tested, or that gave wrong results, is refused, and the message says what would be needed.
"""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy

from lightning_memsink._lightning import is_a

Reads = Literal["losses", "weights", "gradients"]
"""What a callback reads. ``losses``: the loss's graph, activations and their gradients; each process has all of these
for its own samples. ``weights``: slices of the weights, of which each process must have all. ``gradients``: an extra
gradient with respect to the weights, which must be the ones that the forward used."""


def refusal(strategy: Strategy, reads: Reads) -> str | None:
    """Why a callback that ``reads`` this can't work under ``strategy``, and what would be needed; None if it can."""
    if is_a(strategy, DeepSpeedStrategy):
        return (
            "its engine runs backward and optimizer itself, on partitioned gradients and (ZeRO-3) weights. Support "
            "would need hooks that read from its engine"
        )
    if is_a(strategy, FSDPStrategy):
        return (
            "it flattens weights and swaps them in and out of the modules, and it runs on GPUs only, where it is not "
            "tested. Its successor works: ModelParallelStrategy(tensor_parallel_size=1) with fully_shard"
        )
    if is_a(strategy, XLAStrategy):
        return (
            "its processes do not communicate through torch.distributed, so each would keep a ledger of its own. "
            "Support would need a gather over XLA"
        )
    if is_a(strategy, ModelParallelStrategy):
        return _of_model_parallel(strategy, reads)
    if is_a(strategy, SingleDeviceStrategy) or is_a(strategy, DDPStrategy):
        return None
    return "it is not one of the tested strategies. Support would need a test that ledgers agree under it"


def _of_model_parallel(strategy: ModelParallelStrategy, reads: Reads) -> str | None:
    size = tensor_parallel_size(strategy)
    if size > 1:
        return (
            f"its tensor_parallel_size is {size}: that many processes see each sample, would count it that often, and "
            "have a part of its hidden units each. Support would need a gather of samples over the data-parallel "
            "processes only, and a gather of units over the others"
        )
    if reads == "weights":
        return "it shards weights, and a process must have whole rows of them. Support would need slices of shards"
    if reads == "gradients":
        return (
            "its forward uses other weights than the parameters, and parts of a gradient with respect to these would "
            "be missing. Support would need a gradient with respect to the output of each layer"
        )
    return None


def tensor_parallel_size(strategy: ModelParallelStrategy) -> int:
    """Number of processes that share each sample; 1 before setup if Lightning chooses it."""
    size = strategy._tensor_parallel_size  # publicly, only the mesh has it, and only after setup
    return size if isinstance(size, int) else 1


def require_support(strategy: Strategy, callback: str, reads: Reads = "losses") -> None:
    """Raises ValueError, with the names of both and the reason, if ``callback`` can't work under ``strategy``."""
    reason = refusal(strategy, reads)
    if reason is not None:
        raise ValueError(
            f"{callback} can't work under {type(strategy).__name__}: {reason}. Train on one device or with "
            f"strategy='ddp', or leave {callback} out."
        )
