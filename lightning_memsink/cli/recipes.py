"""The recipes that ship with memsink: where they are, and how they are named."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_SEE = ". List them: memsink recipes ls"


def recipes_folder() -> Path:
    """In a wheel beside the modules, in a checkout beside the package."""
    shipped = _PACKAGE / "recipes"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "recipes"


def recipe_names() -> list[str]:
    """``watch``, ``mitigate/hold``, ...: paths below the recipes' folder, without ``.yaml``."""
    folder = recipes_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def recipe_table() -> str:
    """A line for each recipe: its name, and the first line of its comment."""
    names = recipe_names()
    width = max(map(len, names), default=0)
    return "\n".join(f"{name:<{width}}  {_description(recipes_folder() / f'{name}.yaml')}" for name in names)


def find_recipe(name: str) -> Path | None:
    """The shipped recipe called ``watch``, ``watch.yaml`` or ``recipes/watch.yaml``; None if there is none."""
    plain = name.removeprefix("./").removeprefix("recipes/").removesuffix(".yaml")
    return recipes_folder() / f"{plain}.yaml" if plain in recipe_names() else None


def is_overlay(name: str) -> bool:
    """Whether a recipe only changes others: those in folders, as ``mitigate/hold``, do."""
    recipe = None if Path(name).is_file() else find_recipe(name)
    return recipe is not None and recipe.parent != recipes_folder()


def is_for_audit(name: str) -> bool:
    """Whether a recipe is one of `memsink audit`, and not of `memsink fit`."""
    recipe = None if Path(name).is_file() else find_recipe(name)
    return recipe is not None and recipe.stem.startswith("audit_")


def config_path(name: str) -> str:
    """The file of that name or, where there is none, the shipped recipe."""
    if Path(name).is_file():
        return name
    recipe = find_recipe(name)
    if recipe is None:
        near = [str(path) for path in Path(name).parent.glob("*.yaml")] if Path(name).parent.is_dir() else []
        hint = did_you_mean(name, [*near, *recipe_names()])
        raise SystemExit(f"There is no config `{name}`, neither as a file nor as a recipe{hint or _SEE}")
    return str(recipe)


def copy_recipe(name: str, destination: str = ".", force: bool = False) -> Path:
    """Copies a recipe into a folder or to a file; one that exists is overwritten only with ``force``."""
    source = find_recipe(name)
    if source is None:
        hint = did_you_mean(name, recipe_names())
        raise SystemExit(f"There is no recipe `{name}`{hint or _SEE}")
    target = Path(destination)
    target = target / source.name if target.is_dir() or destination.endswith("/") else target
    if target.exists() and not force:
        raise SystemExit(f"{target} exists. Overwrite it with --force, or name another file.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    return target


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean `watch`?``, or nothing where nothing is near."""
    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _description(recipe: Path) -> str:
    first = recipe.read_text("utf-8").split("\n", 1)[0]
    return first.lstrip("# ") if first.startswith("#") else ""
