"""ExtractionProbe in whole runs: no side effects, and results that agree with generation."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_memsink import memsink
from lightning_memsink.callbacks.extraction_probe import ExtractionProbe
from lightning_memsink.extraction.history import ExtractionHistory
from lightning_memsink.extraction.probe import ProbeConfig, logits_of
from lightning_memsink.extraction.probe import probe as probe_texts
from lightning_memsink.ledger import Ledger
from tests.support.small_runs import CANARIES, LENGTH, VOCABULARY, TinyLM, fit, noise, watch


class SmallGPT(TinyLM):
    """A model of transformers with dropout: a probe must not use its random state."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        )  # fmt: skip
        self.gpt = GPT2LMHeadModel(config)

    def loss(self, batch):
        return self.gpt(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


TEXTS = {"canaries": CANARIES, "never trained": noise(8, seed=9)}


def probe(**options):
    return ExtractionProbe(**{"texts": TEXTS, "prefix": 4, "n": 10} | options)


@pytest.fixture(scope="module")
def run():
    return fit([*watch(), probe()], SmallGPT(), max_epochs=6)


def test_a_probe_changes_no_weight(run):
    plain = fit(watch(), SmallGPT(), max_epochs=6)[1].state_dict()
    assert all(torch.equal(weight, plain[name]) for name, weight in run[1].state_dict().items())


def test_results_agree_with_generate(run):
    trainer, module = run
    history = Ledger.of(trainer).extraction
    last = history.rows[-1]
    module.eval()
    for group, tokens in TEXTS.items():
        generated = module.gpt.generate(
            tokens[:, :4], attention_mask=torch.ones(len(tokens), 4, dtype=torch.int64), do_sample=False,
            min_new_tokens=LENGTH - 4, max_new_tokens=LENGTH - 4, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        # The last probe is before the last steps.
        assert set(history.first[group][(generated == tokens).all(1)].tolist()) - {-1} or group == "never trained"
    assert last["canaries/exact"] == 1
    assert last["canaries/discoverable"] == 1
    assert last["never trained/exact"] == last["never trained/discoverable"] == 0
    assert last["never trained/longest_run"] < 0.5
    assert history.rows[0]["canaries/exact"] == 0
    assert len(history.rows) == len(Ledger.of(trainer).flags.evaluations)


def test_curves_and_report_show_the_results(tmp_path):
    callbacks = [*memsink(identity="content", k=4, path=tmp_path / "report.md"), probe()]
    trainer, _ = fit(callbacks, SmallGPT(), max_epochs=6)
    row = Ledger.of(trainer).history[-1]
    assert row["extraction/canaries/exact"] == 1
    assert row["extraction/never_trained/exact"] == 0
    report = (tmp_path / "report.md").read_text()
    assert "## What can be extracted" in report
    assert "canaries: 4 of 4 come word for word after 4 tokens, the first at step" in report
    assert "never trained: 0 of 8 come word for word" in report


def test_a_resumed_run_keeps_its_results(tmp_path):
    whole, _ = fit([*watch(), probe()], SmallGPT(0.0), max_epochs=3)
    first, _ = fit([*watch(), probe()], SmallGPT(0.0), max_epochs=2)
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit([*watch(), probe()], SmallGPT(0.0), max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    expected, found = Ledger.of(whole).extraction, Ledger.of(resumed).extraction
    assert found.rows == expected.rows
    assert all(torch.equal(found.first[group], expected.first[group]) for group in TEXTS)


def tiny_logits(model):
    def logits(tokens, mask):
        embedded = model.embed(tokens)
        after_two = model.mlp(torch.cat([embedded[:, :-1], embedded[:, 1:]], -1))
        return F.pad(after_two, (0, 0, 1, 0))

    return logits


def test_any_model_can_be_probed_with_a_function_for_its_logits():
    model = TinyLM()
    trainer, _ = fit([*watch(), probe(logits=tiny_logits(model))], model, max_epochs=8)
    assert Ledger.of(trainer).extraction.rows[-1]["canaries/longest_run"] > 0.5


def test_a_model_without_logits_is_refused_at_the_start():
    with pytest.raises(ValueError, match=r"One causal language model .* found: none\. Say how to get logits"):
        fit([*watch(), probe()])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"texts": None}, "there is none"),
        ({"texts": {}}, "there is none"),
        ({"prefix": LENGTH}, f"the longest has {LENGTH} tokens"),
        ({"texts": {"one": torch.zeros(5, dtype=torch.int64)}}, r"token ids \[N, T\] of each group, and not {'one'"),
    ],
)
def test_missing_texts_are_refused_at_the_start(options, words):
    with pytest.raises(ValueError, match=words):
        fit([*watch(), probe(**options)], SmallGPT())


@pytest.mark.parametrize("options", [{"prefix": 0}, {"n": 0}, {"p": 1.0}, {"temperature": 0.0}, {"top_p": 0.0}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=r"not (prefix|temperature)="):
        probe(**options)


def test_a_probe_that_fails_does_not_end_the_run():
    def broken(tokens, mask):
        raise RuntimeError("no memory left")

    with pytest.warns(match="failed on this model; training goes on. no memory left"):
        trainer, _ = fit([*watch(), probe(logits=broken)], SmallGPT(), max_epochs=1)
    assert not Ledger.of(trainer).extraction.rows
    assert not trainer.interrupted


def test_shorter_texts_are_padded_and_those_without_suffix_are_not_counted():
    tokens = CANARIES.clone()
    tokens[0, 4:], tokens[1, 6:] = -1, -1
    texts = {"canaries": tokens, "short": tokens[:1]}

    def logits(tokens, mask):
        return F.one_hot(tokens.roll(-1, 1).clamp(min=0), VOCABULARY) * 20.0

    results = probe_texts(logits, tokens, tokens != -1, ProbeConfig(prefix=4), batch_size=3)
    assert results.suffix.tolist() == [0, 2, LENGTH - 4, LENGTH - 4]
    assert results.exact.tolist() == [False, True, True, True]
    history = ExtractionHistory(ProbeConfig(prefix=4))
    history.add(1, {name: probe_texts(logits, each, each != -1, ProbeConfig(prefix=4)) for name, each in texts.items()})
    assert history.rows[-1]["canaries/exact"] == 1
    assert history.words()[1] == "short: no text is longer than the prefix of 4 tokens."


def test_the_outermost_language_model_is_probed():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = SmallGPT().gpt

    tokens = CANARIES[:, :5]
    mask = torch.ones_like(tokens)
    wrapper = Wrapper().eval()
    assert logits_of(wrapper)(tokens, mask).shape == (4, 5, VOCABULARY)
    with pytest.raises(ValueError, match="GPT2LMHeadModel, GPT2LMHeadModel"):
        logits_of(nn.ModuleList([Wrapper(), Wrapper()]))


def test_the_preset_adds_it_and_passes_its_options():
    assert [type(each).__name__ for each in memsink(extract=True, prefix=8)][-1] == "ExtractionProbe"
    with pytest.raises(TypeError, match="prefix"):
        memsink(prefix=8)
