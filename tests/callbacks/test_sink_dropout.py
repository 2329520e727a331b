"""Localized units are dropped for the chosen samples, with the chosen probability, and nothing else changes."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_memsink.attribution.hidden_layers import HiddenLayer, find_hidden_layers
from lightning_memsink.callbacks.sink_dropout import SinkDropout
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.detection.verdicts import Verdict, verdicts_of
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.mitigation.unit_dropout import dropout_mask, samples_in, zero_units
from tests.support.small_runs import LENGTH, TinyLM, fit, snapshot, watch

UNITS = torch.tensor([5, 0, 77, 127])
SINKS = Sinks({"mlp.2": UNITS}, {"mlp.2": torch.arange(4.0).flip(0)}, {"mlp.2": 128})
QUIET: dict[str, Any] = {"val_check_interval": None, "max_epochs": 1, "limit_val_batches": 0}


class ByPosition(TinyLM):
    """The tiny model chosen hidden activations ``[B, T, U]`` keep their axes and are recorded where they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self.mlp[2].register_forward_hook(lambda module, args, output: self.seen.append(args[0].detach()))


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in model.parameters()]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# Pure functions ---------------------------------------------------------------------------------------------------


@given(samples=st.integers(0, 6), units=st.integers(1, 9), chosen=st.integers(0, 9), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_only_what_may_be_dropped_is_dropped_and_the_same_each_time(samples, units, chosen, seed):
    generator = torch.Generator().manual_seed(seed)
    among = torch.randperm(units, generator=generator)[:chosen]
    chosen = torch.rand(samples, generator=generator) < 0.5
    off = dropout_mask((seed, 3), chosen, among, units, 0.7)
    for sample in range(samples):
        for unit in range(units):
            assert not off[sample, unit] or (chosen[sample] and unit in among)
    assert torch.equal(off, dropout_mask((seed, 3), chosen, among, units, 0.7))
    everyone = dropout_mask((seed, 3), torch.ones_like(chosen), among, units, 0.7)
    assert torch.equal(off, everyone & chosen[:, None]), "a sample's draw does not depend on the others"


@pytest.mark.parametrize("p", [0.0, 0.2, 1.0])
def test_each_unit_is_off_with_probability_p(p):
    everyone, units = torch.ones(4, dtype=torch.bool), torch.arange(8)
    rates = torch.stack([dropout_mask((0, step), everyone, units, 8, p) for step in range(2000)]).float().mean(0)
    assert (rates - p).abs().max() <= 4 * (p * (1 - p) / 2000) ** 0.5


@pytest.mark.parametrize(
    ("axes", "shape"),
    [((-1, 0), (2, 5, 3)), ((-1, 1), (5, 2, 3)), ((-1, 0), (2, 3)), ((1, 0), (2, 3, 4, 4))],
    ids=["[B, T, U]", "[T, B, U]", "[B, U]", "[B, U, H, W]"],
)
def test_a_unit_is_zero_at_every_position_of_its_sample(axes, shape):
    layer = HiddenLayer("down", nn.Linear(3, 1), 3, *axes)
    hidden, off = torch.randn(shape), torch.tensor([[True, False, False], [False, True, True]])
    found = zero_units(hidden, off, layer)
    for sample in range(2):
        for unit in range(3):
            own, before = (
                one.select(axes[1], sample).select(axes[0] if axes[0] < 0 else 0, unit) for one in (found, hidden)
            )
            assert torch.equal(own, torch.zeros_like(before) if off[sample, unit] else before)
    assert samples_in(hidden, layer) == 2


# Whole runs -------------------------------------------------------------------------------------------------------


def test_all_samples_lose_their_units_in_training_and_none_in_evaluation():
    model = ByPosition()
    fit([SinkDropout(1.0, "all", SINKS)], model, max_epochs=1, limit_train_batches=2, val_check_interval=2)
    first, second = model.seen[2:4]  # after a check of two validation batches
    others = model.seen[:2] + model.seen[4:]
    for hidden in (first, second):
        assert (hidden[..., UNITS] == 0).all() and (hidden[..., 1] != 0).all()
    assert all((hidden[..., UNITS] != 0).any() for hidden in others)


def test_one_draw_of_a_sample_and_unit_holds_at_all_its_tokens():
    model = ByPosition()
    run, _ = fit([SinkDropout(0.5, "all", SINKS)], model, **QUIET)
    off = torch.stack([hidden[:16, :, UNITS] == 0 for hidden in model.seen[:-1]])  # [steps, B, T, k]
    assert off.shape[2] == LENGTH - 2 and (off.all(2) == off.any(2)).all()
    assert 0.4 < off.float().mean() < 0.6 and len(off.flatten(0, 1)[:, 0].unique(dim=0)) == 16
    [record] = Ledger.of(run).interventions["SinkDropout"].records
    assert record["visits"] == record["acted"] == 328 and record["removed"] == pytest.approx(0.5 * 4 / 128, rel=0.1)


def crew(**options: Any) -> list[Any]:
    return [*watch(), SinkLocalizer(every=1, fraction=0.1), SinkDropout(**options)]


class Watcher(Callback):
    """Records the units that were off in each training step, and the samples flagged as memorized."""

    def __init__(self) -> None:
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.seen.clear()
        self.sinks = Ledger.of(trainer).sinks

    def on_before_backward(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        ledger = Ledger.of(trainer)
        memorized = verdicts_of(ledger.batch.ids, ledger.losses, ledger.flags) == Verdict.MEMORIZED
        mask = torch.zeros(128, dtype=torch.bool) if self.sinks is None else self.sinks.masks()["mlp.2"]
        self.steps.append(((pl_module.seen[-1] == 0).all(1), memorized, mask))


def test_units_are_dropped_for_flagged_samples_only():
    watcher = Watcher()
    run, _ = fit([*crew(p=1.0), watcher], ByPosition(), max_epochs=4)
    for off, memorized, mask in watcher.steps:
        assert torch.equal(off, memorized[:, None] & mask)
    acted = sum(int(memorized.sum()) for _, memorized, mask in watcher.steps if mask.any())
    assert 0 < acted == Ledger.of(run).interventions["SinkDropout"].total("acted")
    dropped = sum(float(off.float().mean()) for off, _, _ in watcher.steps) / len(watcher.steps)
    records = Ledger.of(run).interventions["SinkDropout"].records  # one an epoch, each of as many steps
    assert sum(record["removed"] for record in records) / len(records) == pytest.approx(dropped)


@pytest.fixture(scope="module")
def dropped() -> tuple[Any, Any]:
    return fit(crew(), max_epochs=4)


def facts(run: Any, model: Any) -> tuple[str, str, str]:
    ledger = Ledger.of(run)
    actions = ledger.interventions["SinkDropout"]
    counted = [actions.total("visits"), actions.total("acted"), round(actions.total("removed"), 9)]
    return snapshot(run, model), repr(ledger.attribution.state_dict()), repr(counted)


@pytest.mark.parametrize("order", list(permutations(range(4)))[5::13], ids=str)
def test_any_order_of_callbacks_gives_the_same_run(dropped, order):
    callbacks = crew()
    assert facts(*fit([callbacks[place] for place in order], max_epochs=4)) == facts(*dropped)


def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path, dropped):
    first, _ = fit(crew(), max_epochs=3)
    first.save_checkpoint(tmp_path / "three.ckpt")
    assert Ledger.of(first).sinks is not None, "it resumes where units are dropped"
    assert facts(*fit(crew(), max_epochs=4, ckpt_path=tmp_path / "three.ckpt")) == facts(*dropped)


def test_without_dropped_units_a_run_is_bit_identical_to_one_without_the_callback_and_draws_no_random_number():
    expected = weights(fit([], **QUIET)[1])
    random = torch.get_rng_state()
    for callbacks in ([SinkDropout(0.0, "all", SINKS)], crew(p=1.0)):
        if len(callbacks) > 1:
            with pytest.warns(UserWarning, match="only one evaluation takes place"):
                model = fit(callbacks, **QUIET)[1]
        else:
            model = fit(callbacks, **QUIET)[1]
        assert equal(weights(model), expected) and torch.equal(torch.get_rng_state(), random)


def test_a_checkpointed_forward_that_runs_again_sees_the_same_units():
    """So its gradients, and the weights they lead to, are those of the plain forward."""

    class Checkpointed(TinyLM):
        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            seen = self.embed(batch["input_ids"])
            given = torch.cat([seen[:, :-2], seen[:, 1:-1]], -1)
            logits = checkpoint(self.mlp, given, use_reentrant=False)
            return nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 2:].flatten())

    runs = [fit([SinkDropout(0.5, "all", SINKS)], model, **QUIET)[1] for model in (TinyLM(), Checkpointed())]
    assert equal(weights(runs[1]), weights(runs[0])) and not equal(weights(runs[0]), weights(fit([], **QUIET)[1]))


