"""Text difficulty against counting by hand."""

import itertools
import math
import zlib
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_memsink.detection.ngram_features import EXCERPT, SPAN, NgramCounts, compressed_bits

texts = st.lists(st.lists(st.integers(0, 9), min_size=6, max_size=6), min_size=1, max_size=8)


def whole(tokens):
    return torch.ones_like(tokens, dtype=torch.bool)


def ngrams(counts, tokens, mask=None):
    return counts.look_up(tokens, whole(tokens) if mask is None else mask)


def by_hand(sample, corpus):
    """Mean unigram and bigram NLL of one text from a dictionary of counts of the others."""
    ones = Counter(token for text in corpus for token in text)
    twos = Counter(pair for text in corpus for pair in itertools.pairwise(text))
    kinds = len({token for text in [*corpus, sample] for token in text})
    share = {token: (ones[token] + 1) / (ones.total() + kinds) for token in sample}
    one = -sum(math.log(share[token]) for token in sample) / len(sample)
    pairs = list(itertools.pairwise(sample))
    two = -sum(math.log((twos[pair] + 4 * share[pair[1]]) / (ones[pair[0]] + 4)) for pair in pairs) / len(pairs)
    return one, two


@given(corpus=texts)
def test_a_samples_own_counts_are_left_out_of_its_likelihood(corpus):
    """A new text is counted by all others; a text of the corpus by all but itself."""
    counts, tokens = NgramCounts(), torch.tensor(corpus)
    counts.update(ngrams(counts, tokens))
    found = counts.nll(ngrams(counts, tokens), torch.ones(len(tokens)))
    for row, sample in enumerate(corpus):
        expected = by_hand(sample, corpus[:row] + corpus[row + 1 :])
        assert found[row].tolist() == pytest.approx(expected, rel=1e-3)


def test_a_text_shown_often_looks_as_difficult_as_shown_once():
    counts, background = NgramCounts(), torch.randint(10, (50, 12), generator=torch.Generator().manual_seed(0))
    counts.update(ngrams(counts, background))
    sample = torch.randint(10, (1, 12), generator=torch.Generator().manual_seed(1))
    before = counts.nll(ngrams(counts, sample), torch.zeros(1))
    familiar = counts.familiarity(ngrams(counts, sample), torch.zeros(1))
    for _ in range(64):
        counts.update(ngrams(counts, sample))
    torch.testing.assert_close(counts.nll(ngrams(counts, sample), torch.tensor([64])), before, rtol=1e-3, atol=1e-3)
    assert counts.familiarity(ngrams(counts, sample), torch.tensor([64])) == familiar
    assert counts.familiarity(ngrams(counts, sample), torch.zeros(1)) > math.log(64)


def test_familiarity_grows_with_the_runs_of_four_that_occur_elsewhere_and_how_often():
    counts = NgramCounts()
    known = torch.tensor([[1, 2, 3, 4, 5, 6]])
    for times in (1, 2):
        counts.update(ngrams(counts, known))
        for text, share in (([1, 2, 3, 4, 5, 6], 1.0), ([1, 2, 3, 4, 5, 9], 2 / 3), ([9, 8, 7, 6, 5, 4], 0.0)):
            tokens = torch.tensor([text])
            expected = share * math.log(1 + times)
            assert counts.familiarity(ngrams(counts, tokens), torch.zeros(1)).item() == pytest.approx(expected)


def test_padding_counts_for_nothing():
    counts = NgramCounts()
    tokens = torch.tensor([[1, 2, 3, 4, 5, 0, 0], [5, 4, 3, 2, 1, 2, 3]])
    mask = torch.tensor([[True] * 5 + [False] * 2, [True] * 7])
    counts.update(ngrams(counts, tokens, mask))
    assert counts.unigrams.sum() == 12 and counts.bigrams.sum() == 10 and counts.runs.sum() == 6
    alone = counts.nll(ngrams(counts, tokens[:1, :5], mask[:1, :5]), torch.ones(1))
    torch.testing.assert_close(counts.nll(ngrams(counts, tokens, mask), torch.ones(2))[:1], alone)


def test_texts_shorter_than_a_run_are_familiar_to_nobody_rather_than_an_error():
    counts = NgramCounts()
    tokens = torch.tensor([[1, 2]])
    counts.update(ngrams(counts, tokens))
    assert counts.familiarity(ngrams(counts, tokens), torch.ones(1)).tolist() == [0.0]


def test_compressed_bits_are_deflates_and_low_where_a_text_repeats_itself():
    tokens = torch.stack([torch.arange(64), torch.full((64,), 7)])
    bits = compressed_bits(tokens, whole(tokens))
    assert bits[0].item() == pytest.approx(8 * len(zlib.compress(tokens[0].to(torch.int16).numpy().tobytes(), 6)) / 64)
    assert bits[1] < bits[0] / 3


@pytest.mark.parametrize("length", [3, 1024, 1025, 1100, 5000])
def test_a_text_is_read_alike_in_batches_of_any_width(length):
    """Alone, beside a longer text, and padded on the left: the same n-grams, in the same order."""
    tokens = torch.randint(1, 1000, (1, length), generator=torch.Generator().manual_seed(length))
    alone = NgramCounts().look_up(tokens, whole(tokens))
    for before, after in ((0, 700), (700, 0), (0, 1)):
        wide = torch.nn.functional.pad(tokens, (before, after))
        beside = torch.stack([wide[0], torch.arange(wide.shape[1])])
        mask = torch.stack([wide[0] > 0, torch.ones(wide.shape[1], dtype=torch.bool)])
        found = NgramCounts().look_up(beside, mask)
        for kind, counted in (("single", "counted"), ("pair", "paired"), ("run", "whole")):
            expected = getattr(alone, kind)[getattr(alone, counted)]
            assert getattr(found, kind)[0][getattr(found, counted)[0]].equal(expected)
        assert compressed_bits(beside, mask)[0] == compressed_bits(tokens, whole(tokens))[0]


def test_of_a_long_text_spans_are_read_and_no_pair_across_two_of_them():
    tokens = torch.arange(5000)[None] + 1
    text = NgramCounts(1 << 20).look_up(tokens, whole(tokens))
    read = text.single[0]
    assert len(read) == EXCERPT and read[0] == 1 and read[-1] == 5000 and (read.diff() > 0).all()
    assert int(text.paired.sum()) == EXCERPT - EXCERPT // SPAN
    assert int(text.whole.sum()) == EXCERPT - 3 * EXCERPT // SPAN
    assert (read.diff()[text.paired[0]] == 1).all()
