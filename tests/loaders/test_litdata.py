"""litdata: streams of samples and of blocks of tokens, from chunks in an order of their own each epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.text_runs import SaveAfter, Text, by_row, check, fit_and_compare, fit_texts, id_of, texts, visits_of

litdata = pytest.importorskip("litdata")

TEXTS = [text[:4] for text in texts()]
BLOCK = 5


def tokens_of(text: Text) -> dict[str, Any]:
    return {"input_ids": torch.tensor(text), "source": "odd" if sum(text) % 2 else "even"}


def stream_of(text: Text) -> Any:
    yield torch.tensor(text, dtype=torch.int32)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("samples"))
    litdata.optimize(tokens_of, TEXTS, folder, chunk_size=7, num_workers=1)
    return folder


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("blocks"))
    loader = litdata.TokensLoader(block_size=BLOCK)
    litdata.optimize(stream_of, TEXTS, folder, chunk_size=4 * BLOCK, num_workers=1, item_loader=loader)
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_samples(samples, workers, tmp_path: Path):
    def loader() -> Any:
        data = litdata.StreamingDataset(samples, shuffle=True, drop_last=False, seed=4)
        return litdata.StreamingDataLoader(data, batch_size=4, num_workers=workers)

    fitted = fit_and_compare(loader, by_row)
    check(fitted)
    expected = Counter(id_of(text) for text in TEXTS)
    assert fitted.exposures == {id: 2 * count for id, count in expected.items()}
    names = fitted.ledger.losses.source_names
    found = {id: names.label(int(code)) for id, code in fitted.column("source").items()}
    assert found == {id_of(text): "odd" if sum(text) % 2 else "even" for text in TEXTS}


def test_blocks_of_tokens(blocks):
    def loader() -> Any:
        items = litdata.TokensLoader(block_size=BLOCK)
        data = litdata.StreamingDataset(blocks, item_loader=items, shuffle=True, drop_last=False, seed=4)
        return litdata.StreamingDataLoader(data, batch_size=4)

    fitted = fit_and_compare(loader, by_row)
    check(fitted)
    assert len(fitted.exposures) > 10 and set(fitted.exposures.values()) == {2}


def test_a_run_that_goes_on_within_an_epoch_counts_each_visit_once(samples, tmp_path: Path):
    def loader() -> Any:
        data = litdata.StreamingDataset(samples, shuffle=True, drop_last=False, seed=4)
        return litdata.StreamingDataLoader(data, batch_size=4)

    path = tmp_path / "within.ckpt"
    first = fit_texts(loader(), by_row, {}, callbacks=[SaveAfter(path, 3)], max_steps=3, enable_checkpointing=True)
    resumed = fit_texts(loader(), by_row, {}, ckpt_path=path)
    assert resumed.exposures == visits_of(first, resumed)
    assert resumed.messages == []
