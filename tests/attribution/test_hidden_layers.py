"""Hidden layers are found by structure in models of every family, and attention and heads never are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_memsink.attribution.hidden_layers import describe, find_hidden_layers, unit_weights

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 20}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def hf(model: str, config: str, **options: Any) -> nn.Module:
    return getattr(transformers, model)(getattr(transformers, config)(**options))


def names(model: nn.Module, modules: Any = None) -> list[str]:
    return [layer.name for layer in find_hidden_layers(model, modules)]


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20, **ENDS}
T5 = {"d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
VIT = {**SMALL, "image_size": 8, "patch_size": 4}
DOWN = "model.layers.{}.mlp.down_proj"
FAMILIES: dict[str, tuple[str, Any, str]] = {
    "GPT-2": ("GPT2", GPT2, "transformer.h.{}.mlp.c_proj"),
    "GPT-NeoX": ("GPTNeoX", SMALL | ENDS, "gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "Llama": ("Llama", SMALL | ENDS, DOWN),
    "Mistral, grouped queries": ("Mistral", SMALL | ENDS | {"num_key_value_heads": 2}, DOWN),
    "Qwen2, one key": ("Qwen2", SMALL | ENDS | {"num_key_value_heads": 1}, DOWN),
    "Qwen3, heads as wide as the MLP": ("Qwen3", SMALL | ENDS | {"num_key_value_heads": 4, "head_dim": 6}, DOWN),
    "Phi-3, fused gate": ("Phi3", SMALL | ENDS, DOWN),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_language_model_family_has_its_down_projections(family):
    prefix, options, pattern = FAMILIES[family]
    model = hf(f"{prefix}{'LMHeadModel' if prefix == 'GPT2' else 'ForCausalLM'}", f"{prefix}Config", **options)
    assert names(model) == [pattern.format(block) for block in range(2)]


@pytest.mark.parametrize(
    "kind, config, options, expected",
    [
        ("BertForMaskedLM", "BertConfig", SMALL, ["bert.encoder.layer.{}.output.dense"]),
        ("BertForSequenceClassification", "BertConfig", SMALL, ["bert.encoder.layer.{}.output.dense"]),
        ("RobertaForMaskedLM", "RobertaConfig", SMALL, ["roberta.encoder.layer.{}.output.dense"]),
        ("ViTForImageClassification", "ViTConfig", VIT, ["vit.layers.{}.mlp.fc2"]),
        ("T5EncoderModel", "T5Config", {**T5, "num_layers": 2}, ["encoder.block.{}.layer.1.DenseReluDense.wo"]),
    ],
)
def test_heads_on_a_normalized_stream_are_not_taken(kind, config, options, expected):
    assert names(hf(kind, config, **options)) == [name.format(block) for block in range(2) for name in expected]


def together(kind: str = "Block", **children: nn.Module) -> nn.Module:
    """A module with these attributes, whose forward shows nothing."""
    module = type(kind, (nn.Module,), {})()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def block(width: int, head: int, key: int) -> nn.Module:
    """Attention and an MLP as attributes of one module."""
    attention = {"q": nn.Linear(width, head), "k": nn.Linear(width, key), "v": nn.Linear(width, key)}
    return together(**attention, o=nn.Linear(head, width), fc1=nn.Linear(width, 32), fc2=nn.Linear(32, width))


@pytest.mark.parametrize("head", [8, 12, 16, 32])
@pytest.mark.parametrize("key", [4, 8, 12, 32])
def test_attention_is_told_from_an_mlp_by_its_widths_alone(head, key):
    if 32 in (head, key):  # as wide as the MLP: nothing tells them apart, so nothing is taken
        with pytest.raises(ValueError, match=r"There are q, k, v, o, fc1, fc2\."):
            find_hidden_layers(block(8, head, key))
    else:
        assert names(block(8, head, key)) == ["fc2"]


FUSED = together(
    qkv=nn.Linear(8, 24),
    proj=nn.Linear(8, 8),
    norm=nn.LayerNorm(8),
    fc1=nn.Linear(8, 32),
    fc2=nn.Linear(32, 8),
)
SWIGLU = together(w1=nn.Linear(8, 16), w2=nn.Linear(16, 8), w3=nn.Linear(8, 16))
TWO_HEADS = together(
    trunk=nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()),
    policy=nn.Linear(8, 3),
    value=nn.Linear(8, 1),
)
NUMBERED = together(fc1=nn.Linear(4, 8), fc2=nn.Linear(8, 8), fc3=nn.Linear(8, 8), fc4=nn.Linear(8, 3))
HEAD_BEFORE_BODY = together(
    enter=nn.Linear(5, 8),
    head=nn.Linear(8, 3),
    body=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1),
)
VGG = together(
    features=nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU()),
    pool=nn.AdaptiveAvgPool2d(1),
    classifier=nn.Sequential(nn.Flatten(), nn.Linear(8, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 3)),
)
GAN = together(
    generator=nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh()),
    critic=nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1)),
)


class Basic(nn.Module):
    """A residual block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.layer1 = nn.Sequential(Basic(8, 8), Basic(8, 8))
        self.layer2 = nn.Sequential(Basic(8, 16))
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(16, 10)


