"""trl: a DPO step in Lightning, with trl's collator, whose batch has two rows a sample, and with pairs of one's own."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import selective_log_softmax

from tests.ecosystem.fitting import Case, one_by_one, rows

VOCABULARY, BETA = 40, 0.1


class DPO(LightningModule):
    """Chosen and rejected answers go through the policy, and a copy that stays as it was, in one batch."""

    def __init__(self) -> None:
        super().__init__()
        size = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": VOCABULARY}
        size |= {"bos_token_id": 0, "eos_token_id": 0}
        self.policy = GPT2LMHeadModel(GPT2Config(**size))
        self.reference = deepcopy(self.policy).requires_grad_(False)

    def answers(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """``[2B]`` log-probabilities of the answers."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        of_tokens = selective_log_softmax(logits, batch["input_ids"][:, 1:])
        return (of_tokens * batch["completion_mask"][:, 1:]).sum(1)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        chosen, rejected = self.answers(self.policy, batch).chunk(2)
        with torch.no_grad():
            chosen_before, rejected_before = self.answers(self.reference, batch).chunk(2)
        margins = (chosen - chosen_before) - (rejected - rejected_before)
        return -functional.logsigmoid(BETA * margins).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.policy.parameters(), lr=1e-3)


class DPOWithPairs(DPO):
    """Pairs of padded tensors, joined in the step; log-probabilities by ``log_softmax`` and ``gather``."""

    def answers(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        of_tokens = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
        return (of_tokens * batch["completion_mask"][:, 1:]).sum(1)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        names = ("input_ids", "attention_mask", "completion_mask")
        return super().loss({name: torch.cat([batch[f"chosen_{name}"], batch[f"rejected_{name}"]]) for name in names})


def preferences(count: int, seed: int) -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(seed)

    def tokens(least: int, most: int) -> list[int]:
        length = int(torch.randint(least, most, (), generator=draw))
        drawn: list[int] = torch.randint(1, VOCABULARY, (length,), generator=draw).tolist()
        return drawn

    return [
        {"prompt_ids": tokens(3, 7), "chosen_ids": tokens(2, 6), "rejected_ids": tokens(2, 6)} for _ in range(count)
    ]


def pairs(samples: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """What trl's collator gives, in two halves."""
    joined = DataCollatorForPreference(pad_token_id=0)(samples)
    halves = {name: part.chunk(2) for name, part in joined.items()}
    return {f"{kind}_{name}": halves[name][half] for half, kind in enumerate(("chosen", "rejected")) for name in halves}


def fitted(kind: type[DPO], collate: Any) -> Any:
    def fit(callbacks: list[Any], **options: Any) -> LightningModule:
        module = kind()
        trainer = Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, **options)
        train = DataLoader(preferences(48, 0), 8, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
        trainer.fit(module, train, DataLoader(preferences(16, 1), 8, collate_fn=collate))  # type: ignore[arg-type]
        return module

    return fit


def both_answers(batch: dict[str, Tensor], sample: int) -> dict[str, Tensor]:
    size = len(batch["input_ids"]) // 2
    return {name: part[[sample, size + sample]] for name, part in batch.items()}


CASES = {
    "trl-dpo": Case(
        fitted(DPO, DataCollatorForPreference(pad_token_id=0)),
        one_by_one(both_answers, lambda batch: len(batch["input_ids"]) // 2),
    ),
    "trl-dpo-pairs": Case(fitted(DPOWithPairs, pairs), one_by_one(rows, lambda batch: len(batch["chosen_input_ids"]))),
}
