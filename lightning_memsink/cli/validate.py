"""``memsink validate``: what a config would run, without running it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lightning_memsink.cli.fit import MemSinkCLI
from lightning_memsink.cli.recipes import is_for_audit


class Rehearsal(MemSinkCLI):
    """Parses, checks every type, and stops there: nothing is seeded, instantiated or trained."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        self.config.fit.seed_everything = False

    def instantiate_classes(self) -> None:
        """Nothing is built."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""


def validate(words: list[str]) -> str:
    """A line on what a valid config would run.

    Raises:
        SystemExit: with one line for each error.
    """
    if not words:
        raise SystemExit("usage: memsink validate CONFIG [-c MORE] [--any.option=value]")
    if is_for_audit(words[0]):
        raise SystemExit(f"`{words[0]}` is of a finished model, and fits none: memsink audit --config {words[0]}")
    first = words if words[0].startswith("-") else ["-c", *words]
    config = Rehearsal(args=["fit", *first]).config.fit
    return (
        f"OK: would fit {_name(config.model)} on {_name(config.data)} for {_duration(config.trainer)}, {_watch(config)}"
    )


def _name(described: Any) -> str:
    return "the model's own data" if described is None else described.class_path.rpartition(".")[2]


def _duration(trainer: Any) -> str:
    if trainer.max_steps and trainer.max_steps > 0:
        return f"{trainer.max_steps} steps"
    epochs = 1000 if trainer.max_epochs is None else trainer.max_epochs  # Lightning's default
    return "1 epoch" if epochs == 1 else f"{epochs} epochs"


def _watch(config: Any) -> str:
    if not config.memsink.enabled:
        return "unwatched (memsink.enabled: false)"
    mitigation = config.memsink.mitigation
    return f"watched for memorization, mitigation: {_name(mitigation) if mitigation else 'none'}"
