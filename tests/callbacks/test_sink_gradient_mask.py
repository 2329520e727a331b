"""Frozen units stay the same to the bit under every optimizer, and all else moves as if they were constants."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from lightning_memsink.callbacks.sink_gradient_mask import SinkGradientMask
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.sinks import Sinks
from tests.support.optimizers import OPTIMIZERS
from tests.support.small_runs import TinyLM, fit, snapshot, train_loader, watch

UNITS = torch.tensor([5, 0, 77, 127])
SINKS = Sinks({"mlp.2": UNITS}, {"mlp.2": torch.arange(4.0).flip(0)}, {"mlp.2": 128})
SHORT: dict[str, Any] = {"limit_train_batches": 8, "max_epochs": 1, "limit_val_batches": 0}


class With(TinyLM):
    """The tiny model with another optimizer."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Manual(With):
    """Two optimizers by hand, one of which owns the units."""

    def __init__(self) -> None:
        super().__init__(None)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(part.parameters(), 1e-2) for part in (self.mlp, self.embed)]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()


def units_of(model: Any, units: Tensor = UNITS) -> list[Tensor]:
    """Rows, biases and columns, by the layout of ``nn.Linear``."""
    up, down = model.mlp[0], model.mlp[2]
    return [up.weight.detach()[units], up.bias.detach()[units], down.weight.detach()[:, units]]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3}, {"precision": "bf16-true"}],
    ids=["as it is", "accumulated and clipped", "bf16"],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_units_are_frozen_to_the_bit(name, options):
    precise = options.get("precision") == "bf16-true"
    before = units_of(TinyLM().bfloat16() if precise else TinyLM())
    _, model = fit([SinkGradientMask(sinks=SINKS)], With(OPTIMIZERS[name]), **SHORT, **options)
    assert equal(units_of(model), before)
    others = torch.tensor([1, 2, 3])
    assert not equal(units_of(model, others), units_of(TinyLM(), others))


def by_hand(optimizer: Any, clip: float | None) -> TinyLM:
    """The oracle: the loop written out, gradient zeroed, norm clipped, values put back."""
    model = TinyLM()
    stepper = optimizer(model.parameters())
    loader = train_loader()
    loader.sampler.set_epoch(0)
    for batch, _ in zip(loader, range(8), strict=False):
        stepper.zero_grad()
        model.loss(batch).backward()
        up, down = model.mlp[0], model.mlp[2]
        for gradient in (up.weight.grad, up.bias.grad, down.weight.grad.T):
            gradient[UNITS] = 0
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = units_of(model)
        stepper.step()
        with torch.no_grad():
            up.weight[UNITS], up.bias[UNITS], down.weight[:, UNITS] = before
    return model


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("name", ["SGD", "momentum and decay", "AdamW", "AdamW fused"])
def test_everything_else_moves_as_if_the_units_were_constants(name, clip):
    _, model = fit([SinkGradientMask(sinks=SINKS)], With(OPTIMIZERS[name]), **SHORT, gradient_clip_val=clip)
    assert equal(weights(model), weights(by_hand(OPTIMIZERS[name], clip)))


@pytest.mark.parametrize("name", ["SGD", "momentum and decay", "AdamW"])
def test_a_strength_below_one_takes_its_share_off_the_first_step_of_any_optimizer(name):
    one_step = {"max_steps": 1, "limit_val_batches": 0}
    start, free = units_of(TinyLM()), fit([], With(OPTIMIZERS[name]), **one_step)[1]
    held = fit([SinkGradientMask(0.75, SINKS)], With(OPTIMIZERS[name]), **one_step)[1]
    for before, moved, part in zip(start, units_of(free), units_of(held), strict=True):
        torch.testing.assert_close(part - before, 0.25 * (moved - before), rtol=1e-3, atol=1e-6)
    others = torch.tensor([1, 2, 3])
    assert equal(units_of(held, others), units_of(free, others))


def test_two_optimizers_stepped_by_hand_freeze_too():
    before = units_of(TinyLM())
    _, model = fit([SinkGradientMask(sinks=SINKS)], Manual(), **SHORT)
    free = fit([], Manual(), **SHORT)[1]
    assert equal(units_of(model), before) and not equal(units_of(free), before)
    assert not torch.equal(model.embed.weight, TinyLM().embed.weight)


@pytest.mark.parametrize("direction", ["in", "out"])
def test_a_direction_leaves_the_other_free(direction):
    rows, biases, columns = units_of(TinyLM())
    _, model = fit([SinkGradientMask(sinks=SINKS, direction=direction)], With(OPTIMIZERS["AdamW"]), **SHORT)
    found = units_of(model)
    assert equal(found[:2], [rows, biases]) == (direction == "in")
    assert equal(found[2:], [columns]) == (direction == "out")


# Sinks of the ledger ----------------------------------------------------------------------------------------------


def crew(**options: Any) -> list[Any]:
    return [*watch(), SinkLocalizer(every=1, fraction=0.1), SinkGradientMask(**options)]


def facts(run: Any, model: Any) -> tuple[str, str, str]:
    ledger = Ledger.of(run)
    actions = ledger.interventions["SinkGradientMask"]
    counted = [actions.total("visits"), actions.total("acted"), round(actions.total("removed"), 9)]
    return snapshot(run, model), repr(ledger.attribution.state_dict()), repr(counted)


