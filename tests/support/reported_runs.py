"""Trainer runs of Lightning's ``BoringModel`` whose ledger is filled with synthetic contents by a callback."""

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lightning_memsink.ledger import Ledger
from tests.support.made_up import RUNGS, MadeUp

EVERY = 2
"""Steps between two validations."""
QUIET = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers.*", "ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*",
    "ignore:.*GPU available but not used.*", "ignore:Starting from v1.9.0.*", "ignore:.*litlogger.*",
    "ignore:.*Checkpoint directory.*exists and is not empty.*",
)  # fmt: skip


class Writer(Callback):
    """In place of LossTracker and MemorizationDetector: writes their slots in the same hooks."""

    def __init__(self, memorized: int = 3, also_at: tuple[int, ...] = ()) -> None:
        self.made = MadeUp(memorized)
        self.also_at = also_at

    def on_fit_start(self, trainer, pl_module):
        ledger = Ledger.of(trainer)
        ledger.losses, ledger.controls, ledger.flags = self.made.table, self.made.controls, self.made.flags
        ledger.onset = self.made.onset

    def on_validation_epoch_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.evaluate(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.also_at:
            self.evaluate(trainer)

    def on_train_end(self, trainer, pl_module):
        if trainer.global_step in self.also_at:
            self.evaluate(trainer)

    def evaluate(self, trainer):
        self.made.evaluate(trainer.global_step)
        Ledger.of(trainer).onset = self.made.onset

    def state_dict(self):
        return {"flags": self.made.flags.state_dict()}

    def load_state_dict(self, state_dict):
        self.made.flags.load_state_dict(state_dict["flags"])


class Data(BoringDataModule):
    """Random data with the planted groups of ``RUNGS``."""

    def rungs(self):
        return RUNGS


def fit(
    callbacks: list[Callback], logger: object = False, steps: int = 6, ckpt_path: object = None, **options: object
) -> Trainer:
    """The trainer after a fit that validates every ``EVERY`` steps."""
    trainer = Trainer(
        max_steps=steps,
        val_check_interval=EVERY,
        limit_val_batches=1,
        accelerator="cpu",
        logger=logger,
        callbacks=callbacks,
        enable_model_summary=False,
        **{"enable_checkpointing": False, "enable_progress_bar": False, **options},
    )
    trainer.fit(BoringModel(), datamodule=Data(), ckpt_path=ckpt_path)
    return trainer
