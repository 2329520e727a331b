"""Suspected texts and controls: from JSONL to tokens.

N  texts      T  tokens
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Text:
    """One line of a file. The report lists results by ``group``, such as ``x16``; texts are compared with controls of
    the same ``kind``, such as prose or code."""

    text: str
    group: str
    kind: str
    line: int
    tokens: tuple[int, ...] | None = None
    """The tokens as they were trained on, in place of a text; `with_decoded_text` fills in the text."""


def read_texts(path: Path) -> list[Text]:
    """The texts of a JSONL file, one object a line; blank lines are ignored.

    An object has ``text``, or ``tokens`` for a text that a tokenizer would not split in the same way. ``group`` is
    optional (default: the file's name), and so is ``kind`` (default: the group).

    Raises:
        ValueError: a line is no such object (the message has its number), or the file holds no text.
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. A line of it looks like this: {EXAMPLE}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}). A line of it looks like this: {EXAMPLE}") from None
    texts = []
    for line, content in enumerate(lines, 1):
        if content.strip():
            texts.append(_text(path, line, content))
    if not texts:
        raise ValueError(f"{path} holds no text. A line of it looks like this: {EXAMPLE}")
    return texts


EXAMPLE = '{"text": "We the People of the United States", "group": "speeches"}'


def _text(path: Path, line: int, content: str) -> Text:
    try:
        row = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line} is not JSON ({error.msg}). It should look like this: {EXAMPLE}"
        ) from None
    row = row if isinstance(row, dict) else {}
    group = str(row.get("group", path.stem))
    source = (group, str(row.get("kind", group)), line)
    if _are_tokens(row.get("tokens")):
        return Text("", *source, tuple(row["tokens"]))
    if not isinstance(row.get("text"), str) or not row["text"].strip():
        raise ValueError(f"{path}, line {line} has no `text`. It should look like this: {EXAMPLE}")
    return Text(row["text"], *source)


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(type(each) is int and each >= 0 for each in value)


def with_decoded_text(texts: Sequence[Text], tokenizer: Any) -> list[Text]:
    """The same texts; those given as tokens with their decoded text.

    Raises:
        ValueError: the tokenizer does not know a token; the message has the line of the text.
    """
    last = max(tokenizer.get_vocab().values())
    for each in texts:
        if each.tokens is not None and max(each.tokens) > last:
            raise ValueError(
                f"Line {each.line} has token {max(each.tokens)}, and the last that this tokenizer knows is {last}. "
                "Tokens are those of the audited model's own tokenizer; give `text` where there is another."
            )
    return [each if each.tokens is None else replace(each, text=tokenizer.decode(each.tokens)) for each in texts]


@dataclass(frozen=True)
class Encoded:
    """``tokens`` int64 ``[N, T]``, padded on the right with 0; ``mask`` bool ``[N, T]``, True where there is text."""

    tokens: Tensor
    mask: Tensor

    def select(self, rows: Sequence[int] | Tensor) -> Encoded:
        """The texts in ``rows``, without columns that are padding in all of them."""
        mask = self.mask[rows]
        width = int(mask.sum(1).max())
        return Encoded(self.tokens[rows, :width], mask[:, :width])


def encode(texts: Sequence[Text], tokenizer: Any, length: int) -> Encoded:
    """The first ``length`` tokens of each text, with the special tokens that the tokenizer prepends.

    Raises:
        ValueError: no text has two tokens.
    """
    rows = [
        tokenizer(each.text, truncation=True, max_length=length)["input_ids"]
        if each.tokens is None
        else each.tokens[:length]
        for each in texts
    ]
    longest = max(len(row) for row in rows)
    if longest < 2:
        raise ValueError("No text has two tokens: there is nothing that a model could predict.")
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[row, : len(ids)] = True
    return Encoded(tokens, mask)
