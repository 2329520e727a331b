"""Suspected and control texts, from JSONL to tokens.

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
    """One line of a file. ``group`` is what the report tells apart, ``x16``, say; ``kind`` is what texts are compared
    within, prose or code, say."""

    text: str
    group: str
    kind: str
    line: int
    tokens: tuple[int, ...] | None = None
    """Instead of a text, as it was trained on; `with_decoded_text` finds the text."""


def read_texts(path: Path) -> list[Text]:
    """Of a JSONL file: an object a line, with ``text``, or ``tokens`` for one that is cut as a tokenizer would not cut
    it. If wanted, with ``group`` (the file's name if not) and ``kind`` (the group if not). Blank lines are passed over.

    Raises:
        ValueError: a line is no such object, which is told with its number, or there is no text at all.
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
        found = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {line} is not JSON ({error.msg}). It should look like this: {EXAMPLE}"
        ) from None
    found = found if isinstance(found, dict) else {}
    group = str(found.get("group", path.stem))
    about = (group, str(found.get("kind", group)), line)
    if _are_tokens(found.get("tokens")):
        return Text("", *about, tuple(found["tokens"]))
    if not isinstance(found.get("text"), str) or not found["text"].strip():
        raise ValueError(f"{path}, line {line} has no `text`. It should look like this: {EXAMPLE}")
    return Text(found["text"], *about)


def _are_tokens(found: Any) -> bool:
    return isinstance(found, list) and len(found) > 1 and all(type(each) is int and each >= 0 for each in found)


def with_decoded_text(texts: Sequence[Text], tokenizer: Any) -> list[Text]:
    """With the text of those that have tokens alone.

    Raises:
        ValueError: the tokenizer does not know a token, which is told with its line.
    """
    known = max(tokenizer.get_vocab().values())
    for each in texts:
        if each.tokens is not None and max(each.tokens) > known:
            raise ValueError(
                f"Line {each.line} has token {max(each.tokens)}, and the last that this tokenizer knows is {known}. "
                "Tokens are those of the audited model's own tokenizer; give `text` where there is another."
            )
    return [each if each.tokens is None else replace(each, text=tokenizer.decode(each.tokens)) for each in texts]


@dataclass(frozen=True)
class Encoded:
    """``tokens`` int64 ``[N, T]``, padded to the right with 0, and ``mask`` bool ``[N, T]``."""

    tokens: Tensor
    mask: Tensor


def encode(texts: Sequence[Text], tokenizer: Any, length: int) -> Encoded:
    """The first ``length`` tokens of each, with the special tokens that the tokenizer puts in front.

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
        raise ValueError("No text has two tokens: there is nothing that a model could foretell.")
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
        mask[row, : len(ids)] = True
    return Encoded(tokens, mask)
