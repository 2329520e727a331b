"""Encoder layers that torch computes by one kernel in evaluation."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_memsink import Ledger, memsink
from tests.support.small_runs import trainer

WIDTH, CLASSES = 16, 5


class Own(nn.TransformerEncoderLayer):
    """A user's own layer, which may do anything."""


class Encoder(LightningModule):
    def __init__(self, layer=nn.TransformerEncoderLayer, mixes: bool = False, padded: bool = False, **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"batch_first": True, "norm_first": True} | options
        block = layer(WIDTH, 2, 32, dropout=0.0, **options)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head, self.mixes, self.padded = nn.Linear(WIDTH, CLASSES), mixes, padded
        self.is_time_first = not options["batch_first"]

    def losses(self, batch):
        inputs, labels = batch
        padding = inputs[:, :, 0] > 1 if self.padded else None
        inputs = inputs.transpose(0, 1) if self.is_time_first else inputs
        hidden = self.encoder(inputs, src_key_padding_mask=padding)
        hidden = hidden.mean(0) if self.is_time_first else hidden.mean(1)
        hidden = hidden.roll(1, 0) if self.mixes else hidden
        return cross_entropy(self.head(hidden), labels, reduction="none")

    def training_step(self, batch, batch_idx):
        return self.losses(batch).mean()

    def validation_step(self, batch, batch_idx):
        return self.losses(batch).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def data(seed: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(24, 6, WIDTH, generator=generator)
    return TensorDataset(inputs, torch.randint(CLASSES, (24,), generator=generator))


@pytest.fixture
def kernels(monkeypatch):
    """Counts the calls of torch's kernel."""
    calls = []
    kernel = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: (calls.append(1), kernel(*args))[1])
    return calls


def controls_of(module: Encoder) -> torch.Tensor:
    run = trainer(memsink(path=None, recheck=0), max_epochs=2, val_check_interval=None, num_sanity_val_steps=0)
    run.fit(module, DataLoader(data(0), 8), DataLoader(data(1), 6))
    return Ledger.of(run).controls.latest


@pytest.mark.parametrize("options", [{}, {"padded": True}, {"activation": "gelu", "norm_first": False}])
def test_layers_run_as_one_kernel_and_losses_are_those_of_each_sample(options, kernels):
    module = Encoder(**options)
    found = controls_of(module)
    assert len(kernels) == 2 * 2 * 4, "each layer in each validation batch"
    with torch.no_grad():
        expected = module.eval().losses(data(1).tensors)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not any("forward" in vars(layer) for layer in module.modules())


@pytest.mark.parametrize("options", [{"layer": Own}, {"batch_first": False}, {"activation": torch.tanh}])
def test_other_layers_are_followed_call_by_call(options, kernels):
    module = Encoder(**options)
    found = controls_of(module)
    assert not kernels
    with torch.no_grad():
        assert torch.allclose(found, module.eval().losses(data(1).tensors), atol=1e-5)


def test_a_batch_that_is_taken_for_a_sequence_is_mixed():
    class Mixing(Encoder):
        def losses(self, batch):
            inputs, labels = batch
            return cross_entropy(self.head(self.encoder(inputs[:, 0])), labels, reduction="none")

    with pytest.warns(UserWarning):
        assert not controls_of(Mixing()).isfinite().any()


def test_samples_moved_behind_a_layer_are_seen(kernels):
    module = Encoder(mixes=True)
    with pytest.warns(UserWarning):
        found = controls_of(module)
    assert kernels and not found.isfinite().any()
