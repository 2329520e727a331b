"""SampleGradientMask in whole runs: its promises on the weights and on the samples."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.callbacks.sample_gradient_mask import SampleGradientMask
from lightning_memsink.detection.verdicts import Verdict
from lightning_memsink.ledger import Ledger
from lightning_memsink.losses.step_reader import StepReader
from lightning_memsink.mitigation.gradient_routing import reserved_units, route
from lightning_memsink.reporting.mitigation_summary import action_series, what_was_done
from lightning_memsink.samples.hashing import content_ids
from tests.support.small_runs import (
    CANARIES,
    CONTROLS,
    TRAIN,
    Rows,
    TinyLM,
    chain,
    control_loader,
    fit,
    noise,
    snapshot,
    train_loader,
    watch,
    weights,
)

ACTING = [
    {"mode": "hold"},
    {"mode": "hold", "at": 0.5},
    {"mode": "skip"},
    {"mode": "attenuate", "weight": 0.1},
    {"mode": "route"},
]
EPOCHS = 4


@pytest.fixture(scope="module")
def plain() -> tuple[Trainer, LightningModule]:
    return fit(watch(), max_epochs=6)


def loss_of(model: Any, tokens: Tensor) -> float:
    return model.loss({"input_ids": tokens}).item()


def canary_ids() -> Tensor:
    return content_ids({"input_ids": CANARIES})


def facts(run: Trainer, model: LightningModule) -> tuple[str, str]:
    return snapshot(run, model), repr(Ledger.of(run).interventions["SampleGradientMask"].state_dict())


def test_hold_keeps_canaries_near_the_set_point_and_helps_the_rest(plain):
    """Where the plain run knows them by heart. Each comes 1.5 times a step here, so a step overshoots by as much."""
    mask = SampleGradientMask(at=0.5)
    _, model = fit([*watch(), mask], max_epochs=6)
    never_seen = noise(60, seed=77)
    assert loss_of(plain[1], CANARIES) < 0.2
    assert loss_of(model, never_seen) - loss_of(model, CANARIES) < 2.5
    assert loss_of(model, chain(60, seed=77)) < loss_of(plain[1], chain(60, seed=77))
    totals = {name: mask.interventions.total(name) for name in ("visits", "acted", "removed", "unmatched", "unknown")}
    assert totals["visits"] == 6 * len(TRAIN) and totals["unmatched"] == 0
    assert 0 < totals["acted"] < totals["visits"] and totals["removed"] == pytest.approx(
        totals["acted"] / totals["visits"], abs=0.01
    )
    assert len(TRAIN) > totals["unknown"] >= 200, "a sample has no features before its first visit was recorded"


def test_a_set_point_that_is_measured_holds_canaries_and_helps_the_rest(plain):
    """A quarter of the visits here are of canaries. Samples of the chain are all at one loss, whatever their number."""
    mask = SampleGradientMask()
    run, model = fit([*watch(), mask], max_epochs=6)
    assert loss_of(model, CANARIES) > loss_of(plain[1], CANARIES) + 2
    assert loss_of(model, chain(60, seed=77)) < loss_of(plain[1], chain(60, seed=77))
    records = mask.interventions.records
    assert "set_point" not in records[0] and records[0]["acted"] == 0, "there was no evaluation to compare with"
    assert all(math.isfinite(each["set_point"]) for each in records[2:])
    assert action_series({"hold": mask.interventions})["mitigation/hold/set_point"] == mask.set_point.value
    assert mask.set_point.value in [each.get("set_point") for each in records]
    words = " ".join(what_was_done(Ledger.of(run).interventions, None))
    assert "0.5 nats further below their matched controls than samples usually are" in words
    assert "Its set point moved with the run, between" in words


def test_a_set_point_that_cannot_be_measured_is_said_once():
    """Each evaluation has other controls: nothing tells whether they improve."""

    class Others(DataLoader):
        def __iter__(self):
            self.times = getattr(self, "times", 0) + 1
            return iter(control_loader(chain(60, seed=100 + self.times)))

    mask = SampleGradientMask()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit([*watch(), mask], max_epochs=4, controls=Others(Rows(chain(60, seed=1)), 20))
    said = [str(each.message) for each in caught if "set point" in str(each.message)]
    assert len(said) == 1 and "could not be measured in 4 evaluations" in said[0] and "at=0.75" in said[0]
    assert mask.interventions.total("acted") == 0


def test_a_higher_set_point_lets_more_be_memorized():
    losses = [loss_of(fit([*watch(), SampleGradientMask(at=at)], max_epochs=EPOCHS)[1], CANARIES) for at in (0.5, 3.0)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    "options", [{"at": 1e9}, {"mode": "skip"}, {"mode": "attenuate", "weight": 1.0}, {"mode": "route"}]
)
def test_with_nothing_to_act_on_weights_are_those_of_a_run_without_it(options):
    """An unreachable set point; text without repeats, of which nothing is flagged; a weight of one."""
    run: dict[str, Any] = {"max_epochs": 2}
    if options.get("mode") in ("skip", "route"):
        run |= {"train": train_loader(chain(100, seed=1)), "controls": control_loader(chain(60, seed=2))}
    _, without = fit(watch(), **run)
    state = torch.get_rng_state()
    _, model = fit([*watch(), SampleGradientMask(**options)], **run)
    assert torch.equal(weights(model), weights(without))
    assert torch.equal(torch.get_rng_state(), state)


def test_skip_holds_for_good_and_attenuate_by_weight(plain):
    """The flag goes when the loss has risen again; the latch stays."""
    mask = SampleGradientMask("skip")
    run, skipped = fit([*watch(), mask], max_epochs=6)
    ledger = Ledger.of(run)
    assert torch.isin(canary_ids(), mask.latched).all()
    rows = ledger.losses.index.find(canary_ids())
    assert not (ledger.flags.verdict[rows] == Verdict.MEMORIZED).all()
    attenuated = fit([*watch(), SampleGradientMask("attenuate", weight=0.1)], max_epochs=6)[1]
    losses = [loss_of(model, CANARIES) for model in (plain[1], attenuated, skipped)]
    assert losses == sorted(losses) and losses[2] > 2


def test_attenuating_by_zero_is_skipping():
    models = [
        fit([*watch(), mask], max_epochs=EPOCHS)[1]
        for mask in (SampleGradientMask("skip"), SampleGradientMask("attenuate", weight=0.0))
    ]
    assert torch.equal(*(weights(model) for model in models))


class Excluding(TinyLM):
    """The oracle of `skip`: leaves samples out by hand, with the denominator of the whole batch."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__()
        self.ids = ids

    def training_step(self, batch, batch_idx):
        if self.global_step < 21:
            return self.loss(batch)
        logits = self.logits(batch["input_ids"])
        out = torch.isin(content_ids(batch), self.ids)
        logits = torch.where(out[:, None, None], logits.detach(), logits)
        return F.cross_entropy(logits.flatten(0, 1), batch["input_ids"][:, 2:].flatten())


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}, {"gradient_clip_val": 0.5}], ids=str)
def test_a_latched_sample_leaves_as_if_detached_by_hand(options):
    """Ids are latched by hand from the second epoch on; also in micro-batches and under clipping."""

    class LatchedAtStep(SampleGradientMask):
        def _latch_flagged(self, ledger):
            self.latched = canary_ids().sort().values if self.now() >= 21 else self.latched

        def on_train_batch_start(self, trainer, *args):
            self.now = lambda: trainer.global_step
            super().on_train_batch_start(trainer, *args)

    _, by_hand = fit([], Excluding(canary_ids()), max_epochs=2, **options)
    _, model = fit([*watch(), LatchedAtStep("skip")], max_epochs=2, **options)
    assert torch.equal(weights(model), weights(by_hand))


