"""The recipes that ship with memsink: their folder, names and descriptions."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_LIST_THEM = ". List them: memsink recipes ls"
CONFIG_FLAGS = ("-c", "--config")


def recipes_folder() -> Path:
    """The folder of the recipes: in the package if it was installed from a wheel, beside it in a checkout."""
    in_wheel = _PACKAGE / "recipes"
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of all recipes, ``watch``, ``mitigate/hold``, ...: paths in their folder without ``.yaml``."""
    folder = recipes_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def recipe_table() -> str:
    """One line per recipe: its name, and the first line of its comment."""
    names = recipe_names()
    width = max(map(len, names), default=0)
    return "\n".join(f"{name:<{width}}  {_description(recipes_folder() / f'{name}.yaml')}" for name in names)


def find_recipe(name: str) -> Path | None:
    """The shipped recipe called ``watch``, ``watch.yaml`` or ``recipes/watch.yaml``; None if there is none."""
    stem = name.removeprefix("./").removeprefix("recipes/").removesuffix(".yaml")
    return recipes_folder() / f"{stem}.yaml" if stem in recipe_names() else None


def is_overlay(name: str) -> bool:
    """Whether a name is that of a recipe which only changes others: one in a folder, such as ``mitigate/hold``."""
    recipe = None if Path(name).is_file() else find_recipe(name)
    return recipe is not None and recipe.parent != recipes_folder()


def is_for_audit(name: str) -> bool:
    """Whether a name is that of a recipe for `memsink audit`, not for `memsink fit`."""
    recipe = None if Path(name).is_file() else find_recipe(name)
    return recipe is not None and recipe.stem.startswith("audit_")


def map_configs(words: Sequence[str], replace: Callable[[str], str]) -> list[str]:
    """The same command line with ``replace`` applied to the value of each ``-c`` and ``--config``."""
    mapped: list[str] = []
    expects_value = False
    for word in words:
        flag, equals, value = word.partition("=")
        if expects_value:
            mapped.append(replace(word))
        elif equals and flag in CONFIG_FLAGS:
            mapped.append(f"{flag}={replace(value)}")
        else:
            mapped.append(word)
        expects_value = not expects_value and word in CONFIG_FLAGS
    return mapped


def config_path(name: str) -> str:
    """The path of the file of that name or, if there is none, of the shipped recipe.

    Raises:
        SystemExit: there is neither.
    """
    if Path(name).is_file():
        return name
    recipe = find_recipe(name)
    if recipe is None:
        near = [str(path) for path in Path(name).parent.glob("*.yaml")] if Path(name).parent.is_dir() else []
        hint = did_you_mean(name, [*near, *recipe_names()])
        raise SystemExit(f"There is no config `{name}`, neither as a file nor as a recipe{hint or _LIST_THEM}")
    return str(recipe)


def copy_recipe(name: str, destination: str = ".", force: bool = False) -> Path:
    """Copies a recipe into a folder or to a file, and returns the path of the copy.

    Raises:
        SystemExit: there is no such recipe, or the file exists and ``force`` is false.
    """
    source = find_recipe(name)
    if source is None:
        hint = did_you_mean(name, recipe_names())
        raise SystemExit(f"There is no recipe `{name}`{hint or _LIST_THEM}")
    target = Path(destination)
    target = target / source.name if target.is_dir() or destination.endswith("/") else target
    if target.exists() and not force:
        raise SystemExit(f"{target} exists. Overwrite it with --force, or name another file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The hint ``; did you mean `watch`?`` at the most similar known word; empty if none is similar."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _description(recipe: Path) -> str:
    first = recipe.read_text("utf-8").split("\n", 1)[0]
    return first.lstrip("# ") if first.startswith("#") else ""
