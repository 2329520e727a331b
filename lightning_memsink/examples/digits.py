"""Model and data of the classification recipe: digits, some with a wrong label, which can only be memorized."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class DigitClassifier(LightningModule):
    """A multilayer perceptron on 8×8 digits, large enough to memorize wrong labels.

    Args:
        hidden: units of each of the two hidden layers.
        lr: of Adam.
    """

    def __init__(self, hidden: int = 256, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        layers = [nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
        self.layers = nn.Sequential(*layers)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_loss", nn.functional.cross_entropy(self.layers(images), labels), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class Digits(LightningDataModule):
    """scikit-learn's 1,797 digits with some wrong labels, which can only be memorized.

    Args:
        flipped: share of labels replaced by a wrong one, in training and among controls alike, in 0…1.
        held_out: share of the digits that are controls, in 0…1.
        batch_size: training digits per step.
        seed: of the split and of the wrong labels.

    Raises:
        ImportError: in ``setup``, if scikit-learn is not installed.
    """

    def __init__(self, flipped: float = 0.1, held_out: float = 0.33, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.flipped, self.held_out, self.batch_size, self.seed = flipped, held_out, batch_size, seed

    def setup(self, stage: str) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError:
            raise ImportError("The digits come with scikit-learn. Install it: pip install scikit-learn") from None
        digits = load_digits()
        images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
        generator = torch.Generator().manual_seed(self.seed)
        wrong = torch.rand(len(labels), generator=generator) < self.flipped
        shift = torch.randint(1, 10, labels.shape, generator=generator)
        labels = torch.where(wrong, (labels + shift) % 10, labels)
        order = torch.randperm(len(labels), generator=generator)
        controls = order[: round(self.held_out * len(order))]
        training = order[len(controls) :]
        self.train = TensorDataset(images[training], labels[training])
        self.controls = TensorDataset(images[controls], labels[controls])
        self.flipped_rows = wrong[training].nonzero().flatten()
        """Rows of the training set with a wrong label: the ground truth."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.controls, 4 * self.batch_size)
