"""Module paths and names of earlier versions: they resolve to the new ones, with a DeprecationWarning.

Imports nothing but the standard library, because ``import lightning_memsink`` imports it.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

TYPE_CHECKING = False  # as type checkers know it: importing typing takes longer than this module
if TYPE_CHECKING:
    from types import CodeType
    from typing import Any

_PACKAGE = __name__.rpartition(".")[0]

MODULES = {
    "data": "examples.corpora",
    "data.famous": "examples.corpora.famous",
    "data.python_docs": "examples.corpora.python_docs",
    "data.text": "examples.corpora.text",
    "demo": "examples.text",
    "demo_audit": "examples.audit_export",
    "demo_digits": "examples.digits",
    "extraction_metrics": "extraction.metrics",
    "hidden_layers": "attribution.hidden_layers",
    "integrations": "reporting.loggers",
    "integrations.trackio": "reporting.loggers.trackio",
    "integrations.wandb": "reporting.loggers.wandb",
    "judging_localizers": "localization.evaluation",
    "judging_localizers.blind": "localization.evaluation.ownership",
    "judging_localizers.deletion": "localization.evaluation.ablation_curves",
    "judging_localizers.injection": "localization.evaluation.injection",
    "judging_localizers.ranking": "localization.evaluation.ranking",
    "judging_localizers.stress": "localization.evaluation.prompt_perturbation",
    "localizers": "localization.localizers",
    "localizers.attributing": "localization.localizers.attribution_methods",
    "localizers.pruning": "localization.localizers.pruning",
    "localizers.task": "localization.localizers.task",
    "membership": "extraction.membership",
    "parquet": "reporting.parquet",
}
"""Old module to new module, both below the package. No module of today has an old path."""

NAMES = {
    "Blind": "localization.evaluation.OwnershipRecovery",
    "Deletion": "localization.evaluation.AblationTest",
    "Samples": "localization.localizers.Batch",
    "Separation": "extraction.separation.Separation",
    "Stress": "localization.evaluation.PromptPerturbation",
    "distinct_rows": "samples.unique.distinct_rows",
    "judge_blind": "localization.evaluation.evaluate_ownership",
    "judge_deletion": "localization.evaluation.evaluate_ablation",
    "judge_injection": "localization.evaluation.evaluate_injection",
    "measure": "localization.evaluation.ablation_curves.mean_losses",
    "prefix_stress": "localization.evaluation.perturb_prompts",
    "random_scores": "localization.localizers.reference.random_scores",
    "separation": "extraction.separation.separation",
    "undisturbed": "_evaluation.isolated_eval",
    "weight_norm": "localization.localizers.reference.weight_norm",
    "without": "samples.unique.without",
}
"""Names that an old module had and its new module lacks, with the full path of each below the package."""


def install() -> None:
    """Makes the old module paths importable, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())  # last: only modules that no other finder has


def resolve(old_module: str, new_module: str, old_name: str) -> Any:
    """The object that ``old_module`` had under ``old_name``; warns that it has another path now.

    To be called by ``__getattr__`` of a module: the warning names the line that reads the attribute.

    Raises:
        AttributeError: neither ``new_module`` nor the table of renamed names has it.
    """
    home: Any = import_module(f"{_PACKAGE}.{new_module}")
    name, path = old_name, f"{new_module}.{old_name}"
    if not hasattr(home, name):
        if name not in NAMES:
            raise AttributeError(f"module '{_PACKAGE}.{old_module}' has no attribute {name!r}")
        path = NAMES[name]
        module, _, name = path.rpartition(".")
        home = import_module(f"{_PACKAGE}.{module}")
    warnings.warn(
        f"{_PACKAGE}.{old_module}.{old_name} is now {_PACKAGE}.{path}. "
        "Write the new path: the old one will be removed.",
        DeprecationWarning,
        stacklevel=3,
    )
    return getattr(home, name)


class _MovedModule(ModuleType):
    """An old module: its attributes are those of the new one."""

    def __getattr__(self, name: str) -> Any:
        old = self.__name__.removeprefix(f"{_PACKAGE}.")
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return resolve(old, MODULES[old], name)


class _Finder:
    """Finds and loads the modules of `MODULES`."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != _PACKAGE or old not in MODULES:
            return None
        return ModuleSpec(fullname, self, is_package=self.is_package(fullname))  # type: ignore[arg-type]

    def is_package(self, fullname: str) -> bool:
        old = fullname.partition(".")[2]
        return any(module.startswith(f"{old}.") for module in MODULES)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: attributes are looked up when they are used, and warn there."""

    def get_code(self, fullname: str) -> CodeType | None:
        """For ``python -m`` with an old path."""
        from importlib.util import find_spec

        spec = find_spec(f"{_PACKAGE}.{MODULES[fullname.partition('.')[2]]}")
        return None if spec is None else spec.loader.get_code(spec.name)  # type: ignore[union-attr]
