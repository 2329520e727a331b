"""The cost of attribution: full training steps with and without it, interleaved, also for other libraries.

Time is processor time on one thread. Every round has one step of each way, in an order that rotates, and two plain
steps; a ratio is of medians. Exact norms every 8th step are seven steps with closed hooks and one step that is read.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isnan, nan

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.common.criteria import Criterion, Report, argument_parser, configure_process, fresh_seeds
from benchmarks.common.memory import MEBIBYTE, memory_in_use, reset_peak, run_forked
from benchmarks.overhead.attribution_tasks import TASKS
from benchmarks.overhead.gradient_peers import FLOOR, OURS, PEERS, Task, Way, loop, mean_loss, plain
from lightning_memsink.attribution.gradient_norms import GradientNorms

UNITS, EVERY_8TH = 1.05, 1.05
ERROR = 1e-5
CORRECT = 1e-3
"""Largest relative error of a peer that counts as working."""
EVERY = 8
SETTLING = 1
"""Untimed steps of a way before the timed ones."""
ROUNDS, QUICK_ROUNDS = 24, 2


@dataclass(frozen=True)
class Measured:
    """Measurements of one way on one task.

    ``ratio``: time to that of a plain step. ``error``: of the norms, relative to the loop's. ``memory``: MiB above what
    was resident before the first step. ``fault``: the exception, if the way failed.
    """

    ratio: float = nan
    error: float = nan
    memory: float = nan
    fault: str = ""

    @property
    def works(self) -> bool:
        return not self.fault and self.error <= CORRECT


Measurements = dict[str, dict[str, Measured]]


def memories(task: Task, ways: dict[str, Way], seed: int) -> dict[str, float]:
    """`peak_memory` of each way. Measured before any timing, since a process reuses memory it has freed."""
    torch.manual_seed(seed)
    model, (inputs, targets) = task.model().train(), task.batch(seed)
    mean_loss(model(inputs[:1]), targets[:1]).backward()  # the code of the operations becomes resident
    return {name: peak_memory(way, model, inputs, targets) for name, way in ({"plain": plain} | ways).items()}


def measure(task: Task, ways: dict[str, Way], memory: dict[str, float], rounds: int, seed: int) -> dict[str, Measured]:
    torch.manual_seed(seed)
    model, (inputs, targets) = task.model().train(), task.batch(seed)
    oracle = loop(copy.deepcopy(model))(inputs, targets)
    assert oracle is not None
    steps, errors, faults = {"plain": plain(copy.deepcopy(model))}, {"plain": nan}, {}
    for name, way in ways.items():
        try:
            step = way(copy.deepcopy(model))
            norms = step(inputs, targets)
            for _ in range(SETTLING):
                step(inputs, targets)
        except Exception as error:  # an exception of a peer is its result
            faults[name] = f"{type(error).__name__}: {error}"
        else:
            steps[name], errors[name] = step, nan if norms is None else float((norms / oracle - 1).abs().max())
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        order = list(steps)
        turn = number % len(order)
        for name in [*order[turn:], *order[:turn], "plain"]:
            start = time.process_time()
            steps[name](inputs, targets)
            times[name].append(time.process_time() - start)
    usual = {name: statistics.median(each) for name, each in times.items()}
    measured = {name: Measured(usual[name] / usual["plain"], errors[name], memory[name]) for name in steps}
    return measured | {name: Measured(fault=fault) for name, fault in faults.items()}


def peak_memory(way: Way, model: nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Peak memory of the first steps of ``way``, in MiB above what was resident before, in a separate process."""

    def work() -> float:
        step = way(model)
        before = memory_in_use()
        reset_peak()
        for _ in range(SETTLING):
            step(inputs, targets)
        return (memory_in_use("VmHWM") - before) / MEBIBYTE

    memory = run_forked(work)
    return nan if memory is None else round(memory, 1)


def coverage() -> dict[str, float]:
    """The fraction of parameters that exact norms cover in small Hugging Face models."""
    small = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    models = {
        "GPT-2": GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        ),
        "Llama": LlamaForCausalLM(LlamaConfig(**small)),
        "BERT": BertForMaskedLM(BertConfig(**small, max_position_embeddings=16)),
    }
    covered = {}
    for name, model in models.items():
        ids, recorder = torch.randint(1, 64, (3, 16)), GradientNorms(model.train())
        recorder.open()
        model(input_ids=ids, labels=ids).loss.backward()
        recorder.finish(len(ids))
        covered[name] = recorder.covered
    return covered


