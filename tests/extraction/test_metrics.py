import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch.testing import assert_close

from lightning_memsink.extraction.functional import discoverable, exact_match, longest_run, suffix_log_prob
from lightning_memsink.extraction.metrics import (
    MeanOverTexts,
    discoverable_rate,
    edit_similarity,
    exact_match_rate,
    mean_longest_run,
)
from lightning_memsink.extraction.separation import separation


def batches(many=3):
    for seed in range(many):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(4, (5, 6), generator=generator)
        logits = torch.randn(5, 6, 4, generator=generator)
        logits[:2, :-1].scatter_(2, tokens[:2, 1:, None], 5.0)
        yield logits, tokens


def test_batches_add_up():
    metrics = exact_match_rate(2), mean_longest_run(2), discoverable_rate(2, 50, 0.5, top_k=3)
    texts = list(batches())
    for batch in texts:
        for metric in metrics:
            metric.update(*batch)
    whole = torch.cat([logits for logits, _ in texts]), torch.cat([tokens for _, tokens in texts])
    expected = (
        exact_match(*whole, 2),
        longest_run(*whole, 2),
        discoverable(suffix_log_prob(*whole, 2, top_k=3), 50, 0.5),
    )
    assert [float(metric.compute()) for metric in metrics] == [float(each.double().mean()) for each in expected]
    assert 0.3 < float(metrics[0].compute()) < 1


def test_values_that_are_not_finite_are_left_out_and_counted():
    metric = MeanOverTexts(lambda logits, tokens, mask: torch.tensor([1.0, torch.nan, torch.inf, 3.0]))
    assert metric.texts == 0
    metric.update(torch.zeros(4, 2, 3), torch.zeros(4, 2, dtype=torch.int64))
    assert float(metric.compute()) == 2
    assert int(metric.left_out) == 2


def test_edits():
    assert_close(edit_similarity(["kitten", "", "same"], ["sitting", "", "same"]), torch.tensor([1 - 3 / 7, 1, 1]))


@settings(max_examples=40, deadline=None)
@given(
    members=st.lists(st.integers(0, 6), min_size=2, max_size=30),
    controls=st.lists(st.integers(0, 6), min_size=2, max_size=30),
)
def test_the_auroc_is_that_of_scikit_learn_and_lies_in_its_interval(members, controls):
    found = separation(torch.tensor(members).float(), torch.tensor(controls).float())
    truth = [1] * len(members) + [0] * len(controls)
    assert found.auroc == pytest.approx(roc_auc_score(truth, members + controls))
    assert 0 <= found.auroc_low <= found.auroc <= found.auroc_high <= 1


def test_the_interval_covers_the_truth():
    """Normal scores one apart: the area is .760."""
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        members, controls = (torch.randn(40, generator=generator) + mean for mean in (1.0, 0.0))
        found = separation(members, controls)
        covered += found.auroc_low <= 0.7602 <= found.auroc_high
    assert 0.92 <= covered / 300 <= 0.98


def test_all_apart_is_not_all_certain():
    found = separation(torch.arange(10.0) + 100, torch.arange(20.0))
    assert (found.auroc, found.auroc_high, found.tpr, found.fpr) == (1.0, 1.0, 1.0, 0.05)
    assert found.auroc_low == pytest.approx(0.025**0.1)


def test_the_requested_share_of_controls_may_lie_above():
    controls = torch.arange(200.0)
    members = torch.tensor([197.5, 198.5, 199.5, torch.nan])
    found = separation(members, controls, fpr=0.01)
    assert (found.tpr, found.fpr, found.members) == (1.0, 0.01, 3)
    assert separation(members - 1, controls, fpr=0.01).tpr == pytest.approx(2 / 3)


@pytest.mark.parametrize("members", [[], [1.0], [1.0, float("nan")]])
def test_too_few_scores_are_refused(members):
    with pytest.raises(ValueError, match="At least 2 suspected texts and 2 controls"):
        separation(torch.tensor(members), torch.arange(5.0))
