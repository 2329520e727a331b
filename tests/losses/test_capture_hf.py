"""Capture inside Hugging Face models, which compute their loss themselves."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import seed_everything

from tests.support.capturing import QUIET, Model, check, watched

transformers = pytest.importorskip("transformers")

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::UserWarning")]
VOCABULARY = 11
NARROW = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2(**options):
    return transformers.GPT2Config(
        n_embd=8, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **NARROW, **options
    )


def bert(**options):
    return transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, max_position_embeddings=16,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0, **NARROW, **options,
    )  # fmt: skip


def t5():
    return transformers.T5Config(
        d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0, decoder_start_token_id=0, **NARROW
    )


def tokens(batch):
    return {"input_ids": batch["x"] + 3, "labels": torch.where(batch["y"] < 0, -100, batch["y"] + 3)}


def causal(batch):
    return {"input_ids": batch["x"] + 3, "labels": batch["x"] + 3}


def one_label(batch):
    return {"input_ids": batch["x"] + 3, "labels": batch["x"][:, 0] % 3}


def one_number(batch):
    return {"input_ids": batch["x"] + 3, "labels": batch["x"][:, 0].float()}


MODELS = {
    "causal": (lambda: transformers.GPT2LMHeadModel(gpt2()), causal),
    "causal, ragged": (lambda: transformers.GPT2LMHeadModel(gpt2()), tokens),
    "masked": (lambda: transformers.BertForMaskedLM(bert()), tokens),
    "sequence to sequence": (lambda: transformers.T5ForConditionalGeneration(t5()), tokens),
    "classification": (lambda: transformers.BertForSequenceClassification(bert(num_labels=3)), one_label),
    "last token": (lambda: transformers.GPT2ForSequenceClassification(gpt2(num_labels=3)), one_label),
    "regression": (lambda: transformers.BertForSequenceClassification(bert(num_labels=1)), one_number),
}


class Wrapped(Model):
    def __init__(self, model, inputs, **options) -> None:
        super().__init__()
        self.model, self.inputs, self.options = model, inputs, options

    def training_step(self, batch, batch_idx):
        return self.model(**self.inputs(batch), **self.options).loss

    validation_step = training_step


@pytest.mark.parametrize(("build", "inputs"), MODELS.values(), ids=MODELS)
def test_a_loss_inside_the_model_is_captured(build, inputs):
    seed_everything(0, verbose=False)
    model = Wrapped(build(), inputs)
    check(watched(model, lambda m, b: m.training_step(b, 0), validate=True), tolerance=2e-5)


def test_the_number_of_items_does_not_change_the_units():
    seed_everything(0, verbose=False)
    build, inputs = MODELS["causal"]
    counted = Wrapped(build(), inputs, num_items_in_batch=torch.tensor(1000))

    def plain(model, batch):
        return model.model(**inputs(batch)).loss

    check(watched(counted, plain), tolerance=2e-5)
