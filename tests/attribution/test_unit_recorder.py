"""Effects recorded in the user's backward equal those of each sample alone, however the step is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_memsink.attribution.hidden_layers import HiddenLayer, find_hidden_layers
from lightning_memsink.attribution.unit_effects import sample_weights
from lightning_memsink.attribution.unit_recorder import UnitRecorder
from lightning_memsink.losses.autograd_graph import find_loss_calls
from lightning_memsink.losses.per_sample import in_batch_order

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
TOKENS = torch.randint(20, (3, 6), generator=torch.Generator().manual_seed(0))
LABELS = TOKENS.clone()
LABELS[0, 2:], LABELS[2, :2] = -100, -100
IMAGES = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def recorded(model: nn.Module, loss: Callable[[], Tensor], batch_size: int = 3) -> dict[str, Tensor]:
    """One step of the user's, watched; nats of each sample's own mean loss."""
    recorder = UnitRecorder(find_hidden_layers(model))
    recorder.open()
    number = loss()
    calls = in_batch_order(find_loss_calls(number), batch_size)
    number.backward()
    weights = sample_weights(calls, batch_size)
    assert weights is not None
    effects = recorder.finish(batch_size, weights)
    recorder.remove()
    assert not recorder.left_out
    model.zero_grad()
    return effects


def keeping(layer: HiddenLayer, kept: list[tuple[HiddenLayer, Tensor]]) -> Callable[..., None]:
    return lambda module, args: kept.append((layer, args[0]))


def one_by_one(model: nn.Module, loss: Callable[[int], Tensor], batch_size: int = 3) -> dict[str, Tensor]:
    """The oracle: each sample in a batch of its own, its hidden activations differentiated by hand."""
    layers = find_hidden_layers(model)
    rows: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    for sample in range(batch_size):
        kept: list[tuple[HiddenLayer, Tensor]] = []
        handles = [layer.module.register_forward_pre_hook(keeping(layer, kept)) for layer in layers]
        number = loss(sample)
        for handle in handles:
            handle.remove()
        sums = {layer.name: torch.zeros(layer.units) for layer in layers}
        for (layer, hidden), gradient in zip(kept, torch.autograd.grad(number, [h for _, h in kept]), strict=True):
            sums[layer.name] -= (hidden * gradient).detach().movedim(layer.unit_axis, -1).flatten(0, -2).sum(0)
        for name, total in sums.items():
            rows[name].append(total)
    return {name: torch.stack(row) for name, row in rows.items()}


def language_model(kind: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**options, **ENDS)
    name = f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(config).eval()


GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20}
LANGUAGE_MODELS = {
    "GPT-2, tied": lambda: language_model("GPT2", **GPT2),
    "GPT-NeoX": lambda: language_model("GPTNeoX", **SMALL),
    "Llama": lambda: language_model("Llama", **SMALL),
    "Qwen2": lambda: language_model("Qwen2", **SMALL, num_key_value_heads=1),
}


@pytest.mark.parametrize("kind", LANGUAGE_MODELS)
def test_each_sample_of_a_ragged_batch_gets_its_own_nats(kind):
    model = LANGUAGE_MODELS[kind]()
    expected = one_by_one(model, lambda n: model(TOKENS[n : n + 1], labels=LABELS[n : n + 1]).loss)
    assert_close(recorded(model, lambda: model(TOKENS, labels=LABELS).loss), expected, atol=1e-6, rtol=1e-4)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.reentrant = nn.Embedding(20, 8), reentrant
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(2))
        self.head = nn.Linear(8, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.enter(tokens)
        for block in self.blocks:
            x = x + (block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant))
        return self.head(x)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_checkpointing_and_freezing_change_nothing(reentrant, frozen):
    plain, model = Checkpointed(None), Checkpointed(reentrant)
    for block in model.blocks:
        block.requires_grad_(not frozen)

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(TOKENS).flatten(0, 1), LABELS.flatten())

    assert_close(recorded(model, lambda: loss(model)), recorded(plain, lambda: loss(plain)))


def test_an_input_kept_for_a_frozen_layer_is_released_with_its_gradient():
    model = Checkpointed(None)
    model.blocks.requires_grad_(False)
    recorder = UnitRecorder(find_hidden_layers(model))
    recorder.open()
    loss = model(TOKENS).sum()
    assert [len(kept) for kept in recorder._kept_inputs.values()] == [1, 1]
    loss.backward()
    assert not any(recorder._kept_inputs.values())


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))


INPUTS = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
CLASSES = torch.tensor([0, 3, 1])


@pytest.mark.parametrize("scale", [1.0, 1 / 8, 1024.0], ids=["plain", "accumulation", "gradient scaler"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_factors_of_the_loss_are_undone(reduction, scale):
    model = mlp()
    expected = one_by_one(model, lambda n: F.cross_entropy(model(INPUTS[n : n + 1]), CLASSES[n : n + 1]))
    effects_by_layer = recorded(model, lambda: scale * F.cross_entropy(model(INPUTS), CLASSES, reduction=reduction))
    assert_close(effects_by_layer, expected)


class Widened(nn.Module):
    """An activation that leaves float32 behind, which autocast then reads as a copy."""

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(x.float())


@pytest.mark.parametrize("widened", [False, True], ids=["as it is", "read as a copy"])
def test_autocast_costs_precision_only(widened):
    model = mlp()
    if widened:
        model[3] = Widened()
    expected = recorded(model, lambda: F.cross_entropy(model(INPUTS), CLASSES))

    def half() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(INPUTS), CLASSES)

    effects_by_layer = recorded(model, half)
    assert all(effects.dtype == torch.float32 for effects in effects_by_layer.values())
    assert_close(effects_by_layer, expected, atol=5e-3, rtol=5e-2)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"image_size": 8, "patch_size": 4, "num_labels": 5, "attn_implementation": "eager"}
        self.vit = transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, **options))

    def forward(self, images: Tensor) -> Tensor:
        return self.vit(images).logits


class SequenceFirst(nn.Module):
    """torch's own layers as they come: ``[T, B, U]``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(24, 2, 16, dropout=0.0)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(2).permute(2, 0, 1).repeat(1, 1, 8)).mean(0)


