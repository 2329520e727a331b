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
    "timm-smoothing": Claim("timm==1.0.31", "vision", "timm", "smoothing"),
    "timm-smoothing-vit": Claim("timm==1.0.31", "vision", "timm", "smoothing-vit"),
    "timm-two-losses": Claim("timm==1.0.31", "vision", "timm", "two-losses"),
    "timm-bce": Claim("timm==1.0.31", "vision", "timm", "bce"),
    "timm-bce-classes": Claim("timm==1.0.31", "vision", "timm", "bce-classes"),
    "timm-asymmetric": Claim("timm==1.0.31", "vision", "timm", "asymmetric"),
    "timm-asymmetric-labels": Claim("timm==1.0.31", "vision", "timm", "asymmetric-labels"),
    "timm-jsd": Claim("timm==1.0.31", "vision", "timm", "jsd"),
    "timm-mixup": Claim("timm==1.0.31", "vision", "timm", "mixup"),
    "timm-cutmix": Claim("timm==1.0.31", "vision", "timm", "cutmix"),
    "timm-mixup-cutmix": Claim("timm==1.0.31", "vision", "timm", "mixup-cutmix"),
    "timm-mixup-pairs": Claim("timm==1.0.31", "vision", "timm", "mixup-pairs"),
    "timm-mixup-images": Claim("timm==1.0.31", "vision", "timm", "mixup-images"),
    "timm-mixup-off": Claim("timm==1.0.31", "vision", "timm", "mixup-off"),
    "timm-mixup-half": Claim("timm==1.0.31", "vision", "timm", "mixup-half"),
    "torchvision-faster-rcnn": Claim("torchvision==0.28.0", "vision", "torchvision", "faster-rcnn"),
    "torchvision-retinanet": Claim("torchvision==0.28.0", "vision", "torchvision", "retinanet"),
    "torchvision-ssdlite": Claim("torchvision==0.28.0", "vision", "torchvision", "ssdlite"),
    "torchvision-lraspp": Claim("torchvision==0.28.0", "vision", "torchvision", "lraspp"),
    "torchvision-lraspp-focal": Claim("torchvision==0.28.0", "vision", "torchvision", "lraspp-focal"),
    "torchvision-deeplab": Claim("torchvision==0.28.0", "vision", "torchvision", "deeplab"),
    "lightly-simclr": Claim("lightly==1.6.0", "vision", "lightly", "SimCLR", lightning="pytorch_lightning"),
    "metric-learning-ntxent": Claim(
        "pytorch-metric-learning==2.9.0", "vision", "pytorch_metric_learning", "NTXentLoss"
    ),
    "metric-learning-triplets": Claim(
        "pytorch-metric-learning==2.9.0", "vision", "pytorch_metric_learning", "TripletMarginLoss"
    ),
    "diffusers": Claim("diffusers==0.42.1", "vision", "diffusers", "UNet2DModel"),
    "ctc-lstm": Claim("transformers==5.24.0", "language", "ctc", "LSTM"),
    "ctc-wav2vec2": Claim("transformers==5.24.0", "language", "ctc", "Wav2Vec2ForCTC"),
    "peft-gpt2": Claim("peft==0.21.2", "language", "peft", "GPT2"),
    "peft-llama": Claim("peft==0.21.2", "language", "peft", "Llama"),
    "peft-t5": Claim("peft==0.21.2", "language", "peft", "T5"),
    "trl-dpo": Claim("trl==1.16.0", "language", "trl", "DPO"),
    "trl-dpo-pairs": Claim("trl==1.16.0", "language", "trl", "DPO pairs"),
    "geometric-graphs": Claim("torch-geometric==2.8.1", "language", "torch_geometric", "graphs"),
    "geometric-nodes": Claim("torch-geometric==2.8.1", "language", "torch_geometric", "nodes"),
    "geometric-masked-nodes": Claim("torch-geometric==2.8.1", "language", "torch_geometric", "masked nodes"),
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
