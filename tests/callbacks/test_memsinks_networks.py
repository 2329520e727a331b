"""Designed sinks in every kind of network: each layer reads its samples' units."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memsinks import MemSinks
from lightning_memsink.ledger import Ledger
from lightning_memsink.mitigation.designed_sinks import Pool
from lightning_memsink.samples.hashing import content_ids
from tests.support.small_runs import LENGTH, VOCABULARY, fit, watch

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": VOCABULARY}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
OPT = {**SMALL, "ffn_dim": 40, "word_embed_proj_dim": 16, "dropout": 0.1, **ENDS}


class HuggingFace(nn.Module):
    def __init__(self, model: str, **options: Any) -> None:
        super().__init__()
        config = getattr(transformers, f"{model}Config")(**options)
        self.inner = getattr(transformers, f"{model}{'LMHeadModel' if model == 'GPT2' else 'ForCausalLM'}")(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits


class Encoder(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        block = nn.TransformerEncoderLayer(16, 2, 40, batch_first=batch_first)
        self.first = batch_first
        self.embed, self.head = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)
        self.blocks = nn.TransformerEncoder(block, 2, enable_nested_tensor=batch_first)

    def forward(self, tokens: Tensor) -> Tensor:
        padded = (torch.arange(LENGTH) > 9).expand(len(tokens), LENGTH)
        seen = self.embed(tokens) if self.first else self.embed(tokens).transpose(0, 1)
        out = self.head(self.blocks(seen, src_key_padding_mask=padded))
        out = out if self.first else out.transpose(0, 1)
        return F.pad(out, (0, 0, 0, LENGTH - out.shape[1]))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        up, down = nn.Conv1d(16, 40, 1), nn.Conv1d(40, VOCABULARY, 1)
        self.embed, self.stack = nn.Embedding(VOCABULARY, 16), nn.Sequential(up, nn.BatchNorm1d(40), nn.GELU(), down)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.stack(self.embed(tokens).transpose(1, 2)).transpose(1, 2)


NETWORKS = {
    "GPT-2": lambda: HuggingFace("GPT2", n_embd=16, n_inner=40, n_layer=2, n_head=2, vocab_size=VOCABULARY, **ENDS),
    "Llama": lambda: HuggingFace("Llama", **SMALL, **ENDS, intermediate_size=40),
    "OPT, tokens in a row": lambda: HuggingFace("OPT", **OPT),
    "encoder": lambda: Encoder(batch_first=False),
    "encoder, batch first": lambda: Encoder(batch_first=True),
    "convolution": Convolution,
}


class Wrapped(LightningModule):
    """Keeps what each hidden layer read, ``[B, T, U]`` or so, in training and in validation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.reads: dict[bool, list[Tensor]] = {True: [], False: []}
        self.trained = torch.zeros(0)

    def on_fit_start(self) -> None:
        names = ("c_proj", "down_proj", "fc2", "linear2", "stack.3")
        for name, module in self.network.named_modules():
            if name.endswith(names) and "attn" not in name:
                module.register_forward_pre_hook(lambda _, args: self.reads[self.training].append(args[0].detach()))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        self.reads[self.training].clear()
        tokens = batch["input_ids"]
        self.trained = tokens if self.training else self.trained
        return F.cross_entropy(self.network(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 1e-3)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.filterwarnings("ignore:.*nested tensors.*prototype", "ignore:.*precision=bf16 is supported for historical")
def test_every_layer_of_every_network_reads_its_samples_units(network, precision):
    torch.manual_seed(0)
    model = Wrapped(NETWORKS[network]())
    fit([LossTracker(identity="content"), MemSinks()], model, max_steps=2, val_check_interval=2, precision=precision)
    ids = content_ids({"input_ids": model.trained})
    reads, blocks = model.reads[True], 1 if network == "convolution" else 2
    assert len(reads) == len(model.reads[False]) == blocks
    for read in reads:
        read = read.unflatten(0, (-1, LENGTH)) if read.ndim == 2 else read
        read = read.transpose(0, 1) if network == "encoder" else read.transpose(1, 2) if read.shape[1] == 40 else read
        own = Pool().own(ids, 40)[:, None].expand_as(read)
        assert read.dtype == (torch.bfloat16 if precision == "bf16-mixed" else torch.float32)
        assert not read[~own].any() and (read[own] != 0).float().mean() > 0.3
    for read in model.reads[False]:
        for part in read.unbind():
            part = part.T if network == "convolution" else part
            assert not part[..., 10:].any() and part[..., :10].any()


class TwoExperts(nn.Module):
    """Each token goes to one of two experts, so that what an expert reads are no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 32)) for _ in range(2))
        self.head = nn.Sequential(nn.Linear(32, 40), nn.GELU(), nn.Linear(40, VOCABULARY))

    def forward(self, tokens: Tensor) -> Tensor:
        seen, first = self.embed(tokens), tokens < 12
        out = seen.new_zeros(*tokens.shape, 32)
        for expert, own in zip(self.experts, (first, ~first), strict=True):
            out[own] = expert(seen[own])
        return self.head(out)


def test_a_layer_whose_rows_are_not_the_samples_drops_its_pool_and_is_named_once():
    """The others go on, and are certified."""
    model = Wrapped(TwoExperts())
    with pytest.warns(UserWarning) as warned:
        run, _ = fit([*watch(), MemSinks()], model, max_epochs=2)
    said = [str(one.message) for one in warned if "are not the samples of the batch" in str(one.message)]
    assert sorted(message.split(" reads")[0] for message in said) == ["network.experts.0.2", "network.experts.1.2"]
    assert "the ids of the batch are [16]" in said[0]
    assert Ledger.of(run).certificate.samples >= 8
