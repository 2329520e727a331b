"""Rows of the user's own data as text: files, folders and data sets by name."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_memsink.cli.own_texts import texts_at

MODULE = """
import torch
rows = ["zero", "one", "two"]
calls = 0
def load():
    return [{"label": n, "text": f"text {n}"} for n in range(3)]
class Tokens(torch.utils.data.Dataset):
    def __len__(self): return 3
    def __getitem__(self, row): return torch.arange(row + 1), torch.tensor(0)
tokens = Tokens()
splits = {"test": rows}
both = {"train": rows, "test": ["other"]}
class Holder: inner = rows
def broken(): raise KeyError("no such file")
class Odd:
    def __getitem__(self, row): raise OSError("disk\\nfull")
odd = Odd()
number = 5
nested = [[[1, 2]]]
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rows.py").write_text(MODULE)
    yield
    sys.modules.pop("my_rows", None)


def written(name, text):
    with open(name, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    return name


def refusal(data, rows, **options):
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        texts_at(data, rows, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_lines_of_text_are_rows_in_the_order_that_is_wanted():
    data = written("a.txt", "zero\n\ntwo\u2028with a separator\r\nthree")
    assert texts_at(data, [3, 2, 1, 3]) == ["three", "two\u2028with a separator", "", "three"]


def test_json_lines_are_counted_without_blank_ones():
    rows = [{"text": "zero\nwith a break"}, {"text": "one"}]
    data = written("a.jsonl", json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1]) + "\n")
    assert texts_at(data, [1, 0]) == ["one", "zero\nwith a break"]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_rows_too(indent):
    data = written("a.json", json.dumps([{"text": "zero"}, {"text": "one"}], indent=indent))
    assert texts_at(data, [1]) == ["one"]


def test_json_that_is_broken_is_named_by_its_line():
    assert "b.jsonl, line 2 is not JSON" in refusal(written("b.jsonl", '{"text": "a"}\n{"text'), [1])
    assert "neither JSON lines nor an array" in refusal(written("b.json", "[\n1,"), [1])


def test_tables_have_texts_over_several_lines_and_very_long_ones():
    long = "x" * 200_000
    data = written("a.csv", f'id,text\n1,"two\nlines, one cell"\n2,{long}\n')
    assert texts_at(data, [0, 1]) == ["two\nlines, one cell", long]
    assert texts_at(written("a.tsv", "id\tbody\n1\thello, you\n"), [0], column="body") == ["hello, you"]


def test_of_parquet_only_the_wanted_rows_are_read():
    pq.write_table(pa.table({"n": range(10), "text": [f"row {n}" for n in range(10)]}), "a.parquet", row_group_size=3)
    assert texts_at("a.parquet", [9, 0, 4]) == ["row 9", "row 0", "row 4"]
    assert "come from rows up to 10, and a.parquet has 10 rows" in refusal("a.parquet", [3, 10])
    assert "has no column `body`, but n, text. Name the one" in refusal("a.parquet", [3], column="body")


def test_fewer_rows_than_the_samples_come_from_is_said():
    data = written("a.txt", "zero\none\n")
    assert "rows up to 2, and a.txt has fewer rows. Give the data that it trained on" in refusal(data, [2])
    assert "rows up to 3, and my_rows:rows has 3 rows" in refusal("my_rows:rows", [3])


def test_a_data_set_is_named_by_module_and_attribute_or_by_a_function():
    assert texts_at("my_rows:rows", [2]) == ["two"]
    assert texts_at("my_rows:Holder.inner", [0]) == ["zero"]
    assert texts_at("my_rows:load()", [1]) == ["text 1"]
    assert texts_at("my_rows:both", [1]) == ["one"]
    assert "" not in sys.path


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("my_rows:load", "is a function, which has no rows by number; to call it, write ()"),
        ("my_rows:number", "is a int, which has no rows by number"),
        ("my_rows:nothing", "raised AttributeError: module 'my_rows' has no attribute 'nothing'"),
        ("no_such_module:rows", "raised ModuleNotFoundError: No module named 'no_such_module'"),
        ("my_rows:broken()", "raised KeyError: 'no such file'"),
        ("my_rows:odd", "raised OSError for row 0: disk"),
        ("my_rows:splits", "is no data set, but has test. Name one of them"),
        ("my_rows:nested", "row 0 of my_rows:nested is a list; a text or a list of token ids was expected"),
        ("nothing.jsonl", "There is no nothing.jsonl on this machine. Give a .parquet, .jsonl"),
        ("https://host/data.parquet", "There is no https://host/data.parquet on this machine"),
        ("my_rows.py", "is of no kind that is read here. Give a .parquet"),
    ],
)
def test_other_data_are_answered_in_one_line(data, said):
    assert said in refusal(data, [0])


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    assert "a.txt is no UTF-8 text" in refusal("a.txt", [0])
    (tmp_path / "a.parquet").write_bytes(b"no")
    assert "a.parquet is not Parquet" in refusal("a.parquet", [0])


def test_token_ids_are_numbers_without_a_tokenizer():
    assert texts_at("my_rows:tokens", [2]) == ["3 token ids, to decode with --tokenizer DIR: 0 1 2"]
    data = written("a.jsonl", json.dumps({"input_ids": list(range(1000))}))
    [text] = texts_at(data, [0])
    assert text.startswith("1,000 token ids") and text.endswith(" 39 …")


def test_token_ids_are_decoded_by_a_local_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "good": 1, "day": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path / "tokenizer")
    folder = tmp_path / "tokenizer"
    data = written("a.jsonl", '{"input_ids": [1, 2]}\n{"input_ids": [1, 7]}\n{"input_ids": [-100]}\n')
    assert texts_at(data, [0], tokenizer=folder) == ["good day"]
    assert "row 1 of a.jsonl has token 7, and the tokenizer in" in refusal(data, [1], tokenizer=folder)
    assert "has token -100" in refusal(data, [2], tokenizer=folder)
    assert "There is no tokenizer at" in refusal(data, [0], tokenizer=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "There is no tokenizer in" in refusal(data, [0], tokenizer=tmp_path / "empty")


def test_a_folder_takes_datasets(monkeypatch, tmp_path):
    (tmp_path / "folder").mkdir()
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "which takes Hugging Face datasets to read: pip install datasets" in refusal("folder", [0])


def test_a_saved_dataset_is_read_by_row_and_its_training_split_of_several(tmp_path):
    datasets = pytest.importorskip("datasets")
    train = datasets.Dataset.from_dict({"label": [0, 1], "text": ["zero", "one"]})
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=train, test=train.select([1])).save_to_disk(str(tmp_path / "splits"))
    assert texts_at("one", [1]) == texts_at("splits", [1]) == ["one"]
    assert "come from rows up to 2, and one has 2 rows" in refusal("one", [2])
    (tmp_path / "other").mkdir()
    assert "datasets can't load other" in refusal("other", [0])
