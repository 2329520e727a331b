"""Places and names of modules, and words. Which room may import which is checked by import-linter (pyproject.toml)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lightning_memsink

PACKAGE = Path(lightning_memsink.__file__).parent
ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

MOVED = """
ablation actions agreement attribution baking blocks broadcasts canaries capture cells certificate certifying
concentration controls default_set demo demo_audit demo_digits designed_sinks detection distinct extracted extraction
extraction_metrics features freezing gathering ghost_norms goldfish gradient_norms hidden_layers holding holding_out
identity interrupts judging layer_gradients localization loss_call loss_graph loss_reading loss_scale loss_weights
losses matching membership module_calls movement namespaces neighbours onset parquet probing propagation removal
restoring ridge routing sink_layers sinks sketches strategies table tagging tokens unit_dropout unit_parameters
unit_recorder verdicts visits watching whole_files witnesses asking
auditing/__init__ auditing/answers_file auditing/audit auditing/closer_look auditing/report auditing/standing_out
auditing/subject auditing/tables auditing/texts
cli/auditing cli/explaining cli/fitting cli/reports cli/validating
data/__init__ data/famous data/python_docs data/text
integrations/__init__ integrations/trackio integrations/wandb integrations/wandb_reader
judging_localizers/__init__ judging_localizers/blind judging_localizers/deletion judging_localizers/injection
judging_localizers/ranking judging_localizers/stress
localizers/__init__ localizers/attributing localizers/pruning localizers/task
reporting/acting reporting/acting_figure reporting/curves reporting/heat_maps reporting/page reporting/settings
reporting/summary reporting/where reporting/wandb_run
""".split()
"""Modules that are in rooms by subject since version 0.1.0, at their former paths."""


def test_the_root_of_the_package_has_at_most_ten_modules():
    assert len([name for name in FILES if "/" not in name]) <= 10


def test_no_module_is_left_at_a_path_from_before_the_rooms():
    assert [module for module in MOVED if f"{module}.py" in FILES] == []


def test_no_module_has_more_than_300_lines():
    lines = {name: len((PACKAGE / name).read_text().splitlines()) for name in FILES}
    assert {name: count for name, count in lines.items() if count > 300} == {}


def test_no_module_is_named_utils():
    assert [name for name in FILES if "utils" in name] == []


RETIRED = re.compile(
    r"""\b(?:fellows?|in\ hand|told|lots|lent|(?<!")witness(?:es)?|let\ go|standing\ out|closer\ look|spelled_out|
    held\ back|holding_out|foretells?|nobody\ can\ tell|in\ vain|whose\ it\ is|stands\ as\ memorized)\b
    | \b_(?:let_go|hear|look_at|say_once|tell|meet)\b | \b(?-i:Rung|Bench|Seen)\b""",
    re.IGNORECASE | re.VERBOSE,
)
"""Words that were replaced by the terms of PyTorch, Lightning and the literature on memorization. ``"witnesses"`` is a
key in checkpoints."""

TEXTS = [
    *(path for kind in ("*.py", "*.jinja") for path in PACKAGE.rglob(kind)),
    *(path for path in (ROOT / "recipes").rglob("*") if path.suffix in (".yaml", ".md", ".sh", ".sbatch")),
    ROOT / "README.md",
]


def lines_with(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    """``PATH:LINE: WORD`` of every match."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {match[0]}"
        for path in sorted(paths)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in pattern.finditer(line)
    ]


def test_no_retired_word_is_used():
    assert lines_with(RETIRED, TEXTS) == []


@pytest.mark.parametrize(("room", "word"), [("extraction", r"\bask(?:s|ed|ing)?\b"), ("detection", r"\bcells?\b")])
def test_a_room_uses_the_term_of_its_field(room, word):
    """``probe`` or ``query`` for a model, ``partition`` for a k-d tree."""
    assert lines_with(re.compile(word, re.IGNORECASE), [*(PACKAGE / room).rglob("*.py")]) == []


def test_nothing_is_named_what():
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        parameters = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        annotated = [node.target for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
        fields = {target.id for target in annotated if isinstance(target, ast.Name)}
        assert "what" not in parameters | attributes | fields, path
