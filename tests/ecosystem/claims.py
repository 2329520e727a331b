"""What we claim of each case, and what was found."""

from __future__ import annotations

import re
from dataclasses import dataclass

TOLERANCE = 1e-5  # of float32 losses: batched and single matrix products round differently


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Args:
        package: what pip installs, pinned.
        environment: cases with the same one share a virtual environment.
        module: file in ``modules/`` that builds the case.
        what: the class that is fitted.
        message: what our callbacks say instead of per-sample losses; "" where losses are claimed.
        reason: why, in a few words.
        lightning: the namespace that the package uses.
    """

    package: str
    environment: str
    module: str
    what: str
    message: str = ""
    reason: str = ""
    lightning: str = "lightning.pytorch"


@dataclass(frozen=True)
class Finding:
    """What one case's fits came to; see ``fitting.py``."""

    versions: dict[str, str]
    steps: int
    samples: int
    visits: int
    controls: int
    tracked: int
    reproducible: bool
    identical: bool
    messages: list[tuple[int, str]]
    error: float | None
    mean_error: float | None
    control_error: float | None


OWN_LOSS = "decomposable, but written by hand, so its graph tells no losses: the module must end with per_sample(...)"

CLAIMS = {
    "demos-transformer": Claim("lightning==2.6.6", "shared", "demos", "LightningTransformer"),
    "demos-lstm": Claim("lightning==2.6.6", "shared", "demos", "LightningLSTM"),
    "demos-manual": Claim("lightning==2.6.6", "shared", "demos", "ManualOptimBoringModel"),
    "mingpt": Claim("lightning-gpt==0.1.1", "shared", "lightning_gpt", "MinGPT"),
    "nanogpt": Claim("lightning-gpt==0.1.1", "shared", "lightning_gpt", "NanoGPT"),
    "chemprop": Claim("chemprop==2.3.1", "shared", "chemprop", "MPNN"),
    "forecasting-tft": Claim(
        "pytorch-forecasting==1.8.0",
        "shared",
        "pytorch_forecasting",
        "TemporalFusionTransformer",
        message="TemporalFusionTransformer.training_step has a loss that comes from MaximumBackward0",
        reason=f"quantile loss, {OWN_LOSS}",
    ),
    "forecasting-nbeats": Claim(
        "pytorch-forecasting==1.8.0",
        "shared",
        "pytorch_forecasting",
        "NBeats",
        reason="our losses are absolute errors. MASE divides each by a number of its own series, which counts as the "
        "sample's weight. Validation calls no loss function that can be watched, so there are no controls",
    ),
    "gluonts-deepar": Claim(
        "gluonts[torch]==0.17.0",
        "shared",
        "gluonts",
        "DeepAR",
        message="DeepARLightningModule.training_step has a loss that comes from",
        reason=f"likelihood of a Student t, {OWN_LOSS}",
    ),
    "scvi": Claim(
        "scvi-tools==1.4.2",
        "scvi",
        "scvi_tools",
        "SCVI",
        message="TrainingPlan.training_step has a loss that comes from",
        reason=f"evidence lower bound of counts, {OWN_LOSS}",
    ),
    "tabular": Claim(
        "pytorch-tabular==1.2.0", "tabular", "pytorch_tabular", "CategoryEmbedding", lightning="pytorch_lightning"
    ),
    "litgpt": Claim("litgpt==0.5.13", "litgpt", "litgpt", "GPT"),
}


def differences(claim: Claim, found: Finding) -> list[str]:
    """Where a finding is not as claimed; nothing is the verdict hoped for."""
    kinds = [re.sub(r"\d+", "", message) for _, message in found.messages]
    at_start = [message for step, message in found.messages if step <= 2]
    checks = {
        "not reproducible without us": found.reproducible,
        "weights differ": found.identical,
        "a message was repeated": len(set(kinds)) == len(kinds),
        "no steps": found.steps > 0 and found.samples > 0,
    }
    if claim.message:
        checks["not said at the start: " + claim.message] = any(claim.message in message for message in at_start)
        checks["losses of some samples were tracked"] = found.tracked == 0
    else:
        checks["some samples have no loss"] = found.tracked == found.samples
        checks["losses are not those of samples alone"] = found.error is not None and found.error <= TOLERANCE
        checks["losses of controls are not those of samples alone"] = (found.control_error or 0.0) <= TOLERANCE
        checks["a message about training_step"] = not any(".training_step" in message for _, message in found.messages)
    return [name for name, holds in checks.items() if not holds]


def losses_found(found: Finding) -> str:
    """In the words of the table."""
    if not found.tracked:
        return "none, said once at the start"
    text = f"{found.tracked} of {found.samples} samples, within {found.error:.0e}" if found.error is not None else "?"
    return text if found.control_error is None else f"{text}; {found.controls} controls, {found.control_error:.0e}"
