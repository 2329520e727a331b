"""Tests that a killed and resumed training loses nothing, on real text.

Each run is a process of its own, ended by SIGKILL: at a random second, or when it begins to write a checkpoint or a
file of the report, is writing it, or has written it but not yet renamed it. It is started again, killed again in half
of the runs, and at its end compared bit for bit with an uninterrupted run: every column of the ledger, flags, onset,
curves, the mitigation's state, weights and optimizer, and the ledger's files.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
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
from benchmarks.faults.runs import EPOCHS, MOMENTS, READY, SAVE_EVERY, TRAINING, newest_intact, step_of

BACKGROUND, REPEATED, TIMES, CONTROLS = 1200, 12, 64, 200
"""1968 rows an epoch: with batches of 16, no validation and no end of an epoch falls on the step of a checkpoint."""
ANYWHERE = "at a random second"
KINDS = (ANYWHERE, "checkpoint", ANYWHERE, "report")
TIMEOUT, TRIES = 900.0, 5
"""Seconds that a run may take, and attempts to kill a run before its end."""


@dataclass
class KilledRun:
    """One run: when it was killed, and how its result differs from the uninterrupted run."""

    number: int
    seed: int
    killed: list[str] = field(default_factory=list)
    resumed: list[int] = field(default_factory=list)
    """Steps of the checkpoints it resumed from; 0 is the beginning."""
    torn: int = 0
    """Checkpoints that did not load and were skipped."""
    differs: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """Faults of the files."""


@dataclass(frozen=True)
class Reference:
    """The uninterrupted run."""

    folder: Path
    data: Path
    end: dict[str, Any]


def write_data(path: Path, seed: int, epochs: int) -> None:
    """Saves Python's documentation: most sequences shown once an epoch, a few repeated, and texts held out."""
    corpus = documentation(seed)
    background, held_out, rest = split_background(corpus, BACKGROUND, CONTROLS, seed)
    rows = torch.cat([torch.arange(BACKGROUND), torch.arange(BACKGROUND, BACKGROUND + REPEATED).repeat(TIMES)])
    texts = {"train": torch.cat([background, rest[:REPEATED]]), "rows": rows, "held_out": held_out.clone()}
    torch.save({**texts, "seed": seed, "vocab_size": corpus.tokenizer.get_vocab_size(), "epochs": epochs}, path)


def start(folder: Path, data: Path, aim: str = "") -> subprocess.Popen[str]:
    (folder / "tmp").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.faults.runs", str(folder), str(data), *[aim] * bool(aim)]
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=output, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )


def finish(process: subprocess.Popen[str]) -> int:
    """The exit code of a process that runs to its end."""
    watchdog = threading.Timer(TIMEOUT, process.kill)
    watchdog.start()
    process.communicate()
    watchdog.cancel()
    return process.returncode


def kill_when_ready(process: subprocess.Popen[str], delay: float) -> bool:
    """Kills a process ``delay`` seconds after it printed ``READY``; False if it ended before."""
    watchdog = threading.Timer(TIMEOUT, process.kill)
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


def kill_once(folder: Path, reference: Reference, kind: str, rng: random.Random) -> str | None:
    """Starts or resumes the run and kills it. Returns at which moment, or None if the run ended before."""
    if kind == ANYWHERE:
        seconds = rng.uniform(0.0, 0.9 * reference.end["seconds"])
        process = start(folder, reference.data, f"{TRAINING}:1:run")
        return f"after {seconds:.1f} s" if kill_when_ready(process, seconds) else None
    moment = rng.choice([moment for moment in MOMENTS if moment.startswith(kind)])
    number, wait = rng.randint(1, reference.end["moments"][moment]), rng.random() < 0.5
    delay = 0.0 if wait else rng.uniform(0.0, 0.005)
    process = start(folder, reference.data, f"{moment}:{number}:{'wait' if wait else 'run'}")
    where = f"{moment} ({number}.)" + ("" if wait else f" + {1000 * delay:.1f} ms")
    return where if kill_when_ready(process, delay) else None


def run_with_kills(number: int, seed: int, folder: Path, reference: Reference) -> KilledRun:
    """Runs to the end with at least one kill on the way."""
    rng, run = random.Random(seed), KilledRun(number, seed)
    for tries, kind in ((TRIES, KINDS[number % len(KINDS)]), (1, rng.choice(KINDS))):
        killed = kill_once(folder, reference, kind, rng)
        while killed is None and (tries := tries - 1):
            shutil.rmtree(folder)  # it ended before the kill
            killed = kill_once(folder, reference, kind, rng)
        if killed is not None:
            path, torn = newest_intact(folder / "checkpoints")
            run.killed.append(killed)
            run.resumed.append(step_of(path) if path else 0)
            run.torn += torn
        if rng.random() < 0.5:
            break
    if not (folder / "end.pt").exists():
        finish(start(folder, reference.data))
    compare(run, folder, reference)
    shutil.rmtree(folder)
    return run


