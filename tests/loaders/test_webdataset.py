"""webdataset: shards in tar files, shuffled, through its own loader and torch's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tests.support.text_runs import by_row, check, fit_and_compare, id_of, texts

wds = pytest.importorskip("webdataset")

TEXTS = [text[:4] for text in texts()]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    for part in range(3):
        with wds.TarWriter(str(folder / f"{part}.tar")) as tar:
            for row in range(part, len(TEXTS), 3):
                source = "odd" if sum(TEXTS[row]) % 2 else "even"
                tar.write({"__key__": f"row{row}", "tokens.npy": np.array(TEXTS[row]), "source.txt": source})
    return str(folder / "{0..2}.tar")


def batched(samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "input_ids": torch.stack([torch.from_numpy(sample["tokens.npy"]) for sample in samples]),
        "source": [sample["source.txt"] for sample in samples],
        "__key__": [sample["__key__"] for sample in samples],
    }


def stream(shards: str) -> Any:
    data = wds.WebDataset(shards, shardshuffle=3, seed=3).shuffle(8, seed=3).decode()
    return data.batched(4, collation_fn=batched)


LOADERS = {
    "torch's": lambda data: DataLoader(data, batch_size=None),
    "its own": lambda data: wds.WebLoader(data, batch_size=None, num_workers=1),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_each_text_is_one_sample(kind, shards):
    fitted = fit_and_compare(lambda: LOADERS[kind](stream(shards)), by_row)
    check(fitted)
    expected = Counter(id_of(text) for text in TEXTS)
    assert fitted.exposures == {id: 2 * count for id, count in expected.items()}
    names = fitted.ledger.losses.source_names
    found = {id: names.label(int(code)) for id, code in fitted.column("source").items()}
    assert found == {id_of(text): "odd" if sum(text) % 2 else "even" for text in TEXTS}


@pytest.mark.parametrize("kind", LOADERS)
def test_its_keys_can_be_ids(kind, shards):
    fitted = fit_and_compare(lambda: LOADERS[kind](stream(shards)), by_row, key="__key__")
    table = fitted.ledger.losses
    exposures = dict(zip(table.names.of(table.ids), table.exposures.tolist(), strict=True))
    assert exposures == {f"row{row}": 2 for row in range(len(TEXTS))}
    assert [message[:37] for message in fitted.messages] == ["3 texts come under several ids, 9 ids"]
