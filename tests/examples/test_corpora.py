"""Texts, and how they are cut and split."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_memsink.examples.corpora import apart, byte_level_bpe, documents_of, python_docs, tokenized, unshared

rows = st.lists(st.lists(st.integers(0, 2), min_size=6, max_size=6), min_size=1, max_size=8)
words = st.text(st.sampled_from("abc \n"), max_size=60)


@pytest.fixture
def library(tmp_path):
    """A standard library of two modules, and folders that are no documentation."""
    for folder in ("test", "site-packages", "pydoc_data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.py").write_text('"""Left out, or without topics."""')
    (tmp_path / "b.py").write_text('"""Module b."""\nclass C:\n  "The class."\n  def f(self):\n    "The method."\n')
    (tmp_path / "a.py").write_text('def f():\n  """The same."""\ndef g():\n  """The same."""\n')
    (tmp_path / "template.py").write_text("this is $no python")
    (tmp_path / "pydoc_data" / "topics.py").write_text('topics = {"if": "The if statement."}')
    (tmp_path / "pydoc_data" / "x.py").unlink()
    return tmp_path


@pytest.fixture(scope="module")
def docs():
    return python_docs()


def test_docs_are_docstrings_in_the_order_of_the_files_then_the_topics(library):
    """Duplicates stay; sources that don't parse, tests and site-packages are passed over."""
    expected = ["The same.", "The same.", "Module b.", "The class.", "The method.", "The if statement."]
    assert python_docs(library) == expected


def test_this_python_has_a_megabyte_of_its_own_documentation(docs):
    assert sum(map(len, docs)) > 1e6
    assert any('"for" statement' in doc for doc in docs)


def test_a_python_without_sources_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Found no documented Python source under .*use a full installation"):
        python_docs(tmp_path)


@given(texts=st.lists(words, min_size=1, max_size=30), context=st.integers(1, 8), seed=st.integers(0, 9))
def test_each_sequence_is_a_piece_of_one_text(texts, context, seed):
    """Put together again, the tokens of a text's sequences are the text, but for less than a sequence at its end."""
    corpus = tokenized(texts, vocab_size=260, context=context, held_out=0.0, seed=seed)
    expected = []
    for text in texts:
        ids = corpus.tokenizer.encode(text).ids
        expected += [ids[start : start + context] for start in range(0, len(ids) // context * context, context)]
    assert corpus.train.tolist() == expected
    assert corpus.held_out.shape == (0, context)


@given(texts=st.lists(words, min_size=2, max_size=30), context=st.integers(1, 8), seed=st.integers(0, 9))
def test_nothing_held_out_is_trained_on(texts, context, seed):
    """No sequence is on both sides, none is held out twice, and the global generators stay as they were."""
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()
    corpus = tokenized(texts, vocab_size=260, context=context, held_out=0.5, seed=seed)
    train, held_out = set(map(tuple, corpus.train.tolist())), list(map(tuple, corpus.held_out.tolist()))
    assert not train & set(held_out)
    assert len(held_out) == len(set(held_out))
    assert torch.equal(torch.random.get_rng_state(), torch_state) and random.getstate() == python_state


def halves(row):
    """The runs of three tokens in a row of six."""
    return {tuple(row[start : start + 3]) for start in range(4)}


@given(sequences=rows, others=rows)
def test_unshared_rows_have_no_half_in_common_with_the_others(sequences, others):
    expected = [row for row in sequences if not any(halves(row) & halves(other) for other in others)]
    assert unshared(torch.tensor(sequences), torch.tensor(others)).tolist() == expected


@given(sequences=rows)
def test_rows_apart_have_no_half_in_common_with_another(sequences):
    expected = [
        row
        for n, row in enumerate(sequences)
        if not any(halves(row) & halves(other) for m, other in enumerate(sequences) if m != n)
    ]
    assert apart(torch.tensor(sequences)).tolist() == expected


def test_equal_texts_are_held_out_together():
    """Else a control would have been trained on under another name."""
    texts = [letter * 40 for letter in "abcdefgh" for _ in range(3)]
    for seed in range(5):
        corpus = tokenized(texts, vocab_size=256, context=40, held_out=0.25, seed=seed)
        assert (len(corpus.train), len(corpus.held_out)) == (18, 2)


def test_the_same_texts_give_the_same_tokens(docs):
    first, second = tokenized(docs[:300]), tokenized(docs[:300])
    assert first.tokenizer.to_str() == second.tokenizer.to_str()
    assert torch.equal(first.train, second.train) and torch.equal(first.held_out, second.held_out)


def test_any_text_survives_the_tokenizer():
    """Byte level: what it was not trained on is spelt out."""
    tokenizer = byte_level_bpe(["some English text"], vocab_size=300)
    for text in ("some English", "naïve — 数学 🙂\n\ttab"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_file_is_cut_into_passages_of_whole_paragraphs(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("\n\n".join(f"Paragraph {n}." for n in range(10)))
    passages = documents_of(file, characters=40)
    assert len(passages) > 2
    assert all(len(passage) >= 40 for passage in passages[:-1])
    assert [line for passage in passages for line in passage.split("\n") if line] == [
        f"Paragraph {n}." for n in range(10)
    ]


def test_a_folder_is_all_its_text_files(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.txt", "a.md", "more/c.txt", "picture.png"):
        (tmp_path / name).write_text(name)
    assert [passage.strip() for passage in documents_of(tmp_path)] == ["a.md", "b.txt", "more/c.txt"]


def test_missing_text_is_said_with_what_to_set(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Found no text at .*nowhere\.txt\. Set data\.path"):
        documents_of(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match=r"Found no \.txt or \.md file in .*Set data\.path"):
        documents_of(tmp_path)
