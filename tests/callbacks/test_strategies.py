"""A callback that can't work under a strategy is refused by name, at the start, with what would be needed."""

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


class Untested(Strategy):
    """A strategy that was never tested."""


Untested.__abstractmethods__ = frozenset()


def bare(kind: type[Strategy], **attributes: object) -> Strategy:
    """A strategy that this machine has no hardware for. The decision depends on its class and settings only."""
    strategy = object.__new__(kind)
    vars(strategy).update(attributes)
    return strategy


TENSOR_PARALLEL = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)
UNSUPPORTED = {
    "partitioned gradients": bare(DeepSpeedStrategy),
    "fully_shard": bare(FSDPStrategy),
    "over XLA": bare(XLAStrategy),
    "tensor_parallel_size is 2": TENSOR_PARALLEL,
    "not one of the tested strategies": bare(Untested),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
@pytest.mark.parametrize("reads", ["losses", "weights", "gradients"])
def test_an_untested_or_wrong_strategy_is_refused_with_what_would_be_needed(reason, reads):
    strategy = UNSUPPORTED[reason]
    with pytest.raises(ValueError, match=rf"(?s)LossTracker can't work under {type(strategy).__name__}: .*{reason}"):
        require_support(strategy, "LossTracker", reads)


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(), DDPStrategy(), DDPStrategy(static_graph=True)])
def test_tested_strategies_are_accepted(strategy):
    assert [refusal(strategy, reads) for reads in ("losses", "weights", "gradients")] == [None] * 3


def test_sharded_data_parallel_accepts_losses_but_not_weights_and_gradients():
    sharded = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    assert refusal(sharded, "losses") is None
    assert "shards weights" in (refusal(sharded, "weights") or "")
    assert "its forward uses other weights" in (refusal(sharded, "gradients") or "")


CALLBACKS = [
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


@pytest.mark.parametrize("kind", CALLBACKS)
def test_every_callback_that_reads_a_step_checks_the_strategy_first(kind):
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy._lightning_module = module = TinyLM()
    trainer._accelerator_connector.strategy = TENSOR_PARALLEL
    with pytest.raises(ValueError, match=f"{kind.__name__} can't work under ModelParallelStrategy"):
        kind().setup(trainer, module, "fit")
