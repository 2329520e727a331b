"""Which of Lightning's strategies each callback can work under: one place decides, at the start of fit.

What is allowed here was tried with real processes (``make test-distributed``). What could not be tried, or was tried
and was wrong, is refused, and the message says what would be needed.
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
"""What a callback takes hold of: the loss's graph, activations and their gradients, each of which a process has whole
for samples of its own; slices of the weights, which a process must have whole too; or a gradient of its own asking with
respect to them, for which they must be those of the forward."""


def refusal(strategy: Strategy, reads: Reads) -> str | None:
    """Why what is read can't be read under ``strategy``, and what would be needed; None if it can."""
    if is_a(strategy, DeepSpeedStrategy):
        return (
            "its engine runs backward and optimizer itself, on partitioned gradients and (ZeRO-3) weights. It would "
            "take hooks that read from its engine"
        )
    if is_a(strategy, FSDPStrategy):
        return (
            "it flattens weights and swaps them in and out of the modules, and runs on GPUs only, where nobody has "
            "tried it yet. Its successor works: ModelParallelStrategy(tensor_parallel_size=1) with fully_shard"
        )
    if is_a(strategy, XLAStrategy):
        return (
            "its processes do not speak through torch.distributed, so that each would keep a ledger of its own. It "
            "would take a gather over XLA"
        )
    if is_a(strategy, ModelParallelStrategy):
        return _of_model_parallel(strategy, reads)
    if is_a(strategy, SingleDeviceStrategy) or is_a(strategy, DDPStrategy):
        return None
    return "it is none of those that were tried. It would take a test of whether ledgers agree under it"


def _of_model_parallel(strategy: ModelParallelStrategy, reads: Reads) -> str | None:
    together = tensor_parallel_size(strategy)
    if together > 1:
        return (
            f"its tensor_parallel_size is {together}: so many processes see each sample, which would be counted as "
            "often, and each has a part of its hidden units. It would take a gather over the data-parallel processes "
            "alone, and one of units over the others"
        )
    if reads == "weights":
        return "it shards weights, of which a process must have whole rows. It would take slices of shards"
    if reads == "gradients":
        return (
            "it puts other weights into a forward than those that a gradient can be asked for, and parts of it would "
            "be missing. It would take one with respect to what each layer gives"
        )
    return None


def tensor_parallel_size(strategy: ModelParallelStrategy) -> int:
    """How many processes share each sample; 1 before they are set up if that is left to Lightning."""
    size = strategy._tensor_parallel_size  # a public name exists for its mesh only, once there is one
    return size if isinstance(size, int) else 1


def require_support(strategy: Strategy, callback: str, reads: Reads = "losses") -> None:
    """Raises ValueError, with the names of both, if ``callback`` can't work under ``strategy``."""
    why = refusal(strategy, reads)
    if why is not None:
        raise ValueError(
            f"{callback} can't work under {type(strategy).__name__}: {why}. Train on one device or with "
            f"strategy='ddp', or leave {callback} out."
        )
