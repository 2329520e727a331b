"""What a user's own script is: `python script.py FOLDER STRATEGY PROCESSES`, by itself or under torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch.utils.data import DataLoader

from lightning_memsink import RunReport
from lightning_memsink.ledger import Ledger
from tests.distributed.runs import crew, train
from tests.support.small_runs import CONTROLS, TRAIN, Rows


def main(folder: Path, strategy: str, processes: int) -> None:
    torch.set_num_threads(1)
    # Under spawn a worker is spawned too, anew for each pass, which takes longer than the pass.
    callbacks = [each for each in crew("skip", "SinkGradientMask") if not isinstance(each, RunReport)]
    run, _ = train(
        folder,
        [*callbacks, RunReport(folder / "report" / "memsink.md")],
        strategy=strategy,
        devices=processes,
        max_epochs=2,
        train=DataLoader(Rows(TRAIN), 6, shuffle=True, num_workers=int(strategy != "ddp_spawn")),
        controls=DataLoader(Rows(CONTROLS), 10),
        use_distributed_sampler=True,
        logger=[WandbLogger(save_dir=folder, offline=True), CSVLogger(folder, "csv")],
    )
    try:
        print(f"knows {len(Ledger.of(run).losses)} samples")
    except RuntimeError as error:
        print(error)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
