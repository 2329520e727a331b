"""What can't work under a strategy is refused by name, at the start, with what would be needed."""

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy

from lightning_memsink.callbacks.extraction_probe import ExtractionProbe
from lightning_memsink.callbacks.goldfish import Goldfish
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.loss_truncation import LossTruncation
from lightning_memsink.callbacks.memsinks import MemSinks
from lightning_memsink.callbacks.runtime.strategies import refusal, require_support
from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask
from lightning_memsink.callbacks.sink_dropout import SinkDropout
from lightning_memsink.callbacks.sink_gradient_mask import SinkGradientMask
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from tests.support.small_runs import TinyLM


class Elsewhere(Strategy):
    """Nobody has heard of it."""


Elsewhere.__abstractmethods__ = frozenset()


def bare(kind: type[Strategy], **attributes: object) -> Strategy:
    """One that this machine has no hardware for: what decides is its class, and how it was set."""
    strategy = object.__new__(kind)
    vars(strategy).update(attributes)
    return strategy


TENSOR_PARALLEL = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
UNSUPPORTED = {
    "partitioned gradients": bare(DeepSpeedStrategy),
    "fully_shard": bare(FSDPStrategy),
    "over XLA": bare(XLAStrategy),
    "tensor_parallel_size is 2": TENSOR_PARALLEL,
    "none of those": bare(Elsewhere),
}


@pytest.mark.parametrize("why", UNSUPPORTED)
@pytest.mark.parametrize("reads", ["losses", "weights", "gradients"])
def test_what_was_not_tried_or_is_wrong_is_refused_with_what_would_be_needed(why, reads):
    strategy = UNSUPPORTED[why]
    with pytest.raises(ValueError, match=rf"(?s)LossTracker can't work under {type(strategy).__name__}: .*{why}"):
        require_support(strategy, "LossTracker", reads)


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(), DDPStrategy(), DDPStrategy(static_graph=True)])
def test_what_was_tried_is_let_through(strategy):
    assert [refusal(strategy, reads) for reads in ("losses", "weights", "gradients")] == [None] * 3


def test_sharded_data_parallel_lets_all_through_but_slices_of_weights_and_gradients_with_respect_to_them():
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    assert refusal(sharded, "losses") is None
    assert "shards weights" in (refusal(sharded, "weights") or "")
    assert "puts other weights into a forward" in (refusal(sharded, "gradients") or "")


EVERYONE = [
    ExtractionProbe,
    Goldfish,
    LossTracker,
    LossTruncation,
    MemSinks,
    SampleGradientMask,
    SinkDropout,
    SinkGradientMask,
    SinkLocalizer,
]


@pytest.mark.parametrize("kind", EVERYONE)
def test_every_callback_that_looks_into_a_step_asks_before_anything_else(kind):
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy._lightning_module = module = TinyLM()
    trainer._accelerator_connector.strategy = TENSOR_PARALLEL
    with pytest.raises(ValueError, match=f"{kind.__name__} can't work under ModelParallelStrategy"):
        kind().setup(trainer, module, "fit")
