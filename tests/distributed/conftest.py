"""Marks all tests here as distributed: they start processes of their own and run with `make test-distributed`."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent

IGNORED = (
    "ignore:.*multi-threaded, use of fork",
    "ignore:.*FSDP2-wrapped module .* returned a view tensor",  # torch 2.13, of plain runs too
    "ignore:The dirpath has changed from",  # a resumed run of a test writes into a folder of its own
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.distributed)
            for each in IGNORED:
                item.add_marker(pytest.mark.filterwarnings(each))
