"""Rows of the user's own data as text, on their machine: nothing is downloaded, and nothing is kept."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

TEXT_COLUMNS = ("text", "content", "input_ids", "tokens")
"""Names of the column that is shown where the user names none, the first that there is."""
KINDS = (
    "a .parquet, .jsonl, .json, .csv, .tsv or .txt file, a folder that datasets' save_to_disk wrote, or "
    "module:attribute or module:function() of a data set"
)
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_SHOWN_TOKENS = 40


def texts_at(data: str, rows: Sequence[int], column: str | None = None, tokenizer: Path | None = None) -> list[str]:
    """The text of each of these rows of a data set.

    Rows are counted from 0: of Parquet, CSV and a data set as they are, of JSON lines without blank lines, of text
    line by line. Only these rows are read.

    Args:
        data: a path, or ``module:attribute``, which is imported; ``module:function()`` is called.
        rows: row numbers, at least 0.
        column: of the text or the token ids; by default the first of `TEXT_COLUMNS` that there is.
        tokenizer: local folder of the tokenizer that decodes token ids; without one they are shown as numbers.

    Raises:
        ValueError: the data can't be read, has fewer rows, or has no text in a row.
        FileNotFoundError: there is no such file, folder or tokenizer.
    """
    wanted = sorted(set(rows))
    if not wanted:
        return []
    items = _items(data, wanted, column)
    if len(items) < len(wanted):
        raise ValueError(_too_short(data, wanted[-1], None))
    decode = None if tokenizer is None else _decoder(tokenizer)
    texts = {row: _text(item, f"row {row} of {data}", column, decode) for row, item in items.items()}
    return [texts[row] for row in rows]


def _items(data: str, rows: Sequence[int], column: str | None) -> dict[int, Any]:
    """What the data have in ``rows``, which are sorted; fewer than these if the data end before."""
    path = Path(data)
    if path.is_dir():
        return _of_sequence(_saved_dataset(path), data, rows)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".parquet":
            return _of_parquet(path, rows, column)
        readers = {".txt": _lines, ".csv": _table, ".tsv": _table, ".jsonl": _json, ".ndjson": _json, ".json": _json}
        if suffix not in readers:
            raise ValueError(f"{data} is of no kind that is read here. Give {KINDS}")
        try:
            return _picked(readers[suffix](path), rows)
        except UnicodeDecodeError as error:
            raise ValueError(f"{data} is no UTF-8 text ({error})") from None
        except csv.Error as error:
            raise ValueError(f"{data} is no table: {error}") from None
    module, colon, attribute = data.partition(":")
    if not colon or not module or "/" in data:
        raise FileNotFoundError(f"There is no {data} on this machine. Give {KINDS}")
    return _of_sequence(_imported(module, attribute), data, rows)


def _picked(items: Iterable[Any], rows: Sequence[int]) -> dict[int, Any]:
    wanted = set(rows)
    return {row: item for row, item in enumerate(islice(items, rows[-1] + 1)) if row in wanted}


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:  # a carriage return within a line is a part of it
        for line in file:
            yield line.rstrip("\r\n")


def _table(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, delimiter=_SEPARATORS[path.suffix.lower()])


def _json(path: Path) -> Iterator[Any]:
    """The objects of JSON lines, or of one array."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                if number > 1 or not line.lstrip().startswith("["):
                    raise ValueError(f"{path}, line {number} is not JSON ({error.msg})") from None
                file.seek(0)
                try:
                    yield from json.load(file)
                except json.JSONDecodeError as broken:
                    raise ValueError(f"{path} is neither JSON lines nor an array ({broken})") from None
                return
            if number == 1 and isinstance(item, list) and item and isinstance(item[0], (dict, list, str)):
                yield from item  # an array in one line
            else:
                yield item


def _of_parquet(path: Path, rows: Sequence[int], column: str | None) -> dict[int, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path} is not Parquet ({str(error).splitlines()[0]})") from None
    name = _column(file.schema_arrow.names, str(path), column)
    if rows[-1] >= file.metadata.num_rows:
        raise ValueError(_too_short(str(path), rows[-1], file.metadata.num_rows))
    items, begin = {}, 0
    for group in range(file.num_row_groups):
        end = begin + file.metadata.row_group(group).num_rows
        here = [row for row in rows if begin <= row < end]
        if here:
            values = file.read_row_group(group, columns=[name])[name]
            items.update({row: {name: values[row - begin].as_py()} for row in here})
        begin = end
    return items


def _saved_dataset(path: Path) -> Any:
    try:
        from datasets import load_from_disk  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ValueError(
            f"{path} is a folder, which takes Hugging Face datasets to read: pip install datasets"
        ) from None
    try:
        return load_from_disk(str(path))
    except Exception as error:  # of any type: the user gets one line
        raise ValueError(f"datasets can't load {path}: {_first_line(error)}. Give {KINDS}") from None


def _imported(module: str, attribute: str) -> Any:
    """The object that ``module:attribute`` names. As with ``python -m``, modules of the working folder are found."""
    called, name = attribute.endswith("()"), attribute.removesuffix("()")
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found() if called else found
    except Exception as error:
        raise ValueError(f"{module}:{attribute} raised {type(error).__name__}: {_first_line(error)}") from None
    finally:
        sys.path.remove("")


def _of_sequence(dataset: Any, data: str, rows: Sequence[int]) -> dict[int, Any]:
    if isinstance(dataset, Mapping):
        if "train" not in dataset:
            raise ValueError(f"{data} is no data set, but has {_names(dataset)}. Name one of them")
        dataset = dataset["train"]
    if not hasattr(dataset, "__getitem__"):
        hint = "; to call it, write ()" if callable(dataset) else ""
        raise ValueError(f"{data} is a {type(dataset).__name__}, which has no rows by number{hint}")
    try:
        count = len(dataset)
    except TypeError:
        count = rows[-1] + 1
    if rows[-1] >= count:
        raise ValueError(_too_short(data, rows[-1], count))
    items = {}
    for row in rows:
        try:
            items[row] = dataset[row]
        except Exception as error:
            raise ValueError(f"{data} raised {type(error).__name__} for row {row}: {_first_line(error)}") from None
    return items


def _text(item: Any, where: str, column: str | None, decode: Any) -> str:
    """An item of a data set as text: itself, a column of it, or the first of a tuple; decoded if it is token ids."""
    if isinstance(item, Mapping):
        item = item[_column([str(name) for name in item], where, column)]
    elif isinstance(item, tuple) and item:
        item = item[0]
    if isinstance(item, bytes):
        return item.decode("utf-8", "replace")
    if isinstance(item, str):
        return item
    tokens = item.tolist() if hasattr(item, "tolist") else item
    if not isinstance(tokens, list) or not all(type(each) is int for each in tokens):
        raise ValueError(f"{where} is a {type(item).__name__}; a text or a list of token ids was expected")
    if decode is not None:
        return str(decode(tokens, where))
    numbers = " ".join(map(str, tokens[:_SHOWN_TOKENS])) + (" …" if len(tokens) > _SHOWN_TOKENS else "")
    return f"{len(tokens):,} token ids, to decode with --tokenizer DIR: {numbers}"


def _column(names: Sequence[str], where: str, column: str | None) -> str:
    if column is not None and column in names:
        return column
    found = [name for name in TEXT_COLUMNS if name in names] if column is None else []
    if not found and (column is not None or len(names) != 1):
        missing = "none of " + ", ".join(TEXT_COLUMNS) if column is None else f"no column `{column}`"
        raise ValueError(f"{where} has {missing}, but {_names(names)}. Name the one with the text: --column NAME")
    return found[0] if found else names[0]


def _decoder(folder: Path) -> Any:
    """``decode(tokens, where) -> str`` with the tokenizer in a local folder."""
    if not folder.exists():
        raise FileNotFoundError(f"There is no tokenizer at {folder}: a local folder was expected (--tokenizer DIR)")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        last = max(tokenizer.get_vocab().values())
    except Exception as error:
        raise ValueError(
            f"There is no tokenizer in {folder}: {_first_line(error)}. Give another: --tokenizer DIR"
        ) from None

    def decode(tokens: list[int], where: str) -> str:
        outside = [token for token in tokens if not 0 <= token <= last]
        if outside:
            raise ValueError(
                f"{where} has token {outside[0]}, and the tokenizer in {folder} knows 0 to {last}. Give the one of "
                "this data: --tokenizer DIR"
            )
        return str(tokenizer.decode(tokens))

    return decode


def _too_short(data: str, row: int, count: int | None) -> str:
    has = "fewer" if count is None else f"{count:,}"
    return (
        f"The run's samples come from rows up to {row:,}, and {data} has {has} rows. Give the data that it trained on"
    )


def _names(names: Iterable[Any]) -> str:
    shown = [str(name) for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") or "nothing"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