@pytest.mark.parametrize("options", ACTING, ids=str)
def test_callbacks_agree_in_any_order(options):
    found = set()
    for order in [(0, 1, 2), (2, 1, 0), (1, 2, 0)]:
        crew = [*watch(), SampleGradientMask(**options)]
        found.add(facts(*fit([crew[at] for at in order], max_epochs=2)))
    assert len(found) == 1


@pytest.mark.parametrize("options", ACTING, ids=str)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, options):
    def crew() -> list[Any]:
        keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        return [*watch(flush_every=10), SampleGradientMask(**options), keep]

    whole = fit(crew(), max_epochs=EPOCHS, enable_checkpointing=True)
    resumed = fit(crew(), max_epochs=EPOCHS, ckpt_path=str(tmp_path / "epoch=1.ckpt"), enable_checkpointing=True)
    assert Ledger.of(whole[0]).interventions["SampleGradientMask"].total("acted") > 0
    assert facts(*resumed) == facts(*whole)


def test_routing_keeps_values_and_opens_reserved_units_only():
    hidden = torch.randn(3, 4, 10, requires_grad=True)
    layer = find_hidden_layers(nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2)))[0]
    samples, units = torch.tensor([True, False, True]), reserved_units(layer, 0.25)
    assert units.nonzero().flatten().tolist() == [8, 9]
    routed = route(hidden, samples, units)
    assert torch.equal(routed, hidden)
    routed.sum().backward()
    for sample in range(3):
        open_units = [8, 9] if samples[sample] else range(10)
        expected = torch.tensor([float(unit in open_units) for unit in range(10)])
        assert torch.equal(hidden.grad[sample], expected.expand(4, 10))
    images = torch.randn(10, 3, 4, requires_grad=True)
    route(images, samples, units, batch_axis=1, unit_axis=0).sum().backward()
    assert images.grad[:, 0].sum(1).tolist() == [0.0] * 8 + [4.0] * 2 and images.grad[:, 1].eq(1).all()


