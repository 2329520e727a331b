"""transformers: speech recognition with CTC, by its Wav2Vec2 and by an LSTM of one's own on padded sequences."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from tests.ecosystem.fitting import Case, one_by_one, rows

SYMBOLS, FEATURES = 6, 5  # symbol 0 is the blank


class Utterances(Dataset[Any]):
    """Each symbol sounds for three to five frames, in features of its own."""

    def __init__(self, count: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        sounds = torch.randn(SYMBOLS, FEATURES, generator=torch.Generator().manual_seed(0))
        self.samples = []
        for _ in range(count):
            text = torch.randint(1, SYMBOLS, (int(torch.randint(2, 6, (), generator=draw)),), generator=draw)
            frames = sounds[text].repeat_interleave(torch.randint(3, 6, text.shape, generator=draw), 0)
            self.samples.append((frames + torch.randn(frames.shape, generator=draw) / 4, text))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.samples[index]


def padded(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    frames, texts = zip(*samples, strict=True)
    lengths = [torch.tensor([len(one) for one in part]) for part in (frames, texts)]
    return pad_sequence(frames, batch_first=True), pad_sequence(texts, batch_first=True), *lengths


class Recognizer(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(FEATURES, 16, batch_first=True), nn.Linear(16, SYMBOLS)

    def loss(self, batch: Any) -> Tensor:
        frames, texts, frame_lengths, text_lengths = batch
        log_probs = self.head(self.lstm(frames)[0]).log_softmax(-1)
        return functional.ctc_loss(log_probs.transpose(0, 1), texts, frame_lengths, text_lengths, zero_infinity=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Wav2Vec2(Recognizer):
    """The loss is computed inside the model, on the labels that are not padding, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        size |= {"conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (2, 2), "num_conv_pos_embeddings": 4}
        size |= {"num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "vocab_size": SYMBOLS}
        self.model = Wav2Vec2ForCTC(
            Wav2Vec2Config(ctc_loss_reduction="mean", ctc_zero_infinity=True, mask_time_prob=0.0, **size)
        )

    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss


def waves(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Frames flattened into waves, with masks, and labels of -100 where there is no symbol."""
    frames, texts, lengths, _ = padded(samples)
    values = frames.flatten(1)
    mask = (torch.arange(values.shape[1]) < FEATURES * lengths[:, None]).long()
    return {"input_values": values, "attention_mask": mask, "labels": texts.masked_fill(texts == 0, -100)}


def fitted(kind: type[Recognizer], collate: Any) -> Any:
    def fit(callbacks: list[Any], **options: Any) -> LightningModule:
        module = kind()
        trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
        train = DataLoader(Utterances(48, 1), 8, shuffle=True, collate_fn=collate)
        trainer.fit(module, train, DataLoader(Utterances(16, 2), 8, collate_fn=collate))
        return module

    return fit


CASES = {
    "ctc-lstm": Case(fitted(Recognizer, padded), one_by_one(rows, lambda batch: len(batch[0]))),
    "ctc-wav2vec2": Case(fitted(Wav2Vec2, waves), one_by_one(rows, lambda batch: len(batch["labels"]))),
}