class Watcher(Callback):
    """Records the weights that moved in each step, and the sinks at its start."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        sinks = Ledger.of(trainer).sinks
        self.units = torch.zeros(0, dtype=torch.int64) if sinks is None else sinks.units["mlp.2"]
        self.before = units_of(pl_module, self.units)
        self.steps: list[int] = getattr(self, "steps", [])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        assert equal(units_of(pl_module, self.units), self.before)
        self.steps.append(len(self.units))


@pytest.fixture(scope="module")
def masked() -> tuple[Any, Any]:
    return fit(crew(), max_epochs=4)


def test_each_evaluation_names_who_stands_still_until_the_next():
    watcher = Watcher()
    run, _ = fit([*crew(), watcher], max_epochs=4)
    assert watcher.steps[0] == 0 and watcher.steps[-1] == 13 and not Ledger.of(run).sinks.empty


@pytest.mark.parametrize("order", list(permutations(range(4)))[::11], ids=str)
def test_any_order_of_callbacks_gives_the_same_run(masked, order):
    callbacks = crew()
    assert facts(*fit([callbacks[place] for place in order], max_epochs=4)) == facts(*masked)


def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path, masked):
    first, _ = fit(crew(), max_epochs=3)
    first.save_checkpoint(tmp_path / "three.ckpt")
    assert Ledger.of(first).sinks is not None, "it resumes where units are frozen"
    assert facts(*fit(crew(), max_epochs=4, ckpt_path=tmp_path / "three.ckpt")) == facts(*masked)


def test_without_sinks_nothing_changes_and_no_random_number_is_drawn():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    quiet = {"max_epochs": 1, "limit_val_batches": 0}
    expected = weights(fit([], **quiet)[1])
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    with pytest.warns(UserWarning, match="only one evaluation takes place"):
        run, model = fit(crew(), **quiet)
    assert equal(weights(model), expected) and torch.equal(torch.get_rng_state(), after)
    assert {record["acted"] for record in Ledger.of(run).interventions["SinkGradientMask"].records} == {0.0}


def test_what_was_done_is_counted(masked):
    log = Ledger.of(masked[0]).interventions["SinkGradientMask"]
    assert log.total("visits") == 4 * 328 == sum(record["visits"] for record in log.records)
    assert 0 < log.total("acted") < log.total("visits") and 0 < log.total("removed") < 1


def test_the_share_removed_is_of_the_squared_norm():
    class Reads(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            up, down = pl_module.mlp[0], pl_module.mlp[2]
            inside = [up.weight.grad[UNITS], up.bias.grad[UNITS], down.weight.grad[:, UNITS]]
            whole = sum(parameter.grad.square().sum() for parameter in pl_module.parameters())
            self.share = float(sum(part.square().sum() for part in inside) / whole)

    reads = Reads()
    run, _ = fit([SinkGradientMask(sinks=SINKS), reads], max_steps=1, limit_val_batches=0)
    assert Ledger.of(run).interventions["SinkGradientMask"].total("removed") == pytest.approx(reads.share, rel=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_no_number_counts_for_nothing(value):
    class Poisons(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            pl_module.mlp[0].weight.grad[:] = value

    before = units_of(TinyLM())
    run, model = fit([SinkGradientMask(sinks=SINKS), Poisons()], max_steps=2, limit_val_batches=0)
    assert equal(units_of(model), before)
    assert Ledger.of(run).interventions["SinkGradientMask"].total("removed") == 0


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError("of the user")], ids=["end", "error"])
def test_no_hook_stays_behind(error):
    class Stops(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            self.optimizer = trainer.optimizers[0]
            if error is not None:
                raise error

    stops = Stops()
    try:
        fit([SinkGradientMask(sinks=SINKS), stops], **SHORT)
    except RuntimeError:
        assert error is not None
    assert not stops.optimizer._optimizer_step_pre_hooks and not stops.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0}, "strength is above 0 and at most 1, which freezes, but it is 0"),
        ({"strength": 1.5}, "but it is 1.5"),
        ({"direction": "up"}, "direction is 'in', 'out' or 'both', but it is 'up'"),
        ({"sinks": Sinks(sizes={"mlp.2": 128})}, r"name no unit.*SinkLocalizer\(\).*memsink\(localize=True\)"),
    ],
)
def test_bad_options_are_refused_when_made(options, message):
    with pytest.raises(ValueError, match=message):
        SinkGradientMask(**options)


def test_sinks_of_another_model_are_refused_at_the_start():
    alien = Sinks({"h.0.down": torch.tensor([1])}, {"h.0.down": torch.ones(1)}, {"h.0.down": 6})
    with pytest.raises(ValueError, match=r"name h\.0\.down, but the hidden layers of TinyLM are mlp\.2"):
        fit([SinkGradientMask(sinks=alien)], **SHORT)


def test_without_a_localizer_the_missing_callback_is_named():
    with pytest.raises(RuntimeError, match=r"No callback of this Trainer writes `sinks`\. Add SinkLocalizer"):
        fit([*watch(), SinkGradientMask()])
