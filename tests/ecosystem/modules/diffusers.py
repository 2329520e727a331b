"""diffusers: an unconditional DDPM step, as in its training tutorial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from tests.ecosystem.fitting import Case

SIZE = 16


class Diffusion(LightningModule):
    """Each image at a time of its own and with noise of its own; in validation both are the same at each evaluation."""

    def __init__(self) -> None:
        super().__init__()
        channels = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
        blocks = {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        self.model = UNet2DModel(sample_size=SIZE, layers_per_block=1, attention_head_dim=4, **channels, **blocks)
        self.scheduler = DDPMScheduler(num_train_timesteps=100)

    def draw(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        noise = torch.randn(images.shape, generator=generator)
        return noise, torch.randint(0, 100, (len(images),), generator=generator)

    def loss(self, images: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        noisy = self.scheduler.add_noise(images, noise, times)
        predicted = self.model(noisy, times, return_dict=False)[0]
        return functional.mse_loss(predicted, noise)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (images,) = batch
        loss = self.loss(images, *self.draw(images))
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (images,) = batch
        self.log("val_loss", self.loss(images, *self.draw(images, torch.Generator().manual_seed(0))))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def images(count: int, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    waves = torch.arange(SIZE) / torch.randint(1, 6, (count, 1), generator=draw)
    return TensorDataset((waves.sin()[:, None, :, None] * waves.cos()[:, None, None, :]).float())


def fit(callbacks: list[Any], **options: Any) -> LightningModule:
    module = Diffusion()
    trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
    trainer.fit(module, DataLoader(images(48, 0), 8, shuffle=True), DataLoader(images(16, 1), 8))
    return module


def alone(generator: Callable[[], torch.Generator | None]) -> Callable[[Diffusion, Any], Tensor]:
    """With the noise and the times that the step is about to draw for the whole batch."""

    def losses(module: Diffusion, batch: Any) -> Tensor:
        (images,) = batch
        with torch.random.fork_rng(devices=[]):
            drawn = module.draw(images, generator())
        rows = zip(images, *drawn, strict=True)
        return torch.stack([module.loss(image[None], noise[None], time[None]) for image, noise, time in rows])

    return losses


CASES = {"diffusers": Case(fit, alone(lambda: None), alone(lambda: torch.Generator().manual_seed(0)))}
