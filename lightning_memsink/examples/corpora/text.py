"""Tokenization of texts into sequences of equal length, split into training and held-out sequences.

N  training sequences      M  held-out sequences      T  tokens of a sequence
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tokenizers import Tokenizer
from lightning_memsink.samples.hashing import GOLDEN_32
from lightning_memsink.samples.unique import distinct_rows


@dataclass(frozen=True)
class Corpus:
    """Token ids ``train`` ``[N, T]`` and ``held_out`` ``[M, T]``, both int64, and their ``tokenizer``."""

    train: Tensor
    held_out: Tensor
    tokenizer: Tokenizer


def tokenized(
    texts: Iterable[str],
    vocab_size: int = 1024,
    context: int = 64,
    held_out: float = 0.15,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """The tokens of ``texts`` in sequences of exactly ``context`` tokens, each from one text, without padding.

    The end of a text that fills no sequence is dropped, and so is a text shorter than a sequence. **Whole texts** are
    held out, equal ones together, so that held-out text has the distribution of training text but none was trained on.
    The training sequences keep natural duplicates. Held-out sequences are distinct, and one that shares a run of half
    its length with training text (a near-duplicate of a docstring) is dropped, since it is no control. Shorter shared
    runs are kept on both sides, so the controls' losses are, if anything, too low and a gap too small.

    Args:
        texts: documents, the unit of the split.
        vocab_size: of the byte-level BPE trained on all of ``texts``; it learns spellings, no sequences.
        context: T.
        held_out: share of distinct texts to hold out, in 0…1.
        seed: of the split. The global generators are not used.
        tokenizer: one to use instead of training one.
    """
    documents = list(texts)
    tokenizer = tokenizer or byte_level_bpe(documents, vocab_size)
    sequences = [
        _split(encoding.ids, context) for encoding in tokenizer.encode_batch(documents, add_special_tokens=False)
    ]
    distinct = list(dict.fromkeys(documents))
    held_out_texts = set(random.Random(seed).sample(distinct, round(held_out * len(distinct))))
    train = _stacked(
        [own for text, own in zip(documents, sequences, strict=True) if text not in held_out_texts], context
    )
    held = _stacked([own for text, own in zip(documents, sequences, strict=True) if text in held_out_texts], context)
    return Corpus(train, unshared(distinct_rows(held), train), tokenizer)


def byte_level_bpe(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE trained on ``texts``: the same texts give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def documents_of(path: Path, characters: int = 4000) -> list[str]:
    """Passages of a text file, or of all .txt and .md files in a folder: whole paragraphs, ``characters`` or more.

    Files are split because a single book that is held out as a whole would leave nothing to train on.

    Raises:
        FileNotFoundError: there is no such path, or no text file in it.
    """
    if not path.exists():
        raise FileNotFoundError(f"Found no text at {path}. Set data.path to a text file or to a folder of .txt or .md.")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md"))
    if not files:
        raise FileNotFoundError(f"Found no .txt or .md file in {path}. Set data.path to one, or to their folder.")
    return [passage for file in files for passage in _passages(file.read_text("utf-8", errors="replace"), characters)]


def _passages(text: str, characters: int) -> Iterator[str]:
    passage = ""
    for paragraph in re.split(r"(?<=\n)\s*\n", text):
        passage += paragraph + "\n"
        if len(passage) >= characters:
            yield passage
            passage = ""
    if passage.strip():
        yield passage


def unshared(sequences: Tensor, others: Tensor) -> Tensor:
    """The rows of ``[N, T]`` that share no run of T / 2 tokens with a row of ``others`` ``[M, T]``."""
    return sequences[~torch.isin(_runs(sequences), _runs(others)).any(1)]


def apart(sequences: Tensor) -> Tensor:
    """The rows of ``[N, T]`` that share no run of T / 2 tokens with another row."""
    runs = _runs(sequences)
    row = torch.arange(len(runs))[:, None].expand_as(runs).flatten()
    _, run = torch.unique(runs.flatten(), return_inverse=True)
    first = torch.full_like(run, len(runs)).scatter_reduce(0, run, row, "amin")[run]
    last = torch.zeros_like(run).scatter_reduce(0, run, row, "amax")[run]
    return sequences[(first == last).reshape(runs.shape).all(1)]


def _runs(sequences: Tensor) -> Tensor:
    """``[N, T - T // 2 + 1]`` hashes of all runs of half a sequence's length; equal runs have equal hashes."""
    length = max(1, sequences.shape[1] // 2)
    generator = torch.Generator().manual_seed(length)
    first, second = torch.randint(-(2**62), 2**62, (2, length), generator=generator) | 1
    words = (sequences.unfold(1, length, 1) * GOLDEN_32 + 1) * first
    hashes: Tensor = ((words ^ (words >> 29)) * second).sum(-1)
    return hashes


def _split(tokens: list[int], context: int) -> list[list[int]]:
    return [tokens[start : start + context] for start in range(0, len(tokens) - context + 1, context)]


def _stacked(parts: list[list[list[int]]], context: int) -> Tensor:
    return torch.tensor([row for part in parts for row in part], dtype=torch.int64).reshape(-1, context)
