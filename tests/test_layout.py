"""Where files of the package are. Which room may import which is checked by import-linter (pyproject.toml)."""

from __future__ import annotations

from pathlib import Path

import lightning_memsink

PACKAGE = Path(lightning_memsink.__file__).parent
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
