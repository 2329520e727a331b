"""Ledgers whose texts have sources, made up."""

import torch

from lightning_memsink.detection.verdicts import Evaluation, Flags, Verdict
from lightning_memsink.samples.loss_table import LossTable
from lightning_memsink.samples.sources import label_text

TOKENS = 20


def sourced(counts: dict[str | None, dict[Verdict, int]], controls: int = 400) -> tuple[LossTable, Flags]:
    """By source, how many texts have which verdict. Memorized texts have a gap of 3 nats, the others of 0."""
    verdicts = [(label, verdict) for label, some in counts.items() for verdict, n in some.items() for _ in range(n)]
    table, flags = LossTable(), Flags()
    ids = torch.arange(len(verdicts))
    visits = ids.repeat(2)
    table.record(visits, torch.ones(len(visits)), ids.new_zeros(len(visits)), torch.full((len(visits),), TOKENS))
    unseen = torch.tensor([verdict == Verdict.UNSEEN for _, verdict in verdicts], dtype=torch.bool)
    table.columns["exposures"][: len(ids)][unseen] = 1
    codes = table.source_names.codes([label_text(label) for label, _ in verdicts])
    table.write("source", ids, codes)
    flags.grow(len(table))
    flags.verdict[:] = torch.tensor([int(verdict) for _, verdict in verdicts], dtype=torch.uint8)
    flags.gap[:] = torch.where(flags.memorized, 3.0, 0.0).half()
    flags.gap[unseen] = torch.nan
    flags.onset_step[flags.memorized], flags.onset_exposures[flags.memorized] = 40, 3
    flags.null_gaps = torch.randn(controls, generator=torch.Generator().manual_seed(0)) / 4
    flags.evaluations.append(evaluation(flags, 50))
    return table, flags


def evaluation(flags: Flags, step: int) -> Evaluation:
    return Evaluation(
        **dict(step=step, epoch=0, controls=len(flags.null_gaps), tested=len(flags.verdict), counts=flags.counts()),
        **dict(train_loss=1.0, control_loss=1.0, gap=0.1, gap_memorized=3.0, null_low=-0.5, null_high=0.5),
        **dict(null_sd=0.25, threshold=1.0, p_floor=0.01, alpha=0.05, tail="conformal"),
    )
