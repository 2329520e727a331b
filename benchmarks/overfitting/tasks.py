"""Models that know their training data by heart after a few epochs, and one that learned a rule.

N  training samples      M  held-out samples      B  samples of a batch      F  inputs      T  tokens of a text
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from benchmarks.common.planted_text import documentation
from benchmarks.common.training import TextModel, token_nll
from lightning_memsink.examples.corpora import apart
from lightning_memsink.examples.text import Sequences
from lightning_memsink.samples.unique import distinct_rows

HELD_OUT = 1024
EFFECT = {"nats": 0.3, "ratio": math.log(2)}
"""What is known by heart has more than this, by unit: a likelihood's loss in nats, or the logarithm of another loss."""
Losses = Callable[..., Tensor]


@dataclass(frozen=True)
class Arm:
    """One way to train and to validate."""

    name: str
    controls: int
    epochs: int
    every: int = 1
    """Epochs from one validation to the next."""
    times: int = 1
    """How often a sample stands in the data set."""
    claims: bool = True
    """Whether what is known by heart must be found: not where there is one validation in the whole run."""


@dataclass(frozen=True)
class Task:
    """Data and a model for them.

    ``module()`` draws its weights from the global generator. ``losses(module, dataset)`` gives ``[N]``, one loss a
    sample in evaluation mode.
    """

    name: str
    unit: str
    train: Dataset[Any]
    held_out: Dataset[Any]
    module: Callable[[], LightningModule]
    losses: Callable[[Any, Any], Tensor]
    arms: Sequence[Arm]
    batch_size: int = 32
    learns_a_rule: bool = False
    """Whether there is a rule to learn, so that not everything must be known by heart."""
    knows_nothing: bool = False
    """Whether the rule is all that there is to learn."""

    @property
    def effect(self) -> float:
        return EFFECT[self.unit]


class Perceptron(LightningModule):
    """Two hidden layers, wide enough to know every sample by heart."""

    def __init__(self, inputs: int, outputs: int, loss: Losses, lr: float, width: int = 512) -> None:
        super().__init__()
        self.loss, self.lr = loss, lr
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return self.loss(self.layers(inputs), targets)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


@torch.no_grad()
def losses_of_rows(module: Perceptron, dataset: TensorDataset) -> Tensor:
    """``[N]`` mean loss of each sample."""
    inputs, targets = dataset.tensors
    losses = module.loss(module.eval().layers(inputs), targets, reduction="none")
    return losses.reshape(len(inputs), -1).mean(1)


def losses_of_texts(module: TextModel, dataset: Sequences) -> Tensor:
    """``[N]`` mean loss of each text's tokens."""
    return token_nll(module.eval(), dataset.tokens).mean(1)


def arms(epochs: int, controls: Sequence[int]) -> list[Arm]:
    """Validation in each epoch, with few and with many controls."""
    return [Arm(f"{count:,} controls", count, epochs) for count in controls]


@dataclass(frozen=True)
class Size:
    """Of all tasks. ``samples``: of made-up data."""

    samples: int = 512
    texts: int = 96
    pretraining: int = 200
    """Steps."""
    controls: Sequence[int] = field(default=(50, 200, 1024))
    epochs: float = 1.0
    """Times the usual number."""

    def of_epochs(self, usual: int) -> int:
        return max(2, round(self.epochs * usual))


def digits(seed: int, size: Size, wrong: float) -> Task:
    """scikit-learn's digits, 1,024 of them held out, a share ``wrong`` of all labels drawn at random.

    With some labels drawn at random a run learns a rule and knows by heart what does not follow it: held-out samples
    are then as well predicted as half of the training samples would be.
    """
    pixels, target = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    inputs, labels = torch.tensor(pixels).float() / 16, torch.tensor(target)
    drawn = torch.randint(10, labels.shape, generator=generator)
    labels = torch.where(torch.rand(labels.shape, generator=generator) < wrong, drawn, labels)
    order = torch.randperm(len(labels), generator=generator)
    held_out, train = (TensorDataset(inputs[rows], labels[rows]) for rows in (order[:HELD_OUT], order[HELD_OUT:]))
    kind = "true labels" if not wrong else "random labels" if wrong == 1 else f"{wrong:.0%} of labels random"
    return Task(
        f"digits, {kind}",
        "nats",
        train,
        held_out,
        lambda: Perceptron(64, 10, functional.cross_entropy, lr=2e-3 if wrong else 1e-3),
        losses_of_rows,
        arms(size.of_epochs(40 if wrong else 15), size.controls),
        learns_a_rule=wrong < 1,
        knows_nothing=not wrong,
    )


