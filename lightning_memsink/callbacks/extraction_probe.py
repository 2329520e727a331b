"""Which of some chosen texts can be got out of the model, while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import WarningCache
from torch import Tensor

from lightning_memsink._evaluation import without_trace
from lightning_memsink._lightning import warn_once
from lightning_memsink.callbacks.runtime.strategies import require_support
from lightning_memsink.extraction.canaries import CanaryGroup
from lightning_memsink.extraction.history import ExtractionHistory
from lightning_memsink.extraction.probe import ExtractionResults, Logits, ProbeConfig, logits_of, probe
from lightning_memsink.ledger import Ledger
from lightning_memsink.reporting.scalars import HasRungs


class ExtractionProbe(Callback):
    """Asks for texts before each validation: word for word by greedy decoding, and within some sampled tries.

    One forward a text and validation, in evaluation mode and without a trace: nothing is generated, random state and
    weights stay as they are. A look that fails is told once and training goes on.

    Args:
        texts: token ids ``[N, T]``, by name of their group: ``{"canaries": ..., "never trained": ...}``. None takes
            what a data module with a method `rungs()` has planted, and its twins.
        prefix: tokens that the model is given.
        n: sampled tries, and ``p``, the probability to see the rest among them (Hayes et al. 2024).
        temperature: of sampling, as ``top_k`` and ``top_p``.
        padding: a token id that is no text, to the right of shorter ones.
        batch_size: texts in a forward.
        logits: how to get ``[B, T, V]`` from tokens and mask ``[B, T]``; needed for models without transformers' call.

    Raises:
        ValueError: at the start, if there is no text, no text longer than the prefix, or no language model to ask.
    """

    def __init__(
        self,
        texts: Mapping[str, Tensor] | None = None,
        prefix: int = 16,
        n: int = 1000,
        p: float = 0.5,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        padding: int | None = None,
        batch_size: int = 64,
        logits: Logits | None = None,
    ) -> None:
        self.scheme = ProbeConfig(prefix, n, p, temperature, top_k, top_p)
        self.texts, self.padding, self.batch_size, self.logits = texts, padding, batch_size, logits
        self.extracted = ExtractionHistory(self.scheme)
        self._texts: dict[str, Tensor] = {}
        self._ask: Logits | None = None
        self._warnings = WarningCache()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            require_support(trainer.strategy, "ExtractionProbe")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Ledger.of(trainer).extraction = self.extracted
        source = trainer.datamodule  # type: ignore[attr-defined]
        self._texts = _planted(source) if self.texts is None else dict(self.texts)
        wrong = {group: list(each.shape) for group, each in self._texts.items() if each.ndim != 2}
        if wrong:
            raise ValueError(f"ExtractionProbe takes token ids [N, T] of each group, and not {wrong}.")
        longest = max((each.shape[1] for each in self._texts.values() if len(each)), default=0)
        if longest <= self.scheme.prefix:
            found = f"the longest has {longest} tokens" if longest else "there is none"
            raise ValueError(
                f"ExtractionProbe needs texts longer than its prefix of {self.scheme.prefix} tokens, but {found}. Pass "
                "ExtractionProbe(texts={'canaries': tokens}, prefix=...)."
            )
        self._ask = logits_of(pl_module) if self.logits is None else self.logits

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before the validation, at whose end others read what is written here. Every rank asks for all: no collective.
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._ask is None:
            return
        try:
            with without_trace(pl_module), trainer.precision_plugin.forward_context():
                answers = {group: self._answers(tokens, pl_module.device) for group, tokens in self._texts.items()}
            self.extracted.add(trainer.global_step, answers)
        except Exception as error:  # no look is worth the training
            warn_once(self._warnings, f"ExtractionProbe failed on this model; training goes on. {error}", key="failed")

    def state_dict(self) -> dict[str, Any]:
        return self.extracted.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.extracted.load_state_dict(state_dict)

    def _answers(self, tokens: Tensor, device: torch.device) -> ExtractionResults:
        assert self._ask is not None
        mask = torch.ones_like(tokens, dtype=torch.bool) if self.padding is None else tokens != self.padding
        return probe(self._ask, tokens.to(device), mask.to(device), self.scheme, self.batch_size)


def _planted(source: Any) -> dict[str, Tensor]:
    """Planted sequences by rung, and the twins of each kind."""
    rungs = [rung for rung in source.rungs() if isinstance(rung, CanaryGroup)] if isinstance(source, HasRungs) else []
    texts = {rung.name: rung.sequences for rung in rungs}
    return texts | {f"{rung.kind} never trained": rung.twins for rung in rungs}
