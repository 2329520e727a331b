"""Texts that are available without a download, and their tokenization."""

from lightning_memsink.examples.corpora.python_code import python_code
from lightning_memsink.examples.corpora.python_docs import python_docs
from lightning_memsink.examples.corpora.text import Corpus, apart, byte_level_bpe, documents_of, tokenized, unshared

__all__ = ["Corpus", "apart", "byte_level_bpe", "documents_of", "python_code", "python_docs", "tokenized", "unshared"]
