"""Baked models are plain and smaller, and compute what the masked ones did."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.testing import assert_close

from lightning_memsink.attribution.hidden_layers import find_hidden_layers
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memsinks import MemSinks
from lightning_memsink.mitigation.bake import bake
from lightning_memsink.mitigation.designed_sinks import Pool, masked
from tests.support.small_runs import TinyLM, fit

IDS = torch.randint(20, (2, 7), generator=torch.Generator().manual_seed(0))
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SEQ2SEQ = {"d_model": 16, "vocab_size": 20, "decoder_start_token_id": 0, **ENDS}
BART = {**SEQ2SEQ, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20, **ENDS}),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SMALL | ENDS),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", SMALL | ENDS | {"tie_word_embeddings": True}),
    "Llama, as wide as its vocabulary": ("LlamaForCausalLM", "LlamaConfig", SMALL | ENDS | {"intermediate_size": 20}),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", SMALL | ENDS | {"num_key_value_heads": 1}),
    "Phi-3, gate and up in one": ("Phi3ForCausalLM", "Phi3Config", SMALL | ENDS),
    "OPT": ("OPTForCausalLM", "OPTConfig", SMALL | ENDS | {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    "BERT": ("BertForMaskedLM", "BertConfig", SMALL),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        SEQ2SEQ | {"d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2},
    ),
    "BART": (
        *("BartForConditionalGeneration", "BartConfig"),
        BART | {"encoder_ffn_dim": 24, "decoder_ffn_dim": 40},
    ),
}


def hf(model: str, config: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def size(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def logits(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def served(model: nn.Module, pool: Pool, without: list[int] | None) -> Any:
    """The mask that the baked model should amount to."""
    ids = torch.tensor(without or [], dtype=torch.int64)
    mask = pool.dropped if without is None else lambda units: pool.without(ids, units)
    return masked(find_hidden_layers(model), mask, tokens=IDS.shape[1])


@pytest.mark.parametrize("without", [None, [5], [5, -1], []], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_baked_model_computes_what_the_masked_one_did(family, without):
    model, pool = hf(*FAMILIES[family]), Pool(0.75, 0.3, seed=1)
    before, whole, state = copy.deepcopy(model.state_dict()), logits(model), torch.get_rng_state()
    baked = bake(model, pool, without=without)
    assert torch.equal(state, torch.get_rng_state())
    with served(model, pool, without):
        expected = logits(model)
    assert_close(logits(baked), expected, rtol=0, atol=1e-6)
    assert type(baked) is type(model) and (size(baked) < size(model) or without == [])
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(logits(model), whole) and not torch.equal(whole, expected)


LOADS = """
import sys, torch, transformers
for folder in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    given = torch.load(f"{folder}/given.pt")
    assert torch.equal(model(input_ids=given["ids"]).logits, given["logits"])
    settings = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(given["ids"], use_cache=True, **settings), given["text"])