PLAIN = nn.Sequential(
    nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)
)
CNN = nn.Sequential(
    *(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
)
DEPTHWISE = nn.Sequential(
    *(nn.Conv2d(4, 8, 1), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Conv2d(8, 4, 1)),
)
WIDE_FLATTEN = nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    "model, expected",
    [
        (PLAIN, ["3", "6"]),
        (CNN, ["4", "8"]),
        (DEPTHWISE, ["4"]),
        (WIDE_FLATTEN, ["5"]),
        (FUSED, ["fc2"]),
        (SWIGLU, ["w2"]),
        (TWO_HEADS, ["trunk.2"]),
        (NUMBERED, ["fc2", "fc3", "fc4"]),
        (HEAD_BEFORE_BODY, ["body.layers.0.linear2"]),
        (Residual(), ["layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv2"]),
        (VGG, ["features.2", "classifier.1", "classifier.4"]),
        (GAN, ["generator.2", "critic.2"]),
        (nn.Transformer(8, 2, 1, 1, 16, batch_first=True), ["encoder.layers.0.linear2", "decoder.layers.0.linear2"]),
        (nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)]), ["1", "2", "3"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_plain_models_are_read_by_structure(model, expected):
    assert names(model) == expected


@pytest.mark.parametrize("batch_first, axis", [(False, 1), (True, 0)])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_torch_layers_say_where_their_batch_lies(kind, batch_first, axis):
    [layer] = find_hidden_layers(kind(8, 2, 16, batch_first=batch_first))
    assert (layer.batch_axis, layer.unit_axis, layer.units) == (axis, -1, 16)


def test_channels_are_units_of_a_convolution_and_features_of_a_linear():
    assert [(layer.unit_axis, layer.units) for layer in find_hidden_layers(CNN)] == [(1, 8), (-1, 16)]


class Lora(nn.Module):
    """As adapters wrap: the frozen layer, and a low rank beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def test_a_lora_wrapper_counts_as_the_linear_it_wraps():
    model = hf("LlamaForCausalLM", "LlamaConfig", **SMALL, **ENDS)
    for block in model.model.layers:
        block.mlp.down_proj = Lora(block.mlp.down_proj)
        block.mlp.up_proj = Lora(block.mlp.up_proj)
    layers = find_hidden_layers(model)
    assert [layer.name for layer in layers] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert isinstance(layers[0].module, Lora) and unit_weights(layers[0]).shape == (24, 16)


@pytest.mark.parametrize(
    "model, inputs",
    [
        (PLAIN, torch.randn(3, 4)),
        (CNN, torch.randn(3, 3, 12, 12)),
        (nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), torch.randn(5, 3, 8)),
        (hf("GPT2LMHeadModel", "GPT2Config", **GPT2), torch.arange(8).reshape(2, 4)),
    ],
    ids=["Linear", "Conv", "torch", "Conv1D"],
)
def test_zeroing_a_unit_is_zeroing_its_weights(model, inputs):
    for layer in find_hidden_layers(model.eval()):

        def silence(module: nn.Module, args: tuple[Tensor], axis: int = layer.unit_axis) -> tuple[Tensor]:
            return (args[0].index_fill(axis, torch.arange(4), 0.0),)

        def run() -> Tensor:
            output = model(inputs)
            return output if isinstance(output, Tensor) else output.logits

        handle = layer.module.register_forward_pre_hook(silence)
        expected = run()
        handle.remove()
        weights = unit_weights(layer)
        assert len(weights) == layer.units
        before = weights.detach().clone()
        assert not torch.equal(run(), expected)
        with torch.no_grad():
            weights[:4] = 0.0
        torch.testing.assert_close(run(), expected)
        with torch.no_grad():
            weights.copy_(before)


GPT = hf("GPT2LMHeadModel", "GPT2Config", **GPT2)


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("*.1.mlp.c_proj", ["transformer.h.1.mlp.c_proj"]),
        ("*c_proj", ["transformer.h.0.mlp.c_proj", "transformer.h.1.mlp.c_proj"]),
        ("transformer.h.0.*", ["transformer.h.0.mlp.c_proj"]),
        ("transformer.h.0.attn.c_proj", ["transformer.h.0.attn.c_proj"]),
    ],
)
def test_patterns_take_hidden_layers_among_what_they_name(pattern, expected):
    assert names(GPT, [pattern]) == names(GPT, pattern) == expected


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("*.mlp.c_fc", r"h\.0\.mlp\.c_fc writes one.*There are transformer\.h\.0\.mlp\.c_proj, transformer\.h\.1\."),
        ("transformer.h.0.mlp", r"no Linear or Conv has that name. There is transformer\.h\.0\.mlp\.c_proj\."),
        ("transformer.h.0.mlp.c_porj", r"There are transformer\.h\.0\.mlp\.c_proj"),
        ("zzz", r"modules='zzz' names no hidden layer of GPT2LMHeadModel.*There are transformer\.h\.0\.mlp\.c_proj"),
    ],
)
def test_a_pattern_that_names_none_says_which_there_are(pattern, message):
    with pytest.raises(ValueError, match=message):
        find_hidden_layers(GPT, [pattern])


def test_the_table_folds_blocks_in_a_row():
    model = nn.ModuleDict({"blocks": nn.ModuleList(copy.deepcopy(SWIGLU) for _ in range(3)), "plain": PLAIN})
    model["blocks"][1] = nn.Identity()
    assert describe(find_hidden_layers(GPT)) == "transformer.h.0-1.mlp.c_proj  Conv1D  64 units each"
    assert describe(find_hidden_layers(model)).splitlines() == [
        "blocks.0.w2  Linear  16 units",
        "blocks.2.w2  Linear  16 units",
        "plain.3      Linear  8 units",
        "plain.6      Linear  8 units",
    ]
    assert describe([]) == ""


def test_finding_leaves_the_model_alone():
    model = VGG
    state = {name: value.clone() for name, value in model.state_dict().items()}
    find_hidden_layers(model)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
