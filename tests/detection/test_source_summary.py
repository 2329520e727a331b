"""Numbers of sources against sums over their texts, one by one."""

import math
from dataclasses import replace

import pytest
import torch

from lightning_memsink.detection.source_shares import source_shares
from lightning_memsink.detection.source_summary import MEASURED, TAKEN, Z, source_onsets, summarize_sources
from lightning_memsink.detection.verdicts import Flags, Verdict
from lightning_memsink.samples.loss_table import LossTable
from tests.support.sourced import TOKENS, sourced

V = Verdict


def random_ledger(samples: int = 500, sources: int = 7):
    generator = torch.Generator().manual_seed(3)
    verdicts = torch.randint(len(Verdict), (samples,), generator=generator).tolist()
    labels = torch.randint(-1, sources, (samples,), generator=generator).tolist()
    table, flags = sourced({None: {V.LEARNED: samples}})
    table.write("source", torch.arange(samples), torch.tensor(labels))
    table.source_names.codes(map(str, range(sources)))
    table.columns["elements"][:samples] = torch.randint(1, 50, (samples,), generator=generator).bfloat16()
    table.columns["exposures"][:samples] = torch.randint(1, 9, (samples,), generator=generator).int()
    flags.verdict[:] = torch.tensor(verdicts, dtype=torch.uint8)
    flags.gap[:] = torch.randn(samples, generator=generator).half()
    flags.gap[::17] = torch.nan
    return table, flags


def test_every_number_is_a_sum_over_the_texts_of_the_source():
    table, flags = random_ledger()
    summary = summarize_sources(table, flags)
    assert summary.codes.tolist() == list(range(-1, 7))
    null = flags.null_gaps.double()
    everywhere = sum(int(flags.verdict[n]) in MEASURED and math.isfinite(flags.gap[n]) for n in range(len(table)))
    known = 0
    for place, code in enumerate(summary.codes.tolist()):
        own = [n for n in range(len(table)) if int(table.source[n]) == code]
        measured = [n for n in own if int(flags.verdict[n]) in MEASURED and math.isfinite(flags.gap[n])]
        seen_once = [n for n in own if int(table.exposures[n]) == 1]
        drawn = [n for n in seen_once if n in measured]
        stands_for = sum(float(table.elements[n]) for n in seen_once) / max(1, sum(map(float, table.elements[drawn])))
        tokens = [float(table.elements[n]) * (stands_for if n in drawn else 1) for n in measured]
        each = [float(flags.gap[n]) - float(null.mean()) for n in measured]
        bits = sum(gap * t for gap, t in zip(each, tokens, strict=True)) / math.log(2)
        assert summary.samples[place] == len(own) and summary.measured[place] == len(measured)
        assert summary.tokens[place] == sum(float(table.elements[n]) for n in own)
        assert summary.exposures[place] == sum(int(table.exposures[n]) for n in own)
        assert summary.repeated[place] == sum(int(table.exposures[n]) > 1 for n in own)
        assert summary.memorized[place] == sum(int(flags.verdict[n]) == V.MEMORIZED for n in measured)
        if 2 * float(table.elements[measured].double().sum()) < float(table.elements[own].double().sum()):
            assert math.isnan(summary.bits[place])
            continue
        known += 1
        assert summary.bits[place].item() == pytest.approx(bits, rel=1e-9)
        controls = max(8, len(null) * len(measured) / everywhere)
        error = null.std().item() * math.sqrt(sum(t**2 for t in tokens) + sum(tokens) ** 2 / controls) / math.log(2)
        steps = [max(1, int(table.exposures[n]) - 1) for n in measured]
        gaps = [float(flags.gap[n]) - float(null.mean()) for n in measured]
        latest = sum(gap * t / step for gap, t, step in zip(gaps, tokens, steps, strict=True)) / math.log(2)
        assert summary.bits_high[place].item() - bits == pytest.approx(Z * error + max(0, latest), rel=1e-6)
        visits = sum(int(table.exposures[n]) for n in own) / int(table.exposures.sum())
        taken = TAKEN * min(0.5, visits) * max(0, bits)
        assert bits - summary.bits_low[place].item() == pytest.approx(Z * error + taken, rel=1e-6)
        assert summary.share[place].item() == pytest.approx(int(summary.memorized[place]) / len(measured))
    assert known >= 3