def compare(run: KilledRun, folder: Path, reference: Reference) -> None:
    """Records how the run and its files differ from the uninterrupted run."""
    if not (folder / "end.pt").exists():
        run.differs, run.files = ["never ended"], [(folder / "output.txt").read_text()[-400:]]
        return
    facts = torch.load(folder / "end.pt", weights_only=True)["facts"]
    run.differs = [name for name, fact in reference.end["facts"].items() if bits(facts.get(name)) != bits(fact)]
    ours, expected_folder = (each / "report" for each in (folder, reference.folder))
    written = {path.relative_to(ours): path for path in ours.rglob("*") if path.is_file()}
    expected = {path.relative_to(expected_folder): path for path in expected_folder.rglob("*") if path.is_file()}
    run.files = [f"{name} is left over" for name in written.keys() - expected.keys()]
    run.files += [f"{name} is missing" for name in expected.keys() - written.keys()]
    for name in written.keys() & expected.keys():
        if name.suffix in (".parquet", ".md", ".svg") and contents(written[name]) != contents(expected[name]):
            run.files.append(f"{name} differs")
    for name in ("samples", "controls"):
        path = ours / "run_files" / "ledger" / f"{name}.parquet"
        ids = pq.read_table(path)["sample_id"].to_pylist() if path.exists() else []
        known = facts["losses" if name == "samples" else "controls"]["ids"].tolist()
        if sorted(ids) != sorted(known) or len(set(ids)) != len(ids):
            run.files.append(f"{path.name} has missing or double rows")


def contents(path: Path) -> bytes:
    """The bytes of a file without the time at which a Markdown report was written."""
    if path.suffix != ".md":
        return path.read_bytes()
    return re.sub(rb"^\d{4}-\d\d-\d\dT[\d:+]+$", b"", path.read_bytes(), count=1, flags=re.MULTILINE)


def bits(value: Any) -> str:
    """A digest that is equal for values equal to the bit, including NaN and the order of entries."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key, part in value.items():
            digest.update(f"{key!r}:".encode())
            _update(digest, part)
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}]".encode())
        for part in value:
            _update(digest, part)
    else:
        digest.update(repr(value).encode())


def uninterrupted(folder: Path, seed: int, epochs: int) -> Reference:
    write_data(folder / "data.pt", seed, epochs)
    if finish(start(folder / "whole", folder / "data.pt")):
        raise RuntimeError(f"The uninterrupted run failed:\n{(folder / 'whole' / 'output.txt').read_text()}")
    end = torch.load(folder / "whole" / "end.pt", weights_only=True)
    return Reference(folder / "whole", folder / "data.pt", end)


def measure(kills: int, seed: int, epochs: int) -> tuple[Reference, list[KilledRun]]:
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        reference = uninterrupted(folder, seed, epochs)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(run_with_kills, number, seed + number, folder / f"run{number}", reference)
                for number in range(kills)
            ]
            return reference, [job.result() for job in jobs]


def table(runs: Sequence[KilledRun]) -> Table:
    rows = Table(title="Killed, resumed, compared", title_justify="left")
    for column in ("run", "seed", "killed", "resumed from step", "ledger to weights", "files"):
        rows.add_column(column, justify="right" if column in ("run", "seed") else "left")
    for run in runs:
        rows.add_row(
            str(run.number + 1),
            str(run.seed),
            ",\nthen ".join(run.killed),
            ",\nthen ".join(map(str, run.resumed)),
            ", ".join(run.differs) + " differ" if run.differs else "equal",
            "; ".join(run.files) or "whole",
        )
    return rows


def criteria(reference: Reference, runs: Sequence[KilledRun]) -> list[Criterion]:
    flags = reference.end["facts"]["flags"]
    return [
        Criterion("resumed runs equal to the uninterrupted one", share(not run.differs for run in runs), ">=", 1.0),
        Criterion("resumed runs whose files are whole and equal", share(not run.files for run in runs), ">=", 1.0),
        Criterion("checkpoints that did not load after a kill", sum(run.torn for run in runs), "<=", 0),
        Criterion("kills at a checkpoint", sum("checkpoint" in one for run in runs for one in run.killed), ">=", 1),
        Criterion("kills at the report", sum("report" in one for run in runs for one in run.killed), ">=", 1),
        Criterion(
            "samples memorized, so that there are flags", flags["evaluations"][-1]["counts"]["memorized"], ">=", 1
        ),
        Criterion("visits withheld, so that the mitigation acts", reference.end["withheld"], ">=", 1),
    ]


def share(holds: Iterable[bool]) -> float:
    values = list(holds)
    return sum(values) / len(values)


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("faults", "Training that is killed and resumed equals training that is not.", seeds=1)
    parser.add_argument("--kills", type=int, default=20, help="runs to kill, default 20")
    options = parser.parse_args(arguments_given)
    configure_process()
    (seed,) = fresh_seeds(options)
    kills, epochs = (min(options.kills, 4), 1) if options.quick else (options.kills, EPOCHS)
    start_time = time.monotonic()
    reference, runs = measure(kills, seed, epochs)
    equal, all_kills = (
        sum(not run.differs and not run.files for run in runs),
        sum(len(run.killed) for run in runs),
    )
    figure = (
        f"faults: {equal} of {kills} runs, killed {all_kills} times, equal the uninterrupted one to the bit; "
        f"{time.monotonic() - start_time:.0f} s"
    )
    settings = {"first_seed": seed, "kills": kills, "epochs": epochs, "save_every": SAVE_EVERY}
    return Report("faults", [table(runs)], criteria(reference, runs), figure, settings).publish(options.json)


if __name__ == "__main__":
    sys.exit(main())
