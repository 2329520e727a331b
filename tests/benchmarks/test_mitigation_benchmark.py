"""The mitigation benchmark's own arithmetic, and that each of its arms runs."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial

import pytest
import torch

from benchmarks.common import planted_text as mitigation_data
from benchmarks.common.planted_text import WORLDS, Sizes, source_code
from benchmarks.mitigation import benchmark as mitigation
from benchmarks.mitigation import fine_tuning, ordinary
from benchmarks.mitigation import runs as mitigation_runs
from benchmarks.mitigation.arms import (
    ARMS,
    EVERY_SEED,
    EXTRA,
    GUIDED,
    HOLD,
    HOLD_AUTO,
    MEMSINKS,
    STANDARD,
    SWEEP,
    capped,
    once,
    thinned,
)
from benchmarks.mitigation.figure import draw, frontier, points_of
from benchmarks.mitigation.fine_tuning import REPEATS, Epoch, Tuned, made_up, pretrain, recall_of, sentences, tune
from benchmarks.mitigation.ordinary import Ordinary, train_ordinarily
from benchmarks.mitigation.runs import Learner, Measured, Result, Visits, gpt, run
from lightning_memsink.examples.corpora import tokenized

TINY = Sizes(
    background=64, natural=3, natural_times=8, twice=3, domain=8, domain_times=4, canaries=3, canary_times=8, easy=3,
    easy_times=8, controls=24, twins=12, unseen=24,
)  # fmt: skip
TINY_TUNING = fine_tuning.Sizes(
    pretrained=32,
    pretraining_epochs=1,
    texts=16,
    sentences=2,
    control_texts=12,
    control_sentences=6,
    unseen=12,
    epochs=2,
)


def some_texts(many: int = 600, seed: int = 0) -> list[str]:
    """Documents that a tokenizer can learn something from, no two alike."""
    words = [f"{first}{last}" for first in "bdfgklmnprst" for last in ("a", "el", "in", "or", "ut", "y")]
    pick = torch.randint(len(words), (many, 80), generator=torch.Generator().manual_seed(seed))
    return [" ".join(words[n] for n in row) for row in pick.tolist()]


@pytest.fixture(scope="module")
def corpus():
    return tokenized(some_texts(), vocab_size=300)


@pytest.fixture(autouse=True)
def small_text(monkeypatch, corpus):
    monkeypatch.setattr(mitigation_data, "documentation", lambda seed: corpus)
    for module in (fine_tuning, ordinary):
        monkeypatch.setattr(module, "documentation", lambda seed: corpus)
    for module in (mitigation_data, fine_tuning):
        monkeypatch.setattr(module, "source_code", lambda: some_texts(120, seed=1))


# Who is shown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", WORLDS)
def test_every_sample_is_shown_as_often_as_its_kind_says_and_no_held_out_sample_is(where):
    world = WORLDS[where](TINY, 0)
    shown = Counter(map(tuple, world.tokens[world.rows].tolist()))
    for kind in world.kinds:
        assert {shown[row] for row in map(tuple, kind.shown.tolist())} == {kind.times}
        assert not set(map(tuple, torch.cat([kind.controls, kind.unseen]).tolist())) & set(shown)
        assert not set(map(tuple, kind.controls.tolist())) & set(map(tuple, kind.unseen.tolist()))
        assert torch.equal(world.tokens[world.ids(kind.name)], kind.shown)
    assert set(Counter(once(world, {}).rows.tolist()).values()) == {1}


def test_source_code_has_neither_comments_nor_docstrings(tmp_path):
    (tmp_path / "one.py").write_text('"""Head."""\nX = 1  # note\ndef f(a):\n    """Says."""\n    return a  # why\n')
    assert source_code(tmp_path) == ["def f(a):\n    return a"]


# Rivals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("let", [0, 1, 5, 8])
def test_a_cap_keeps_the_first_visits(let):
    world = WORLDS["E1"](TINY, 0)
    keep, counts, order = capped(world, {"natural": let}), Counter(), []
    for part in world.rows[torch.randperm(len(world.rows), generator=torch.Generator().manual_seed(0))].split(7):
        kept = keep(part, torch.zeros(len(part)))
        counts.update(part[kept].tolist())
        order += kept[part == world.ids("natural")[0]].tolist()
    assert order == [True] * let + [False] * (TINY.natural_times - let)
    assert [counts[row] for row in world.ids("natural").tolist()] == [let] * TINY.natural
    assert all(counts[row] == 1 for row in world.ids("background").tolist())


def test_thinning_shows_samples_the_given_number_of_times():
    world = WORLDS["E2"](TINY, 0)
    shown = Counter(thinned(world, {"domain": 2.4}).rows.tolist())
    assert {shown[row] for row in world.ids("domain").tolist()} == {2}
    assert {shown[row] for row in world.ids("canary").tolist()} == {TINY.canary_times}


def test_a_gate_leaves_out_a_samples_gradient_and_keeps_the_weight_of_the_others():
    torch.manual_seed(0)
    plain = Learner(gpt(50, 16, width=32, layers=1))
    gated = Learner(plain.gpt, gate=lambda ids, losses: ids != 1)
    batch = torch.utils.data.default_collate([Visits(torch.randint(50, (3, 16)), torch.arange(3))[n] for n in range(3)])
    gated.training_step(batch, 0).backward()
    found = plain.gpt.transformer.wte.weight.grad.clone()
    plain.zero_grad()
    parts = [{name: value[n : n + 1] for name, value in batch.items()} for n in (0, 2)]
    (sum(plain.training_step(part, 0) for part in parts) / 3).backward()
    torch.testing.assert_close(plain.gpt.transformer.wte.weight.grad, found)


# Numbers ----------------------------------------------------------------------------------------------------------


def made(arm: str, shown: float, unseen: float, validation: float, where: str = "E1") -> Result:
    kind = {"E1": "natural", "E2": "domain"}[where]
    kinds = {
        "background": Measured(10, 4.0, validation, 0.0),
        kind: Measured(4, shown, unseen, 0.0),
        "canary": Measured(4, shown, unseen, 0.95),
        "easy": Measured(3, 1.0, 1.0, 1.0, flagged=1 / 3),
        "twice": Measured(9, 1.0, 1.0, 0.0, flagged=0.0),
    }
    return Result(where, arm, 0, kind, kinds)


def test_the_gap_closed_is_a_share_of_the_way_from_standards_loss_to_that_of_unseen_twins():
    standard, own = made("standard", 1.0, 4.0, 4.5), made("x", 3.0, 5.0, 4.4)
    assert own.closed(standard, "natural") == (3.0 - 1.0) / (5.0 - 1.0)
    assert standard.closed(standard, "natural") == 0
    assert own.gap == 2.0
    assert own.false_flags == pytest.approx(1 / 12)


def test_a_criterion_takes_the_worst_seed_and_falls_short_if_an_arm_is_missing():
    found = mitigation.Measurements({("E1", STANDARD, 0): made(STANDARD, 1.0, 4.0, 4.5)})
    said = {each.name: each for each in mitigation.criteria(found)}
    assert said["E1, standard: canaries said"].holds
    assert math.isnan(said[f"E1, {MEMSINKS}: canaries said"].value)
    for seed, validation in ((0, 4.4), (1, 4.6)):
        for arm in (STANDARD, MEMSINKS):
            found.results["E1", arm, seed] = made(arm, 1.0, 4.0, 4.5 if arm == STANDARD else validation)
            object.__setattr__(found.results["E1", arm, seed], "seed", seed)
    said = {each.name: each.value for each in mitigation.criteria(found)}
    assert said[f"E1, {MEMSINKS}: validation against standard, nats"] == pytest.approx(0.1)


def test_the_frontier_has_the_arms_that_no_other_beats_on_both_axes():
    generator = torch.Generator().manual_seed(0)
    points = [tuple(row) for row in torch.rand(40, 2, generator=generator).tolist()]
    slow = [one for one in points if not any(o[0] <= one[0] and o[1] <= one[1] and o != one for o in points)]
    assert frontier(points) == sorted(slow)


def test_the_figure_shows_every_arm_as_share_of_the_gap_and_nats_against_standard(tmp_path):
    results = {
        (where, arm, 0): made(arm, shown, 4.0, validation, where)
        for where in ("E1", "E2")
        for arm, shown, validation in ((STANDARD, 1.0, 4.5), (HOLD, 3.0, 4.4), ("deduplicated (oracle)", 3.9, 5.5))
    }
    assert points_of(results, "E2", "background")[HOLD] == pytest.approx((100 / 3, -0.1))
    draw(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


# Fine-tuning ------------------------------------------------------------------------------------------------------


def test_people_differ_by_seed_and_no_name_is_used_twice():
    people = made_up(200, seed=0)
    assert people == made_up(200, seed=0) != made_up(200, seed=1)
    assert len({start for start, _ in people}) == 200
    assert all(len(number) == 8 and number[3] == "-" for _, number in people)


def test_a_number_counts_as_extracted_only_if_each_of_its_tokens_is_the_first_choice(corpus):
    tokenizer = corpus.tokenizer
    people = sentences(3, tokenizer, 48, seed=0)
    for row, (start, number) in enumerate(made_up(3, seed=0)):
        assert tokenizer.decode(people.tokens[row][people.answer[row]].tolist()).strip() == number
        whole = tokenizer.decode(people.tokens[row][people.labels[row] >= 0].tolist())
        assert whole == f"{start} {number}."

    class Parrot(torch.nn.Module):
        """Knows the sentences, but for one token of the second's number and the first token of the third."""

        def forward(self, input_ids):
            following = input_ids.roll(-1, 1)
            wrong = int(people.answer[1].nonzero()[2]) - 1
            following[1, wrong] += 1
            following[2, 0] += 1
            return type("Output", (), {"logits": 50 * torch.nn.functional.one_hot(following % 300, 300).float()})

    module = torch.nn.Module()
    module.gpt = Parrot()
    said, losses = recall_of(module, people)
    assert said.tolist() == [True, False, True]
    assert losses[0] < 1e-4 < losses[1]


