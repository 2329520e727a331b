"""Time and memory of families, in a process that does nothing else. Prints JSON.

``python -m benchmarks.families.cost TEXTS``
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.common.memory import memory_in_use
from lightning_memsink.samples.families import Families
from lightning_memsink.samples.tokens import Tokens

LENGTH, BATCH, VOCABULARY = 64, 800, 30_000
"""Batches as `LossTracker` writes them: 50 steps of 16 texts."""
VARIANTS = 40
"""Texts of a batch that are variants of texts of the batch before."""


@dataclass(frozen=True)
class Cost:
    texts: int
    seconds: float
    """Processor time of the thread that compares, and of the calls."""
    seconds_of_calls: float
    """Processor time that `Families.add` took of the thread that calls it."""
    seconds_to_read: float
    """Of `Families.numbers`, when all texts were compared."""
    bytes_per_text: float
    """Growth of resident memory, texts that wait included, less what a run of a few texts takes."""
    fixed_bytes: float
    """Growth of a run of a few texts."""


def measure(texts: int) -> Cost:
    """Runs `main` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.families.cost", str(texts)]
    return Cost(**json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def main(texts: int) -> Cost:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    shares = 1 / torch.arange(1, VOCABULARY + 1).double()
    bounds = (shares.cumsum(0) / shares.sum()).float()
    before = torch.zeros(0, LENGTH, dtype=torch.int64)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    families = Families(limit=max(texts, 1 << 20))
    start, calls, used, fixed = memory_in_use(), 0.0, 0.0, 0
    for first in range(0, texts, BATCH):
        count = min(BATCH, texts - first)
        ids = torch.searchsorted(bounds, torch.rand(count, LENGTH, generator=generator)).clamp(max=VOCABULARY - 1)
        ids[: min(VARIANTS, len(before))] = _changed(before[:VARIANTS][:count], generator)
        began, processor = time.thread_time(), time.process_time()
        families.add(torch.arange(first, first + count), Tokens(ids, mask[:count]))
        calls += time.thread_time() - began
        families.settled()
        used += time.process_time() - processor
        before = ids[VARIANTS:]
        fixed = fixed or memory_in_use() - start
    grown = memory_in_use() - start - fixed
    began = time.process_time()
    numbers = families.numbers(texts)
    read = time.process_time() - began
    assert len(numbers) == texts
    return Cost(texts, used, calls, read, grown / max(1, texts - BATCH), fixed)


def _changed(texts: Tensor, generator: torch.Generator) -> Tensor:
    places = torch.rand(texts.shape, generator=generator) < 0.1
    return torch.where(places, torch.randint(VOCABULARY, texts.shape, generator=generator), texts)


if __name__ == "__main__":
    print(json.dumps(vars(main(int(sys.argv[1])))))
