"""However processes are started, there is one run in the logs, one report, and one ledger on every rank."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.launching import launched
from tests.distributed.runs import differences, ranks
from tests.support.small_runs import TRAIN

SCRIPT = str(Path(__file__).with_name("script.py"))
RECIPES = Path(__file__).parents[2] / "recipes" / "distributed"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
PROGRAMS = Path(sys.executable).parent
QUIET = {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "CUDA_VISIBLE_DEVICES": ""}
SMALL = [
    *("--config", "watch_hf"),  # in place of the recipes' own demo, whose tokenizer takes longer than all else
    *("--data.path=text.txt", "--data.context=16", "--data.batch_size=4"),
    *("--model.n_layer=1", "--model.n_embd=16", "--model.n_head=2"),
    *("--trainer.max_steps=6", "--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"),
    "--trainer.accelerator=cpu",
]


@pytest.fixture
def text(tmp_path: Path) -> None:
    """Some hundred different sentences, where the run starts."""
    sentences = (f"Number {n} squared is {n * n}, and its cube is {n**3}. " * 3 for n in range(300))
    (tmp_path / "text.txt").write_text("\n\n".join(sentences))


def alike(folder: Path, world: int) -> dict[str, Any]:
    first, *others = ranks(folder)
    assert first["world"] == len(others) + 1 == world
    for other in others:
        assert differences(first, other) == []
    return first


@pytest.mark.parametrize(
    ("command", "strategy", "world"),
    [
        ([sys.executable], "ddp", 2),
        ([sys.executable], "ddp", 3),
        ([*TORCHRUN, "--nproc-per-node=2"], "ddp", 2),
        ([*TORCHRUN, "--nproc-per-node=3"], "ddp", 3),
        ([*TORCHRUN, "--nproc-per-node=2"], "ddp_find_unused_parameters_true", 2),
        ([sys.executable], "ddp_spawn", 2),
    ],
    ids=["script", "script of 3", "torchrun", "torchrun of 3", "torchrun, unused parameters", "ddp_spawn"],
)
def test_there_is_one_run_one_report_and_one_ledger(command, strategy, world, tmp_path):
    output = launched([*command, SCRIPT, str(tmp_path), strategy, str(world)], tmp_path, **QUIET)
    found = alike(tmp_path, world)
    padded = -(-len(TRAIN) // world) * world
    assert int(found["losses"]["columns"]["exposures"].sum()) == 2 * padded
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1
    assert [each.name for each in (tmp_path / "csv").iterdir()] == ["version_0"]
    assert {each.name for each in (tmp_path / "report").iterdir()} == {
        "memsink.md",
        "memsink.html",
        "memsink.json",
        "memsink_files",
    }
    assert output.count("\nHow sure") == 1, "the summary is printed once"
    assert "sync_dist" not in output
    if strategy == "ddp_spawn":
        assert "trains in processes of its own (spawn), and the ledger ended with them. Read the Parquet" in output
    else:
        assert output.count(f"knows {len(TRAIN.unique(dim=0))} samples") == world


def test_the_torchrun_recipe_runs(text, tmp_path):
    environment = {**QUIET, "TORCHRUN": str(PROGRAMS / "torchrun")}
    output = launched([str(RECIPES / "torchrun.sh"), *SMALL], tmp_path, **environment)
    assert output.count("\nHow sure") == 1
    assert len(list((tmp_path / "runs" / "wandb").glob("offline-run-*"))) == 1
    assert (tmp_path / "memsink_report.html").exists()


SRUN = """#!/usr/bin/env bash
# Starts each task with its rank on one machine, as srun does.
export SLURM_NODEID=0 SLURM_JOB_ID=1234 SLURM_NTASKS=$SLURM_NTASKS_PER_NODE SLURM_STEP_NODELIST=localhost
for ((task = 1; task < SLURM_NTASKS; task++)); do SLURM_PROCID=$task SLURM_LOCALID=$task "$@" & done
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" || exit 1
wait
"""


def test_the_slurm_recipe_runs_where_srun_starts_tasks(text, tmp_path):
    """srun is replaced by a script; all that it starts is real."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "srun").chmod(0o755)
    environment = {
        **QUIET,
        "PATH": f"{tools}:{PROGRAMS}:/usr/bin:/bin",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_JOB_NAME": "memsink",
        "SLURM_NODELIST": "localhost",
        "MASTER_PORT": "23457",
    }
    assert shutil.which("memsink", path=environment["PATH"]), "the package is installed beside python"
    output = launched(["bash", str(RECIPES / "slurm.sbatch"), *SMALL], tmp_path, **environment)
    assert output.count("\nHow sure") == 1
    assert "MEMBER: 2/2" in output
