"""``SampleGradientMask(sources=[...])`` acts on samples of these sources and on no others."""

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_memsink import SampleGradientMask
from lightning_memsink.examples.resumable import EpochShuffledSampler
from lightning_memsink.ledger import Ledger
from lightning_memsink.reporting.source_section import source_rows
from lightning_memsink.samples.chosen_sources import ChosenSources
from lightning_memsink.samples.hashing import content_ids
from tests.callbacks.test_sample_gradient_mask import loss_of
from tests.support.small_runs import CANARIES, TRAIN, Rows, fit, watch, weights
from tests.support.sourced import sourced

MODES = [{"mode": "hold"}, {"mode": "skip"}, {"mode": "attenuate"}, {"mode": "route"}]
EPOCHS = 6


class Labelled(Rows):
    """Canaries are of sources "a" and "b" in turn, the rest is of "web"."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "source": "web" if index < 200 else "ab"[index % 2]}


def run(mask):
    train = DataLoader(Labelled(TRAIN), 16, sampler=EpochShuffledSampler(len(TRAIN)))
    return fit([*watch(), mask] if mask else watch(), train=train, max_epochs=EPOCHS)


def ids_of(places):
    return content_ids({"input_ids": CANARIES[places]}, len(CANARIES[places]))


@pytest.fixture(scope="module")
def plain():
    return run(None)[1]


def test_hold_keeps_the_losses_of_its_sources_up_and_leaves_others_to_be_learned(plain):
    mask = SampleGradientMask(sources=["a"])
    _, model = run(mask)
    of_a, of_b = loss_of(model, CANARIES[::2]), loss_of(model, CANARIES[1::2])
    assert loss_of(plain, CANARIES) < 0.2
    assert of_a > 2 and of_b < 0.5
    assert 0 < mask.interventions.total("acted") <= EPOCHS * 64
    assert "of the source a" in mask.interventions.description
    assert mask.interventions.by_source == {"a": mask.interventions.total("acted")}


def test_skip_latches_its_sources_only(plain):
    mask = SampleGradientMask("skip", sources=["a"])
    _, model = run(mask)
    assert torch.isin(ids_of(slice(0, None, 2)), mask.latched).all()
    assert not torch.isin(ids_of(slice(1, None, 2)), mask.latched).any()
    assert loss_of(model, CANARIES[::2]) > 2 and loss_of(model, CANARIES[1::2]) < 0.5


@pytest.mark.parametrize("options", MODES)
def test_what_was_done_is_counted_by_source(options):
    mask = SampleGradientMask(**options)
    trainer, _ = run(mask)
    ledger = Ledger.of(trainer)
    done = mask.interventions.by_source
    assert sum(done.values()) == mask.interventions.total("acted") > 0 and {"a", "b"} <= set(done)
    rows = {row["source"]: row for row in source_rows(ledger.losses, ledger.flags, ledger.interventions)}
    assert rows["a"]["acted_on"] == done["a"] / rows["a"]["exposures"] > rows["web"]["acted_on"]
    again = SampleGradientMask(**options)
    again.load_state_dict(mask.state_dict())
    assert again.interventions.by_source == done


@pytest.mark.parametrize("options", MODES)
def test_naming_every_source_is_naming_none(options):
    models = [run(SampleGradientMask(**options, sources=sources))[1] for sources in (["a", "b", "web"], None)]
    assert torch.equal(*(weights(model) for model in models))


@pytest.mark.parametrize("options", MODES)
def test_sources_that_no_sample_has_change_nothing_and_are_said(options, plain):
    with pytest.warns(UserWarning, match=r"names 'nobody', 'other', and no sample of this run has that source") as said:
        _, model = run(SampleGradientMask(**options, sources=["nobody", "other"]))
    assert len([w for w in said if "no sample of this run" in str(w.message)]) == 1
    assert torch.equal(weights(model), weights(plain))


def test_without_labels_nothing_is_acted_on():
    mask = SampleGradientMask(sources=["a"])
    with pytest.warns(UserWarning, match="Labels come from batch"):
        trainer, _ = fit([*watch(), mask], max_epochs=2)
    assert mask.interventions.total("acted") == 0 and len(Ledger.of(trainer).losses) > 0


@pytest.mark.parametrize("sources", ["a", b"a", [], (), {"a"}, 3])
def test_what_is_no_list_of_labels_is_refused(sources):
    with pytest.raises(ValueError, match="sources is a list of labels with at least one"):
        SampleGradientMask(sources=sources)


def test_chosen_sources_know_rows_and_labels_that_come_late():
    from lightning_memsink.detection.verdicts import Verdict

    table, _ = sourced({3: {Verdict.LEARNED: 2}, None: {Verdict.LEARNED: 1}, "b": {Verdict.HARD: 1}})
    chosen = ChosenSources([3, "late"])
    assert chosen.includes(table, torch.tensor([0, 1, 2, 3, -1])).tolist() == [True, True, False, False, False]
    assert chosen.missing(table) == ["late"]
    table.write("source", torch.tensor([2]), table.source_names.codes(["late"]))
    assert chosen.includes(table, torch.tensor([2, -1])).tolist() == [True, False] and chosen.missing(table) == []
