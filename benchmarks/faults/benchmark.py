"""What a kill costs: training on real text dies at random and at chosen moments, is resumed, and must lose nothing.

Each run is a process of its own, ended by SIGKILL: at a random second, or at the very moment when it begins to write a
checkpoint or a file of the report, has written one that has no name yet, or is at it. It is started again, killed again
in half of the runs, and at its end compared bit for bit with the run that nobody killed: every column of the ledger,
flags, onset, curves, the mitigation's state, weights and optimizer, and the ledger's files.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.common.criteria import Criterion, Report, argument_parser, configure_process, fresh_seeds
from benchmarks.common.planted_text import documentation, split_background
from benchmarks.faults.runs import EPOCHS, MOMENTS, READY, SAVE_EVERY, TRAINING, newest_whole, step_of

BACKGROUND, REPEATED, TIMES, CONTROLS = 1200, 12, 64, 200
"""1968 rows an epoch: with batches of 16, no validation and no end of an epoch falls on the step of a checkpoint."""
ANYWHERE = "at a random second"
KINDS = (ANYWHERE, "checkpoint", ANYWHERE, "report")
PATIENCE, TRIES = 900.0, 5
"""Seconds for a run, and runs to begin until one is killed before its end."""


@dataclass
class Life:
    """One run: when it was killed and what came of it."""

    number: int
    seed: int
    killed: list[str] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    """Steps of the checkpoints it went on from; 0: from the beginning."""
    torn: int = 0
    """Checkpoints that would not load and were passed over."""
    differs: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """What is wrong with the files."""


@dataclass(frozen=True)
class Reference:
    """The run that nobody killed."""

    folder: Path
    data: Path
    end: dict[str, Any]


def write_data(path: Path, seed: int, epochs: int) -> None:
    """Python's documentation: much of it once an epoch, a little often, and texts held out."""
    corpus = documentation(seed)
    background, held_out, rest = split_background(corpus, BACKGROUND, CONTROLS, seed)
    rows = torch.cat([torch.arange(BACKGROUND), torch.arange(BACKGROUND, BACKGROUND + REPEATED).repeat(TIMES)])
    texts = {"train": torch.cat([background, rest[:REPEATED]]), "rows": rows, "held_out": held_out.clone()}
    torch.save({**texts, "seed": seed, "vocab_size": corpus.tokenizer.get_vocab_size(), "epochs": epochs}, path)


def start(folder: Path, data: Path, aim: str = "") -> subprocess.Popen[str]:
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.faults.runs", str(folder), str(data), *[aim] * bool(aim)]
    with (folder / "said.txt").open("a") as said:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def finish(process: subprocess.Popen[str]) -> int:
    """The exit code of a process that is left to its end."""
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    process.communicate()
    watchdog.cancel()
    return process.returncode


def kill_when_ready(process: subprocess.Popen[str], delay: float) -> bool:
    """``delay`` seconds after it has said that its moment is there; False if that moment never came."""
    watchdog = threading.Timer(PATIENCE, process.kill)
    watchdog.start()
    assert process.stdout is not None
    ready = any(line.strip() == READY for line in process.stdout)
    watchdog.cancel()
    if not ready:
        finish(process)
        return False
    try:
        process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    return process.returncode == -signal.SIGKILL


def kill_once(folder: Path, reference: Reference, kind: str, chance: random.Random) -> str | None:
    """Starts the run, or goes on with it, and kills it; where, or None if it came to its end before."""
    if kind == ANYWHERE:
        seconds = chance.uniform(0.0, 0.9 * reference.end["seconds"])
        process = start(folder, reference.data, f"{TRAINING}:1:run")
        return f"after {seconds:.1f} s" if kill_when_ready(process, seconds) else None
    moment = chance.choice([moment for moment in MOMENTS if moment.startswith(kind)])
    number, wait = chance.randint(1, reference.end["moments"][moment]), chance.random() < 0.5
    delay = 0.0 if wait else chance.uniform(0.0, 0.005)
    process = start(folder, reference.data, f"{moment}:{number}:{'wait' if wait else 'run'}")
    where = f"{moment} ({number}.)" + ("" if wait else f" + {1000 * delay:.1f} ms")
    return where if kill_when_ready(process, delay) else None


def live(number: int, seed: int, folder: Path, reference: Reference) -> Life:
    """One run with at least one kill, to its end."""
    chance, life = random.Random(seed), Life(number, seed)
    for tries, kind in ((TRIES, KINDS[number % len(KINDS)]), (1, chance.choice(KINDS))):
        killed = kill_once(folder, reference, kind, chance)
        while killed is None and (tries := tries - 1):
            shutil.rmtree(folder)  # it came to its end: too late
            killed = kill_once(folder, reference, kind, chance)
        if killed is not None:
            path, torn = newest_whole(folder / "checkpoints")
            life.killed.append(killed)
            life.resumed.append(step_of(path) if path else 0)
            life.torn += torn
        if chance.random() < 0.5:
            break
    if not (folder / "end.pt").exists():
        finish(start(folder, reference.data))
    judge(life, folder, reference)
    shutil.rmtree(folder)
    return life


