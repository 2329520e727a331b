"""The ``memsink`` command. Torch is imported only by the subcommands that need it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_memsink.cli.recipes import copy_recipe, did_you_mean, recipe_table

USAGE = """usage: memsink COMMAND ...

  fit -c CONFIG [-c MORE] [--any.option=value]    train and detect memorization; --help lists every option
  validate CONFIG [-c MORE] [--any.option=value]  check a config without training
  audit --model DIR --suspects FILE --controls FILE   test a finished model for memorized texts
  report DIR [--against OTHER]                    write the HTML report of a finished run or audit again
  samples RUN [--source LABEL] [--text DATA]      list the most memorized samples of a finished run
  gate RUN                                        exit with 1 if the run is over a budget, with 2 without an answer
  recipes ls                                      list the recipes that come with memsink
  recipes cp NAME [DEST] [--force]                copy a recipe, to edit it

A CONFIG is a YAML file or the name of a recipe: memsink fit -c watch --memsink.detector.k=16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; an error exits with 1 and one line on stderr per error."""
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
    elif command == "samples":
        from lightning_memsink.cli.samples import run as samples

        return samples(rest)
    elif command == "gate":
        from lightning_memsink.cli.gate import run as gate

        return gate(rest)
    elif command == "validate":
        from lightning_memsink.cli.validate import validate

        print(validate(rest))
    else:
        hint = did_you_mean(command, ["fit", "validate", "audit", "report", "samples", "gate", "recipes"])
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
