"""``memsink fit``: LightningCLI with a ``memsink:`` group of options."""

from __future__ import annotations

import sys
from argparse import ArgumentError
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_memsink.callbacks.progress import MemSinkProgressBar
from lightning_memsink.callbacks.registry import mitigations, preset_entries
from lightning_memsink.cli.config_errors import explain
from lightning_memsink.cli.recipes import config_path, is_overlay, map_configs
from lightning_memsink.reporting.loggers.wandb import offline_without_key

GROUPS: dict[str, type[Callback]] = {str(entry.group): entry.load() for entry in preset_entries()}
"""By configuration group, the callback whose arguments it holds."""
MITIGATIONS: tuple[type[Callback], ...] = tuple(entry.load() for entry in mitigations())
"""jsonargparse knows these by their short names, because loading them imports their modules."""


class MemSinkCLI(LightningCLI):
    """A LightningCLI that adds the callbacks of this package. Pass your own classes, or let the config name them.

    In addition to LightningCLI's options it has ``memsink.enabled``, ``.localize`` and ``.extract``, the callbacks'
    arguments under ``memsink.tracker``, ``.detector``, ``.curves``, ``.report``, ``.localizer`` and ``.probe``, and
    ``memsink.mitigation``, any callback or null.
    A callback that the config also lists under ``trainer.callbacks`` is used as listed there. If the config lists no
    progress bar, `MemSinkProgressBar` is used.
    A config may be the name of a shipped recipe. An error is reported in one line with a suggestion.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Runs that share a folder, such as those of W&B, would otherwise fail: a config.yaml exists there already.
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        raises = {"exit_on_error": False}  # the parser raises its errors, and `explain` rewrites them
        subcommands = {name: {**raises} for name in self.subcommands()}
        kwargs["parser_kwargs"] = {**raises, **subcommands, **(kwargs.get("parser_kwargs") or {})}
        super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--memsink.enabled", type=bool, default=True, help="Add the callbacks of memsink.")
        parser.add_argument("--memsink.localize", type=bool, default=False, help="Also localize layers and units.")
        parser.add_argument(
            "--memsink.extract", type=bool, default=False, help="Also test which texts can be extracted."
        )
        for name, kind in GROUPS.items():
            parser.add_class_arguments(kind, f"memsink.{name}")
        parser.add_argument(
            "--memsink.mitigation",
            type=Callback | None,
            default=None,
            help="A callback that mitigates memorization, or null. By name: "
            f"{', '.join(kind.__name__ for kind in MITIGATIONS)}, or any by class_path.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        if isinstance(args, dict | Namespace):
            super().parse_arguments(parser, args)
            return
        words = with_recipes(sys.argv[1:] if args is None else args)
        try:
            self.config = parser.parse_args(words)
        except ArgumentError as error:
            options = next((self._subcommand_parsers[word] for word in words if word in self.subcommands()), parser)
            raise SystemExit("\n".join(explain(options, words, str(error)))) from None

    def instantiate_classes(self) -> None:
        offline_without_key()
        super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        memsink, trainer = self._get(self.config_init, "memsink"), self._get(self.config_init, "trainer")
        if memsink.enabled:
            listed = trainer.callbacks or []
            listed = listed if isinstance(listed, list) else [listed]
            chosen = [entry.group for entry in preset_entries() if entry.option is None or memsink[entry.option]]
            ours = [memsink[group] for group in chosen if group and GROUPS[group] not in map(type, listed)]
            if trainer.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in listed):
                ours.append(MemSinkProgressBar())
            kwargs["callbacks"] = [*listed, *ours, *([memsink.mitigation] if memsink.mitigation else [])]
        return super().instantiate_trainer(**kwargs)


def with_recipes(words: list[str]) -> list[str]:
    """The same command line with each config that names a recipe replaced by the recipe's file.

    Raises:
        SystemExit: all configs are overlays, or one is neither a file nor a recipe.
    """
    configs: list[str] = []

    def resolve(name: str) -> str:
        configs.append(name)
        return config_path(name)

    resolved = map_configs(words, resolve)
    if configs and all(map(is_overlay, configs)):
        raise SystemExit(f"`{configs[0]}` is an overlay: put a base config before it, -c watch -c {configs[0]}")
    return resolved