assert "lightning_memsink" not in sys.modules and "lightning" not in sys.modules
"""


def test_transformers_alone_saves_loads_and_generates_with_it(tmp_path):
    folders = []
    for family in ("GPT-2", "Llama"):
        model = hf(*FAMILIES[family])
        model.generation_config.max_length = 13
        baked: Any = bake(model, Pool(), without=[3])
        assert baked.generation_config.max_length == 13
        text = [baked.generate(IDS, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*text)
        folders.append(tmp_path / family)
        baked.save_pretrained(folders[-1])
        torch.save({"ids": IDS, "logits": logits(baked), "text": text[0]}, folders[-1] / "given.pt")
    subprocess.run([sys.executable, "-c", LOADS, *folders], check=True, cwd=tmp_path)


def test_dtype_mode_frozen_and_tied_weights_stay():
    model = hf(*FAMILIES["Llama"]).to(torch.bfloat16).train()
    model.model.norm.float()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    baked: Any = bake(model)
    for (name, before), after in zip(model.named_parameters(), baked.parameters(), strict=True):
        assert (before.dtype, before.requires_grad) == (after.dtype, after.requires_grad), name
    assert [module.training for module in baked.modules()] == [module.training for module in model.modules()]
    assert baked.lm_head.weight is baked.model.embed_tokens.weight
    assert baked.config.intermediate_size == 6 and model.config.intermediate_size == 24


# Other networks -------------------------------------------------------------------------------------------------------


def convolutions() -> nn.Module:
    norm = nn.BatchNorm2d(16)
    nn.init.uniform_(norm.running_mean), nn.init.uniform_(norm.running_var)
    return nn.Sequential(nn.Conv2d(3, 16, 3), norm, nn.PReLU(16), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))


def deep() -> nn.Module:
    """With two pairs of layers of equal size."""
    widths = [(5, 16), (16, 8), (8, 16), (16, 8), (8, 2)]
    layers = [part for width in widths for part in (nn.Linear(*width), nn.GELU())]
    return nn.Sequential(*layers[:-1])


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[int]]] = {
    "deep MLP": (deep, [2, 5]),
    "convolutions": (convolutions, [2, 3, 8, 8]),
    "encoder": (encoder, [5, 2, 8]),
}


@pytest.mark.parametrize("without", [None, [5]], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_other_networks_are_cut_the_same_way(network, without):
    make, shape = NETWORKS[network]
    torch.manual_seed(0)
    model, pool, x = make().eval(), Pool(0.5, 0.25), torch.randn(shape)
    baked = bake(model, pool, without=without)
    with served(model, pool, without):
        expected = model(x)
    assert_close(baked(x), expected, rtol=0, atol=1e-6)
    assert size(baked) < size(model)
    for module in baked.modules():
        if isinstance(module, nn.Linear):
            assert [module.out_features, module.in_features] == list(module.weight.shape)
        if isinstance(module, nn.Conv2d):
            assert [module.out_channels, module.in_channels] == list(module.weight.shape[:2])


class Twice(nn.Module):
    """Two blocks that share their weights, around a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.other = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.other[0].weight, self.other[2].weight = self.one[0].weight, self.one[2].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.norm(self.one(x)))


def test_weights_that_two_layers_share_stay_shared():
    model, x = Twice(), torch.randn(3, 4)
    baked = bake(model, Pool(0.5), without=[1])
    with served(model, Pool(0.5), [1]):
        assert_close(baked(x), model(x), rtol=0, atol=1e-6)
    assert baked.one[0].weight is baked.other[0].weight and baked.one[2].weight is baked.other[2].weight


def test_a_module_of_lightning_is_baked_with_the_model_in_it_and_without_hooks():
    class Around(TinyLM):
        def __init__(self) -> None:
            super().__init__()
            self.lm = hf(*FAMILIES["GPT-2"]).train()

        def on_train_epoch_end(self) -> None:
            baked.append(bake(self, sinks.pool))  # hooks are on the model, which knows its Trainer

    sinks, baked = MemSinks(), list[Any]()
    run, model = fit([LossTracker(identity="content"), sinks], Around(), max_epochs=1)
    (small,) = baked
    model.eval(), small.eval()
    assert isinstance(small, LightningModule) and small._trainer is None and model._trainer is run
    assert all(not module._forward_pre_hooks for module in small.modules())
    assert small.lm.config.n_inner == 16 and small.mlp[0].out_features == 32
    with served(model, sinks.pool, None):
        assert_close(small.lm(IDS).logits, model.lm(IDS).logits, rtol=0, atol=1e-6)


# What can't be cut ----------------------------------------------------------------------------------------------------


MIXTRAL = ("MixtralForCausalLM", "MixtralConfig", SMALL | ENDS | {"num_local_experts": 2})
BLOOM = ("BloomForCausalLM", "BloomConfig", {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 20})


def normed(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), norm, nn.GELU(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), "No hidden layer found in Sequential"),
        (lambda: normed(nn.LayerNorm(8)), r"1 \(LayerNorm\) comes before 3.*can't be cut out there"),
        (lambda: normed(nn.LayerNorm(8, elementwise_affine=False)), r"1 \(LayerNorm\) comes before"),
        (lambda: hf(*MIXTRAL), r"mixture of experts \(num_local_experts=2\)"),
        (lambda: hf(*BLOOM), "No setting of BloomConfig"),
    ],
)
def test_what_can_not_be_cut_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        bake(make())


def test_layers_of_unequal_width_are_refused_where_the_configuration_tells_one():
    model = hf(*FAMILIES["Llama"])
    with pytest.raises(ValueError, match="No setting of LlamaConfig makes a LlamaForCausalLM with 6 instead of 24"):
        bake(model, modules=["model.layers.0.mlp.down_proj"])
    with pytest.raises(
        ValueError, match=r"model.layers.0.self_attn.o_proj reads units, but .* does not show which module writes them"
    ):
        bake(model, modules=["*.o_proj"])
