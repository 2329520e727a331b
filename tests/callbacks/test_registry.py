"""The registry of callbacks, and what derives from it."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from lightning.pytorch import Callback

import lightning_memsink
from lightning_memsink.callbacks.registry import CALLBACKS, mitigations, preset_entries
from lightning_memsink.cli.fit import GROUPS, MITIGATIONS

PACKAGE = Path(lightning_memsink.__file__).parent


@pytest.mark.parametrize("entry", CALLBACKS, ids=lambda entry: entry.name)
def test_an_entry_names_a_callback_that_the_package_exports(entry):
    kind = entry.load()
    assert issubclass(kind, Callback) and kind.__name__ == entry.name
    assert getattr(lightning_memsink, entry.name) is kind
    assert kind.__module__ == f"lightning_memsink.callbacks.{entry.module}"


def test_every_callback_of_the_package_is_registered():
    """A public class of a module in callbacks/ that is a Callback and no base of a registered one."""
    registered = {entry.load() for entry in CALLBACKS}
    bases = {base for kind in registered for base in kind.__mro__[1:]}
    for path in (PACKAGE / "callbacks").glob("*.py"):
        module = import_module(f"lightning_memsink.callbacks.{path.stem}")
        own = [each for each in vars(module).values() if getattr(each, "__module__", "") == module.__name__]
        kinds = {each for each in own if isinstance(each, type) and issubclass(each, Callback)}
        assert kinds - bases <= registered, path.name


def test_type_checkers_see_the_names_that_are_exported():
    """The imports that only type checkers read agree with the modules that names are loaded from."""
    (block,) = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    imported = {
        alias.asname: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module != "typing"
        for alias in node.names
    }
    assert imported == {name: f"lightning_memsink.{module}" for name, module in lightning_memsink._MODULES.items()}
    assert lightning_memsink.__all__ == sorted(imported) and len(imported) == 23


def test_groups_and_mitigations_of_the_command_line():
    assert list(GROUPS) == ["tracker", "detector", "curves", "report", "localizer", "probe"]
    assert {entry.group: entry.option for entry in preset_entries() if entry.option} == {
        "localizer": "localize",
        "probe": "extract",
    }
    names = ["SampleGradientMask", "MemSinks", "SinkGradientMask", "SinkDropout", "Goldfish", "LossTruncation"]
    assert [kind.__name__ for kind in MITIGATIONS] == names == [entry.name for entry in mitigations()]


def test_importing_the_package_loads_no_library():
    """Not even typing, which would take most of the time that the import takes."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules)\n"
        "import lightning_memsink; lightning_memsink.__all__\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    command = [sys.executable, "-I", "-S", "-c", code, str(PACKAGE.parent)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    ours = {"lightning_memsink", "lightning_memsink.callbacks", "lightning_memsink.callbacks.registry"}
    assert ours <= set(loaded)
    assert not {"torch", "lightning", "jsonargparse", "typing", "dataclasses"} & set(loaded)
