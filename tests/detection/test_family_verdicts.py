"""Verdicts on families: their statistics against definitions, and features without the family's own counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_memsink.detection.difficulty import Matching
from lightning_memsink.detection.family_features import FamilyRecord, leave_family_out
from lightning_memsink.detection.family_verdicts import FamilyVerdicts, family_gaps, judge_families
from lightning_memsink.detection.matched_controls import DetectionRule, Measurement
from lightning_memsink.detection.ngram_features import NgramCounts
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.recent_texts import RecentTexts
from lightning_memsink.samples.tokens import Tokens

RULE = DetectionRule()


def whole(ids: Tensor) -> Tokens:
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))


def drawn(*shape: int, seed: int = 0, vocabulary: int = 300) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def variants(count: int, length: int, seed: int) -> Tensor:
    base, other = drawn(1, length, seed=seed), drawn(count, length, seed=seed + 1)
    changed = torch.rand(count, length, generator=torch.Generator().manual_seed(seed)) < 0.1
    return torch.where(changed, other, base)


def counted(*texts: tuple[Tokens, int]) -> NgramCounts:
    counts = NgramCounts()
    for tokens, times in texts:
        for _ in range(times):
            counts.update(counts.look_up(tokens.ids, tokens.mask))
    return counts


def test_features_are_those_of_a_run_without_the_family():
    others, first, second = whole(drawn(50, 40, seed=9)), whole(variants(6, 40, 1)), whole(variants(3, 40, 2))
    counts = counted((others, 2), (first, 4), (second, 7))
    both = Tokens(torch.cat([first.ids, second.ids]), torch.cat([first.mask, second.mask]))
    exposures = torch.tensor([4.0] * 6 + [7.0] * 3)
    found = leave_family_out(counts, both, exposures, torch.tensor([0] * 6 + [1] * 3))
    for family, rows, rest in ((first, slice(6), (second, 7)), (second, slice(6, 9), (first, 4))):
        without = counted((others, 2), rest)
        text = without.look_up(family.ids, family.mask)
        nobody = torch.zeros(len(family.ids))
        assert torch.allclose(found[rows, 2], without.familiarity(text, nobody), atol=1e-5)
        # The number of different tokens is that of the whole run.
        assert torch.allclose(found[rows, :2], without.nll(text, nobody), atol=0.02)


def test_features_of_a_text_by_itself_are_its_own_ones():
    texts = whole(drawn(20, 30, seed=3, vocabulary=40))
    counts = counted((texts, 3))
    text, exposures = counts.look_up(texts.ids, texts.mask), torch.full((20,), 3.0)
    expected = torch.cat([counts.nll(text, exposures), counts.familiarity(text, exposures)[:, None]], 1)
    assert torch.allclose(leave_family_out(counts, texts, exposures, torch.arange(20)), expected, atol=1e-5)


def test_padding_and_texts_without_a_run_are_no_part_of_the_counts():
    texts = Tokens(drawn(4, 12), torch.arange(12) < torch.tensor([12, 3, 1, 0])[:, None])
    counts = counted((texts, 2))
    found = leave_family_out(counts, texts, torch.full((4,), 2.0), torch.tensor([0, 0, 1, 1]))
    assert torch.isfinite(found).all()
    assert found[:, 2].tolist() == [0, 0, 0, 0]


def measured(gap, p, matched):
    """Nothing but these is read of a measurement."""
    zeros = torch.zeros_like(gap)
    return Measurement(gap, p, matched, zeros > 0, zeros > 0, zeros, zeros, zeros, zeros[:20], zeros[:20] + 1, 0.3)


def test_merged_p_values_are_twice_the_mean_and_gaps_are_weighted_by_tokens():
    measurement = measured(
        torch.tensor([1.0, 4.0, 2.0, 9.0, 5.0]),
        torch.tensor([0.1, 0.3, 0.02, 0.9, 0.9]),
        torch.tensor([True, True, True, False, True]),
    )
    texts, gap, p = family_gaps(measurement, torch.tensor([0, 0, 1, 1, 2]), torch.tensor([10.0, 30, 5, 5, 5]), 4)
    assert texts.tolist() == [2, 1, 1, 0]
    assert gap[:3].tolist() == pytest.approx([(10 + 120) / 40, 2, 5])
    assert p[:3].tolist() == pytest.approx([0.4, 0.02, 0.9])  # of one text its own
    assert gap[3].isnan() and p[3].isnan()


@pytest.mark.parametrize("dependence", [0.0, 0.7, 1.0])
def test_a_merged_p_value_is_valid_however_its_parts_depend(dependence):
    generator = torch.Generator().manual_seed(0)
    normal = torch.distributions.Normal(0.0, 1.0)
    own, common = (torch.randn(20_000, size, generator=generator) for size in (4, 1))
    p = normal.cdf(dependence**0.5 * common + (1 - dependence) ** 0.5 * own).flatten()
    zeros = torch.zeros_like(p)
    measurement = measured(zeros, p, zeros == 0)
    merged = family_gaps(measurement, torch.arange(20_000).repeat_interleave(4), zeros + 1, 20_000)[2]
    for level in (0.01, 0.05, 0.2):
        assert float((merged <= level).double().mean()) <= level + 3 * (level / 20_000) ** 0.5


class Run:
    """A table of 40 texts, of which the first 12 are variants and the next 4 others, and 200 controls."""

    def __init__(self, family_gap: float = 3.0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        texts = torch.cat([variants(12, 40, 5), variants(4, 40, 6), drawn(24, 40, seed=7)])
        self.tokens, self.matching, self.table, self.controls = whole(texts), Matching(), LossTable(), ControlTable()
        self.record = FamilyRecord(self.matching.counts)
        self.held_out = whole(drawn(200, 40, seed=8))
        for step in (10, 20, 30, 40):
            losses = 4 + 0.1 * torch.randn(40, generator=generator)
            losses[:12] -= family_gap * (step > 10)
            self.visit(losses, step)
            features = self.matching.of_controls(torch.arange(200), self.held_out, None)
            of_controls = 4 + 0.1 * torch.randn(200, generator=generator)
            self.controls.record(step + 5, torch.arange(200), of_controls, features)

    def visit(self, losses: Tensor, step: int) -> None:
        count = len(losses)
        rows = self.table.record(torch.arange(count), losses, torch.full((count,), step), torch.full((count,), 40.0))
        self.record.add(rows, self.tokens)
        self.matching.describe(self.table, rows, torch.ones(count, dtype=torch.bool), self.tokens, None, True)

    def judged(self, before: FamilyVerdicts | None = None, consecutive: int = 1, since: int = -1) -> FamilyVerdicts:
        before = FamilyVerdicts.none() if before is None else before
        family = self.record.numbers(len(self.table))
        return judge_families(self.table, self.controls, family, self.record.features, before, RULE, consecutive, since)


def test_a_family_known_by_heart_is_memorized_and_one_that_is_not_is_not():
    found = Run().judged()
    assert found.family.tolist() == [0, 12]
    assert found.texts.tolist() == [12, 4]
    assert found.exposures.tolist() == [48, 16]
    assert found.measured.tolist() == [12, 4]
    assert found.memorized.tolist() == [True, False]
    assert float(found.gap[0]) == pytest.approx(3, abs=0.3)
    assert float(found.gap[1]) == pytest.approx(0, abs=0.3)
    assert found.onset_step.tolist() == [45, -1]
    assert [found.word(0), found.word(1)] == ["memorized", "not memorized"]


def test_onset_is_the_first_of_the_flags_in_a_row():
    run = Run()
    once = run.judged(consecutive=2)
    assert not once.memorized.any() and once.word(0) == "undecided"
    run.controls.latest_step = 65
    twice = run.judged(once, consecutive=2)
    assert twice.memorized.tolist() == [True, False]
    assert twice.onset_step.tolist() == [45, -1]
    assert twice.streak.tolist() == [2, 0]


def test_a_family_without_a_visit_keeps_its_verdict():
    run = Run()
    before = run.judged()
    later = run.judged(before, since=1000)
    for name in ("measured", "gap", "p", "streak", "memorized", "onset_step"):
        assert torch.equal(getattr(later, name), getattr(before, name)), name


def test_texts_seen_once_are_measured_after_others_of_their_family():
    run, texts = Run(), variants(6, 40, 5)
    run.table, run.matching, run.tokens = LossTable(), Matching(), whole(texts)
    run.record = FamilyRecord(run.matching.counts)
    other = whole(drawn(100, 40, seed=9))
    run.matching.counts.update(run.matching.counts.look_up(other.ids, other.mask))
    for row in range(6):
        loss, step = torch.tensor([4.0 if row == 0 else 0.5]), torch.tensor([36 + row % 4])
        rows = run.table.record(torch.tensor([row]), loss, step, torch.tensor([40.0]))
        run.record.add(rows, whole(texts[rows]))
        run.matching.describe(run.table, rows, rows >= 0, whole(texts[rows]), None, trained_on=True)
    run.controls.features = run.matching.of_controls(torch.arange(200), run.held_out, None)
    found = run.judged()
    assert found.exposures.tolist() == [6]
    assert found.measured.tolist() == [4]  # not the first of them, nor one of the same step
    assert found.memorized.tolist() == [True]


def test_losses_that_are_not_finite_and_too_few_controls_leave_it_undecided():
    run = Run()
    run.visit(torch.full((40,), torch.nan), 50)
    assert run.judged().memorized.tolist() == [True, False]
    run.table.last_loss[:16] = torch.inf
    found = run.judged()
    assert found.measured.tolist() == [0, 0] and found.word(0) == "undecided"
    few = Run()
    few.controls.latest[10:] = torch.nan
    few.table.begins_with_training = False  # so that first visits are no controls either
    assert few.judged().measured.tolist() == [0, 0]


def test_without_families_there_are_no_verdicts():
    run = Run()
    alone = torch.arange(40, dtype=torch.int32)
    found = judge_families(run.table, run.controls, alone, run.record.features, FamilyVerdicts.none(), RULE, 1, -1)
    assert len(found) == 0
    empty = judge_families(
        LossTable(), run.controls, alone[:0], run.record.features, FamilyVerdicts.none(), RULE, 1, -1
    )
    assert len(empty) == 0


def test_families_that_become_one_keep_the_longest_streak():
    run = Run()
    two = torch.arange(40, dtype=torch.int32)
    two[:6], two[6:12] = 0, 6
    before = judge_families(run.table, run.controls, two, run.record.features, FamilyVerdicts.none(), RULE, 1, -1)
    before = replace(before, streak=torch.tensor([1, 3]), onset_step=torch.tensor([45, 15]))
    after = run.judged(before, since=1000)
    assert after.family.tolist() == [0, 12]
    assert after.streak.tolist() == [3, 0]
    assert after.onset_step.tolist() == [15, -1]


def test_verdicts_outlive_a_checkpoint(tmp_path):
    found = Run().judged()
    torch.save(found.state_dict(), tmp_path / "state.pt")
    restored = FamilyVerdicts.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, column in found.state_dict().items():
        assert torch.equal(getattr(restored, name), column), name


def test_a_resumed_record_goes_on_exactly():
    run = Run()
    whole = run.judged()
    resumed = FamilyRecord(run.matching.counts)
    resumed.load_state_dict(run.record.state_dict())
    assert torch.equal(resumed.numbers(40), run.record.numbers(40))
    run.record = resumed
    again = run.judged()
    assert again.measured.tolist() == [12, 4] and torch.equal(again.gap, whole.gap) and torch.equal(again.p, whole.p)


def test_a_record_of_a_version_that_saved_no_texts_measures_those_that_come_again():
    run = Run()
    resumed = FamilyRecord(run.matching.counts)
    resumed.load_state_dict({name: part for name, part in run.record.state_dict().items() if name != "texts"})
    run.record = resumed
    assert run.judged().measured.tolist() == [0, 0]
    resumed.add(torch.arange(12), Tokens(run.tokens.ids[:12], run.tokens.mask[:12]))
    assert run.judged().measured.tolist() == [12, 0]
    assert run.judged().memorized.tolist() == [True, False]


def test_of_texts_the_last_ones_that_fit_are_remembered():
    texts = RecentTexts(limit=100)
    for row in range(12):
        texts.add(torch.tensor([row]), Tokens(torch.full((1, 30), row), torch.arange(30)[None] < 20))
    assert texts.has(torch.arange(14)).tolist() == [False] * 7 + [True] * 5 + [False] * 2
    found = texts.of(torch.tensor([11, 7]))
    assert found.ids.tolist() == [[11] * 20, [7] * 20] and found.mask.all()
    texts.add(torch.tensor([2]), Tokens(torch.arange(250)[None], torch.ones(1, 250, dtype=torch.bool)))
    assert not texts.has(torch.arange(14)).any()  # it fits by no means


def test_remembered_texts_are_those_that_were_added():
    texts, generator = RecentTexts(limit=1 << 18), torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 200, (900,), generator=generator)
    ids, mask = drawn(900, 200, seed=1), torch.arange(200) < lengths[:, None]
    for rows in torch.randperm(900, generator=generator).split(100):
        texts.add(rows, Tokens(ids[rows], mask[rows]))
    here = (lengths > 0).nonzero().flatten()
    assert torch.equal(texts.has(torch.arange(900)), lengths > 0)
    found = texts.of(here)
    assert torch.equal(found.mask.sum(1), lengths[here])
    for row, own, kept in zip(here.tolist(), found.ids, found.mask, strict=True):
        assert torch.equal(own[kept], ids[row][: lengths[row]])
