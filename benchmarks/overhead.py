"""What watching costs: the same fit with and without, in turns; and whether it changes a single weight.

Time is processor time of the whole process per training step, from the first steps' end to the fit's: validations,
the detector's evaluations and logging lie within, imports, set-up and reports lie without. Both fits validate alike.
"""

from __future__ import annotations

import io
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any

import wandb
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import Logger, WandbLogger
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.reporting import Criterion, Report, arguments, fresh_seeds, settle_down
from benchmarks.workloads import WORKLOADS, Workload
from lightning_memsink import memsink

RATIO = 1.03
SETTLING = 5
"""Steps before the clock starts: the first ones allocate."""
SAMPLES, CONTROLS, EVALUATIONS = 1024, 128, 3


class Clock(Callback):
    """Processor seconds per step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if trainer.global_step == SETTLING:
            self.start = time.process_time()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds = (time.process_time() - self.start) / (trainer.global_step - SETTLING)


@dataclass(frozen=True)
class Comparison:
    """One workload: seconds per step of each plain and each watched fit, and the largest change of a weight."""

    name: str
    plain: list[float]
    watched: list[float]
    change: float

    @property
    def ratio(self) -> float:
        """Median over blocks, in each of which two watched fits lie between two plain ones."""
        return ratio_of_blocks(self.watched, self.plain)

    @property
    def noise(self) -> float:
        """What a ratio of two fits can be off by."""
        return noise_of_blocks(self.plain)


def ratio_of_blocks(seconds: Sequence[float], plain: Sequence[float]) -> float:
    """The median over blocks, each of two fits of either way, there and back."""
    return statistics.median(sum(seconds[at : at + 2]) / sum(plain[at : at + 2]) for at in range(0, len(plain), 2))


def noise_of_blocks(plain: Sequence[float]) -> float:
    """What a ratio of two fits can be off by: the median over blocks of the first plain fit by the last."""
    return statistics.median(first / last for first, last in zip(plain[::2], plain[1::2], strict=True))


def compare(workload: Workload, seeds: Sequence[int]) -> Comparison:
    """One block a seed: plain, watched, watched, plain; so a drift of the machine hits both alike."""
    plain, watched, change = [], [], 0.0
    _fit(replace(workload, steps=2 * SETTLING), seeds[0], watch=True)  # imports and the first allocations
    for seed in seeds:
        fits = [_fit(workload, seed, watch) for watch in (False, True, True, False)]
        plain += [fits[0][0], fits[3][0]]
        watched += [fits[1][0], fits[2][0]]
        change = max(change, *(_largest_change(fits[0][1], weights) for _, weights in fits[1:]))
    return Comparison(workload.name, plain, watched, change)


def _fit(workload: Workload, seed: int, watch: bool) -> tuple[float, dict[str, Tensor]]:
    seed_everything(seed, verbose=False)
    module, clock = workload.module(), Clock()
    # The report's own words would bury the table; silent W&B still writes its files.
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        logger = WandbLogger(save_dir=folder, offline=True, settings=wandb.Settings(silent=True)) if watch else False
        run(module, workload, seed, [*(memsink(path=None) if watch else []), clock], logger)
        if watch:
            wandb.finish()
    return clock.seconds, {name: weight.clone() for name, weight in module.state_dict().items()}


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


def _largest_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max(float((before[name].double() - after[name].double()).abs().max()) for name in before)


def report(compared: Sequence[Comparison], seeds: Sequence[int]) -> Report:
    table = Table("workload", "plain ms/step", "watched ms/step", "ratio", "plain against plain", "largest change")
    for each in compared:
        milliseconds = (f"{1000 * statistics.median(times):.2f}" for times in (each.plain, each.watched))
        table.add_row(each.name, *milliseconds, f"{each.ratio:.3f}", f"{each.noise:.3f}", f"{each.change:g}")
    ratio = statistics.median(each.ratio for each in compared)
    return Report(
        name="overhead",
        tables=[table],
        criteria=[
            Criterion("time per step against plain, median of workloads", ratio, "<=", RATIO),
            Criterion("largest change of any weight", max(each.change for each in compared), "<=", 0),
        ],
        figure=f"overhead: {ratio:.3f}x plain, {len(seeds)} blocks of four fits for each of {len(compared)} workloads",
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
    workloads = [replace(each, steps=each.steps // 5) for each in WORKLOADS] if options.quick else WORKLOADS
    return report([compare(each, seeds) for each in workloads], seeds).tell(options.json)


if __name__ == "__main__":
    sys.exit(main())
