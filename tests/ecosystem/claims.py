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


OWN_LOSS = "decomposable, but its rows can't be followed to the batch: the module must end with per_sample(...)"
MIXED = "an image is a mixture of two samples, so its loss is of neither"
TIMM, TORCHVISION, METRIC_LEARNING = "timm==1.0.31", "torchvision==0.28.0", "pytorch-metric-learning==2.9.0"
TRANSFORMERS, PEFT, TRL, GEOMETRIC = "transformers==5.24.0", "peft==0.21.2", "trl==1.16.0", "torch-geometric==2.8.1"


def refused(
    package: str, environment: str, module: str, what: str, kind: str, reason: str, lightning: str = "lightning.pytorch"
) -> Claim:
    """The claim that no losses are recorded, and that one line about the training step of ``kind`` says so."""
    return Claim(package, environment, module, what, f"{kind}.training_step has a loss", reason, lightning)


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
        message="TemporalFusionTransformer.training_step has a loss",
        reason=f"quantile loss, {OWN_LOSS}",
    ),
    "forecasting-nbeats": Claim("pytorch-forecasting==1.8.0", "shared", "pytorch_forecasting", "NBeats"),
    "gluonts-deepar": Claim(
        "gluonts[torch]==0.17.0",
        "shared",
        "gluonts",
        "DeepAR",
        message="DeepARLightningModule.training_step has a loss",
        reason=f"likelihood of a Student t, {OWN_LOSS}",
    ),
    "scvi": Claim("scvi-tools==1.4.2", "scvi", "scvi_tools", "SCVI"),
    "tabular": Claim(
        "pytorch-tabular==1.2.0", "tabular", "pytorch_tabular", "CategoryEmbedding", lightning="pytorch_lightning"
    ),
    "litgpt": Claim("litgpt==0.5.13", "litgpt", "litgpt", "GPT"),
    "timm-smoothing": Claim(TIMM, "vision", "timm", "ResNet, LabelSmoothingCrossEntropy"),
    "timm-smoothing-vit": Claim(TIMM, "vision", "timm", "ViT, LabelSmoothingCrossEntropy"),
    "timm-two-losses": Claim(
        TIMM,
        "vision",
        "timm",
        "ResNet, smoothed in training only",
        reason="validation takes another loss than training, so there are no controls; one line says so",
    ),
    "timm-bce": Claim(TIMM, "vision", "timm", "ResNet, BinaryCrossEntropy"),
    "timm-bce-classes": Claim(TIMM, "vision", "timm", "ViT, BinaryCrossEntropy summed over classes"),
    "timm-asymmetric": Claim(TIMM, "vision", "timm", "ResNet, AsymmetricLossSingleLabel"),
    "timm-asymmetric-labels": Claim(
        TIMM,
        "vision",
        "timm",
        "ResNet, AsymmetricLossMultiLabel",
        reason="its sum over everything, divided by B, counts as the mean over a sample's classes",
    ),
    "timm-jsd": Claim(TIMM, "vision", "timm", "ResNet, JsdCrossEntropy"),
    **{
        f"timm-{name}": refused(TIMM, "vision", "timm", what, "Classifier", MIXED)
        for name, what in {
            "mixup": "ResNet, Mixup",
            "cutmix": "ResNet, CutMix",
            "mixup-cutmix": "ViT, Mixup and CutMix",
            "mixup-pairs": "ResNet, both, by pair",
            "mixup-images": "ResNet, both, by image",
            "mixup-half": "ResNet, Mixup of half of the batches",
        }.items()
    },
    "timm-mixup-off": refused(
        TIMM, "vision", "timm", "ResNet, Mixup switched off", "Classifier", "other samples' targets are added, times 0"
    ),
    **{
        f"torchvision-{name}": refused(
            TORCHVISION, "vision", "torchvision", what, "Detector", "anchors and proposals are matched image by image"
        )
        for name, what in {
            "faster-rcnn": "Faster R-CNN",
            "retinanet": "RetinaNet",
            "ssdlite": "SSDlite",
        }.items()
    },
    "torchvision-lraspp": Claim(TORCHVISION, "vision", "torchvision", "LR-ASPP, cross entropy"),
    "torchvision-lraspp-focal": Claim(TORCHVISION, "vision", "torchvision", "LR-ASPP, sigmoid_focal_loss"),
    "torchvision-deeplab": Claim(TORCHVISION, "vision", "torchvision", "DeepLabV3 with its auxiliary head"),
    "lightly-simclr": Claim("lightly==1.6.0", "vision", "lightly", "SimCLR, NTXentLoss", lightning="pytorch_lightning"),
    "metric-learning-ntxent": refused(
        METRIC_LEARNING,
        "vision",
        "pytorch_metric_learning",
        "NTXentLoss",
        "TwoViews",
        "a pair's loss is scaled by the largest similarity of any pair",
    ),
    "metric-learning-triplets": refused(
        METRIC_LEARNING,
        "vision",
        "pytorch_metric_learning",
        "TripletMarginLoss, mined",
        "MinedTriplets",
        "a triplet is of three samples",
    ),
    "diffusers": Claim("diffusers==0.42.1", "vision", "diffusers", "UNet2DModel, DDPM step"),
    "ctc-lstm": Claim(TRANSFORMERS, "language", "ctc", "LSTM, F.ctc_loss"),
    "ctc-wav2vec2": Claim(TRANSFORMERS, "language", "ctc", "Wav2Vec2ForCTC"),
    "peft-gpt2": Claim(PEFT, "language", "peft", "LoRA of GPT-2"),
    "peft-llama": Claim(PEFT, "language", "peft", "LoRA of Llama"),
    "peft-t5": Claim(PEFT, "language", "peft", "LoRA of T5"),
    "trl-dpo": refused(
        TRL,
        "language",
        "trl",
        "DPO, trl's collator",
        "DPO",
        "its batch has two rows a sample, and nothing in it says so",
    ),
    "trl-dpo-pairs": Claim(TRL, "language", "trl", "DPO, chosen and rejected joined in the step"),
    "geometric-graphs": Claim(GEOMETRIC, "language", "torch_geometric", "GCN, classes of graphs"),
    "geometric-nodes": Claim(GEOMETRIC, "language", "torch_geometric", "GCN, labels of the nodes of many graphs"),
    "geometric-masked-nodes": Claim(GEOMETRIC, "language", "torch_geometric", "GCN, masked nodes of one graph"),
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
        said = any("validation" in message for _, message in found.messages)
        checks["no controls, and nothing says why"] = found.controls > 0 or said
        checks["a message about training_step"] = not any(".training_step" in message for _, message in found.messages)
    return [name for name, holds in checks.items() if not holds]


def losses_found(found: Finding) -> str:
    """In the words of the table."""
    if not found.tracked:
        return "none, said once at the start"
    text = f"{found.tracked} of {found.samples} samples, within {found.error:.0e}" if found.error is not None else "?"
    return text if found.control_error is None else f"{text}; {found.controls} controls, {found.control_error:.0e}"
