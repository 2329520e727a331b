"""timm: its models with its losses, and with mixup and CutMix, in the step that its users write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from timm import create_model
from timm.data import Mixup
from timm.loss import (
    AsymmetricLossMultiLabel,
    AsymmetricLossSingleLabel,
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.ecosystem.fitting import Case, one_by_one, rows

CLASSES, SIZE, TRAINED_ON, HELD_OUT = 4, 32, 48, 24


class Classifier(LightningModule):
    """A model of timm's, trained as in its own training script: mixing in the step, another loss for validation."""

    def __init__(self, name: str, loss: nn.Module, held_out: nn.Module | None = None, mixup: Any = None) -> None:
        super().__init__()
        options = {"img_size": SIZE} if "vit" in name else {}
        self.model = create_model(name, pretrained=False, num_classes=CLASSES, **options)
        self.train_loss, self.validate_loss, self.mixup = loss, held_out or loss, mixup
        self.mixup_off_epoch: int | None = None

    def on_train_epoch_start(self) -> None:
        if self.mixup_off_epoch is not None and self.current_epoch >= self.mixup_off_epoch:
            self.mixup.mixup_enabled = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
        loss: Tensor = self.train_loss(self.model(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.validate_loss(self.model(images), labels)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Augmented(Classifier):
    """Three splits of each image, one clean and two augmented, joined in the step as AugMix has them."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        clean, first, second, labels = batch
        splits = torch.cat([clean, first, second])
        loss: Tensor = self.train_loss(self.model(splits), labels.repeat(3))
        return loss


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise around the mean of a class."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    return torch.randn(count, 3, SIZE, SIZE, generator=draw) + labels[:, None, None, None] / 2, labels


def plain(count: int, seed: int) -> TensorDataset:
    return TensorDataset(*images(count, seed))


def several_labels(count: int, seed: int) -> TensorDataset:
    pictures, labels = images(count, seed)
    return TensorDataset(pictures, torch.stack([labels == 0, labels < 2, labels > 1, labels == 3], 1).float())


def splits(count: int, seed: int) -> TensorDataset:
    pictures, labels = images(count, seed)
    draw = torch.Generator().manual_seed(seed + 1)
    views = [pictures + torch.randn(pictures.shape, generator=draw) / 4 for _ in range(2)]
    return TensorDataset(pictures, *views, labels)


def fitted(
    build: Callable[[], Classifier],
    data: Callable[[int, int], TensorDataset] = plain,
    held_out: Callable[[int, int], TensorDataset] | None = None,
) -> Callable[..., LightningModule]:
    def fit(callbacks: list[Any], **options: Any) -> LightningModule:
        module = build()
        trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
        train = DataLoader(data(TRAINED_ON, 0), 8, shuffle=True)
        trainer.fit(module, train, DataLoader((held_out or data)(HELD_OUT, 9), 8))
        return module

    return fit


def mixing(name: str = "resnet10t", off_epoch: int | None = None, **options: Any) -> Callable[..., LightningModule]:
    def build() -> Classifier:
        mixup = Mixup(num_classes=CLASSES, label_smoothing=0.1, **options)
        module = Classifier(name, SoftTargetCrossEntropy(), nn.CrossEntropyLoss(), mixup)
        module.mixup_off_epoch = off_epoch
        return module

    return fitted(build)


ALONE = one_by_one(rows, lambda batch: len(batch[0]))


def mean_over_classes(module: LightningModule, batch: Any) -> Tensor:
    """A sum over a sample's elements counts as their mean, whatever it is multiplied with."""
    return ALONE(module, batch) / CLASSES


def unaugmented(module: LightningModule, batch: Any) -> Tensor:
    """The loss of training, of images without augmentation: validation must not pass off another loss as that."""
    pictures, labels = batch
    return ALONE(module, (pictures, pictures, pictures, labels))


def unmixed(module: Classifier, batch: Any) -> Tensor:
    """Of the images as they are, with smoothed labels; after mixing there is no loss of one image."""
    pictures, labels = batch
    share = module.mixup.label_smoothing / CLASSES
    soft = nn.functional.one_hot(labels, CLASSES) * (1 - module.mixup.label_smoothing) + share
    losses = [module.train_loss(module.model(pictures[one, None]), soft[one, None]) for one in range(len(labels))]
    return torch.stack(losses)


def smoothed() -> Classifier:
    return Classifier("resnet10t", LabelSmoothingCrossEntropy(0.1))


def smoothed_in_training() -> Classifier:
    return Classifier("resnet10t", LabelSmoothingCrossEntropy(0.1), nn.CrossEntropyLoss())


CASES = {
    "timm-smoothing": Case(fitted(smoothed), ALONE),
    "timm-smoothing-vit": Case(fitted(lambda: Classifier("test_vit", LabelSmoothingCrossEntropy(0.1))), ALONE),
    "timm-two-losses": Case(fitted(smoothed_in_training), ALONE),
    "timm-bce": Case(fitted(lambda: Classifier("resnet10t", BinaryCrossEntropy(0.1))), ALONE),
    "timm-bce-classes": Case(fitted(lambda: Classifier("test_vit", BinaryCrossEntropy(0.1, sum_classes=True))), ALONE),
    "timm-asymmetric": Case(fitted(lambda: Classifier("resnet10t", AsymmetricLossSingleLabel())), ALONE),
    "timm-asymmetric-labels": Case(
        fitted(lambda: Classifier("resnet10t", AsymmetricLossMultiLabel()), several_labels), mean_over_classes
    ),
    "timm-jsd": Case(
        fitted(lambda: Augmented("resnet10t", JsdCrossEntropy(smoothing=0.1), nn.CrossEntropyLoss()), splits, plain),
        ALONE,
        unaugmented,
    ),
    "timm-mixup": Case(mixing(mixup_alpha=0.8), unmixed),
    "timm-cutmix": Case(mixing(mixup_alpha=0.0, cutmix_alpha=1.0), unmixed),
    "timm-mixup-cutmix": Case(mixing("test_vit", mixup_alpha=0.8, cutmix_alpha=1.0), unmixed),
    "timm-mixup-pairs": Case(mixing(mixup_alpha=0.8, cutmix_alpha=1.0, mode="pair"), unmixed),
    "timm-mixup-images": Case(mixing(mixup_alpha=0.8, cutmix_alpha=1.0, mode="elem"), unmixed),
    "timm-mixup-off": Case(mixing(mixup_alpha=0.8, off_epoch=0), unmixed),
    "timm-mixup-half": Case(mixing(mixup_alpha=0.8, prob=0.5), unmixed),
}