def test_fine_tuning_evaluates_every_epoch_and_early_stopping_counts_at_its_best_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tuning, "gpt", partial(gpt, width=32, layers=1))
    pretrain(tmp_path / "model", 0, TINY_TUNING)
    tuned = tune(tmp_path / "model", STANDARD, 0, TINY_TUNING)
    assert [set(epoch.recalled) for epoch in tuned.epochs] == [{*REPEATS, 0}] * 2
    epochs = tuple(Epoch(loss, {1: 1, 4: 0, 0: 5}, {}) for loss in (3.0, 2.0, 2.5))
    assert Tuned("x", 0, 6, epochs, 0.0, "", 0.0).best is epochs[1]
    assert epochs[0].total == 1
    assert tune(tmp_path / "model", MEMSINKS, 0, TINY_TUNING).verdict


def test_ordinary_training_is_measured_after_each_epoch(monkeypatch):
    monkeypatch.setattr(ordinary, "gpt", partial(gpt, width=32, layers=1))
    sizes = ordinary.Sizes(texts=128, controls=32, unseen=16, epochs=3, every=2)
    plain, held = (train_ordinarily(name, 0, sizes) for name in (STANDARD, HOLD_AUTO))
    assert len(plain.held_out) == len(held.held_out) == 3
    assert plain.best == min(plain.held_out) and plain.last == plain.held_out[-1]
    assert math.isnan(plain.acted) and math.isnan(plain.set_point)
    assert held.set_point >= 0.5 and 0 <= held.acted < 0.5


