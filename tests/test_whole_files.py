"""A file is complete or absent: on a full disk, after a kill, and wherever this package writes."""

import ast
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lightning_memsink
from lightning_memsink import memsink
from lightning_memsink._files import written_whole
from lightning_memsink.ledger import Ledger
from lightning_memsink.localization.sinks import Sinks
from lightning_memsink.reporting.parquet import read_ledger, write_ledger
from tests.support.small_runs import fit, watch

PACKAGE = Path(lightning_memsink.__file__).parent


def test_a_name_is_taken_only_by_what_is_finished(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as unfinished:
        unfinished.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]
    with written_whole(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file.txt"]


def test_what_a_kill_leaves_is_overwritten_the_next_time(tmp_path):
    path = tmp_path / "file.txt"
    script = (
        "import os, pathlib, signal, sys\n"
        "from lightning_memsink._files import written_whole\n"
        "with written_whole(pathlib.Path(sys.argv[1])) as unfinished:\n"
        "    unfinished.write_text('ne')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)])
    assert done.returncode == -signal.SIGKILL and not path.exists()
    with written_whole(path) as unfinished:
        unfinished.write_text("new")
    assert os.listdir(tmp_path) == ["file.txt"]


def test_every_file_of_the_package_is_written_whole():
    """Whatever writes lies within ``written_whole``; the answers of an audit are appended, and read line by line."""
    writes = {"write_text", "write_bytes", "write_table", "savefig", "save"}
    found = {}
    for source in PACKAGE.rglob("*.py"):
        tree = ast.parse(source.read_text())
        within = {
            id(call)
            for block in ast.walk(tree)
            if isinstance(block, ast.With) and "written_whole" in ast.unparse(block.items[0])
            for call in ast.walk(block)
        }
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and id(call) not in within:
                mode = [each.value for each in call.args if isinstance(each, ast.Constant)]
                opened = call.func.attr == "open" and any(str(one)[:1] in ("w", "a", "x") for one in mode)
                if call.func.attr in writes or opened:
                    found.setdefault(source.relative_to(PACKAGE).as_posix(), []).append(ast.unparse(call.func))
    assert found == {
        "extraction/audit/answer_cache.py": ["self.path.open"],
        "reporting/run_files.py": ["sinks.save"],  # Sinks.save writes whole
        "cli/audit.py": ["result.localized_units.sinks.save"],
        "reporting/figures.py": ["figure.savefig"],  # into memory
        "testing/callback_checks.py": ["torch.save", "checkpoint.write_bytes"],  # into memory, and a temporary folder
    }


@pytest.fixture
def full_disk(tmp_path):
    """A file system of its own with room for 64 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_the_report_and_nothing_else(full_disk, tmp_path, capsys):
    """The first files fit. What does not is said once, the summary is printed, and no half of a file lies there."""
    callbacks = memsink(identity="content", path=full_disk / "run.md")
    with pytest.warns(UserWarning, match=r"RunReport can't write .*No space left on device.*summary below is all"):
        run, full = fit(callbacks)
    assert "memorized" in capsys.readouterr().out
    assert not list(full_disk.rglob("*.part"))
    _, plain = fit(memsink(identity="content", path=tmp_path / "run.md"))
    assert all(torch.equal(one, other) for one, other in zip(full.parameters(), plain.parameters(), strict=True))
    assert run.global_step == 63


def test_a_full_disk_leaves_the_old_ledger_and_sinks(full_disk):
    ledger = Ledger.of(fit(watch())[0])
    sinks = Sinks({"a": torch.tensor([1])}, {"a": torch.ones(1)}, {"a": 2}, "none")
    sinks.save(full_disk / "sinks.safetensors")
    large = Sinks({"a": torch.arange(9000)}, {"a": torch.ones(9000)}, {"a": 9000}, "none")
    with pytest.raises(OSError, match="No space left"):
        large.save(full_disk / "sinks.safetensors")
    assert len(Sinks.load(full_disk / "sinks.safetensors")) == 1
    (full_disk / "ballast").write_bytes(bytes(50_000))
    with pytest.raises(OSError, match="No space left"):
        write_ledger(full_disk / "ledger", ledger.losses, ledger.controls, ledger.flags)
    assert os.listdir(full_disk / "ledger") == []


def test_an_audit_stopped_by_a_full_disk_goes_on(full_disk):
    """The line that was cut in two is probed again."""
    from lightning_memsink.extraction.audit.answer_cache import AnswersFile

    path = full_disk / "answers.jsonl"
    answers = AnswersFile(path, {"model": "m"})
    answers.add({"one": {"loss": 1.0}})
    (full_disk / "ballast").write_bytes(bytes(40_000))
    with pytest.raises(OSError, match="No space left"):
        answers.add({f"text {n}": {"loss": 0.5} for n in range(1000)})
    (full_disk / "ballast").unlink()
    again = AnswersFile(path, {"model": "m"})
    assert again.get("one") == {"loss": 1.0}
    assert 0 < sum(again.get(f"text {n}") is not None for n in range(1000)) < 1000
    again.add({"text 999": {"loss": 0.5}})
    assert AnswersFile(path, {"model": "m"}).get("text 999") == {"loss": 0.5}


def test_a_limit_on_file_sizes_is_a_full_disk_too(tmp_path):
    """Where nobody may mount: the kernel refuses to let a file grow."""
    ledger = Ledger.of(fit(watch())[0])
    write_ledger(tmp_path, ledger.losses, ledger.controls, ledger.flags)
    before = (tmp_path / "samples.parquet").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_ledger(tmp_path, ledger.losses, ledger.controls, ledger.flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "samples.parquet").read_bytes() == before
    assert len(read_ledger(tmp_path)[0]) == 204
    assert sorted(os.listdir(tmp_path)) == ["controls.parquet", "samples.parquet"]


def test_nobody_who_reads_is_no_end_of_training(tmp_path, monkeypatch):
    """The pipe of ``train.py | head`` breaks: code after the fit, which may save the model, still runs."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.warns(UserWarning, match=r"RunReport can't print its summary: .*Broken pipe.*run.md"):
            run, _ = fit(memsink(identity="content", path=tmp_path / "run.md"))
        monkeypatch.undo()
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), writing)  # takes what is left in the buffer
    assert run.global_step == 63 and (tmp_path / "run.html").exists()


def test_a_terminal_that_knows_no_dash_gets_the_summary_without_it(tmp_path, monkeypatch):
    printed = tmp_path / "printed.txt"
    with printed.open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        fit(memsink(identity="content", path=tmp_path / "erzählt.md"))
        monkeypatch.undo()
    assert "memorized" in printed.read_text() and "erz?hlt.md" in printed.read_text()
