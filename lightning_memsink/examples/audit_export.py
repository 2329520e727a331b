"""The demo's model and its planted ladder as `memsink audit` takes them."""

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
    """At the end of the demo's training: a transformers folder, and the ladder as suspected texts, its never-trained
    twins as controls. As tokens, for random canaries are no text that a tokenizer would cut so again.

    Args:
        folder: made if need be.
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
            rungs = data.rungs()
            self._write("suspects", (_line(rung, row, rung.name) for rung in rungs for row in rung.sequences.tolist()))
            kinds = {rung.kind: rung for rung in rungs}  # all rungs of a kind share their twins
            twins = (_line(rung, row, f"{rung.kind}, never") for rung in kinds.values() for row in rung.twins.tolist())
            self._write("controls", twins)

    def _write(self, name: str, lines: Iterable[str]) -> None:
        with written_whole(self.folder / f"{name}.jsonl") as file:
            file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _line(rung: CanaryGroup, tokens: list[int], group: str) -> str:
    return json.dumps({"tokens": tokens, "group": group, "kind": rung.kind})


def _save_tokenizer(data: PythonDocs, folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=data.tokenizer).save_pretrained(folder)
