"""Norms read in one backward against a batch of one per sample."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from lightning_memsink.attribution.gradient_norms import GradientNorms
from tests.support.one_by_one import (
    LENGTH,
    SAMPLES,
    TOKENS,
    VOCABULARY,
    agree,
    in_one,
    language,
    mean_square,
    one_by_one,
)


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


LAYERS = {
    "Linear": lambda i, o: nn.Linear(i, o),
    "Linear without bias": lambda i, o: nn.Linear(i, o, bias=False),
    "Hugging Face's Conv1D": lambda i, o: Conv1D(o, i),
    "LayerNorm": lambda i, o: nn.Sequential(nn.LayerNorm(i), nn.Linear(i, o)),
    "RMSNorm": lambda i, o: nn.Sequential(nn.RMSNorm(i), nn.Linear(i, o)),
    "an RMSNorm of one's own": lambda i, o: nn.Sequential(RMSNorm(i), nn.Linear(i, o)),
}


@pytest.mark.parametrize("layer", LAYERS)
@settings(max_examples=12, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    inputs=st.integers(2, 9),
    outputs=st.integers(1, 9),
    seed=st.integers(0, 999),
)
def test_layers_on_features_agree_with_a_batch_of_one(layer, shape, inputs, outputs, seed):
    torch.manual_seed(seed)
    agree(LAYERS[layer](inputs, outputs), torch.randn(*shape, inputs))


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"sparse": True}, {"max_norm": 1.0}], ids=str)
@settings(max_examples=10, deadline=None)
@given(samples=st.integers(2, 4), length=st.integers(1, 9), width=st.integers(1, 5), seed=st.integers(0, 999))
def test_embeddings_agree_with_a_batch_of_one(options, samples, length, width, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(5, width, **options), nn.Linear(width, 3))
    agree(model, torch.randint(5, (samples, length)))


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3), 1),
    (nn.Conv1d(4, 6, 3, padding=2, dilation=2, stride=2, groups=2), 1),
    (nn.Conv1d(4, 60, 3, padding="same", bias=False), 1),
    (nn.Conv2d(4, 6, 3, padding=1), 2),
    (nn.Conv2d(4, 6, (2, 3), stride=(2, 3)), 2),
    (nn.Conv2d(4, 40, 3, padding=1, stride=2, padding_mode="reflect"), 2),
    (nn.Conv2d(4, 8, 3, padding=(0, 2), groups=4, padding_mode="circular"), 2),
    (nn.Conv3d(4, 3, 2), 3),
    (nn.Sequential(nn.GroupNorm(2, 4), nn.Conv2d(4, 3, 1)), 2),
]


@pytest.mark.parametrize(("layer", "axes"), CONVOLUTIONS, ids=str)
def test_convolutions_agree_with_a_batch_of_one(layer, axes):
    torch.manual_seed(0)
    agree(layer, torch.randn(3, 4, *[6] * axes))


def small(kind: type, config: type, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return kind(config(vocab_size=VOCABULARY, **options))


GPT2 = {"n_positions": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LLAMA = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {
    **LLAMA,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
TRANSFORMERS = {
    "GPT-2": lambda: small(GPT2LMHeadModel, GPT2Config, **GPT2, **NO_DROPOUT),
    "Llama": lambda: small(LlamaForCausalLM, LlamaConfig, **LLAMA, num_key_value_heads=1),
    "Llama, tied": lambda: small(LlamaForCausalLM, LlamaConfig, **LLAMA, tie_word_embeddings=True),
    "BERT": lambda: small(BertForMaskedLM, BertConfig, **BERT),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_every_parameter_of_hugging_face_models_is_covered(name):
    """Tied heads and position embeddings that all samples share included."""
    agree(TRANSFORMERS[name]().train(), TOKENS, language)


def test_every_parameter_of_a_classifier_is_covered():
    model = small(BertForSequenceClassification, BertConfig, **BERT).train()
    agree(model, TOKENS, lambda model, batch: model(input_ids=batch, labels=batch[:, 0] % 2).loss)


class Positions(nn.Module):
    """``way`` is how the positions come to the samples."""

    def __init__(self, way: str, axis: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.word, self.place = nn.Embedding(VOCABULARY, 8), nn.Embedding(16, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.way, self.axis = way, axis

    def forward(self, tokens: Tensor) -> Tensor:
        word, steps = self.word(tokens), torch.arange(tokens.shape[1 - self.axis])
        match self.way:
            case "one axis":
                hidden = word + self.place(steps)
            case "an axis added later":
                hidden = word + self.place(steps).unsqueeze(self.axis)
            case "subtracted, scaled, in front":
                hidden = torch.sub(word, self.place(steps.unsqueeze(self.axis)), alpha=0.5) + self.place(steps[:1])
            case "expanded":
                hidden = self.place(steps.unsqueeze(self.axis)).expand_as(word) + word
            case "multiplied":
                hidden = word * self.place(steps.unsqueeze(self.axis))
        return self.head(self.norm(hidden))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("way", ["an axis added later", "expanded"])
@pytest.mark.parametrize("samples", [1, 3, LENGTH])
def test_positions_shared_by_all_samples_are_exact(way, axis, samples):
    """With as many samples as positions, too, where shapes alone would not tell."""
    tokens = torch.randint(VOCABULARY, (samples, LENGTH), generator=torch.Generator().manual_seed(samples))
    agree(Positions(way, axis), tokens if axis == 0 else tokens.T.contiguous(), axis=axis)


@pytest.mark.parametrize("samples", [3, LENGTH])
def test_positions_without_a_sample_axis_are_exact(samples):
    agree(Positions("one axis"), TOKENS[:1].repeat(samples, 1).roll(1))


@pytest.mark.parametrize("way", ["multiplied", "subtracted, scaled, in front"])
def test_positions_that_cannot_be_followed_are_named(way):
    model = Positions(way)
    oracle = one_by_one(model, TOKENS, mean_square)
    norms, recorder = in_one(model, TOKENS, mean_square)
    assert list(recorder.uncovered) == ["place"] and "place" not in norms
    assert recorder.covered == pytest.approx(1 - 128 / sum(weight.numel() for weight in model.parameters()))
    for name, norm in norms.items():
        assert_close(norm, oracle[name], rtol=1e-5, atol=1e-9)


class Adapted(nn.Module):
    """A frozen layer and two small ones beside it (LoRA, Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.up(self.down(x))


class Thrice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same, self.norm, self.mix = nn.Linear(6, 6), nn.LayerNorm(6), nn.Conv1d(5, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.mix(torch.tanh(self.norm(self.same(x))))
        return x


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 2), reentrant
        self.inner = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 6), nn.LayerNorm(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.inner, self.first(x), use_reentrant=self.reentrant))


