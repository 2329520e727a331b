"""Tests during training which of some chosen texts can be extracted from the model."""

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
from lightning_memsink.extraction.canaries import CanaryGroup, HasCanaryGroups
from lightning_memsink.extraction.history import ExtractionHistory
from lightning_memsink.extraction.probe import ExtractionResults, Logits, ProbeConfig, logits_of, probe
from lightning_memsink.ledger import Ledger


class ExtractionProbe(Callback):
    """Tests before each validation which texts can be extracted: by greedy decoding, and within some sampled tries.

    Takes one forward pass per text and validation, in evaluation mode and without side effects: nothing is generated,
    and random state and weights do not change. A probe that fails warns once, and training continues.

    Args:
        texts: token ids ``[N, T]`` by name of their group: ``{"canaries": ..., "never trained": ...}``. None takes the
            canary groups of a data module with a method `rungs()`, and their twins.
        prefix: tokens of a text that the model is given as a prompt.
        n: sampled tries of (n, p)-discoverable extraction (Hayes et al. 2024).
        p: probability that the rest of the text is among the ``n`` tries.
        temperature: of sampling.
        top_k: of sampling; 0 keeps all tokens.
        top_p: of sampling; 1 keeps all tokens.
        padding: id of the padding token, to the right of shorter texts.
        batch_size: texts in a forward pass.
        logits: a function from tokens and mask ``[B, T]`` to logits ``[B, T, V]``; needed for models without
            transformers' forward call.

    Raises:
        ValueError: at the start, if there is no text, no text longer than the prefix, or no language model to probe.
    """

    saves_samples = False

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
        self.config = ProbeConfig(prefix, n, p, temperature, top_k, top_p)
        self.texts, self.padding, self.batch_size, self.logits = texts, padding, batch_size, logits
        self.history = ExtractionHistory(self.config)
        self._texts: dict[str, Tensor] = {}
        self._model_logits: Logits | None = None
        self._warnings = WarningCache()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            require_support(trainer.strategy, "ExtractionProbe")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Ledger.of(trainer).extraction = self.history
        data = trainer.datamodule  # type: ignore[attr-defined]
        self._texts = _canary_texts(data) if self.texts is None else dict(self.texts)
        wrong = {group: list(tokens.shape) for group, tokens in self._texts.items() if tokens.ndim != 2}
        if wrong:
            raise ValueError(f"ExtractionProbe takes token ids [N, T] of each group, and not {wrong}.")
        longest = max((tokens.shape[1] for tokens in self._texts.values() if len(tokens)), default=0)
        if longest <= self.config.prefix:
            found = f"the longest has {longest} tokens" if longest else "there is none"
            raise ValueError(
                f"ExtractionProbe needs texts longer than its prefix of {self.config.prefix} tokens, but {found}. Pass "
                "ExtractionProbe(texts={'canaries': tokens}, prefix=...)."
            )
        self._model_logits = logits_of(pl_module) if self.logits is None else self.logits

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Readers use the results at the end of the validation. Every rank probes all texts, so nothing is gathered.
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._model_logits is None:
            return
        try:
            with without_trace(pl_module), trainer.precision_plugin.forward_context():
                results = {group: self._probe(tokens, pl_module.device) for group, tokens in self._texts.items()}
            self.history.add(trainer.global_step, results)
        except Exception as error:  # a probe that fails must not end training
            warn_once(self._warnings, f"ExtractionProbe failed on this model; training goes on. {error}", key="failed")

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict)

    def _probe(self, tokens: Tensor, device: torch.device) -> ExtractionResults:
        assert self._model_logits is not None
        mask = torch.ones_like(tokens, dtype=torch.bool) if self.padding is None else tokens != self.padding
        return probe(self._model_logits, tokens.to(device), mask.to(device), self.config, self.batch_size)


def _canary_texts(data: Any) -> dict[str, Tensor]:
    """The sequences of each canary group of a data module, and the twins of each kind; empty if it has none."""
    groups = (
        [each for each in data.rungs() if isinstance(each, CanaryGroup)] if isinstance(data, HasCanaryGroups) else []
    )
    texts = {group.name: group.sequences for group in groups}
    return texts | {f"{group.kind} never trained": group.twins for group in groups}
