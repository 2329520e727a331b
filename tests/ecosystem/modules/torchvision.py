"""torchvision: detectors, whose batches are lists of images and whose models return a dict of losses; segmentation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models.detection import (
    RetinaNet,
    fasterrcnn_mobilenet_v3_large_320_fpn,
    ssdlite320_mobilenet_v3_large,
)
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, lraspp_mobilenet_v3_large
from torchvision.ops import sigmoid_focal_loss

from tests.ecosystem.fitting import Case, one_by_one, rows

CLASSES, SIZE = 3, 64
WITHOUT_WEIGHTS = {"weights": None, "weights_backbone": None}


class Squares(Dataset[Any]):
    """Images with one to three bright squares on noise, and their boxes."""

    def __init__(self, count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.samples = []
        for sample in range(count):
            image = torch.rand(3, SIZE, SIZE, generator=draw) / 4
            boxes = torch.randint(0, SIZE // 2, (1 + sample % 3, 2), generator=draw).float()
            sides = torch.randint(12, SIZE // 2, (len(boxes), 2), generator=draw)
            corners = torch.cat([boxes, boxes + sides], 1)
            labels = 1 + torch.arange(len(boxes)) % (CLASSES - 1)
            for (left, top, right, bottom), label in zip(corners.long().tolist(), labels.tolist(), strict=True):
                image[label, top:bottom, left:right] += 0.5
            self.samples.append((image, {"boxes": corners, "labels": labels}))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        image, target = self.samples[index]
        return image, dict(target)


def collate(samples: list[Any]) -> Any:
    """As in torchvision's references."""
    return tuple(zip(*samples, strict=True))


class Detector(LightningModule):
    """As in torchvision's tutorial: in training the model returns its losses, and the step adds them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        losses = self.model(list(images), [dict(target) for target in targets])
        loss: Tensor = sum(losses.values())
        self.log_dict(losses, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, _ = batch
        self.log("detections", float(sum(len(found["boxes"]) for found in self.model(list(images)))))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([each for each in self.parameters() if each.requires_grad], lr=1e-3)


def still(module: LightningModule) -> None:
    """In evaluation mode a detector returns no losses; only its batch norms are put there."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()


def image_of(batch: Any, sample: int) -> Any:
    images, targets = batch
    return images[sample : sample + 1], targets[sample : sample + 1]


ALONE = one_by_one(image_of, lambda batch: len(batch[0]))


def held_out(module: LightningModule, batch: Any) -> Tensor:
    """Detectors are validated by their detections, and have losses in training mode only."""
    module.train()
    still(module)
    losses = ALONE(module, batch)
    module.eval()
    return losses


def detected(build: Callable[[], nn.Module]) -> Case:
    def fit(callbacks: list[Any], **options: Any) -> LightningModule:
        module = Detector(build())
        trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
        train = DataLoader(Squares(8, 0), 4, shuffle=True, collate_fn=collate)
        trainer.fit(module, train, DataLoader(Squares(4, 1), 4, collate_fn=collate))
        return module

    return Case(fit, ALONE, held_out, still)


def faster_rcnn() -> nn.Module:
    """All anchors and proposals count, so that chance has no part in a sample's loss."""
    all_of_them = {"rpn_batch_size_per_image": 100_000, "box_batch_size_per_image": 100_000}
    sizes = {"min_size": SIZE, "max_size": SIZE}
    return fasterrcnn_mobilenet_v3_large_320_fpn(num_classes=CLASSES, **WITHOUT_WEIGHTS, **all_of_them, **sizes)


def retinanet() -> nn.Module:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return RetinaNet(backbone, num_classes=CLASSES, min_size=SIZE, max_size=SIZE)


def ssdlite() -> nn.Module:
    return ssdlite320_mobilenet_v3_large(num_classes=CLASSES, **WITHOUT_WEIGHTS)


class Segmenter(LightningModule):
    """Cross entropy over pixels, with the auxiliary head's as in torchvision's references, or focal loss."""

    def __init__(self, model: nn.Module, focal: bool = False) -> None:
        super().__init__()
        self.model, self.focal = model, focal

    def loss(self, batch: Any) -> Tensor:
        images, masks = batch
        outputs = self.model(images)
        if self.focal:
            wanted = functional.one_hot(masks.clamp(max=CLASSES - 1), CLASSES).movedim(-1, 1).float()
            focal: Tensor = sigmoid_focal_loss(outputs["out"], wanted, reduction="mean")
            return focal
        loss = functional.cross_entropy(outputs["out"], masks, ignore_index=255)
        if "aux" in outputs:
            loss = loss + 0.5 * functional.cross_entropy(outputs["aux"], masks, ignore_index=255)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-2, momentum=0.9)


def pixels(count: int, seed: int) -> TensorDataset:
    """Squares and their masks; a border as wide as the sample's number modulo 4 is not labelled."""
    pictures, masks = [], []
    for sample, (image, target) in enumerate(Squares(count, seed)):  # type: ignore[arg-type]
        mask = torch.zeros(SIZE, SIZE, dtype=torch.long)
        for (left, top, right, bottom), label in zip(target["boxes"].long(), target["labels"], strict=True):
            mask[top:bottom, left:right] = label
        mask[: sample % 4] = 255
        pictures.append(image)
        masks.append(mask)
    return TensorDataset(torch.stack(pictures), torch.stack(masks))


def segmented(build: Callable[..., nn.Module], focal: bool = False, **arguments: Any) -> Case:
    def fit(callbacks: list[Any], **options: Any) -> LightningModule:
        module = Segmenter(build(num_classes=CLASSES, **WITHOUT_WEIGHTS, **arguments), focal)
        trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
        trainer.fit(module, DataLoader(pixels(16, 0), 8, shuffle=True), DataLoader(pixels(8, 1), 4))
        return module

    return Case(fit, one_by_one(rows, lambda batch: len(batch[0])))


CASES = {
    "torchvision-faster-rcnn": detected(faster_rcnn),
    "torchvision-retinanet": detected(retinanet),
    "torchvision-ssdlite": detected(ssdlite),
    "torchvision-lraspp": segmented(lraspp_mobilenet_v3_large),
    "torchvision-lraspp-focal": segmented(lraspp_mobilenet_v3_large, focal=True),
    "torchvision-deeplab": segmented(partial(deeplabv3_mobilenet_v3_large, aux_loss=True)),
}