READ, CLOSED = "exact norms, every step", "exact norms, between two"
SAMPLED = f"exact norms, every {EVERY}th step"


def report(found: Measurements, covered: dict[str, float], seeds: Sequence[int]) -> Report:
    """The report of measurements ``found``, by task and way."""
    sampled = {name: (ways[READ].ratio + (EVERY - 1) * ways[CLOSED].ratio) / EVERY for name, ways in found.items()}
    names = list(next(iter(found.values())))
    ratios, errors, memory = (Table("", *found, title=title) for title in TITLES)
    for name in names:
        cells = [ways[name] for ways in found.values()]
        ratios.add_row(name, *(_first_words(each.fault) or f"{each.ratio:.3f}" for each in cells))
        if name == CLOSED:
            ratios.add_row(SAMPLED, *(f"{ratio:.3f}" for ratio in sampled.values()))
        errors.add_row(name, *("" if isnan(each.error) else f"{each.error:.0e}" for each in cells))
        memory.add_row(name, *("" if isnan(each.memory) else f"{each.memory:.0f}" for each in cells))
    parameters = Table("", *covered, title="parameters covered by exact norms")
    parameters.add_row("exact norms", *(f"{part:.1%}" for part in covered.values()))
    criteria = [
        Criterion(
            "units every step against plain, median of workloads", _median(found, "units, every step"), "<=", UNITS
        ),
        *(_norms_criterion(task, found[task.name]) for task in TASKS),
        Criterion(
            f"{SAMPLED} against plain, median of workloads", statistics.median(sampled.values()), "<=", EVERY_8TH
        ),
        Criterion("largest relative error of a norm", max(ways[READ].error for ways in found.values()), "<=", ERROR),
        *(
            Criterion(f"time by that of the fastest correct peer, {name}", _lead(ways), "<=", 1.0)
            for name, ways in found.items()
        ),
        *(Criterion(f"parameters covered, {name}", part, ">=", 1.0) for name, part in covered.items()),
    ]
    figure = (
        f"attribution: units {criteria[0].value:.3f}x plain; exact norms "
        + ", ".join(f"{name} {ways[READ].ratio:.2f}x" for name, ways in found.items())
        + f"; every {EVERY}th step {statistics.median(sampled.values()):.3f}x"
    )
    measured = {name: {way: vars(each) for way, each in ways.items()} for name, ways in found.items()}
    return Report(
        "attribution", [ratios, errors, memory, parameters], criteria, figure, {"seeds": list(seeds), "found": measured}
    )


def _norms_criterion(task: Task, ways: dict[str, Measured]) -> Criterion:
    if task.by_floor:
        ratio = ways[READ].ratio / ways[FLOOR].ratio
        return Criterion(f"{READ} against the floor, {task.name}", ratio, "<=", task.bound)
    return Criterion(f"{READ} against plain, {task.name}", ways[READ].ratio, "<=", task.bound)


TITLES = (
    "time of a training step against a plain one",
    "largest relative error of a sample's norm against a batch of one",
    "memory above set-up at its highest, MiB",
)


def _first_words(fault: str) -> str:
    return " ".join(fault.split()[:5])


def _median(found: Measurements, way: str) -> float:
    return statistics.median(ways[way].ratio for ways in found.values())


def _lead(ways: dict[str, Measured]) -> float:
    """Our ratio divided by that of the best working peer; 0 if none works."""
    peers = [each.ratio for name, each in ways.items() if name in PEERS and each.works]
    return ways[READ].ratio / min(peers, default=inf)


def run(options: argparse.Namespace) -> int:
    seeds = fresh_seeds(options)[:1]  # the batch's; rounds tell the noise
    configure_process()
    warnings.simplefilter("ignore")  # the peers' own
    rounds, ways = QUICK_ROUNDS if options.quick else ROUNDS, OURS | PEERS
    memory = {task.name: memories(task, ways, seeds[0]) for task in TASKS}
    found = {task.name: measure(task, ways, memory[task.name], rounds, seeds[0]) for task in TASKS}
    return report(found, coverage(), seeds).publish(options.json)


def main(arguments_given: Sequence[str] | None = None) -> int:
    parser = argument_parser("attribution_cost", "Cost of attribution, ours and others'.", seeds=1)
    return run(parser.parse_args(arguments_given))


if __name__ == "__main__":
    sys.exit(main())
