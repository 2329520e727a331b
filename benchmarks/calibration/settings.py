"""The settings of the benchmark: which recorded or drawn losses are split how, and which fits run end to end."""

from __future__ import annotations

from dataclasses import dataclass, field

from benchmarks.calibration.synthetic import Noise
from benchmarks.calibration.tasks import CODE, DOCUMENTATION, DUPLICATES, RANDOM


@dataclass(frozen=True)
class Setting:
    """One way to split losses into pretended samples and controls.

    Attributes:
        name: of the setting.
        source: a name of `tasks.FITS`, where losses are those of a fit.
        samples: number of pretended samples.
        controls: number of controls.
        looks: number of looks, evenly spaced over the run.
        visits: rounds in which a sample is visited; None for one before each look of the recorded run.
        kinds: of the held-out samples, where there are several.
        consecutive: looks that must agree on a verdict; None for the detector's default.
        second_look: whether pretended samples can be measured again at a look; else verdicts rest on visits.
        noise: what losses are drawn from, where they are not of a fit.
    """

    name: str
    source: str
    samples: int
    controls: int
    looks: int = 10
    visits: int | None = None
    kinds: tuple[int, ...] = (0,)
    consecutive: int | None = None
    second_look: bool = True
    noise: Noise = field(default_factory=lambda: Noise("normal"))


RECORDED = (
    Setting("text, 10 epochs, 396 for 100", "texts", 396, 100),
    Setting("text, 10 epochs, one look", "texts", 400, 200, looks=1, consecutive=1),
    Setting("text, 10 epochs, by visits alone", "texts", 396, 100, second_look=False),
    Setting("text, 10 epochs, 1,000 controls", "texts", 300, 1000),
    Setting("text, code, random strings", "texts", 500, 200, kinds=(DOCUMENTATION, CODE, RANDOM)),
    Setting("text, code, random strings, 50 controls", "texts", 400, 50, kinds=(DOCUMENTATION, CODE, RANDOM)),
    Setting("text with near-duplicates", "texts", 400, 200, kinds=(DOCUMENTATION, DUPLICATES)),
    Setting("text, one epoch, seen twice", "one epoch", 400, 100, looks=10, visits=2),
    Setting("text, one epoch, 40 looks", "one epoch", 300, 100, looks=40, visits=8),
    Setting("text, dropout .3", "dropout", 400, 100),
    Setting("classification, dropout .5", "digits", 500, 200),
    Setting("classification, 50 controls", "digits", 500, 50),
    Setting("random labels, 500 controls", "random labels", 1000, 500),
    Setting("random labels, 2,000 controls", "random labels", 500, 2000, looks=5),
    Setting("classification, 800 controls", "digits", 190, 800),
    Setting("classification, dropout .5, by visits alone", "digits", 500, 200, second_look=False),
    Setting("regression", "regression", 500, 1000),
    Setting("multi-label BCE", "multi-label", 500, 1000),
)

DRAWN = (
    Setting("normal, one look, 2,000 controls", "", 600, 2000, looks=1, consecutive=1, noise=Noise("normal")),
    Setting("Student t3", "", 600, 100, noise=Noise("student")),
    Setting("Student t3, by visits alone", "", 600, 100, second_look=False, noise=Noise("student")),
    Setting("Student t3, independent", "", 600, 200, noise=Noise("student", correlation=0.0)),
    Setting("Student t3, matched by features", "", 600, 1000, noise=Noise("student", depends_on_features=True)),
    Setting("Student t3, 40 looks", "", 500, 100, looks=40, noise=Noise("student", correlation=0.99)),
    Setting("lognormal, low tail", "", 600, 1000, noise=Noise("lognormal", tail=-1)),
    Setting("lognormal, high tail, growing", "", 600, 1000, noise=Noise("lognormal", spread=4.0)),
    Setting("exponential, low tail, 40 looks", "", 500, 100, looks=40, noise=Noise("exponential", tail=-1)),
    Setting(
        "exponential, one look, 50 controls", "", 600, 50, looks=1, consecutive=1, noise=Noise("exponential", tail=-1)
    ),
)