@pytest.mark.filterwarnings("ignore:memsink. only one evaluation takes place:UserWarning")
def test_a_routed_sample_moves_reserved_rows_of_the_up_projection_only():
    """Alone in its batch, with its id latched by hand."""
    mask = SampleGradientMask("route", reserved=0.25)
    mask.latched = canary_ids().sort().values

    class Plain(TinyLM):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    model, before = Plain(), Plain().state_dict()
    fit([*watch(), mask], model, train=train_loader(CANARIES, batch_size=4), max_epochs=1, val_check_interval=1)
    moved = (model.mlp[0].weight.detach() - before["mlp.0.weight"]).abs().sum(1) > 0
    assert not moved[:96].any() and moved[96:].any()
    assert mask.interventions.total("acted") == 4 and mask.interventions.total("removed") == 0.75
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_step_is_searched_once_for_all_and_its_graph_is_released(monkeypatch):
    searched: list[Tensor] = []
    search = StepReader._nodes

    def counting(reader: StepReader, loss: Tensor, loss_scale: float) -> Any:
        searched.append(loss.detach())
        return search(reader, loss, loss_scale)

    monkeypatch.setattr(StepReader, "_nodes", counting)
    for place in (0, 2):  # the mask before the tracker, and behind both
        crew = watch()
        crew.insert(place, SampleGradientMask("hold"))
        searched.clear()
        run, _ = fit(crew, max_epochs=2)
        assert len(searched) == run.global_step and crew[place].interventions.total("acted") > 0
        reader = Ledger.of(run).batch.reader
        assert reader._read is None and not reader.leaves and not reader.watch.seen.reductions


class Writes(Callback):
    def __init__(self, folder: Any) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        actions = trainer.callbacks[2].interventions
        facts = {"snapshot": snapshot(trainer, pl_module), "acted": actions.total("acted")}
        torch.save(facts | {"loss": loss_of(pl_module, CANARIES)}, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.filterwarnings("ignore:.*recommended to use .*sync_dist")
@pytest.mark.parametrize("mode", ["hold", "skip"])
def test_each_rank_decides_for_its_own_batch_and_replicas_stay_alike(tmp_path, mode):
    loaders = {"train": DataLoader(Rows(TRAIN), 8, shuffle=True), "controls": DataLoader(Rows(CONTROLS), 20)}
    crew = [*watch(), SampleGradientMask(mode), Writes(tmp_path)]
    fit(crew, strategy="ddp_fork", devices=2, max_epochs=6, **loaders)
    one, other = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert one["snapshot"] == other["snapshot"] and one["loss"] == other["loss"] > 1
    assert one["acted"] > 0 and other["acted"] > 0
