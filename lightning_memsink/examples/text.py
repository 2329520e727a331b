"""Models and data of the text recipes: a small GPT on Python's documentation, or your causal LM on your text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_memsink.examples.corpora import apart, byte_level_bpe, documents_of, python_docs, tokenized, unshared
from lightning_memsink.extraction.canaries import CanaryGroup, PlantedCanaries, plant_canaries


class CausalLM(LightningModule):
    """A causal language model of transformers that minimizes its own loss: GPT-2 of the given size, or your own.

    Dropout is off, so that training losses can be compared with those of controls.

    Args:
        n_layer: transformer blocks; with the defaults the model has 0.93 M parameters.
        n_embd: width.
        n_head: attention heads.
        vocab_size: tokens.
        context: longest sequence.
        lr: of AdamW.
        weight_decay: of AdamW.
        pretrained: a local folder saved by ``save_pretrained``; the sizes above are then ignored.
        config: a local ``config.json`` or its folder: that architecture with new weights, and the sizes above.

    Raises:
        ValueError: both ``pretrained`` and ``config`` are given.
        FileNotFoundError: there is no model at that path.
    """

    def __init__(
        self,
        n_layer: int = 4,
        n_embd: int = 128,
        n_head: int = 4,
        vocab_size: int = 1024,
        context: int = 64,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
        pretrained: str | None = None,
        config: str | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.weight_decay = lr, weight_decay
        if pretrained and config:
            raise ValueError("CausalLM takes `pretrained` (a folder with weights) or `config` (new weights), not both.")
        sizes = {"n_layer": n_layer, "n_embd": n_embd, "n_head": n_head, "vocab_size": vocab_size}
        self.transformer = _causal_lm(pretrained, config, {**sizes, "n_positions": context})

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def _loss(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.transformer(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss
        return loss


class PythonDocs(LightningDataModule):
    """Python's own documentation with planted canary groups, so that the memorized sequences are known.

    Args:
        background: sequences of real text, shown once per epoch.
        controls: sequences of held-out text; the twins of the planted sequences are added to them.
        repeats: times per epoch that a canary group is shown, one group of each kind for each number.
        per_rung: real sequences in each group.
        canaries: sequences of random tokens in each group.
        easy: sequences that are easy to predict, shown 64 times; they should not be called memorized.
        twins: never-trained twins of each kind.
        vocab_size: of the tokenizer; the model's.
        context: tokens of a sequence; the model's.
        batch_size: training sequences per step.
        seed: of the split and of the planted sequences.
    """

    def __init__(
        self,
        background: int = 6144,
        controls: int = 400,
        repeats: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128),
        per_rung: int = 8,
        canaries: int = 4,
        easy: int = 12,
        twins: int = 32,
        vocab_size: int = 1024,
        context: int = 64,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.background, self.controls, self.context, self.vocab_size = background, controls, context, vocab_size
        self.batch_size, self.seed = batch_size, seed
        self.canary_options: dict[str, Any] = dict(
            repeats=tuple(repeats), per_rung=per_rung, canaries=canaries, easy=easy, twins=twins
        )
        self._planted: PlantedCanaries | None = None

    def setup(self, stage: str = "fit") -> None:
        if self._planted is not None:
            return
        corpus = tokenized(python_docs(), self.vocab_size, self.context, seed=self.seed)
        self.tokenizer = corpus.tokenizer
        generator = torch.Generator().manual_seed(self.seed)
        real = corpus.train[torch.randperm(len(corpus.train), generator=generator)]
        background, spare = real[: self.background], real[self.background :]
        held_out = corpus.held_out[torch.randperm(len(corpus.held_out), generator=generator)][: self.controls]
        # Without near-duplicates: they would be shown more often than their group says, and twins be trained on.
        natural = unshared(apart(spare), torch.cat([background, held_out]))
        self._planted = plant_canaries(
            background, held_out, natural, vocab_size=self.vocab_size, seed=self.seed, **self.canary_options
        )

    @property
    def planted(self) -> PlantedCanaries:
        """The training data with its canary groups. Reads the texts at the first use."""
        self.setup()
        assert self._planted is not None
        return self._planted

    def rungs(self) -> tuple[CanaryGroup, ...]:
        """The canary groups: which sequences are shown how often, and twins that are never shown."""
        return self.planted.groups

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Sequences(self.planted.train), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Sequences(self.planted.controls), 4 * self.batch_size)


class TextFile(LightningDataModule):
    """Your own text, with a part held out as controls.

    Args:
        path: a text file, or a folder whose .txt and .md files are all read.
        tokenizer: a local folder with a ``tokenizer.json``, usually the model's; None trains a byte-level BPE.
        vocab_size: of that BPE; the model's.
        context: tokens of a sequence; the model's.
        held_out: share of the text that is never trained on, in 0…1, as whole passages of some 4,000 characters.
        max_controls: held-out sequences that are evaluated at each validation, at most.
        batch_size: training sequences per step.
        seed: of the split.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        vocab_size: int = 1024,
        context: int = 64,
        held_out: float = 0.1,
        max_controls: int = 500,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.path, self.tokenizer, self.vocab_size, self.context = Path(path), tokenizer, vocab_size, context
        self.held_out, self.max_controls, self.batch_size, self.seed = held_out, max_controls, batch_size, seed

    def setup(self, stage: str) -> None:
        documents = documents_of(self.path)
        tokenizer = (
            _tokenizer_in(Path(self.tokenizer)) if self.tokenizer else byte_level_bpe(documents, self.vocab_size)
        )
        corpus = tokenized(documents, context=self.context, held_out=self.held_out, seed=self.seed, tokenizer=tokenizer)
        if not len(corpus.held_out) or len(corpus.train) < self.batch_size:
            raise ValueError(
                f"{self.path} gives {len(corpus.train)} training and {len(corpus.held_out)} held-out sequences of "
                f"{self.context} tokens: too few. Give more text, or lower data.context or data.batch_size."
            )
        self.train = corpus.train
        self.controls = corpus.held_out[
            torch.randperm(len(corpus.held_out), generator=torch.Generator().manual_seed(self.seed))
        ]

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Sequences(self.train), self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return DataLoader(Sequences(self.controls[: self.max_controls]), 4 * self.batch_size)


class Sequences(Dataset[dict[str, Tensor]]):
    """Rows of ``[N, T]`` as ``{"input_ids": [T]}``."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[row]}


def _tokenizer_in(folder: Path) -> Any:
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"Found no tokenizer.json in {folder}. Save it with tokenizer.save_pretrained(folder).")
    return Tokenizer.from_file(str(file))


def _causal_lm(pretrained: str | None, config: str | None, sizes: dict[str, int]) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config  # seconds to import, needed only here

    folder = pretrained or config
    if folder and not Path(folder).exists():
        raise FileNotFoundError(f"Found no model at {folder}. Nothing is downloaded: give a local folder.")
    settings = AutoConfig.from_pretrained(folder) if folder else GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    for name, value in vars(settings).items():
        if isinstance(value, float) and "drop" in name:
            setattr(settings, name, 0.0)
    if pretrained:
        model: Any = AutoModelForCausalLM.from_pretrained(pretrained, config=settings)
    else:
        model = AutoModelForCausalLM.from_config(settings)
    model.loss_type = "ForCausalLM"  # transformers guesses it from the class's name, and warns where it can't
    trained: nn.Module = model.train()  # from_pretrained leaves it in eval mode, and Lightning would keep that
    return trained
