"""The launcher of these tests must not hang itself: it did, once in thirty such runs."""

from __future__ import annotations

from tests.distributed.launching import together


def test_processes_that_end_at_the_same_moment_are_all_seen_to_end(tmp_path):
    for _ in range(60):
        together(lambda: None, tmp_path, 3, seconds=30)
