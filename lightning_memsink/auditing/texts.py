"""Suspected and control texts, from JSONL to tokens.

N  texts      T  tokens
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """One line of a file. ``group`` is what the report tells apart, ``x16`` or ``licences``, say."""

    text: str
    group: str
    line: int


def read_texts(path: Path) -> list[Text]:
    """Of a JSONL file: an object a line, with ``text`` and, if wanted, ``group``. Blank lines are passed over.

    Raises:
        ValueError: a line is no such object, which is told with its number, or there is no text at all.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. A line of it looks like this: {EXAMPLE}")
    texts = []
    for line, content in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if content.strip():
            texts.append(_text(path, line, content))
    if not texts:
        raise ValueError(f"{path} holds no text. A line of it looks like this: {EXAMPLE}")
    return texts


EXAMPLE = '{"text": "We the People of the United States", "group": "speeches"}'


def _text(path: Path, line: int, content: str) -> Text:
    try:
        found = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line} is not JSON ({error.msg}). It should look like this: {EXAMPLE}"
        ) from None
    if not isinstance(found, dict) or not isinstance(found.get("text"), str) or not found["text"].strip():
        raise ValueError(f"{path}, line {line} has no `text`. It should look like this: {EXAMPLE}")
    return Text(found["text"], str(found.get("group", path.stem)), line)


@dataclass(frozen=True)
class Encoded:
    """``tokens`` int64 ``[N, T]``, padded to the right with 0, and ``mask`` bool ``[N, T]``."""

    tokens: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def encode(texts: Sequence[Text], tokenizer: Any, length: int) -> Encoded:
    """The first ``length`` tokens of each, with the special tokens that the tokenizer puts in front.

    Raises:
        ValueError: no text has two tokens.
    """
    rows = [tokenizer(each.text, truncation=True, max_length=length)["input_ids"] for each in texts]
    longest = max(len(row) for row in rows)
    if longest < 2:
        raise ValueError("No text has two tokens: there is nothing that a model could foretell.")
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[row, : len(ids)] = True
    return Encoded(tokens, mask)
