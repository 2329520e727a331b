"""The text of this benchmark: Python's documentation."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer

from lightning_memsink.examples.corpora import Corpus, byte_level_bpe, python_docs, tokenized

VOCABULARY = 1024


def documentation(seed: int) -> Corpus:
    """Sequences of 64 tokens; ``seed`` says which texts are held out."""
    return tokenized(python_docs(), seed=seed, tokenizer=_tokenizer())


@cache
def _tokenizer() -> Tokenizer:
    """Learned from all of the text, so that it is the same for every seed: that takes longer than a short run."""
    return byte_level_bpe(list(python_docs()), VOCABULARY)
