"""All cases, by name."""

from __future__ import annotations

from benchmarks.capture.bad_input import BAD_INPUT
from benchmarks.capture.batches import BATCHES
from benchmarks.capture.case import Case
from benchmarks.capture.classes import CLASSES
from benchmarks.capture.dense import DENSE
from benchmarks.capture.manual import MANUAL
from benchmarks.capture.pairs import PAIRS
from benchmarks.capture.regression import REGRESSION
from benchmarks.capture.runs import RUNS
from benchmarks.capture.sequences import SEQUENCES
from benchmarks.capture.terms import TERMS

ALL = [*CLASSES, *SEQUENCES, *DENSE, *REGRESSION, *PAIRS, *TERMS, *MANUAL, *BATCHES, *RUNS, *BAD_INPUT]

MATRIX: dict[str, Case] = {case.name: case for case in ALL}
"""A case for each name: add one to a list of its kind."""