def test_the_interval_of_bits_contains_the_truth_about_as_often_as_it_says():
    """Texts' gaps are the truth, what the text deviates from its controls, and what the controls deviate in common."""
    generator = torch.Generator().manual_seed(1)
    inside = []
    for _ in range(300):
        table, flags = sourced({"a": {V.LEARNED: 40}, "b": {V.LEARNED: 160}}, controls=100)
        control_errors = 0.25 * torch.randn(100, generator=generator)
        truth = torch.rand(200, generator=generator)
        matched = torch.cat(
            [torch.randint(20, (40, 8), generator=generator), torch.randint(20, 100, (160, 8), generator=generator)]
        )
        errors = control_errors[matched].mean(1) - 0.25 * torch.randn(200, generator=generator)
        flags.gap[:] = (truth + errors).half()
        flags.null_gaps = control_errors.mean() - control_errors
        bits = torch.stack([truth[:40].sum(), truth[40:].sum()]) * 20 / math.log(2)
        table.columns["exposures"][:200] = 100_000  # the latest step adds next to nothing then
        summary = summarize_sources(table, flags)
        inside += ((summary.bits_low <= bits) & (bits <= summary.bits_high)).tolist()
    assert 0.93 < sum(inside) / len(inside) < 0.99


def test_the_upper_end_allows_for_the_latest_step_on_texts_that_were_seen_twice():
    """Their loss was taken after one step of two, so that the truth may be twice the estimate."""
    table, flags = sourced({"twice": {V.LEARNED: 40}, "often": {V.LEARNED: 40}, "nothing": {V.LEARNED: 40}})
    table.columns["exposures"][40:80] = 1000
    flags.gap[:] = torch.tensor([0.5, 0.5, -0.1]).repeat_interleave(40).half()
    flags.null_gaps = torch.zeros(400)
    summary = summarize_sources(table, flags)
    assert summary.bits_high / summary.bits == pytest.approx([2.0, 1 + 1 / 999, 1.0])
    part = TAKEN * torch.tensor([80 / 40160, 0.5, 0])  # others would learn in their place
    assert summary.bits_low.tolist() == pytest.approx((summary.bits * (1 - part)).tolist())


def test_texts_seen_once_count_for_all_that_were_seen_once():
    """A second look has drawn twenty of forty; of four nothing is said."""
    table, flags = sourced({"once": {V.UNSEEN: 36, V.LEARNED: 4}, "often": {V.LEARNED: 40}})
    table.columns["exposures"][36:40] = 1
    flags.gap[36:] = 0.5
    flags.null_gaps = torch.zeros(400)
    assert torch.isnan(summarize_sources(table, flags).bits).tolist() == [True, False]
    flags.verdict[20:40], flags.gap[20:40] = int(V.LEARNED), 0.5
    once, often = summarize_sources(table, flags).bits.tolist()
    assert once == pytest.approx(often)
    flags.null_gaps = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    summary = summarize_sources(table, flags)
    wide, narrow = (summary.bits - summary.bits_low).tolist()
    assert wide > 1.2 * narrow


def test_losses_that_are_no_likelihoods_have_no_bits():
    table, flags = sourced({"a": {V.LEARNED: 4}})
    table.unit = "ratio"
    summary = summarize_sources(table, flags)
    assert torch.isnan(summary.bits).all() and torch.isnan(summary.bits_low).all() and summary.measured.tolist() == [4]


def test_both_ends_allow_for_what_all_samples_learn_from_the_visits_to_a_source():
    """Held-out loss fell by .1 while the run grew from 50 to 100 steps: without half of its visits it is .1 higher."""
    table, flags = sourced({"a": {V.LEARNED: 30}, "b": {V.LEARNED: 30}, "c": {V.LEARNED: 60}})
    table.columns["exposures"][:30] = 10
    flags.gap[:], flags.null_gaps = 0, torch.zeros(400)
    losses = ((0, 9.0), (10, 3.0), (50, 2.1), (90, 2.3), (100, 2.0))
    flags.evaluations[:] = [replace(flags.evaluations[0], step=step, control_loss=loss) for step, loss in losses]
    summary = summarize_sources(table, flags)
    shares = [0.5, 60 / 480, 120 / 480]  # the first has 300 of 480 visits, more than can be told
    expected = [0.1 / math.log(2) * -math.log1p(-share) * n * TOKENS / math.log(2)
                for share, n in zip(shares, (30, 30, 60), strict=True)]  # fmt: skip
    assert summary.bits_high.tolist() == pytest.approx(expected) and summary.bits_low.equal(-summary.bits_high)
    for unknown in (math.nan, math.inf):
        flags.evaluations[-1] = replace(flags.evaluations[-1], control_loss=unknown)
        assert summarize_sources(table, flags).bits_high.tolist() == [0, 0, 0]
    del flags.evaluations[1:]
    assert summarize_sources(table, flags).bits_high.tolist() == [0, 0, 0]


