"""Rows of a batch through whole networks, in training and evaluation, with and without autograd, in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from tests.support.following import Following, batch_rows

B, T, VOCABULARY = 3, 7, 50
SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autograd": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
}


class Block(nn.Module):
    """A residual block as torchvision's."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.first_norm(self.first(x)))
        out = self.second_norm(self.second(out))
        out += self.shortcut(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        )
        self.blocks = nn.Sequential(Block(4, 4, 1), Block(4, 8, 2))
        self.pool, self.head = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = nn.Embedding(VOCABULARY, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        hidden = self.embedding(ids)
        hidden = hidden if self.batch_first else hidden.transpose(0, 1)
        return self.encoder(hidden, src_key_padding_mask=padding)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], batch_first: bool, packed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.net = kind(8, 6, num_layers=2, bidirectional=True, batch_first=batch_first)
        self.batch_first, self.packed = batch_first, packed

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.embedding(ids if self.batch_first else ids.T)
        if not self.packed:
            output, state = self.net(hidden)
        else:
            lengths = torch.tensor([T - 2, T, T - 4])
            packed = nn.utils.rnn.pack_padded_sequence(hidden, lengths, self.batch_first, enforce_sorted=False)
            output, state = self.net(packed)
            output, _ = nn.utils.rnn.pad_packed_sequence(output, self.batch_first)
        return output, state[0] if isinstance(state, tuple) else state


@pytest.fixture(params=[True, False], ids=["train", "eval"])
def training(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=list(SETTINGS))
def setting(request: pytest.FixtureRequest) -> Iterator[Any]:
    yield SETTINGS[request.param]


def follow_through(model: Callable[..., Any], setting: Any, *inputs: Tensor) -> tuple[Following, Any]:
    mode = Following()
    for value in inputs:
        mode.give(value, batch_rows(B, value.ndim))
    with setting(), mode:
        return mode, model(*inputs)


def is_followed(mode: Following, result: Tensor, axis: int = 0) -> bool:
    owners = mode.owners(result)
    assert owners is not None, (mode.of(result), mode.lost)
    return torch.equal(owners, batch_rows(B, result.ndim, axis).expand(result.shape))


def ids() -> Tensor:
    return torch.randint(VOCABULARY, (B, T))


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
LANGUAGE = {
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **SIZES)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(vocab_size=VOCABULARY, num_key_value_heads=2, num_local_experts=4, **SIZES)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SIZES)),
}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", LANGUAGE)
def test_rows_through_a_language_model(name, attention, training, setting):
    model = LANGUAGE[name]().train(training)
    model.set_attn_implementation(attention)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, T - 2 :] = 0

    def loss_of(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(input_ids=tokens, attention_mask=mask).logits
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        return logits, losses.mean(1)

    mode, (logits, losses) = follow_through(loss_of, setting, ids(), mask)
    assert is_followed(mode, logits)
    assert is_followed(mode, losses)


def test_rows_through_an_encoder_and_decoder(training, setting):
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).train(training)
    mode, logits = follow_through(lambda a, b: model(input_ids=a, labels=b).logits, setting, ids(), ids())
    assert is_followed(mode, logits)


def test_rows_through_a_vision_transformer(training, setting):
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **SIZES)).train(training)
    mode, logits = follow_through(lambda a: model(pixel_values=a).logits, setting, torch.randn(B, 3, 8, 8))
    assert is_followed(mode, logits)


def test_rows_through_a_residual_network(training, setting):
    mode, logits = follow_through(ResNet().train(training), setting, torch.randn(B, 3, 32, 32))
    assert is_followed(mode, logits)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")
@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_through_a_transformer_encoder(batch_first, training, setting):
    model = Encoder(batch_first).train(training)
    padding = torch.zeros(B, T, dtype=torch.bool)
    padding[1, T - 2 :] = True
    mode, hidden = follow_through(model, setting, ids(), padding)
    assert is_followed(mode, hidden, axis=0 if batch_first else 1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_rows_through_a_recurrent_network(kind, batch_first, packed, training, setting):
    mode, (output, state) = follow_through(Recurrent(kind, batch_first, packed).train(training), setting, ids())
    assert is_followed(mode, output, axis=0 if batch_first else 1)
    assert is_followed(mode, state, axis=1)


def test_attention_over_the_batch_is_lost(training):
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False).train(training)
    mode, hidden = follow_through(model, nullcontext, torch.randn(B, T, 8))
    assert mode.owners(hidden) is None
    assert "over the samples" in mode.of(hidden).reason
