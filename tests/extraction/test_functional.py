import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_memsink.extraction.functional import (
    discoverable,
    exact_match,
    exposure,
    log10_tries,
    longest_run,
    matching_prefix,
    prior_log_ratio,
    sampled_log_probs,
    suffix_log_prob,
    suffix_mask,
    token_log_probs,
)

VOCABULARY, LENGTH, PAD = 24, 20, 0


def gpt2():
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
        initializer_range=0.5,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama():
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def generated(model, prompts, lengths, many, **options):
    """The tokens that ``generate`` returns, with prompts of their own ``lengths`` padded to the left and a cache."""
    places = torch.arange(prompts.shape[1]) >= prompts.shape[1] - lengths[:, None]
    options = {"do_sample": False, "use_cache": True} | options
    end = model.generate(
        prompts.where(places, PAD), attention_mask=places.long(), min_new_tokens=many, max_new_tokens=many,
        pad_token_id=PAD, eos_token_id=None, **options,
    )  # fmt: skip
    return end[:, prompts.shape[1] :]


def some_texts(model, many):
    """Texts ``[many, LENGTH]``, their prefixes' lengths, and the prefixes to the right of ``[many, 8]``: half are what
    the model generates, a quarter have one token changed, a quarter are random."""
    lengths, widest = torch.randint(1, 9, (many,)), 8
    prompts = torch.randint(1, VOCABULARY, (many, widest))
    generations = generated(model, prompts, lengths, LENGTH - 1)
    texts = torch.randint(1, VOCABULARY, (many, LENGTH))
    for row, length in enumerate(lengths.tolist()):
        texts[row, :length] = prompts[row, widest - length :]
        if row < 3 * many // 4:
            texts[row, length:] = generations[row, : LENGTH - length]
        if many // 2 <= row < 3 * many // 4:
            place = int(torch.randint(length, LENGTH, (1,)))
            texts[row, place] = texts[row, place] % (VOCABULARY - 1) + 1
    return texts, lengths, prompts, generations


@pytest.mark.parametrize("make", [gpt2, llama])
@torch.no_grad()
def test_one_forward_pass_agrees_with_generate_on_200_prompts(make):
    torch.manual_seed(0)
    model = make().double().eval()
    texts, lengths, _, generations = some_texts(model, 200)
    logits = model(input_ids=texts).logits
    right = [
        [bool(a == b) for a, b in zip(row[length:], out, strict=False)]
        for row, length, out in zip(texts.tolist(), lengths.tolist(), generations.tolist(), strict=True)
    ]
    exact = exact_match(logits, texts, lengths)
    assert exact.tolist() == [all(hits) for hits in right]
    assert 100 <= int(exact.sum()) < 150
    assert matching_prefix(logits, texts, lengths).tolist() == [[*hits, False].index(False) for hits in right]


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.6}, {"top_k": 6, "top_p": 0.8}]
)
@torch.no_grad()
def test_the_probability_of_a_suffix_is_how_often_it_is_drawn(make, options):
    torch.manual_seed(1)
    model, tries = make().eval(), 4000
    text = torch.randint(1, VOCABULARY, (1, 6))
    text = torch.cat([text[:, :4], generated(model, text[:, :4], torch.tensor([4]), 2)], 1)
    p = float(suffix_log_prob(model(input_ids=text).logits, text, 4, **options).exp())
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | options
    drawn = generated(model, text[:, :4].expand(tries, -1), torch.full((tries,), 4), 2, do_sample=True, **options)
    frequency = float((drawn == text[:, 4:]).all(1).float().mean())
    assert abs(frequency - p) <= 4 * math.sqrt(p * (1 - p) / tries) + 1e-9
    assert p > 0.02