def test_an_ordinary_training_may_cost_no_more_than_a_hundredth_at_its_best_epoch():
    def found(*losses):
        arms = zip((STANDARD, HOLD_AUTO), losses, strict=True)
        trained = {(name, 0): Ordinary(name, 0, own, math.nan, math.nan, 1.0) for name, own in arms}
        said = mitigation.criteria(mitigation.Measurements(ordinary=trained))
        return {each.name.split(": ")[1].split(" against")[0]: each for each in said if each.name[:2] == "E4"}

    good, bad = found((4.0, 3.0, 3.5), (4.0, 3.005, 3.2)), found((4.0, 3.0, 3.5), (4.0, 3.05, 3.49))
    assert good["held-out at its best"].holds and good["held-out at the end"].holds
    assert good["held-out at the end"].value == pytest.approx(-0.3)
    assert not bad["held-out at its best"].holds and not bad["held-out at the end"].holds


# All of it --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ARMS if name not in SWEEP or name == HOLD])
def test_every_arm_runs(name, monkeypatch):
    monkeypatch.setattr(mitigation_runs, "gpt", partial(gpt, width=32, layers=1))
    result = run("E1" if name != HOLD else "E2", name, 0, TINY, {"natural": 2, "canary": 2})
    assert math.isfinite(result.validation)
    assert (result.acted == result.acted) == bool(ARMS[name].acting())
    assert result.kinds["canary"].trained <= (1 if ARMS[name].world is once else TINY.canary_times)


def test_arms_of_every_seed_run_on_the_first_seed_too():
    for where, names in EVERY_SEED.items():
        first, later = (mitigation.arms_of(where, which, quick=False) for which in (True, False))
        assert list(names) == later
        assert set(later) < set(first) <= set(ARMS)
        assert mitigation.arms_of(where, True, quick=False, extent="few") == later
        asked = mitigation.arms_of(where, True, quick=False, extent="all")
        assert asked == [*first, *EXTRA[where]] and len(set(asked)) == len(asked)
        assert set(asked) <= set(ARMS)
    assert set(GUIDED) <= set(mitigation.arms_of("E2", True, quick=False))
    assert set(mitigation.arms_of("E3", True, quick=True)) < set(mitigation.arms_of("E3", True, quick=False))


def test_a_report_of_few_arms_is_printed_and_written(tmp_path, capsys):
    found = mitigation.Measurements(
        {("E1", arm, 0): made(arm, 1.0, 4.0, 4.5) for arm in (STANDARD, HOLD)},
        {
            (STANDARD, 0): Tuned(
                STANDARD,
                0,
                18,
                (Epoch(3.0, dict.fromkeys((0, *REPEATS), 1), dict.fromkeys((0, *REPEATS), 2.0)),),
                math.nan,
                "",
                1.0,
            )
        },
    )
    one = mitigation.report(found, [0], 1.0, only=["E1"])
    assert {each.name[:2] for each in one.criteria} == {"E1"} and len(one.tables) == 1
    assert mitigation.report(found, [0], 1.0).publish(tmp_path / "out.json") == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("mitigation: ")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["environment"]["measured"]["E1/standard/0"]["kinds"]["easy"]["samples"] == 3
