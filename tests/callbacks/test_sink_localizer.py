"""Localization in whole runs: weights are not changed, and every setting is one that users have."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_memsink import memsink
from lightning_memsink.attribution.update_norms import UpdateNorms
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.ledger import Ledger
from tests.support.small_runs import DeepLM, TinyLM, fit, snapshot, watch


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return fit([], DeepLM())[1].state_dict()


@pytest.fixture(scope="module")
def localized() -> Trainer:
    return fit([*watch(), SinkLocalizer(every=1)], DeepLM())[0]


def facts(run: Trainer, model: Any) -> tuple[str, str]:
    ledger = Ledger.of(run)
    return snapshot(run, model), repr((ledger.attribution.state_dict(), str(ledger.sinks)))


@pytest.mark.parametrize(
    "options",
    [{}, {"every": 1}, {"every": 1, "objective": "margin"}, {"norms": False}, {"every": 2, "agreement": True}],
    ids=["default", "every step", "margin", "without norms", "agreement"],
)
def test_recording_changes_no_weight(plain, options):
    _, model = fit([*watch(), SinkLocalizer(**options)], DeepLM())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, plain[name]), name


def test_accumulation_clipping_and_manual_steps_change_nothing_either():
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}
    expected = fit([], DeepLM(), **options)[1].state_dict()
    run, model = fit([*watch(), SinkLocalizer(every=1)], DeepLM(), **options)
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())
    assert Ledger.of(run).attribution.rows[-1].movement


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_any_order_of_callbacks_finds_the_same(localized, order):
    callbacks = [*watch(), SinkLocalizer(every=1)]
    run, _ = fit([callbacks[place] for place in order], DeepLM())
    expected = Ledger.of(localized).attribution.state_dict()
    assert repr(Ledger.of(run).attribution.state_dict()) == repr(expected)


def test_an_evaluation_has_a_row_whose_shares_add_up(localized):
    ledger = Ledger.of(localized)
    steps = [evaluation.step for evaluation in ledger.flags.evaluations]
    rows = ledger.attribution.rows
    assert [row.step for row in rows] == steps
    assert "memorized" in rows[-1].visits
    for row in rows:
        for values in [*row.shares.values(), *row.norms.values()]:
            assert sum(values) == pytest.approx(1, abs=1e-4)
        assert len(row.movement) == len(ledger.attribution.blocks) and min(row.movement) > 0
        assert all(0 <= part <= 1 for part in row.by_memorized)


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
def test_agreement_is_a_cosine_with_the_gradient_of_the_controls(precision):
    run, _ = fit([*watch(), SinkLocalizer(every=1, agreement=True)], DeepLM(), precision=precision)
    rows = Ledger.of(run).attribution.rows
    assert {"memorized", "learned"} <= set(rows[-1].agreement)
    assert all(-1 <= cosine <= 1 for row in rows for cosine in row.agreement.values())
    assert rows[-1].agreement["learned"] > rows[-1].agreement["memorized"], (
        "gradients of memorized samples improve no others"
    )


def test_sinks_are_named_of_the_layers_that_were_found(localized):
    ledger = Ledger.of(localized)
    assert ledger.sinks is not None and not ledger.sinks.empty
    assert set(ledger.sinks.units) <= set(ledger.attribution.units) == {"mlp.2", "mlp.4", "mlp.6"}


@pytest.mark.parametrize("error", [None, RuntimeError("of the user"), KeyboardInterrupt()], ids=["end", "error", "^C"])
def test_no_hook_stays_behind(error):
    class Stops(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            if error is not None:
                raise error

    model = DeepLM()
    try:
        fit([*watch(), SinkLocalizer(every=1), Stops()], model)
    except (RuntimeError, SystemExit):
        assert error is not None
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_resumed_run_ends_like_the_uninterrupted_one(tmp_path, localized):
    callbacks = [*watch(), SinkLocalizer(every=1)]
    first, _ = fit(callbacks, DeepLM(), max_epochs=2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    run, _ = fit([*watch(), SinkLocalizer(every=1)], DeepLM(), ckpt_path=tmp_path / "two.ckpt")
    expected, resumed = (repr(Ledger.of(each).attribution.state_dict()) for each in (localized, run))
    assert resumed == expected


def test_an_error_while_recording_warns_once_and_training_goes_on(monkeypatch, plain):
    monkeypatch.setattr("lightning_memsink.attribution.unit_recorder.unit_effects", lambda *_: 1 / 0)
    with pytest.warns(UserWarning, match="SinkLocalizer failed on a step and stops recording"):
        _, model = fit([*watch(), SinkLocalizer(every=1)], DeepLM())
    assert all(torch.equal(weight, plain[name]) for name, weight in model.state_dict().items())


def test_a_model_without_hidden_layers_is_refused_at_the_start():
    model = TinyLM()
    model.mlp = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="hidden layer"):
        fit([*watch(), SinkLocalizer()], model)


def test_without_a_detector_the_missing_callback_is_named():
    with pytest.raises(RuntimeError, match=r"No callback of this Trainer writes `flags`\. Add MemorizationDetector"):
        fit([watch()[0], SinkLocalizer()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every is a number of optimizer steps, at least 1, but it is 0"),
        ({"objective": "logit"}, "objective is 'loss' or 'margin', but it is 'logit'"),
        ({"fraction": 1.0}, "fraction is a share of all units between 0 and 1, but it is 1.0"),
    ],
)
def test_bad_options_are_refused_when_made(options, message):
    with pytest.raises(ValueError, match=message):
        SinkLocalizer(**options)


def test_the_expression_localizes_on_request_only():
    assert SinkLocalizer not in map(type, memsink())
    [localizer] = [one for one in memsink(localize=True, every=4) if isinstance(one, SinkLocalizer)]
    assert localizer.every == 4
    with pytest.raises(TypeError, match="no option `every`"):
        memsink(every=4)


def test_movement_is_the_norm_of_a_step_and_exact_for_small_weights():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    moved = UpdateNorms(model)
    moved.before_step()
    before = [weight.detach().clone() for weight in model.parameters()]
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    parts = [(weight.detach() - old).square().sum() for weight, old in zip(model.parameters(), before, strict=True)]
    expected = torch.stack([parts[0] + parts[1], parts[2] + parts[3]]).sqrt()
    squares = moved.finish(["0", "1"])
    assert squares is not None
    torch.testing.assert_close(squares.sqrt(), expected)
    assert moved.finish(["0", "1"]) is None, "there was no step since"


def test_agreement_is_of_the_loss_whatever_is_attributed():
    runs = [
        fit([*watch(), SinkLocalizer(every=2, agreement=True, objective=objective)], DeepLM())[0]
        for objective in ("loss", "margin")
    ]
    loss, margin = ([row.agreement for row in Ledger.of(run).attribution.rows] for run in runs)
    assert loss == margin


def test_a_layer_below_which_all_is_frozen_is_named_and_the_others_are_attributed():
    model = DeepLM()
    for part in (model.embed, model.mlp[0]):
        part.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"SinkLocalizer attributes nothing to mlp\.2: no gradient came"):
        run, _ = fit([*watch(), SinkLocalizer(every=1)], model)
    first, *others = Ledger.of(run).attribution.rows[-1].shares["learned"]
    assert first == 0 and sum(others) == pytest.approx(1, abs=1e-4)