def test_gaps_of_flagged_texts_alone_would_give_too_much_and_all_of_them_do_not():
    generator = torch.Generator().manual_seed(0)
    table, flags = sourced({"a": {V.LEARNED: 20_000}})
    gaps = 0.5 + 0.5 * torch.randn(20_000, generator=generator)
    flags.gap[:] = gaps.half()
    flags.null_gaps = torch.randn(400, generator=generator) / 2
    flags.null_gaps -= flags.null_gaps.mean()
    flags.verdict[gaps > 1] = int(V.MEMORIZED)
    truth = 20_000 * 0.5 * 20 / math.log(2)
    assert summarize_sources(table, flags).bits.item() == pytest.approx(truth, rel=0.02)
    flagged = gaps[gaps > 1]
    assert float(flagged.sum()) / (0.5 * len(flagged)) > 2


def test_sources_without_measured_texts_have_no_share_and_no_bits():
    table, flags = sourced({"once": {V.UNSEEN: 3}, "unmatched": {V.NO_MATCHED_CONTROLS: 2}, "a": {V.MEMORIZED: 1}})
    summary = summarize_sources(table, flags)
    assert summary.measured.tolist() == [0, 0, 1] and summary.repeated.tolist() == [0, 2, 1]
    assert torch.isnan(summary.share[:2]).all() and torch.isnan(summary.bits[:2]).all()
    share, low, high = source_shares(table, flags, summary.codes)
    assert torch.isnan(share[:2]).all() and low.tolist()[:2] == [0, 0] and high.tolist()[:2] == [1, 1]


@pytest.mark.parametrize(("gap", "sure"), [(0.0, False), (1.2, False), (3.0, True)])
def test_the_share_of_a_source_is_known_by_the_gaps_of_all_its_texts(gap, sure):
    """Not one of them is flagged. A text is memorized by more than 1 nat."""
    table, flags = sourced({"a": {V.LEARNED: 400}, "b": {V.LEARNED: 400}})
    noise = torch.randn(400, generator=torch.Generator().manual_seed(1)) / 4
    flags.gap[400:] = (gap + noise).half()
    flags.gap[:400] = noise.half()
    share, low, high = (each[1].item() for each in source_shares(table, flags, torch.tensor([0, 1])))
    truth = float(gap > 1)
    assert low <= truth <= high and (low > 0.8) == sure
    assert share == pytest.approx(truth, abs=0.25)
    flags.null_gaps = torch.ones(400)
    assert [each[1].item() for each in source_shares(table, flags, torch.tensor([0, 1]))][1:] == [0, 1]


@pytest.mark.parametrize("controls", [0, 1])
def test_without_controls_bits_are_unknown(controls):
    table, flags = sourced({"a": {V.LEARNED: 4}}, controls=controls)
    assert torch.isnan(summarize_sources(table, flags).bits).all()


def test_an_empty_ledger_and_one_without_sources():
    assert len(summarize_sources(LossTable(), Flags())) == 0
    table = LossTable()
    table.record(torch.arange(3), torch.ones(3), torch.zeros(3), torch.ones(3))
    summary = summarize_sources(table, Flags())
    assert summary.codes.tolist() == [-1] and summary.samples.tolist() == [3] and summary.measured.tolist() == [0]
    assert len(summary.largest(20)) == 0


def test_the_largest_sources_come_first():
    table, flags = sourced(
        {"small": {V.LEARNED: 2}, "large": {V.LEARNED: 9}, None: {V.LEARNED: 30}, "b": {V.MEMORIZED: 3}}
    )
    labels = [table.source_names.label(code) for code in summarize_sources(table, flags).largest(2).codes.tolist()]
    assert labels == ["large", "b"]
    first = summarize_sources(table, flags).largest(1, by="bits").codes.tolist()
    assert table.source_names.label(first[0]) == "b"


def test_onsets_are_those_of_the_sources_own_memorized_texts():
    table, flags = sourced({"a": {V.MEMORIZED: 20}, "b": {V.MEMORIZED: 20}, "c": {V.LEARNED: 5}})
    flags.onset_step[20:40] = 90
    onsets = source_onsets(table, flags, torch.tensor([0, 1, 2]))
    assert set(onsets) == {0, 1}
    assert (onsets[0].step, onsets[1].step, onsets[1].samples) == (40, 90, 20)


def test_a_thousand_sources():
    table, flags = sourced({f"s{n}": {V.LEARNED: 2, V.MEMORIZED: 1} for n in range(1000)})
    summary = summarize_sources(table, flags)
    assert len(summary) == 1000 and summary.memorized.tolist() == [1] * 1000