def judge(life: Life, folder: Path, reference: Reference) -> None:
    """Writes down in what the run and its files differ from those that nobody killed."""
    if not (folder / "end.pt").exists():
        life.differs, life.files = ["never ended"], [(folder / "said.txt").read_text()[-400:]]
        return
    facts = torch.load(folder / "end.pt", weights_only=True)["facts"]
    life.differs = [name for name, fact in reference.end["facts"].items() if bits(facts.get(name)) != bits(fact)]
    ours, theirs = (each / "report" for each in (folder, reference.folder))
    there = {path.relative_to(ours): path for path in ours.rglob("*") if path.is_file()}
    expected = {path.relative_to(theirs): path for path in theirs.rglob("*") if path.is_file()}
    life.files = [f"{name} is left over" for name in there.keys() - expected.keys()]
    life.files += [f"{name} is missing" for name in expected.keys() - there.keys()]
    for name in there.keys() & expected.keys():
        if name.suffix in (".parquet", ".md", ".svg") and there[name].read_bytes() != expected[name].read_bytes():
            life.files.append(f"{name} is another")
    for name in ("samples", "controls"):
        path = ours / "run_files" / "ledger" / f"{name}.parquet"
        ids = pq.read_table(path)["sample_id"].to_pylist() if path.exists() else []
        known = facts["losses" if name == "samples" else "controls"]["ids"].tolist()
        if sorted(ids) != sorted(known) or len(set(ids)) != len(ids):
            life.files.append(f"{path.name} has missing or double rows")


def bits(value: Any) -> str:
    """The same for values that are the same to the bit, NaN and the order of entries included."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key, part in value.items():
            digest.update(f"{key!r}:".encode())
            _feed(digest, part)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}]".encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(repr(value).encode())


def uninterrupted(folder: Path, seed: int, epochs: int) -> Reference:
    write_data(folder / "data.pt", seed, epochs)
    if finish(start(folder / "whole", folder / "data.pt")):
        raise RuntimeError(f"The run that nobody killed failed:\n{(folder / 'whole' / 'said.txt').read_text()}")
    end = torch.load(folder / "whole" / "end.pt", weights_only=True)
    return Reference(folder / "whole", folder / "data.pt", end)


def measure(kills: int, seed: int, epochs: int) -> tuple[Reference, list[Life]]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        reference = uninterrupted(folder, seed, epochs)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(live, number, seed + number, folder / f"run{number}", reference) for number in range(kills)
            ]
            return reference, [job.result() for job in jobs]


def table(lives: Sequence[Life]) -> Table:
    told = Table(title="Killed, resumed, compared", title_justify="left")
    for column in ("run", "seed", "killed", "went on from step", "ledger to weights", "files"):
        told.add_column(column, justify="right" if column in ("run", "seed") else "left")
    for life in lives:
        told.add_row(
            str(life.number + 1),
            str(life.seed),
            ",\nthen ".join(life.killed),
            ",\nthen ".join(map(str, life.resumed)),
            ", ".join(life.differs) + " differ" if life.differs else "equal",
            "; ".join(life.files) or "whole",
        )
    return told


def criteria(reference: Reference, lives: Sequence[Life]) -> list[Criterion]:
    flags = reference.end["facts"]["flags"]
    return [
        Criterion("resumed runs equal to the uninterrupted one", share(not life.differs for life in lives), ">=", 1.0),
        Criterion("resumed runs whose files are whole and equal", share(not life.files for life in lives), ">=", 1.0),
        Criterion("checkpoints that would not load after a kill", sum(life.torn for life in lives), "<=", 0),
        Criterion("kills at a checkpoint", sum("checkpoint" in one for life in lives for one in life.killed), ">=", 1),
        Criterion("kills at the report", sum("report" in one for life in lives for one in life.killed), ">=", 1),
        Criterion(
            "samples memorized, so that there are flags", flags["evaluations"][-1]["counts"]["memorized"], ">=", 1
        ),
        Criterion("visits held back, so that the mitigation acts", reference.end["held"], ">=", 1),
    ]


def share(holds: Iterable[bool]) -> float:
    told = list(holds)
    return sum(told) / len(told)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argument_parser("faults", "Training that is killed and resumed equals training that is not.", seeds=1)
    parser.add_argument("--kills", type=int, default=20, help="runs to kill, default 20")
    options = parser.parse_args(argv)
    configure_process()
    (seed,) = fresh_seeds(options)
    kills, epochs = (min(options.kills, 4), 1) if options.quick else (options.kills, EPOCHS)
    began = time.monotonic()
    reference, lives = measure(kills, seed, epochs)
    equal, all_kills = (
        sum(not life.differs and not life.files for life in lives),
        sum(len(life.killed) for life in lives),
    )
    figure = (
        f"faults: {equal} of {kills} runs, killed {all_kills} times, equal the uninterrupted one to the bit; "
        f"{time.monotonic() - began:.0f} s"
    )
    settings = {"first_seed": seed, "kills": kills, "epochs": epochs, "save_every": SAVE_EVERY}
    return Report("faults", [table(lives)], criteria(reference, lives), figure, settings).publish(options.json)


if __name__ == "__main__":
    sys.exit(main())
