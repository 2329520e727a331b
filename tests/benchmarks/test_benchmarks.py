"""The arithmetic of benchmarks, and that each of them runs."""

import json
import math
import platform
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from benchmarks.common.criteria import Criterion, Report, argument_parser, environment, fresh_seeds
from benchmarks.common.training import CONTINUATION, PROMPT, Sequences, TextModel, exact_match, token_nll
from benchmarks.common.workloads import WORKLOADS
from benchmarks.detection import scores
from benchmarks.detection.population import Sizes, populate
from benchmarks.overhead import attribution as attribution_cost
from benchmarks.overhead import benchmark as overhead
from benchmarks.overhead.attribution_tasks import Text, texts
from benchmarks.overhead.gradient_peers import OURS, Task
from lightning_memsink.examples.corpora import tokenized

TINY = Sizes(
    background=48, held_out=24, repeats=(1, 8), per_rung=3, canaries=3, easy=3, easy_repeats=8, twins=12, once=3,
    noise=2, noise_repeats=4,
)  # fmt: skip


def some_texts(many: int = 400) -> list[str]:
    """Documents that a tokenizer can learn something from, no two alike."""
    words = [f"{first}{last}" for first in "bdfgklmnprst" for last in ("a", "el", "in", "or", "ut", "y")]
    pick = torch.randint(len(words), (many, 80), generator=torch.Generator().manual_seed(0))
    return [" ".join(words[n] for n in row) for row in pick.tolist()]


@pytest.fixture(scope="module")
def people():
    return populate(tokenized(some_texts(), vocab_size=300), 300, TINY, seed=0)


# Criteria and reports -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "sense", "holds"),
    [
        *((0.98, ">=", True), (0.97, ">=", True), (0.96, ">=", False), (math.nan, ">=", False)),
        *((0.96, "<=", True), (0.97, "<=", True), (0.98, "<=", False), (math.nan, "<=", False)),
    ],
)
def test_a_criterion_holds_at_its_bound_and_never_for_nan(value, sense, holds):
    criterion = Criterion("AUROC", value, sense, 0.97)
    assert criterion.holds is holds
    assert str(criterion).startswith("holds" if holds else "falls short")


@pytest.mark.parametrize(("value", "code"), [(1.0, 0), (0.0, 1)])
def test_a_report_prints_its_figure_last_writes_json_and_exits_with_1_if_a_criterion_falls_short(
    tmp_path, capsys, value, code
):
    report = Report("toy", [], [Criterion("share", value, ">=", 0.5)], "toy: one line", {"seeds": [3]})
    assert report.publish(tmp_path / "toy.json") == code
    assert capsys.readouterr().out.splitlines()[-1] == "toy: one line"
    written = json.loads((tmp_path / "toy.json").read_text())
    assert written["name"] == "toy"
    assert written["criteria"] == [{"name": "share", "value": value, "bound": 0.5, "sense": ">=", "holds": code == 0}]
    assert written["environment"]["seeds"] == [3]


def test_json_holds_null_for_a_value_that_could_not_be_measured():
    report = Report("toy", [], [Criterion("share", math.nan, ">=", 0.5)], "", {})
    assert json.loads(json.dumps(report.as_json(), allow_nan=False))["criteria"][0]["value"] is None


def test_the_environment_names_versions_and_neither_host_nor_path():
    text = json.dumps(environment())
    assert torch.__version__ in text
    assert platform.node() not in text
    assert "/" not in text


def test_seeds_are_fresh_unless_a_run_is_repeated():
    parser = argument_parser("toy", "", seeds=3)
    assert fresh_seeds(parser.parse_args([])) != fresh_seeds(parser.parse_args([]))
    assert fresh_seeds(parser.parse_args(["--first-seed", "7", "--seeds", "2"])) == [7, 8]


# Scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", [scores.final_loss, scores.min_k])
def test_what_is_predicted_better_scores_higher(score):
    worse, better = score(torch.tensor([[2.0, 3.0, 9.0, 4.0, 5.0], [1.0, 1.0, 2.0, 1.0, 1.0]]))
    assert better > worse


def test_min_k_is_the_mean_of_the_hardest_tokens():
    nll = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    slow = torch.tensor([-sum(sorted(row, reverse=True)[:2]) / 2 for row in nll.tolist()])
    assert_close(scores.min_k(nll, share=0.2), slow)


