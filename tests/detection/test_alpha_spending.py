"""What actions that stay may spend: it sums to alpha, and keeps the rate where latching every verdict does not."""

import math

import pytest
import torch

from lightning_memsink.detection.alpha_spending import alpha_of_look, significant_for_good
from lightning_memsink.detection.statistics import benjamini_hochberg
from lightning_memsink.detection.verdicts import Evaluation, Flags, Verdict
from lightning_memsink.samples.loss_table import LossTable


def test_doublings_sum_to_alpha():
    spent = [alpha_of_look(2**doubling, 0.05) for doubling in range(1, 2000)]
    assert math.isclose(sum(spent), 0.05 * (1 - 1 / 2000))
    assert alpha_of_look(1, 0.05) == 0.0 and alpha_of_look(2, 0.05) == 0.025 == alpha_of_look(3, 0.05)
    assert all(alpha_of_look(look + 1, 0.05) <= alpha_of_look(look, 0.05) for look in range(2, 300))


def evaluation(step: int, **changes) -> Evaluation:
    names = "train_loss control_loss gap gap_memorized null_low null_high null_sd threshold p_floor".split()
    return Evaluation(
        **dict(step=step, epoch=0, controls=9, tested=9, counts={}, alpha=0.05, tail="conformal"),
        **dict.fromkeys(names, 0.0) | changes,
    )


def judged(p: list[float], looks: int, looked: int = 0, null_share: float = 1.0) -> tuple[LossTable, Flags]:
    """Samples with these p-values, visited twice, all memorized; after so many looks."""
    table, flags = LossTable(), Flags()
    ids = torch.arange(len(p)).repeat(2)
    table.record(
        ids, torch.ones(len(ids)), torch.arange(2).repeat_interleave(len(p)) * 10 * looks, torch.ones(len(ids))
    )
    flags.grow(len(p))
    flags.p[:], flags.verdict[:] = torch.tensor(p).bfloat16(), int(Verdict.MEMORIZED)
    flags.evaluations = [evaluation(10 * look) for look in range(1, looks)]
    flags.evaluations.append(evaluation(10 * looks, looked=looked, null_share=null_share))
    return table, flags


def test_it_is_the_procedure_of_benjamini_and_hochberg_at_the_level_of_the_look():
    """All samples were visited as often, so their weights are 1."""
    p = [0.001, 0.004, 0.011, 0.02, 0.2, 0.9]
    for looks, passed in ((1, 0), (2, 3), (5, 1), (9, 0), (5000, 0)):
        found = significant_for_good(*judged(p, looks))
        oracle = benjamini_hochberg(torch.tensor(p), alpha_of_look(looks, 0.05))
        assert found.tolist() == oracle.tolist() and found.sum() == passed


def test_where_most_are_memorized_more_pass():
    assert significant_for_good(*judged([0.02] * 6, 5)).sum() == 0
    assert significant_for_good(*judged([0.02] * 6, 5, null_share=0.25)).all()


def test_only_verdicts_of_this_look_count():
    table, flags = judged([1e-4] * 4, 2, looked=2)
    flags.looked = torch.arange(2)
    assert significant_for_good(table, flags).tolist() == [True, True, False, False]
    flags.verdict[0] = int(Verdict.WAITING)
    flags.p[1] = torch.nan
    assert not significant_for_good(table, flags).any()


def test_nothing_is_known_before_the_first_evaluation():
    assert len(significant_for_good(LossTable(), Flags())) == 0
    flags = Flags()
    flags.evaluations.append(evaluation(10))
    assert len(significant_for_good(LossTable(), flags)) == 0


@pytest.mark.parametrize("start", [2, 10])
def test_ever_latched_samples_keep_the_rate_where_plain_latching_does_not(start):
    """25 of 500 samples are shifted by 6 from look ``start`` on, of 100 looks; scores are autocorrelated by .9 a look.
    Of 8,300 controls 300 are the same at every look. A sample counts that two looks in a row flag.

    Latched at half of alpha at every look, a tenth and more of all that was ever latched is false.
    """
    plain, spent, power = [], [], []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        state = torch.randn(800, generator=generator)
        ever = torch.zeros(2, 500, dtype=torch.bool)
        previous = torch.zeros(2, 500, dtype=torch.bool)
        for look in range(1, 101):
            state = 0.9 * state + math.sqrt(1 - 0.81) * torch.randn(800, generator=generator)
            null = torch.cat([state[:300], torch.randn(8000, generator=generator)]).sort().values
            scores = state[300:] + 6 * ((torch.arange(500) < 25) & (look >= start))
            p = (1 + len(null) - torch.searchsorted(null, scores)) / (len(null) + 1)
            levels = (0.025, alpha_of_look(look, 0.05))
            flagged = torch.stack([benjamini_hochberg(p, level) if level else p < 0 for level in levels])
            ever |= flagged & previous
            previous = flagged
        shares = (ever[:, 25:].sum(1) / ever.sum(1).clamp(min=1)).tolist()
        plain.append(shares[0])
        spent.append(shares[1])
        power.append(float(ever[1, :25].float().mean()))
    assert sum(spent) / len(spent) <= 0.05 < 0.1 < sum(plain) / len(plain)
    assert min(power) > 0.95
