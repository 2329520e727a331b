"""peft: LoRA over random GPT-2, Llama and T5 of transformers, with transformers' collators; the loss is the model's."""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from tests.ecosystem.fitting import Case, one_by_one, rows

WORDS = " ".join(sorted(pydoc_data.topics.topics.values())).split()
SPECIAL = ["[PAD]", "[EOS]", "[UNK]"]
VOCABULARY = SPECIAL + sorted(set(WORDS[:400]))


def tokenizer() -> PreTrainedTokenizerFast:
    """Of whole words, made here."""
    numbered = {word: number for number, word in enumerate(VOCABULARY)}
    words = Tokenizer(models.WordLevel(numbered, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


class LoRA(LightningModule):
    def __init__(self, model: PreTrainedModel, modules: list[str], task: str) -> None:
        super().__init__()
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=modules, task_type=task)
        self.model = get_peft_model(model, config)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([each for each in self.parameters() if each.requires_grad], lr=1e-2)


def gpt2() -> LoRA:
    size = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": len(VOCABULARY)}
    size |= {"bos_token_id": 1, "eos_token_id": 1}
    return LoRA(GPT2LMHeadModel(GPT2Config(**size)), ["c_attn"], "CAUSAL_LM")


def llama() -> LoRA:
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    return LoRA(LlamaForCausalLM(LlamaConfig(vocab_size=len(VOCABULARY), **size)), ["q_proj", "v_proj"], "CAUSAL_LM")


def t5() -> LoRA:
    size = {"num_layers": 2, "num_heads": 2, "d_model": 16, "d_kv": 8, "d_ff": 32, "decoder_start_token_id": 0}
    return LoRA(T5ForConditionalGeneration(T5Config(vocab_size=len(VOCABULARY), **size)), ["q", "v"], "SEQ_2_SEQ_LM")


def texts(first: int, count: int) -> list[str]:
    """Of 6 to 13 words."""
    return [" ".join(WORDS[start : start + 6 + start % 8]) for start in range(first, first + 5 * count, 5)]


def documents(first: int, count: int) -> list[Any]:
    words = tokenizer()
    return [dict(words(text)) for text in texts(first, count)]


def questions(first: int, count: int) -> list[Any]:
    """The last two to four words of a text are the answer to the others."""
    words, samples = tokenizer(), []
    for row, text in enumerate(texts(first, count)):
        question, answer = text.split()[: -2 - row % 3], text.split()[-2 - row % 3 :]
        samples.append({**words(" ".join(question)), "labels": words(" ".join(answer))["input_ids"]})
    return samples


def fitted(
    build: Callable[[], LoRA], data: Callable[[int, int], list[Any]], collator: Callable[[Any], Any]
) -> Callable[..., LightningModule]:
    def fit(callbacks: list[Any], **options: Any) -> LightningModule:
        module, collate = build(), collator(tokenizer())
        trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
        train = DataLoader(data(0, 48), 8, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
        trainer.fit(module, train, DataLoader(data(240, 24), 8, collate_fn=collate))  # type: ignore[arg-type]
        return module

    return fit


def next_tokens(words: PreTrainedTokenizerFast) -> Any:
    return DataCollatorForLanguageModeling(words, mlm=False)


def for_encoder_and_decoder(words: PreTrainedTokenizerFast) -> Any:
    return DataCollatorForSeq2Seq(words)


ALONE = one_by_one(rows, lambda batch: len(batch["input_ids"]))
CASES = {
    "peft-gpt2": Case(fitted(gpt2, documents, next_tokens), ALONE),
    "peft-llama": Case(fitted(llama, documents, next_tokens), ALONE),
    "peft-t5": Case(fitted(t5, questions, for_encoder_and_decoder), ALONE),
}
