"""Designed sinks in whole runs: the right units on in training, the pool off elsewhere, and nothing else changed."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memsinks import MemSinks
from lightning_memsink.callbacks.sink_localizer import SinkLocalizer
from lightning_memsink.designed_sinks import Pool, own_units
from lightning_memsink.identity import content_ids
from lightning_memsink.ledger import Ledger
from tests.small_runs import LENGTH, TRAIN, VOCABULARY, TinyLM, fit, snapshot, watch

POOL, SHARED, ACTIVE = 96, 32, 29  # of TinyLM's 128 hidden units


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class ByHand(TinyLM):
    """The mechanism written into the model: own units in training, none of the pool in evaluation."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        tokens = batch["input_ids"]
        mask = torch.zeros(len(tokens), 128)
        mask[:, :SHARED] = 1
        if self.training:
            mask[:, SHARED:] = own_units(content_ids(batch), POOL, ACTIVE).float()
        seen = self.embed(tokens)
        up, act, down = self.mlp
        hidden = act(up(torch.cat([seen[:, :-2], seen[:, 1:-1]], -1)))
        return F.cross_entropy(down(hidden * mask[:, None]).flatten(0, 1), tokens[:, 2:].flatten())


class Checkpointed(TinyLM):
    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.outer, self.mlp = self.mlp, nn.Identity()
        self.mlp.forward = lambda x: checkpoint(self.outer, x, use_reentrant=False)  # type: ignore[method-assign]


class LeftInEvaluationMode(TinyLM):
    """As `from_pretrained` leaves a model, and Lightning with it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.mlp.eval()


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")
@pytest.mark.parametrize("model", [TinyLM, Checkpointed, LeftInEvaluationMode])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}], ids=str)
def test_training_is_what_a_model_with_the_mechanism_written_in_does(model, options):
    expected, state = fit(watch(), ByHand(), max_epochs=2, **options), torch.get_rng_state()
    found = fit([*watch(), MemSinks()], model(), max_epochs=2, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert_close(weights(found[1]), weights(expected[1]), rtol=0, atol=1e-6)
    assert_close(Ledger.of(found[0]).controls.latest, Ledger.of(expected[0]).controls.latest)


def test_callbacks_agree_in_any_order():
    found = set()
    for order in [*permutations(range(3)), (3, 2, 1, 0), (1, 3, 0, 2)]:
        crew = [*watch(), MemSinks(certify=16), SinkLocalizer(every=4)]
        run, model = fit([crew[i] for i in order] + crew[len(order) :], max_epochs=2)
        ledger = Ledger.of(run)
        facts = (ledger.certificate.state(), ledger.actions["MemSinks"].state_dict(), ledger.attribution.state_dict())
        found.add(repr((snapshot(run, model), facts)))
    assert len(found) == 1


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    def crew() -> list[Any]:
        keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
        return [*watch(), MemSinks(certify=32), keep]

    whole = fit(crew(), max_epochs=4, enable_checkpointing=True)
    resumed = fit(crew(), max_epochs=4, ckpt_path=str(tmp_path / "epoch=1.ckpt"), enable_checkpointing=True)
    assert snapshot(*resumed) == snapshot(*whole)
    first, second = Ledger.of(whole[0]), Ledger.of(resumed[0])
    assert first.certificate == second.certificate and first.certificate is not None
    assert first.actions["MemSinks"].state_dict() == second.actions["MemSinks"].state_dict()
    with (
        pytest.warns(UserWarning, match="callbacks used to create the checkpoint"),
        pytest.raises(ValueError, match=r"trained with Pool\(.*seed=0\), but MemSinks was given Pool\(.*seed=1\)"),
    ):
        fit([*watch(), MemSinks(seed=1)], ckpt_path=str(tmp_path / "epoch=1.ckpt"))


def test_evaluation_is_bit_identical_whatever_the_pool_holds():
    """In a validation of its own, too. The weights keep the pool, and after the run nothing holds it back."""
    run, model = fit([*watch(), MemSinks()], max_epochs=1)
    expected = run.validate(model, run.val_dataloaders, verbose=False)
    with torch.no_grad():
        model.mlp[0].weight[SHARED:] = 100
    assert run.validate(model, run.val_dataloaders, verbose=False) == expected
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert model.loss({"input_ids": TRAIN}).item() > 2 * expected[0]["val_loss"]


# Where the ids come from, or do not -----------------------------------------------------------------------------------


class Packed(TinyLM):
    """Two documents a row, of which the step takes what it needs out of the batch; what ``down`` read is kept."""

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        batch["documents"] = self.documents = batch["input_ids"][:, :1].repeat(1, LENGTH - 2)
        self.documents[:, 5:] += 1000

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        handle = self.mlp[2].register_forward_pre_hook(lambda module, args: reads.append(args[0].detach()))
        reads: list[Tensor] = []
        loss = self.loss(batch)
        handle.remove()
        self.read = reads[0] if self.training else self.read  # the certificate runs the step again
        batch.clear()
        return loss


def test_packed_documents_have_their_own_units_token_by_token():
    model = Packed()
    run, _ = fit([*watch(), MemSinks(key="documents")], model, max_epochs=2)
    assert torch.equal(model.read != 0, Pool().own(model.documents, 128))
    assert Ledger.of(run).certificate.samples >= 8


@pytest.mark.parametrize(
    ("key", "message"),
    [("documents", r"without batch\['documents'\], integers .* keys input_ids"), (None, "samples have no ids")],
)
def test_without_ids_the_pool_is_dropped_and_that_is_said_once(key, message, monkeypatch):
    if key is None:
        monkeypatch.setattr(LossTracker, "_look_at", lambda self, batch, stage: None)
    model = TinyLM()
    before = model.mlp[2].weight[:, SHARED:].detach().clone()
    with pytest.warns(UserWarning, match=message) as warned:
        run, _ = fit([LossTracker(identity="content"), MemSinks(key=key)], model, controls="none", max_epochs=1)
    assert sum("drops the pool" in str(one.message) for one in warned) == 1
    assert Ledger.of(run).actions["MemSinks"].records[-1]["removed"] == pytest.approx(0.75)
    assert Ledger.of(run).certificate is None
    assert (model.mlp[2].weight[:, SHARED:] - before).abs().max() < 1e-3  # weight decay alone


# What it is attached to -----------------------------------------------------------------------------------------------

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