def test_cartography_is_mean_and_standard_deviation_over_the_visits():
    ids, probabilities = torch.tensor([0, 2, 0, 2, 2]), torch.tensor([0.1, 0.5, 0.3, 0.9, 0.4])
    confidence, variability = scores.cartography(ids, probabilities, samples=3)
    for sample in (0, 2):
        assert_close(confidence[sample], probabilities[ids == sample].mean())
        assert_close(variability[sample], probabilities[ids == sample].std(unbiased=False))
    assert confidence[1].isnan()


def test_a_run_that_learned_its_controls_as_much_memorized_nothing():
    main, twin = torch.tensor([3.0, 1.0]), torch.tensor([5.0, 5.0])
    controls = torch.tensor([3.5, 3.5]), torch.tensor([5.5, 5.5])
    assert_close(scores.counterfactual(main, twin, *controls), torch.tensor([0.0, 2.0]))


def test_auroc_counts_pairs_and_ranks_unmeasured_samples_lowest():
    score = torch.tensor([3.0, torch.nan, 2.0, 1.0, torch.nan])
    positive = torch.tensor([True, True, False, False, False])
    above = [1.0, 1.0, 1.0, 0.0, 0.0, 0.5]  # 3 over 2, 1, nothing; nothing under 2 and 1, as good as nothing
    assert scores.auroc(score, positive, ~positive) == pytest.approx(sum(above) / len(above))
    assert math.isnan(scores.auroc(score, positive, torch.zeros(5).bool()))


# Twin runs --------------------------------------------------------------------------------------------------------


def test_the_twin_sees_no_tested_sample_and_as_much_text(people):
    assert not torch.isin(people.tested[~people.of("noise")], people.twin).any()
    assert len(people.twin) == len(people.main)
    shown = torch.bincount(people.main, minlength=len(people.tokens))[people.tested]
    assert torch.equal(shown, people.repeats)


def test_no_control_is_trained_on(people):
    trained = set(map(tuple, people.tokens[torch.cat([people.main, people.twin])].tolist()))
    assert trained.isdisjoint(map(tuple, people.controls.tolist()))


def test_a_noise_id_has_other_tokens_each_time(people):
    data = Sequences(people.tokens, people.main, people.noise, 300, seed=0)
    where = int((people.main == people.noise[0]).nonzero()[0])
    first, second = data[where], data[where]
    assert first["sample_id"] == second["sample_id"] == people.noise[0]
    assert not torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(data[0]["input_ids"], data[0]["input_ids"])


def test_exact_match_is_what_greedy_generation_repeats():
    torch.manual_seed(0)
    module = TextModel(vocab_size=40, length=PROMPT + CONTINUATION, layers=1, width=32).eval()
    tokens = torch.randint(40, (4, PROMPT + CONTINUATION))
    generated = tokens[:, :PROMPT]
    for _ in range(CONTINUATION):
        with torch.no_grad():
            generated = torch.cat([generated, module.gpt(input_ids=generated).logits[:, -1:].argmax(-1)], 1)
    tokens[:2] = generated[:2]
    tokens[1, -1] = (tokens[1, -1] + 1) % 40
    assert exact_match(module, tokens).tolist() == [True, False, False, False]


def test_token_nll_averages_to_the_loss_of_the_model():
    torch.manual_seed(0)
    module = TextModel(vocab_size=40, length=24, layers=1, width=32).eval()
    tokens = torch.randint(40, (3, 24))
    with torch.no_grad():
        assert_close(token_nll(module, tokens).mean(), module.gpt(input_ids=tokens, labels=tokens).loss)


# Each benchmark runs ----------------------------------------------------------------------------------------------


def test_watching_changes_no_weight():
    compared = overhead.compare(replace(WORKLOADS[2], steps=8), seeds=[0])
    assert compared.change == 0
    assert [len(fits) for fits in compared.seconds.values()] == [1, 1, 1]
    assert compared.ratio > 0 and compared.noise > 0


def test_attribution_costs_are_of_exact_norms():
    task = Task("small", lambda: Text(1, 32), texts(3), bound=9)
    found = attribution_cost.measure(task, OURS, dict.fromkeys(["plain", *OURS], 0.0), rounds=1, seed=0)
    assert not any(way.fault for way in found.values())
    assert found[attribution_cost.READ].error <= attribution_cost.ERROR
