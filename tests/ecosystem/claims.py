"""What we claim of each case, and what was found."""

from __future__ import annotations

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

    steps: int
    samples: int
    visits: int
    controls: int
    tracked: int
    identical: bool
    said: list[str]
    said_times: int
    error: float | None
    mean_error: float | None


CLAIMS = {
    "demos-transformer": Claim("lightning==2.6.6", "shared", "demos", "LightningTransformer"),
    "demos-lstm": Claim("lightning==2.6.6", "shared", "demos", "LightningLSTM"),
    "demos-manual": Claim("lightning==2.6.6", "shared", "demos", "ManualOptimBoringModel"),
}
