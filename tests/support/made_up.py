"""A ledger's contents, made up."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_memsink.detection.run_statement import GroupStatement, RunStatement
from lightning_memsink.detection.verdicts import Evaluation, Flags, Onset, Verdict
from lightning_memsink.reporting.findings import Findings
from lightning_memsink.reporting.scalars import PlantedIds, scalars
from lightning_memsink.samples.control_table import ControlTable
from lightning_memsink.samples.loss_table import LossTable

SAMPLES, TOKENS = 24, 10
HASHED = -(2**40) - 1  # an id as hashes of content are: 64 bits, maybe negative


@dataclass(frozen=True)
class PlantedRung:
    name: str
    repeats: int
    ids: Tensor
    twin_ids: Tensor


RUNGS = [
    PlantedRung("natural x2", 2, torch.arange(0, 4), torch.arange(1000, 1004)),
    PlantedRung("natural x4", 4, torch.tensor([4, 5, 6, HASHED]), torch.arange(1000, 1004)),
    PlantedRung("canary x4", 4, torch.arange(8, 12), torch.arange(1004, 1008)),
]
ONSET = Onset(step=40, step_low=20, step_high=60, exposures=4, exposures_low=3, exposures_high=6, samples=3)


def statement_of(memorized: int, **facts: object) -> RunStatement:
    """What a random sample of 20 of the samples says, of whom so many are memorized."""
    share = memorized / 20
    groups = [GroupStatement("1", 4, 0.0, 0.0, 0.6, 0.0), GroupStatement("4-7", 16, share, share / 2, 0.5, share)]
    return replace(
        RunStatement(
            samples=20,
            population=SAMPLES,
            by_second_look=True,
            share=share,
            share_low=share / 2,
            share_high=0.4,
            at_least=memorized // 2,
            gap=0.2,
            gap_low=0.1,
            gap_high=0.3,
            detectable_gap=1.5,
            detectable_share=0.25,
            by_exposures=groups,
            by_source=[],
        ),
        **facts,
    )


class MadeUp:
    """A ledger's contents: 24 samples of 10 tokens, 20 controls; `memorized` of them so after the second evaluation."""

    def __init__(self, memorized: int = 3) -> None:
        self.table, self.controls, self.flags = LossTable(), ControlTable(), Flags()
        self.table.reference_step = 0
        self.memorized = memorized
        self.onset: Onset | None = None

    def evaluate(self, step: int) -> None:
        ids = torch.arange(SAMPLES)
        ids[7] = HASHED
        exposures = torch.where(torch.arange(SAMPLES) < 4, 1, 2)
        visits = torch.repeat_interleave(ids, exposures)
        losses = 3.0 - 0.05 * visits.clamp(min=0) - step / 200
        self.table.record(visits, losses, torch.full_like(visits, step), torch.full_like(visits, TOKENS))
        self.controls.record(step, torch.arange(1000, 1020), 3 - torch.arange(20) / 40 - step / 400, torch.zeros(20, 1))
        flags = self.flags
        flags.grow(SAMPLES)
        flags.gap = torch.linspace(-0.5, 0.5, SAMPLES).half()
        flags.p = torch.full((SAMPLES,), 0.5, dtype=torch.bfloat16)
        flags.verdict[:] = int(Verdict.LEARNED)
        flags.verdict[:2] = torch.tensor([Verdict.UNSEEN, Verdict.NO_LOSS]).to(torch.uint8)
        if self.flags.evaluations:
            rows = torch.arange(4, 4 + self.memorized)
            flags.verdict[rows], flags.gap[rows] = int(Verdict.MEMORIZED), 2 + rows.half() / 8
            flags.onset_step[rows], flags.onset_exposures[rows] = 40, 4
            self.onset = ONSET if self.memorized else None
        flags.null_gaps = torch.cat([torch.linspace(-0.4, 0.4, 19), torch.tensor([1.5])]).roll(5)
        flags.evaluations.append(self.summarized(step))

    def summarized(self, step: int) -> Evaluation:
        return Evaluation(
            step=step,
            epoch=0,
            controls=20,
            tested=20,
            counts=self.flags.counts(),
            train_loss=2.0 - step / 200,
            control_loss=2.5 - step / 400,
            gap=0.1 + step / 400,
            gap_memorized=2.5 if self.onset else math.nan,
            null_low=-0.4,
            null_high=0.4,
            null_sd=0.2,
            threshold=1.0,
            p_floor=1 / 21,
            alpha=0.05,
            tail="conformal",
            held_out=20,
            looked=20,
            statement=statement_of(self.memorized if self.onset else 0),
        )

    def row(self, rungs: list[PlantedRung]) -> dict[str, float]:
        return scalars(self.table, self.controls, self.flags, self.onset, [PlantedIds.of(rung) for rung in rungs])

    def findings(self, rungs: list[PlantedRung] = RUNGS) -> Findings:
        return Findings(self.table, self.flags, self.onset, [self.row(rungs)])


def made_up(memorized: int = 3, evaluations: int = 2) -> MadeUp:
    made = MadeUp(memorized)
    for number in range(evaluations):
        made.evaluate(20 * (number + 1))
    return made


def findings_with(made: MadeUp, **facts: object) -> Findings:
    """The findings, with some facts of the last evaluation replaced."""
    made.flags.evaluations[-1] = replace(made.flags.evaluations[-1], **facts)
    return made.findings()


# Curves ---------------------------------------------------------------------------------------------------------------
