"""``memsink validate``: checks a config and describes what it would run, without running it."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lightning_memsink.cli.fit import MemSinkCLI
from lightning_memsink.cli.recipes import is_for_audit


class ValidationCLI(MemSinkCLI):
    """Parses and checks every type; seeds, instantiates and trains nothing."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        self.config.fit.seed_everything = False

    def instantiate_classes(self) -> None:
        """Instantiates nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        """Runs nothing."""


def validate(words: list[str]) -> str:
    """One line that describes what a valid config would run.

    Raises:
        SystemExit: the config has errors; one line per error.
    """
    if not words:
        raise SystemExit("usage: memsink validate CONFIG [-c MORE] [--any.option=value]")
    if is_for_audit(words[0]):
        raise SystemExit(f"`{words[0]}` is a recipe for an audit and trains nothing: memsink audit --config {words[0]}")
    options = words if words[0].startswith("-") else ["-c", *words]
    config = ValidationCLI(args=["fit", *options]).config.fit
    run = f"{_name(config.model)} on {_name(config.data)} for {_duration(config.trainer)}"
    return f"OK: would fit {run}, {_callbacks(config)}"


def _name(component: Any) -> str:
    return "the model's own data" if component is None else component.class_path.rpartition(".")[2]


def _duration(trainer: Any) -> str:
    if trainer.max_steps and trainer.max_steps > 0:
        return f"{trainer.max_steps} steps"
    epochs = 1000 if trainer.max_epochs is None else trainer.max_epochs  # Lightning's default
    return "1 epoch" if epochs == 1 else f"{epochs} epochs"


def _callbacks(config: Any) -> str:
    if not config.memsink.enabled:
        return "without memsink (memsink.enabled: false)"
    mitigation = config.memsink.mitigation
    return f"watched for memorization, mitigation: {_name(mitigation) if mitigation else 'none'}"