def noise(
    name: str, unit: str, loss: Losses, targets: Callable[..., Tensor], outputs: int, epochs: int
) -> Callable[[int, Size], Task]:
    """Gaussian inputs ``[N, 64]`` with targets that have nothing to do with them."""

    def make(seed: int, size: Size) -> Task:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(size.samples + HELD_OUT, 64, generator=generator)
        drawn = targets(len(inputs), generator=generator)
        train = TensorDataset(inputs[: size.samples], drawn[: size.samples])
        held_out = TensorDataset(inputs[size.samples :], drawn[size.samples :])
        made = arms(size.of_epochs(epochs), size.controls)
        if name == SPARSE:
            made.append(Arm("validation every 10 epochs of 20", 200, 20, every=10))
        return Task(name, unit, train, held_out, lambda: Perceptron(64, outputs, loss, lr=2e-3), losses_of_rows, made)

    return make


SPARSE = "Gaussian inputs, 10 classes"
"""The task that is also validated rarely."""


def fine_tuning(seed: int, size: Size) -> Task:
    """A small GPT-2 that has learned from other texts of the same corpus, then sees a few texts ten times."""
    corpus = documentation(seed)
    vocabulary = corpus.tokenizer.get_vocab_size()
    generator = torch.Generator().manual_seed(seed)
    shuffled = corpus.train[torch.randperm(len(corpus.train), generator=generator)]
    distinct = apart(distinct_rows(shuffled))
    distinct = distinct[torch.randperm(len(distinct), generator=generator)]
    few, held_out, others = distinct.split([size.texts, HELD_OUT, len(distinct) - size.texts - HELD_OUT])
    weights = pretrained(others, vocabulary, size.pretraining, seed)

    def module() -> TextModel:
        made = TextModel(vocabulary, few.shape[1], 2, 96, lr=1e-3)
        made.load_state_dict(weights)
        return made

    made = [
        *arms(size.of_epochs(10), size.controls),
        Arm("one epoch, one validation", 200, 1, claims=False),
        Arm("one epoch of texts that stand in it 8 times, one validation", 200, 1, times=8, claims=False),
    ]
    return Task("fine-tuning GPT-2", "nats", Sequences(few), Sequences(held_out), module, losses_of_texts, made, 8)


def pretrained(tokens: Tensor, vocabulary: int, steps: int, seed: int) -> dict[str, Tensor]:
    """Weights of a GPT-2 after ``steps`` of 32 texts of ``tokens`` ``[N, T]``."""
    torch.manual_seed(seed)
    model = TextModel(vocabulary, tokens.shape[1], 2, 96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (32,))]
        optimizer.zero_grad()
        model.gpt(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.state_dict()


def _classes(count: int) -> Callable[..., Tensor]:
    return lambda rows, generator: torch.randint(count, (rows,), generator=generator)


def _one_number(rows: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, 1, generator=generator)


def _hot(rows: int, generator: torch.Generator) -> Tensor:
    return (torch.rand(rows, 12, generator=generator) < 0.3).float()


TASKS: dict[str, Callable[[int, Size], Task]] = {
    "digits": lambda seed, size: digits(seed, size, wrong=1),
    "binary": noise("Gaussian inputs, 2 classes", "nats", functional.cross_entropy, _classes(2), 2, 30),
    "classes": noise(SPARSE, "nats", functional.cross_entropy, _classes(10), 10, 30),
    "mse": noise("regression, squared error", "ratio", functional.mse_loss, _one_number, 1, 40),
    "l1": noise("regression, absolute error", "ratio", functional.l1_loss, _one_number, 1, 40),
    "bce": noise("12 labels a sample, BCE", "nats", functional.binary_cross_entropy_with_logits, _hot, 12, 30),
    "text": fine_tuning,
    "noisy": lambda seed, size: digits(seed, size, wrong=0.5),
    "true": lambda seed, size: digits(seed, size, wrong=0),
}
"""By the name that ``--tasks`` takes."""
