import zlib

import torch
from torch.testing import assert_close

from lightning_memsink.extraction.membership import (
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    reference_score,
    zlib_score,
)

MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]])


def some():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 6, 9, generator=generator), torch.randint(9, (3, 6), generator=generator)


def test_scores_against_their_definitions_token_by_token():
    logits, tokens = some()
    texts = ["abc" * 9, "q", "z"]
    found = {
        "loss": loss_score(logits, tokens, MASK),
        "zlib": zlib_score(logits, tokens, texts, MASK),
        "min_k": min_k_score(logits, tokens, MASK, fraction=0.5),
        "min_k++": min_k_plus_plus_score(logits, tokens, MASK, fraction=0.5),
    }
    for row, length in ((0, 6), (1, 4)):
        own, standard = [], []
        for place in range(1, length):
            distribution = torch.distributions.Categorical(logits=logits[row, place - 1])
            log_prob = distribution.log_prob(tokens[row, place])
            surprise = torch.stack([distribution.log_prob(torch.tensor(token)) for token in range(9)])
            mean = (distribution.probs * surprise).sum()
            spread = (distribution.probs * (surprise - mean).square()).sum().sqrt()
            own.append(float(log_prob))
            standard.append(float((log_prob - mean) / spread))
        lowest = max(1, int((length - 1) * 0.5))
        assert_close(float(found["loss"][row]), sum(own) / len(own), rtol=1e-5, atol=1e-5)
        packed = len(zlib.compress(texts[row].encode()))
        assert_close(float(found["zlib"][row]), sum(own) / packed, rtol=1e-5, atol=1e-5)
        assert_close(float(found["min_k"][row]), sum(sorted(own)[:lowest]) / lowest, rtol=1e-5, atol=1e-5)
        assert_close(float(found["min_k++"][row]), sum(sorted(standard)[:lowest]) / lowest, rtol=1e-4, atol=1e-4)
    assert all(
        found[name][2].isnan() for name in ("loss", "min_k", "min_k++")
    )  # there is nothing to predict after one token


def test_a_model_that_knows_a_text_scores_it_above_one_that_does_not():
    logits, tokens = some()
    known = logits.clone()
    known[:, :-1].scatter_(2, tokens[:, 1:, None], 9.0)
    for score in (loss_score, min_k_score, min_k_plus_plus_score):
        assert (score(known, tokens) > score(logits, tokens)).all()
    assert (reference_score(loss_score(known, tokens), loss_score(logits, tokens)) > 0).all()


def test_certainty_everywhere_is_no_division_by_zero():
    logits = torch.full((1, 3, 4), -1e9)
    logits[..., 2] = 0.0
    assert min_k_plus_plus_score(logits, torch.full((1, 3), 2)).isfinite().all()
