"""What the tests of capture share: models, a callback that wires the captures, and the oracle."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset

from lightning_memsink.losses.capture import StepCapture
from lightning_memsink.losses.evaluation_capture import EvaluationCapture
from lightning_memsink.losses.per_sample import Captured

B, T, C, D = 4, 6, 7, 8
CLASS_WEIGHT = torch.linspace(0.5, 2.0, C)

# What Lightning and torch themselves warn of, with models this small
QUIET = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*bfloat16.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]


class Sequences(Dataset):
    """Ragged sequences: labels are ignored from a place on that differs by sample."""

    def __init__(self, count: int = 3 * B, all_ignored: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randint(0, C, (count, T), generator=generator)
        self.y = torch.randint(0, C, (count, T), generator=generator)
        for row in range(count):
            self.y[row, T - row % 3 :] = -100
        if all_ignored is not None:
            self.y[all_ignored] = -100

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


class Model(LightningModule):
    """Embedding, a mixing layer and a head; ``step`` is the user's loss."""

    def __init__(self, step=None) -> None:
        super().__init__()
        self.embed = nn.Embedding(C, D)
        self.mix = nn.Linear(D, D)
        self.head = nn.Linear(D, C)
        self.step = step

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embed(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x))

    def training_step(self, batch, batch_idx):
        return self.step(self, batch)

    def validation_step(self, batch, batch_idx):
        return self.step(self, batch)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Watch(Callback):
    """Wires the captures to the hooks, and keeps what they say beside what each sample alone would say."""

    def __init__(self, oracle=None) -> None:
        self.oracle = oracle
        self.seen: list = []
        self.expected: list[Tensor] = []
        self.validated: list = []
        self.validation_expected: list[Tensor] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        self.training = StepCapture(pl_module)
        self.validation = EvaluationCapture(self.training)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.oracle:
            self.expected.append(alone(self.oracle, pl_module, batch))
        self.training.begin(batch, len(batch["x"]))

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self.training.before_backward(loss, 1.0 / trainer.accumulate_grad_batches)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seen.append(self.training.finish(outputs, len(batch["x"])))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.oracle:
            self.validation_expected.append(alone(self.oracle, pl_module, batch))
        self.validation.begin(batch, len(batch["x"]))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.validated.append(self.validation.finish(outputs, len(batch["x"])))


def alone(oracle, model, batch) -> Tensor:
    """Each sample as a batch of one, on a copy of the model, without a trace in the random state."""
    twin = copy.deepcopy(model)
    twin.log = lambda *args, **kwargs: None
    losses = []
    with torch.random.fork_rng(), torch.no_grad():
        for row in range(len(batch["x"])):
            one = {key: value[row : row + 1] for key, value in batch.items()}
            losses.append(oracle(twin, one).float())
    return torch.stack(losses)


logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def fit(model, *callbacks, data=None, validate=False, **options) -> Trainer:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **options,
    )
    loader = DataLoader(data or Sequences(), batch_size=B)
    trainer.fit(model, loader, DataLoader(Sequences(2 * B), batch_size=B) if validate else None)
    return trainer


def watched(model, oracle=None, **options) -> Watch:
    """Fits a copy without us and one with us; the weights must be bit-equal."""
    plain, ours = copy.deepcopy(model), copy.deepcopy(model)
    watch = Watch(oracle)
    seed_everything(1, verbose=False)
    fit(plain, **options)
    seed_everything(1, verbose=False)
    fit(ours, watch, **options)
    for (name, before), after in zip(plain.state_dict().items(), ours.state_dict().values(), strict=True):
        assert torch.equal(before, after), f"{name} differs from a run without us"
    return watch


def new(step, cls=Model):
    seed_everything(0, verbose=False)
    return cls(step)


def check(watch: Watch, tolerance: float = 1e-5, lost: int = 0) -> None:
    """All steps but the first ``lost`` tell what the oracle tells."""
    for seen, expected in list(zip(watch.seen, watch.expected, strict=True))[lost:]:
        assert isinstance(seen, Captured), seen
        assert_close(seen.losses, expected, atol=tolerance, rtol=tolerance, equal_nan=True)
    for seen, expected in zip(watch.validated, watch.validation_expected, strict=True):
        assert isinstance(seen, Captured), seen
        assert_close(seen.losses, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def targets(batch) -> Tensor:
    return F.one_hot(batch["y"].clamp(min=0), C).float()


def flat(model, batch) -> tuple[Tensor, Tensor]:
    return model(batch["x"]).view(-1, C), batch["y"].view(-1)


def against(function, **options):
    return lambda model, batch: function(model(batch["x"]), targets(batch), **options)


def token_loss(model, batch) -> Tensor:
    return F.cross_entropy(*flat(model, batch))
