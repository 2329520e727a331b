"""``memsink samples``: what it prints of a ledger, and of the user's own data."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_memsink.callbacks.live_curves import LiveCurves
from lightning_memsink.callbacks.loss_tracker import LossTracker
from lightning_memsink.callbacks.memorization_detector import MemorizationDetector
from lightning_memsink.callbacks.run_report import RunReport
from lightning_memsink.cli import main
from lightning_memsink.ledger import Ledger
from lightning_memsink.samples.hashing import text_ids
from lightning_memsink.samples.tokens import Tokens
from tests.support.small_runs import TRAIN, fit, watch

OLD = Path(__file__).parents[1] / "formats" / "f36e55b"
SAMPLES = {
    "sample_id": [100, 101, 102],
    "exposures": [1, 20, 3],
    "last_loss": [1.0, 0.25, float("nan")],
    "elements": [8.0, 8.0, 8.0],
    "gap": [0.5, 4.0, float("nan")],
    "p": [0.5, 0.001, float("nan")],
    "verdict": ["learned", "memorized", "unseen"],
    "reason": ["", "", ""],
    "onset_step": [-1, 1234, -1],
    "first_row": [0, 2, -1],
    "rows": pa.array([1, 4, 0], pa.int16()),
    "source": ["web", "[red]books[/red]", "web"],
    "family": pa.array([0, 0, 2], pa.int32()),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(SAMPLES)
    Path("data.txt").write_text("zero\none\ntwo " + 500 * "x" + "\n")


def write(columns):
    pq.write_table(pa.table(columns), "samples.parquet")


def printed(capsys, *words):
    """The lines that it prints; its exit code is 0."""
    assert main(["samples", "samples.parquet", *words]) == 0
    return capsys.readouterr().out.splitlines()


def refusal(*words):
    with pytest.raises(SystemExit) as refused:
        main(["samples", *words])
    assert isinstance(refused.value.code, str) and "\n" not in refused.value.code  # exit code 1
    return refused.value.code


def test_the_table_is_plain_and_has_no_markup_of_its_own(capsys):
    assert printed(capsys) == [
        "1 of 3 samples memorized; 3 with the largest gaps",
        "    sample          row  source            exposures   gap  verdict    onset step",
        "1.  101     2 (+3 rows)  [red]books[/red]         20  4.00  memorized       1,234",
        "2.  100               0  web                       1  0.50  learned",
        "3.  102                  web                       3        unseen",
    ]


def test_long_names_and_sources_fit_100_columns(capsys):
    write({**SAMPLES, "source": ["web" * 40, "s", "t"], "sample_name": ["n" * 300, None, "a\nb\x1b[31m"]})
    lines = printed(capsys)
    assert max(map(len, lines)) <= 100 and "\x1b" not in "".join(lines)
    assert any("a\\nb\\x1b[31m" in line for line in lines)


def test_a_source_and_a_number_choose_samples(capsys):
    assert printed(capsys, "--source", "web", "--top", "1")[0] == "0 of 2 samples memorized; 1 with the largest gaps"
    assert "did you mean `web`?" in refusal("samples.parquet", "--source", "wep")


def test_families_are_listed_with_their_texts(capsys):
    title, head, row = printed(capsys, "--family")
    assert title == "1 of 1 families, those with the largest gaps"
    assert head.split() == "family of row source texts exposures gap memorized onset step".split()
    assert row.split() == "1. 101 2 (+3 rows) [red]books[/red] 2 21 2.25 1 1,234".split()


def test_texts_are_shown_from_the_users_own_data_and_long_ones_are_cut(capsys):
    lines = printed(capsys, "--text", "data.txt")
    begin = lines.index("1. 101, row 2")
    assert lines[begin + 1].startswith("    two xxx") and max(map(len, lines)) <= 100
    assert " ".join(lines[begin:]).count("x") == 396 and "… (504 characters in all)" in " ".join(lines[begin:])
    assert lines[lines.index("2. 100, row 0") + 1] == "    zero"
    assert lines[lines.index("3. 102") + 1] == "    (its row is not known)"


def test_json_has_all_digits_and_whole_texts(capsys):
    first, _, last = json.loads("\n".join(printed(capsys, "--json", "--text", "data.txt")))
    assert (first["id"], first["first_row"], first["more_rows"], first["gap"]) == (101, 2, 3, 4.0)
    assert len(first["text"]) == 504 and last["text"] is None and last["gap"] is None
    [family] = json.loads("\n".join(printed(capsys, "--json", "--family")))
    assert (family["texts"], family["exposures"], family["member"]["id"]) == (2, 21, 101)


def test_the_wrong_data_are_refused_in_one_line():
    Path("data.txt").write_text("zero\n")
    assert "rows up to 2, and data.txt has fewer rows" in refusal("samples.parquet", "--text", "data.txt")
    assert "There is no nowhere.txt" in refusal("samples.parquet", "--text", "nowhere.txt")
    assert "There is no nowhere. Name the folder" in refusal("nowhere")


@pytest.mark.parametrize("number", ["0", "-1", "many", "1.5"])
def test_a_number_of_samples_that_is_none_is_a_usage_error(number, capsys):
    with pytest.raises(SystemExit) as refused:
        main(["samples", "samples.parquet", f"--top={number}"])
    assert refused.value.code == 2 and "expected 1 or more" in capsys.readouterr().err


def test_where_the_ledger_names_no_rows_small_ids_are_taken_as_rows_and_this_is_said(capsys):
    write({**{name: SAMPLES[name] for name in list(SAMPLES)[:9]}, "sample_id": [0, 2, 1]})
    main(["samples", "samples.parquet", "--text", "data.txt", "--top", "1"])
    output = capsys.readouterr()
    assert "the ledger names no rows, so ids are taken as row numbers" in output.err
    assert "    two xxx" in output.out


def test_an_old_ledger_is_listed_and_its_hashes_are_not_taken_for_rows(capsys):
    main(["samples", str(OLD), "--top", "2"])
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert "doesn't say which rows its samples came from" in refusal(str(OLD), "--text", "data.txt")
    assert "has no sources" in refusal(str(OLD), "--source", "web")
    assert "has no families" in refusal(str(OLD), "--family")


def test_a_ledger_without_samples_is_listed(capsys):
    write({name: pa.table(SAMPLES)[name].slice(0, 0) for name in SAMPLES})
    assert printed(capsys, "--text", "data.txt") == ["0 of 0 samples memorized; 0 with the largest gaps"]
    assert printed(capsys, "--json") == ["[]"]
    assert printed(capsys, "--family") == ["0 of 0 families, those with the largest gaps"]


def test_the_report_of_a_run_is_listed_as_the_detector_left_it(capsys, tmp_path):
    callbacks = [*watch(), LiveCurves(), RunReport(tmp_path / "run" / "report.md")]
    ledger = Ledger.of(fit(callbacks, max_epochs=4)[0])
    capsys.readouterr()
    main(["samples", "run", "--json", "--top", "1000"])
    listed = json.loads(capsys.readouterr().out)
    table, flags = ledger.losses, ledger.flags
    assert {each["id"]: each["exposures"] for each in listed} == dict(
        zip(table.ids.tolist(), table.exposures.tolist(), strict=True)
    )
    memorized = [each["id"] for each in listed if each["verdict"] == "memorized"]
    assert (
        len(memorized) == int(flags.memorized.sum()) > 0
        and memorized == [each["id"] for each in listed][: len(memorized)]
    )
    gaps = [each["gap"] for each in listed][: len(memorized)]
    assert gaps == sorted(gaps, reverse=True)


def test_rows_and_texts_are_those_of_the_data_that_a_run_trained_on(capsys, tmp_path):
    callbacks = [LossTracker(), MemorizationDetector(k=4), LiveCurves(), RunReport(tmp_path / "run" / "report.md")]
    fit(callbacks, max_epochs=3)
    capsys.readouterr()
    main(["samples", "run", "--json", "--top", "300", "--text", "tests.support.small_runs:TRAIN"])
    listed = json.loads(capsys.readouterr().out)
    equal = (TRAIN[:, None] == TRAIN[None]).all(-1).sum(1).tolist()
    assert {each["more_rows"] + 1 for each in listed[:4]} == {32}  # the canaries
    for each in listed:
        assert each["more_rows"] + 1 == equal[each["first_row"]]
        numbers = " ".join(map(str, TRAIN[each["first_row"]].tolist()))
        assert each["text"] == f"12 token ids, to decode with --tokenizer DIR: {numbers}"
        assert each["id"] == int(text_ids(Tokens(TRAIN[each["first_row"]][None], torch.ones(1, 12) == 1)))


def test_it_needs_no_torch_and_a_closed_pipe_ends_it_quietly():
    code = (
        "import sys; from lightning_memsink.cli import main; code = main(['samples', 'samples.parquet']);"
        "assert not {'torch', 'lightning', 'jsonargparse'} & set(sys.modules); sys.exit(code)"
    )
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", code]
    run = subprocess.Popen(command, env={"PYTHONPATH": root}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 0
    run.stderr.close()


def test_an_encoding_without_the_sign_gets_a_question_mark():
    write({**SAMPLES, "sample_name": ["é", "é", "é"]})
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-m", "lightning_memsink", "samples", "samples.parquet", "--text", "data.txt"]
    run = subprocess.run(command, env={"PYTHONPATH": root, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert (
        run.returncode == 0 and b"1.  ?" in run.stdout and b"? (504 characters in all)" in b" ".join(run.stdout.split())
    )
