"""Hugging Face datasets: rows, streams of shards with a shuffle buffer, a column of sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from tests.support.text_runs import Fitted, by_row, check, fit_and_compare, id_of, texts, tokenizer

datasets = pytest.importorskip("datasets")

TEXTS = texts()
SOURCES = ["books" if row % 2 else "web" for row in range(len(TEXTS))]


def columns() -> dict[str, list[Any]]:
    """A text that comes again has the source that it had first."""
    first = {text: source for text, source in reversed(list(zip(TEXTS, SOURCES, strict=True)))}
    return {"input_ids": [list(text) for text in TEXTS], "source": [first[text] for text in TEXTS]}


def collate(rows: list[dict[str, Any]]) -> Any:
    batch = DataCollatorForLanguageModeling(tokenizer(), mlm=False)([{"input_ids": row["input_ids"]} for row in rows])
    batch["source"] = [row["source"] for row in rows]
    return batch


def check_sources(fitted: Fitted) -> None:
    names, found = fitted.ledger.losses.source_names, fitted.column("source")
    given = {id_of(text): source for text, source in zip(columns()["input_ids"], columns()["source"], strict=True)}
    assert {id: names.label(int(code)) for id, code in found.items()} == given


@pytest.mark.parametrize("format", [None, "torch"])
def test_rows(format):
    data = datasets.Dataset.from_dict(columns()).with_format(format)
    generator = torch.Generator().manual_seed(3)
    fitted = fit_and_compare(
        lambda: DataLoader(data, 4, shuffle=True, collate_fn=collate, generator=generator.manual_seed(3)), by_row
    )
    check(fitted)
    check_sources(fitted)
    places = {id_of(text): {row for row, other in enumerate(TEXTS) if other == text} for text in TEXTS}
    assert fitted.column("rows") == {id: len(some) for id, some in places.items()}
    assert all(row in places[id] for id, row in fitted.column("first_row").items())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_shards_with_a_shuffle_buffer(workers, tmp_path: Path):
    """The order is another one in each epoch, and no text has a row; each is one sample all the same."""
    data = datasets.Dataset.from_dict(columns())
    stream = data.to_iterable_dataset(num_shards=4).shuffle(seed=5, buffer_size=8)

    def loader() -> DataLoader[Any]:
        return DataLoader(stream, 4, collate_fn=collate, num_workers=workers)

    fitted = fit_and_compare(loader, by_row)
    check(fitted)
    check_sources(fitted)
    assert set(fitted.column("first_row").values()) == {-1}
    assert {len(losses) for losses in fitted.model.visits.values()} == {2, 6}


def test_a_stream_of_files(tmp_path: Path):
    for part in range(3):
        rows = {name: values[part::3] for name, values in columns().items()}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"{part}.parquet")
    files = [str(path) for path in sorted(tmp_path.glob("*.parquet"))]
    stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True, cache_dir=str(tmp_path))
    stream = stream.shuffle(seed=5, buffer_size=8)
    fitted = fit_and_compare(lambda: DataLoader(stream, 4, collate_fn=collate), by_row)
    check(fitted)
    check_sources(fitted)
