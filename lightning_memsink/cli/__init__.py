"""The ``memsink`` command. Torch is loaded only by what trains or validates."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_memsink.cli.recipes import copy_recipe, did_you_mean, recipe_table

USAGE = """usage: memsink COMMAND ...

  fit -c CONFIG [-c MORE] [--any.option=value]    train, and watch for memorization; --help lists every option
  validate CONFIG [-c MORE] [--any.option=value]  check a config without training
  audit --model DIR --suspects FILE --controls FILE   what a model that was trained without us knows of texts
  report DIR [--against OTHER]                    the page of a finished run or audit, alone or beside another run
  recipes ls                                      list the recipes that come with memsink
  recipes cp NAME [DEST] [--force]                copy one, to change it

A CONFIG is a YAML file or the name of a recipe: memsink fit -c watch --memsink.detector.k=16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exits with 0, or with 1 after one line on stderr for each error."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE, end="")
    elif command == "recipes":
        _recipes(rest)
    elif command == "fit":
        from lightning_memsink.cli.fit import MemSinkCLI

        MemSinkCLI(args=["fit", *rest])
    elif command == "audit":
        from lightning_memsink.cli.audit import run

        return run(rest)
    elif command == "report":
        from lightning_memsink.cli.report import run as report

        return report(rest)
    elif command == "validate":
        from lightning_memsink.cli.validate import validate

        print(validate(rest))
    else:
        hint = did_you_mean(command, ["fit", "validate", "audit", "report", "recipes"])
        raise SystemExit(f"memsink has no command `{command}`{hint or '. List them: memsink --help'}")
    return 0


def _recipes(argv: list[str]) -> None:
    names = [word for word in argv if word != "--force"]
    if names == ["ls"]:
        print(recipe_table())
    elif names[:1] == ["cp"] and 2 <= len(names) <= 3:
        name, destination = [*names[1:], "."][:2]
        print(f"Wrote {copy_recipe(name, destination, force='--force' in argv)}")
    else:
        raise SystemExit("usage: memsink recipes ls | memsink recipes cp NAME [DEST] [--force]")