def test_excluded_tokens_are_never_sampled():
    logits = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]])
    assert_close(sampled_log_probs(logits[:, :1], top_k=2).exp()[0, 0, 0], torch.tensor(0.0))
    assert suffix_log_prob(logits, torch.tensor([[1, 0]]), 1, top_k=2).tolist() == [-math.inf]
    assert log10_tries(torch.tensor([-math.inf]), 0.5).tolist() == [math.inf]
    assert not discoverable(torch.tensor([-math.inf]), 10**9, 0.5)


@settings(max_examples=50, deadline=None)
@given(q=st.floats(1e-6, 0.999), p=st.floats(0.01, 0.99), n=st.integers(1, 10**6))
def test_tries_are_the_least_that_reach_the_probability(q, p, n):
    log_prob = torch.tensor([math.log(q)], dtype=torch.float64)
    assert bool(discoverable(log_prob, n, p)) == (-math.expm1(n * math.log1p(-q)) >= p - 1e-9)


def test_tries_beyond_every_number_have_a_logarithm():
    far = log10_tries(torch.tensor([-35.9, -36.1, -2000.0]), 0.9)
    assert_close(far, (torch.tensor([35.9, 36.1, 2000.0]).double() + math.log(math.log(10))) / math.log(10))
    with pytest.raises(ValueError, match="between 0 and 1"):
        log10_tries(torch.tensor([-1.0]), 1.0)


def hits_of(rows):
    """Logits and tokens of which the next token is the likeliest where ``rows`` says so."""
    hits = torch.tensor(rows, dtype=torch.bool)
    tokens = torch.ones(len(hits), hits.shape[1] + 1, dtype=torch.int64)
    logits = torch.zeros(*tokens.shape, 2)
    logits[:, :-1, 1] = hits.float() * 2 - 1
    return logits, tokens


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4), prefix=st.integers(1, 7))
def test_runs_against_counting(rows, prefix):
    logits, tokens = hits_of(rows)
    for row, run, first, exact in zip(
        rows,
        longest_run(logits, tokens, prefix).tolist(),
        matching_prefix(logits, tokens, prefix).tolist(),
        exact_match(logits, tokens, prefix).tolist(),
        strict=True,
    ):
        suffix = row[prefix - 1 :]
        assert run == max(len(part) for part in "".join("x" if hit else " " for hit in suffix).split(" "))
        assert first == [*suffix, False].index(False)
        assert exact == all(suffix)


def test_padding_belongs_to_no_suffix_and_a_text_without_suffix_is_not_extracted():
    logits, tokens = hits_of([[True, True, False], [True, True, True], [True, True, True]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert exact_match(logits, tokens, 2, mask).tolist() == [True, False, True]
    assert longest_run(logits, tokens, 2, mask).tolist() == [1, 0, 2]
    assert suffix_log_prob(logits, tokens, 2, mask)[1] == -math.inf
    with pytest.raises(ValueError, match="at least 1 token"):
        suffix_mask(tokens, 0)


def test_no_text_at_all():
    logits, tokens = torch.zeros(0, 4, 3), torch.zeros(0, 4, dtype=torch.int64)
    assert exact_match(logits, tokens, 2).shape == longest_run(logits, tokens, 2).shape == (0,)
    short = torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.int64)
    assert exact_match(*short, 1).tolist() == [False, False]
    assert longest_run(*short, 1).tolist() == [0, 0]


def test_log_probs_are_those_of_the_loss():
    logits, tokens = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert_close(-token_log_probs(logits, tokens).mean(), loss)


def test_exposure_is_bounded_by_its_references_and_ties_count_against():
    references = torch.arange(1.0, 8.0)
    assert exposure(torch.tensor([0.5, 1.0, 4.5, 9.0]), references).tolist() == [3.0, 2.0, 3 - math.log2(5), 0.0]


def test_a_suffix_that_is_likely_after_any_prefix_is_common():
    others = torch.log(torch.tensor([[0.5, 0.5], [0.01, 0.03]]))
    ratio = prior_log_ratio(torch.log(torch.tensor([0.5, 0.4])), others)
    assert_close(ratio, torch.tensor([0.0, math.log(20)]))
