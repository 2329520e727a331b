"""Makes the files under ``f36e55b/`` with the version that is imported, which for those was commit f36e55b.

That commit is the last one before the package's modules moved. In a checkout of it, with this folder at hand:

    PYTHONPATH=. python path/to/tests/formats/make.py path/to/tests/formats/f36e55b

Of two runs it keeps the checkpoint at the end, and as JSON what readers of the ledger read then. Of the first it also
keeps the report, the sinks and the Parquet ledger, and as JSON what that version read from the ledger.
"""

from __future__ import annotations

import json
import lzma
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from shutil import copyfile, copytree
from types import ModuleType

from frozen_run import RUNS, SmallLM, facts, fit, plain
from lightning_memsink.parquet import detect, read_ledger

from lightning_memsink import Ledger
from lightning_memsink.cli import main

MODULES = """
data data.famous data.python_docs data.text demo demo_audit demo_digits extraction extraction_metrics hidden_layers
integrations.trackio integrations.wandb judging_localizers judging_localizers.blind judging_localizers.deletion
judging_localizers.injection judging_localizers.ranking judging_localizers.stress localizers localizers.attributing
localizers.pruning localizers.task membership parquet
""".split()
"""Modules with a path that README, a recipe or a docstring of f36e55b names, and theirs."""
RECIPES = ("watch", "watch_hf", "classification", "audit_smollm2", "audit/keep_demo", "mitigate/hold")


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, callbacks_of in RUNS.items():
        model = SmallLM()
        with tempfile.TemporaryDirectory() as place:
            report = Path(place) / "report.md"
            callbacks = callbacks_of(model, report)
            trainer = fit(callbacks, model)
            trainer.save_checkpoint(Path(place) / "run.ckpt")
            # Packed, because the table of n-gram counts is five megabytes, nearly all of them zeros.
            (folder / f"{name}.ckpt.xz").write_bytes(lzma.compress((Path(place) / "run.ckpt").read_bytes()))
            write(folder / f"{name}.json", facts(Ledger.of(trainer)))
            if name == "watching":
                keep_report(report, folder)
    write(folder / "names.json", {name: names_of(import_module(f"lightning_memsink.{name}")) for name in MODULES})
    for recipe in RECIPES:
        main(["recipes", "cp", recipe, str(folder / "recipes" / f"{recipe.replace('/', '_')}.yaml")])


def names_of(module: ModuleType) -> list[str]:
    """What the module defines for others: its ``__all__``, classes and functions."""
    own = [name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
    return sorted(name for name in {*getattr(module, "__all__", []), *own} if not name.startswith("_"))


def keep_report(report: Path, folder: Path) -> None:
    copyfile(report.with_suffix(".json"), folder / "report.json")
    beside = report.with_name("report_files")
    copyfile(beside / "sinks.safetensors", folder / "sinks.safetensors")
    copytree(beside / "ledger", folder / "ledger")
    table, controls = read_ledger(folder / "ledger")
    flags, evaluation = detect(folder / "ledger")
    read = {
        "table": table.state_dict(),
        "controls": controls.state_dict(),
        "flags": flags.state_dict(),
        "memorized": evaluation.memorized,
    }
    write(folder / "ledger.json", plain(read))


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