MODELS = {
    "adapters": lambda: nn.Sequential(Adapted(nn.Linear(6, 7)), nn.ReLU(), Adapted(nn.Linear(7, 3))),
    "a layer used three times": Thrice,
    "activation checkpointing": lambda: Checkpointed(reentrant=False),
    "reentrant checkpointing": lambda: Checkpointed(reentrant=True),
    "a frozen part": lambda: nn.Sequential(nn.Linear(6, 6).requires_grad_(False), nn.GELU(), nn.Linear(6, 2)),
    "in place": lambda: nn.Sequential(nn.Flatten(), nn.Linear(30, 6), nn.ReLU(inplace=True), nn.Linear(6, 2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_whole_models_agree_with_a_batch_of_one(name):
    torch.manual_seed(0)
    agree(MODELS[name](), torch.randn(4, 5, 6))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_a_frozen_parameter_counts_for_nothing(frozen):
    layer = nn.Linear(3, 2)
    getattr(layer, frozen).requires_grad_(False)
    agree(layer, torch.randn(4, 3))


def test_sequences_may_come_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, 5), nn.LayerNorm(5), nn.Linear(5, 2))
    agree(model, TOKENS.T.contiguous(), axis=1)


def test_half_precision_is_as_exact_as_it_can_be():
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mean_square(model, batch)

    torch.manual_seed(0)
    agree(nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 4)), torch.randn(4, 5, 6), loss, rtol=2e-2)


def test_weights_turn_the_batchs_gradient_into_each_samples_own():
    """Tokens of unequal number, a mean over all of them, a scaled loss and half of an accumulation."""
    model, counts = nn.Linear(6, VOCABULARY), torch.tensor([6, 1, 0, 3])
    inputs = torch.randn(SAMPLES, LENGTH, 6, generator=torch.Generator().manual_seed(0))
    labels = TOKENS.masked_fill(torch.arange(LENGTH) >= counts[:, None], -100)
    recorder = GradientNorms(model)
    recorder.open()
    (1024 / 2 * functional.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())).backward()
    norms = recorder.finish(SAMPLES, 1024 / 2 * counts / counts.sum())[""]
    for sample in (0, 1, 3):
        model.zero_grad()
        functional.cross_entropy(model(inputs[sample]), labels[sample]).backward()
        oracle = sum(weight.grad.square().sum() for weight in model.parameters())
        assert_close(norms[sample], oracle, rtol=1e-5, atol=0)
    assert norms[2] == 0


def test_a_reused_layer_in_reentrant_checkpoints_is_named():
    class Twice(Checkpointed):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.inner, self.first(x), use_reentrant=True)
            return self.last(checkpoint(self.inner, x, use_reentrant=True))

    norms, recorder = in_one(Twice(reentrant=True), torch.randn(4, 5, 6), mean_square)
    assert set(norms) == {"first", "last"} and set(recorder.uncovered) == {"inner.0", "inner.2", "inner.3"}


def test_gradients_are_bit_identical_and_hooks_leave_no_trace():
    model = TRANSFORMERS["GPT-2"]()
    language(model, TOKENS).backward()
    plain = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    _, recorder = in_one(model, TOKENS, language)
    assert all(torch.equal(plain[name], weight.grad) for name, weight in model.named_parameters())
    recorder.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_closed_it_sees_nothing_and_frozen_models_have_no_hooks():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2).requires_grad_(False))
    recorder = GradientNorms(model)
    mean_square(model, torch.randn(4, 3)).backward()
    model.zero_grad()
    assert not recorder._norms and not recorder._kept_inputs and not model[1]._forward_pre_hooks
    assert recorder.finish(4) == {} and recorder.covered == 1