def test_a_pretrained_part_in_evaluation_mode_is_trained_and_so_dropped_from():
    model = ByPosition()
    model.mlp.eval()
    with pytest.warns(UserWarning, match="in eval mode at the start of training"):
        fit([SinkDropout(1.0, "all", SINKS)], model, **QUIET, limit_train_batches=1)
    assert (model.seen[0][..., UNITS] == 0).all()


def test_another_seed_draws_others_and_every_micro_batch_its_own():
    def off(seed: int, **options: Any) -> Tensor:
        model = ByPosition()
        fit([SinkDropout(0.5, "all", SINKS, seed=seed)], model, **QUIET, limit_train_batches=4, **options)
        return torch.stack([hidden[:, 0, UNITS] == 0 for hidden in model.seen])

    assert not torch.equal(off(0), off(1)) and torch.equal(off(0), off(0))
    assert len(off(0, accumulate_grad_batches=4).unique(dim=0)) == 4


def test_rows_that_are_no_samples_are_left_alone_and_said_once():
    class Flat(TinyLM):
        def loss(self, batch: dict[str, Tensor]) -> Tensor:
            seen = self.embed(batch["input_ids"])
            logits = self.mlp(torch.cat([seen[:, :-2], seen[:, 1:-1]], -1).flatten(0, 1))
            return nn.functional.cross_entropy(logits, batch["input_ids"][:, 2:].flatten())

    with pytest.warns(UserWarning, match=r"drops nothing in mlp\.2: its input has 160 rows where the batch has 16"):
        model = fit([SinkDropout(1.0, "all", SINKS)], Flat(), **QUIET, limit_train_batches=4)[1]
    assert equal(weights(model), weights(fit([], Flat(), **QUIET, limit_train_batches=4)[1]))


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError("of the user")], ids=["end", "error"])
def test_no_hook_stays_behind(error):
    class Stops(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if error is not None:
                raise error

    model = TinyLM()
    try:
        fit([SinkDropout(0.5, "all", SINKS), Stops()], model, **QUIET)
    except RuntimeError:
        assert error is not None
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 1.5}, "p is a probability between 0 and 1, but it is 1.5"),
        ({"p": float("nan")}, "p is a probability between 0 and 1, but it is nan"),
        ({"who": "some"}, "who is 'flagged' or 'all', but it is 'some'"),
        ({"sinks": Sinks(sizes={"mlp.2": 128})}, "name no unit"),
    ],
)
def test_bad_options_are_refused_when_made(options, message):
    with pytest.raises(ValueError, match=message):
        SinkDropout(**options)


def test_a_missing_localizer_and_one_that_looks_elsewhere_are_named():
    with pytest.raises(RuntimeError, match=r"No callback of this Trainer writes `sinks`\. Add SinkLocalizer"):
        fit([*watch(), SinkDropout()])
    with pytest.raises(RuntimeError, match=r"No callback of this Trainer writes `batch`\. Add LossTracker"):
        fit([SinkDropout(sinks=SINKS)])
    model = TinyLM()
    model.mlp.append(nn.Linear(32, 32))
    with pytest.raises(ValueError, match=r"SinkLocalizer records mlp\.3, and SinkDropout has no such layer"):
        fit([*watch(), SinkLocalizer(["mlp.3"], every=1), SinkDropout()], model)


def test_a_model_without_hidden_layers_is_refused_at_the_start():
    model = TinyLM()
    model.mlp = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="No hidden layer found"):
        fit([*watch(), SinkDropout()], model)
    assert find_hidden_layers(TinyLM())[0].name == "mlp.2"