class Twice(nn.Module):
    """One module used twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mlp, self.head = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 64)), nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.mlp(self.mlp(images.flatten(2).mean(1))))


@pytest.mark.parametrize("build", [cnn, Vit, SequenceFirst, Twice])
def test_images_sequences_first_and_modules_used_twice(build):
    model = build()
    expected = one_by_one(model, lambda n: F.cross_entropy(model(IMAGES[n : n + 1]), CLASSES[n : n + 1]))
    effects_by_layer = recorded(model, lambda: F.cross_entropy(model(IMAGES), CLASSES))
    assert_close(effects_by_layer, expected, atol=1e-6, rtol=1e-4)


class Adapter(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_a_lora_layer_is_watched_and_one_below_all_adapters_is_named():
    model = mlp().requires_grad_(False)
    model[2] = Adapter(model[2])
    recorder = UnitRecorder(find_hidden_layers(model))
    recorder.open()
    F.cross_entropy(model(INPUTS), CLASSES).backward()
    effects = recorder.finish(3)
    assert list(effects) == ["4"] and effects["4"].shape == (3, 8)
    assert recorder.left_out == {"2": "no gradient came to its input (not called, or frozen from there down)"}


def test_a_flattened_layer_is_left_out_by_name():
    model = mlp()
    recorder = UnitRecorder(find_hidden_layers(model))
    recorder.open()
    model(torch.randn(12, 4)).sum().backward()
    assert recorder.finish(3) == {}
    assert recorder.left_out["2"] == "its input has 12 rows where the batch has 3 samples"


def test_calls_that_do_not_match_are_left_out_by_name():
    model = mlp()
    recorder = UnitRecorder(find_hidden_layers(model))
    recorder.open()
    (model(torch.randn(3, 4)).sum() + model(torch.randn(2, 4)).sum()).backward()
    assert recorder.finish(3) == {} and recorder.left_out["2"] == "it was called on 2 rows, then on 3"
    [layer] = find_hidden_layers(nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0))
    recorder = UnitRecorder([layer])
    recorder.open()
    layer.module(torch.randn(5, 8, requires_grad=True)).sum().backward()
    assert recorder.finish(5) == {} and recorder.left_out["linear2"] == "its input [5, 8] has no batch axis"


def test_without_weights_effects_are_of_the_batch_s_loss_and_weight_zero_gives_zero():
    model = mlp()
    own = recorded(model, lambda: F.cross_entropy(model(INPUTS), CLASSES))
    recorder = UnitRecorder(find_hidden_layers(model))
    for weights, scale in (
        (None, torch.full((3, 1), 1 / 3)),
        (torch.tensor([1.0, 0.0, 0.5]), torch.tensor([1 / 3, 0, 2 / 3])),
    ):
        recorder.open()
        F.cross_entropy(model(INPUTS), CLASSES).backward()
        effects_by_layer = recorder.finish(3, weights)
        assert_close(effects_by_layer, {name: effects * scale.reshape(3, 1) for name, effects in own.items()})


def test_nothing_is_recorded_while_closed_and_an_unfinished_step_is_dropped():
    model = mlp()
    recorder = UnitRecorder(find_hidden_layers(model))
    model(INPUTS).sum().backward()
    recorder.open()
    model(INPUTS).sum().backward()
    recorder.open()
    assert recorder.finish(3) == {} and set(recorder.left_out) == {"2", "4"}
    recorder.remove()
    recorder.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_recording_leaves_the_gradients_bit_identical():
    model, watched = mlp(), mlp()
    F.cross_entropy(model(INPUTS), CLASSES).backward()
    recorder = UnitRecorder(find_hidden_layers(watched))
    recorder.open()
    F.cross_entropy(watched(INPUTS), CLASSES).backward()
    recorder.finish(3)
    for one, other in zip(model.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
