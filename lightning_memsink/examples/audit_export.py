"""Exports the demo's model and canary groups in the formats that `memsink audit` reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_memsink._files import written_whole
from lightning_memsink.examples.text import CausalLM, PythonDocs
from lightning_memsink.extraction.canaries import CanaryGroup


class KeepForAudit(Callback):
    """Saves the demo's model at the end of training, its canary groups as suspected texts and their twins as controls.

    Texts are saved as tokens, because a tokenizer would not split the text of a random canary into the same tokens.

    Args:
        folder: of the saved model and texts; it is created if it does not exist.

    Raises:
        ValueError: at the start, if the model or the data is not the demo's.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, CausalLM) or not isinstance(data, PythonDocs):
            raise ValueError(
                f"KeepForAudit keeps the demo's CausalLM of PythonDocs, not {type(pl_module).__name__} of "
                f"{type(data).__name__}. Save your own model with save_pretrained and write your texts as JSONL."
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero:
            pl_module.transformer.save_pretrained(self.folder)  # type: ignore[union-attr, operator]
            _save_tokenizer(data, self.folder)
            groups = data.rungs()
            planted = ((group, row) for group in groups for row in group.sequences.tolist())
            self._write("suspects", (_line(group, row, group.name) for group, row in planted))
            by_kind = {group.kind: group for group in groups}  # all groups of a kind share their twins
            twins = ((group, row) for group in by_kind.values() for row in group.twins.tolist())
            self._write("controls", (_line(group, row, f"{group.kind}, never") for group, row in twins))

    def _write(self, name: str, lines: Iterable[str]) -> None:
        with written_whole(self.folder / f"{name}.jsonl") as file:
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _line(group: CanaryGroup, tokens: list[int], name: str) -> str:
    return json.dumps({"tokens": tokens, "group": name, "kind": group.kind})


def _save_tokenizer(data: PythonDocs, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=data.tokenizer).save_pretrained(folder)
