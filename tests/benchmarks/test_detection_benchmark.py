"""The benchmark of detection: groups of samples, settings, and that all of it runs."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from benchmarks.common.training import Schedule
from benchmarks.detection import benchmark, group_report, group_runs, runs
from benchmarks.detection.group_runs import GroupFindings
from benchmarks.detection.groups import GROUPS, GroupSizes, draw_groups
from benchmarks.detection.population import Sizes
from benchmarks.detection.settings import SETTINGS, Setting, VariedText
from lightning_memsink.examples.corpora import tokenized

TINY = Sizes(
    background=48, held_out=24, repeats=(1, 8), per_rung=3, canaries=3, easy=3, easy_repeats=8, twins=12, once=3,
    noise=2, noise_repeats=4,
)  # fmt: skip
TINY_GROUPS = GroupSizes(
    background=24, held_out=24, repeats=(2, 8), natural=2, canaries=2, easy=2, easy_repeats=8, twins=12, once=3,
    noise=2, noise_repeats=4, families=1, members=3,
)  # fmt: skip


def some_texts(many: int = 400) -> list[str]:
    """Documents that a tokenizer can learn something from, no two alike."""
    words = [f"{first}{last}" for first in "bdfgklmnprst" for last in ("a", "el", "in", "or", "ut", "y")]
    pick = torch.randint(len(words), (many, 80), generator=torch.Generator().manual_seed(0))
    return [" ".join(words[n] for n in row) for row in pick.tolist()]


def made_up(seed: int):
    return tokenized(some_texts(), vocab_size=300, seed=seed)


@pytest.fixture(scope="module")
def drawn():
    return draw_groups(made_up(0), 300, TINY_GROUPS, seed=0)


def findings(
    memorization, flagged, *, kind="natural", exposures=2, gap=None, flag_step=0, exact_step=math.inf
) -> GroupFindings:
    """A run whose samples are all alike but for their truth and verdict."""
    truth = torch.tensor(memorization)
    same = torch.ones_like(truth)
    return GroupFindings(
        kind=[kind] * len(truth),
        repeats=torch.ones(len(truth), dtype=torch.int64),
        memorization=truth,
        gap=truth if gap is None else torch.tensor(gap),
        p=same,
        flagged=torch.tensor(flagged),
        verdict=torch.tensor(flagged).byte() * 3,
        last_step=same.int(),
        exposures=(exposures * same).int(),
        flag_step=flag_step * same,
        exact_step=exact_step * same,
    )


# Groups -------------------------------------------------------------------------------------------------------------


def test_no_group_trains_on_what_another_has_or_on_a_control(drawn):
    texts = [set(map(tuple, group.tokens[~group.of("noise")].tolist())) for group in drawn.groups] + [
        set(map(tuple, drawn.controls.tolist()))
    ]
    assert len(drawn.groups) == GROUPS
    for number, own in enumerate(texts):
        assert all(own.isdisjoint(other) for other in texts[number + 1 :])


def test_groups_are_of_the_same_kinds_and_as_many_each(drawn):
    first, *others = ((group.kind, group.repeats.tolist(), len(group.rows())) for group in drawn.groups)
    assert all(other == first for other in others)
    shown = torch.bincount(drawn.groups[0].rows())
    assert torch.equal(shown, drawn.groups[0].repeats)
    more = torch.bincount(drawn.groups[0].rows(times=3))
    assert torch.equal(more, torch.where(shown > 1, 3 * shown, shown))


@pytest.mark.parametrize("kind", ["background", "natural", "canary", "easy", "shuffled", "template", "near", "noise"])
def test_every_kind_has_controls_that_are_drawn_alike(drawn, kind):
    assert drawn.groups[0].of(kind).any()
    assert drawn.controls_of(kind).sum() >= TINY_GROUPS.twins


def test_near_duplicates_differ_in_about_a_tenth_of_their_tokens(drawn):
    group = drawn.groups[0]
    family = group.tokens[group.of("near")]
    different = (family[0] != family[1:]).float().mean()
    assert 0.05 < different < 0.4


# Settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_trains_a_causal_model(name):
    torch.manual_seed(0)
    module = VariedText(SETTINGS[name], 40, 24, steps=100)
    tokens = torch.randint(40, (3, 24))
    loss = module.training_step({"input_ids": tokens}, 0)
    assert loss.requires_grad and math.log(40) * 0.7 < loss < math.log(40) * 1.5
    module.eval()
    with torch.no_grad():
        before = module.gpt(input_ids=tokens).logits
        tokens[:, 12:] = 0
        assert_close(module.gpt(input_ids=tokens).logits[:, :12], before[:, :12])


def test_the_learning_rate_rises_and_falls_to_0_where_it_decays():
    module = VariedText(SETTINGS["decay"], 40, 24, steps=100)
    schedule = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[0]
    assert [round(schedule(step), 4) for step in (0, 29, 50, 100)] == [0.0333, 0.71, 0.5, 0]


def test_label_smoothing_is_a_mixture_with_the_uniform_distribution():
    torch.manual_seed(0)
    module = VariedText(Setting("smoothed", label_smoothing=0.1), 40, 24, steps=9).eval()
    tokens = torch.randint(40, (3, 24))
    with torch.no_grad():
        loss = module.training_step({"input_ids": tokens}, 0)
        log_p = module.gpt(input_ids=tokens).logits[:, :-1].log_softmax(-1)
    own = -log_p.gather(-1, tokens[:, 1:, None]).mean()
    assert_close(loss, 0.9 * own - 0.1 * log_p.mean())


# Criteria -----------------------------------------------------------------------------------------------------------


def values(setting, seeds):
    return {
        each.name.removeprefix(f"{setting.title}: "): (each.value, each.holds)
        for each in group_report.criteria({setting: seeds})
    }


def test_rates_are_of_the_worst_seed_and_discoveries_of_all():
    good = findings([2.0, 2.0, 0.0, 0.0], [True, True, False, False])
    bad = findings([2.0, 2.0, 0.0, 0.0], [True, False, True, False])
    found = values(Setting("toy"), [[good], [bad]])
    assert found["live AUROC"] == (1.0, True)
    assert found["live TPR above 1 nats"] == (0.5, False)
    assert found["live FPR"] == (0.5, False)
    assert found["live FDR, bound with 2 s.e."] == (pytest.approx(0.25), True)  # one of four; few cases prove nothing


def test_a_sample_without_a_gap_ranks_last():
    found = values(Setting("toy"), [[findings([2.0, 0.0], [True, False], gap=[math.nan, 0.0])]])
    assert found["live AUROC"] == (0.0, False)


def test_a_flag_at_the_evaluation_of_the_first_exact_match_is_not_before_it():
    at_once, before = (findings([2.0], [True], flag_step=at, exact_step=4) for at in (4, 3))
    assert values(Setting("toy"), [[at_once, before]])["flagged before first exact match"] == (0.5, False)


def test_samples_seen_twice_have_a_bound_where_there_are_enough():
    twice = findings([2.0] * 20, [True] * 15 + [False] * 5, kind="background")
    assert values(Setting("toy"), [[twice]])["seen twice, above 1 nat: TPR"] == (0.75, False)
    assert "seen twice, above 1 nat: TPR" not in values(Setting("toy"), [[findings([2.0], [True])]])


def test_what_was_never_visited_counts_nowhere():
    unseen = findings([2.0, 0.0], [False, True], exposures=0)
    seen = findings([2.0, 0.0], [True, False])
    found = values(Setting("toy"), [[unseen, seen]])
    assert found["live TPR above 1 nats"] == (1.0, True)
    assert found["live FPR"] == (0.0, True)
    assert found["live FDR, bound with 2 s.e."] == (0.0, True)


# It runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:memsink. .*16 held-out controls", "ignore:memsink. .*are needed"
)  # a setting has none
def test_detection_runs_and_saves_what_a_detector_is_tuned_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runs, "documentation", made_up)
    monkeypatch.setattr(group_runs, "documentation", made_up)
    for name in ("natural", "unvalidated"):
        monkeypatch.setitem(SETTINGS, name, replace(SETTINGS[name], evaluate_every=2))
    monkeypatch.setattr(benchmark, "configure_process", lambda: None)  # other tests read what libraries log
    monkeypatch.setattr(
        benchmark, "run_in_processes", lambda work, jobs: [work(*job) for job in jobs]
    )  # a process would not have the made-up text
    monkeypatch.setattr(benchmark, "QUICK", TINY)
    monkeypatch.setattr(benchmark, "QUICK_GROUPS", TINY_GROUPS)
    monkeypatch.setattr(benchmark, "SCHEDULE", Schedule(evaluate_every=2))
    where = ["--save", str(tmp_path), "--json", str(tmp_path / "out")]
    settings = ["--setting", "standard", "natural", "unvalidated"]
    code = benchmark.main(["--quick", "--seeds", "1", "--first-seed", "0", *settings, *where])
    written = json.loads((tmp_path / "out").read_text())
    assert code == (0 if all(each["holds"] for each in written["criteria"]) else 1)
    names = [each["name"] for each in written["criteria"]]
    assert "live AUROC, worst seed" in names
    assert "controls of natural text only: canaries found" in names
    assert "one epoch, no validation set: live TPR above 2 nats" in names
    assert capsys.readouterr().out.splitlines()[-1].startswith("detection: live AUROC ")
    kept = torch.load(tmp_path / "detection_0.pt", weights_only=True)
    assert kept["main"]["tested_nll"].shape[0] == len(kept["memorization"]) == len(kept["flagged"])
    assert kept["trained_losses"].shape == (len(kept["main"]["evaluation_step"]), len(kept["trained"]))
