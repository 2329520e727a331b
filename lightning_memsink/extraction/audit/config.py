"""What an audit measures, and when it calls a text memorized."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_memsink.detection.matched_controls import DetectionRule
from lightning_memsink.extraction.probe import ProbeConfig


@dataclass(frozen=True)
class AuditConfig:
    """What is measured, and when a text counts as memorized.

    Args:
        prefix: tokens of a text that the model is given as a prompt.
        length: tokens of a text that are used; the rest is cut off.
        n: sampled tries, and ``p``, the probability that the rest of the text is among them.
        p: see ``n``.
        temperature: of sampling.
        top_k: of sampling; 0 keeps all tokens.
        top_p: of sampling; 1 keeps all tokens.
        alpha: false-discovery rate over the suspected texts.
        k: controls that a text is compared with.
        min_gap: nats per token by which the loss of a memorized text lies below that of its controls, at least.
        fpr: share of controls above the threshold of a membership score.
        closer: number of top texts for which the model also generates, and whose rest is scored after other prefixes.
        units: also localize the units that carry the texts called memorized.
        unit_fraction: share of all units that is localized.
        batch_size: texts in a forward pass.
    """

    prefix: int = 32
    length: int = 128
    n: int = 1000
    p: float = 0.5
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    alpha: float = 0.05
    k: int = 8
    min_gap: float = 1.0
    fpr: float = 0.01
    closer: int = 20
    units: bool = False
    unit_fraction: float = 0.01
    batch_size: int = 8

    @property
    def probe(self) -> ProbeConfig:
        """Raises a ValueError for values that no text can be probed with."""
        return ProbeConfig(self.prefix, self.n, self.p, self.temperature, self.top_k, self.top_p)

    @property
    def rule(self) -> DetectionRule:
        """Raises a ValueError for values that no rule can have."""
        return DetectionRule(alpha=self.alpha, k=self.k, min_gap=self.min_gap)
