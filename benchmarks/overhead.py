"""What watching costs: the same fit with and without, a step in turn; and whether it changes a single weight.

Time is processor time of a training step, the first ones left out: validations, the detector's evaluations and logging
lie within, imports, set-up and reports lie without. All fits validate alike, and memory that was freed is kept.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import wandb
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger, WandbLogger
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.interleaving import Turn, in_turns, ratio, typical
from benchmarks.memory import keep_freed
from benchmarks.reporting import Criterion, Report, arguments, fresh_seeds, settle_down
from benchmarks.workloads import WORKLOADS, Workload
from lightning_memsink import memsink

RATIO = 1.03
SAMPLES, CONTROLS, EVALUATIONS = 1024, 128, 3
PLAIN, AGAIN, WATCHED = "plain", "plain again", "watched"


@dataclass(frozen=True)
class Comparison:
    """One workload: by way, seconds of each step of each fit; and the largest change of a weight."""

    name: str
    seconds: Mapping[str, Sequence[Sequence[float]]]
    change: float

    @property
    def ratio(self) -> float:
        """Of a watched step to a plain one."""
        return ratio(self.seconds[WATCHED], self.seconds[PLAIN], self.seconds[AGAIN])

    @property
    def noise(self) -> float:
        """What a ratio can be off by: that of a plain fit to another."""
        return ratio(self.seconds[AGAIN], self.seconds[PLAIN])


def compare(workload: Workload, seeds: Sequence[int]) -> Comparison:
    """Two fits alone, for their weights, and to have imported all; then, for each seed, three in turns."""
    ways = {PLAIN: False, AGAIN: False, WATCHED: True}
    with redirect_stdout(io.StringIO()):  # the report's own words would bury the table
        weights = [fit(workload, seeds[0], watch, Turn()) for watch in (False, True)]
        fits = [{name: partial(fit, workload, seed, watch) for name, watch in ways.items()} for seed in seeds]
        blocks = [in_turns(block, seed) for block, seed in zip(fits, seeds, strict=True)]
    change = max(float((before - after).abs().max()) for before, after in zip(*weights, strict=True))
    return Comparison(workload.name, {name: [block[name] for block in blocks] for name in ways}, change)


def fit(workload: Workload, seed: int, watch: bool, turn: Turn) -> list[Tensor]:
    """The trained weights, in double precision."""
    seed_everything(seed, verbose=False)
    module = workload.module()
    with tempfile.TemporaryDirectory() as folder:  # silent W&B still writes its files
        logger = WandbLogger(save_dir=folder, offline=True, settings=wandb.Settings(silent=True)) if watch else False
        run(module, workload, seed, [turn, *(memsink(path=None) if watch else [])], logger)
        if watch:
            wandb.finish()
    return [weight.detach().double() for weight in module.state_dict().values()]


def run(
    module: LightningModule,
    workload: Workload,
    seed: int,
    callbacks: list[Callback],
    logger: Logger | bool = False,
    samples: int = SAMPLES,
    evaluations: int = EVALUATIONS,
    **options: Any,
) -> Trainer:
    """A whole fit of the workload, validated ``evaluations`` times."""
    trainer = Trainer(
        accelerator="cpu",
        max_steps=workload.steps,
        val_check_interval=max(1, workload.steps // evaluations),
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(
        module,
        DataLoader(workload.data(samples, seed), workload.batch_size, shuffle=True),
        DataLoader(workload.data(CONTROLS, seed + 1), CONTROLS),
    )
    return trainer


def report(compared: Sequence[Comparison], seeds: Sequence[int]) -> Report:
    table = Table("workload", "plain ms/step", "watched ms/step", "ratio", "plain against plain", "largest change")
    for each in compared:
        milliseconds = (f"{1000 * typical(each.seconds[way]):.2f}" for way in (PLAIN, WATCHED))
        table.add_row(each.name, *milliseconds, f"{each.ratio:.3f}", f"{each.noise:.3f}", f"{each.change:g}")
    typically = statistics.median(each.ratio for each in compared)
    return Report(
        name="overhead",
        tables=[table],
        criteria=[
            Criterion("time per step against plain, median of workloads", typically, "<=", RATIO),
            Criterion("largest change of any weight", max(each.change for each in compared), "<=", 0),
        ],
        figure=f"overhead: {typically:.3f}x plain, {len(seeds)} seeds for each of {len(compared)} workloads",
        settings={"seeds": list(seeds), "ratios": {each.name: each.ratio for each in compared}},
    )


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = arguments("overhead", "Cost of watching, and whether it changes training.", seeds=3)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tracking", action="store_true", help="memsink() and W&B offline against none")
    what.add_argument("--attribution", action="store_true", help="units and gradient norms against none, and peers")
    what.add_argument("--mitigation", action="store_true", help="each mitigation against none")
    options = parser.parse_args(arguments_given)
    if options.attribution:
        from benchmarks import attribution_cost  # which needs transformers, and peers where there are any

        return attribution_cost.run(options)
    if options.mitigation:
        from benchmarks import mitigation_cost  # which runs what is here

        return mitigation_cost.measure_all(options)
    seeds = fresh_seeds(options)
    settle_down()
    keep_freed()
    workloads = [replace(each, steps=each.steps // 5) for each in WORKLOADS] if options.quick else WORKLOADS
    return report([compare(each, seeds) for each in workloads], seeds).tell(options.json)


if __name__ == "__main__":
    sys.exit(main())
