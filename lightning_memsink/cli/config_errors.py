"""From a parser's complaint to lines that say what is wrong, where, and what was probably meant."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes with jsonargparse
from jsonargparse import ArgumentParser

from lightning_memsink.cli.recipes import did_you_mean


def explain(parser: ArgumentParser, words: list[str], complaint: str) -> list[str]:
    """One line for each error of the configs and options in ``words``, which ``parser`` refused with ``complaint``."""
    lines = []
    known: dict[str, str] = {}
    for file in _configs(words):
        try:
            with open(file, encoding="utf-8") as stream:
                content = yaml.safe_load(stream)
        except yaml.YAMLError as error:
            lines.append(f"{file}: no valid YAML {' '.join(str(error).split())}")
            continue
        if isinstance(content, dict):
            lines += [f"{file}: {line}" for line in _misspelt(parser, content, "", "", known)]
        else:
            lines.append(f"{file}: a config maps options to values, like `trainer: {{max_epochs: 1}}`; this is none")
    return lines or [_cause(parser, complaint)]


def _configs(words: list[str]) -> Iterator[str]:
    for before, word in zip(["", *words], words, strict=False):
        if before in ("-c", "--config"):
            yield word
        elif word.startswith(("-c=", "--config=")):
            yield word.partition("=")[2]


def _misspelt(
    parser: ArgumentParser, content: dict[str, Any], group: str, shown: str, known: dict[str, str]
) -> Iterator[str]:
    """Keys that are no option, and class paths that can't be imported, at any depth.

    ``group`` is the place of ``content`` in ``parser``, ``shown`` its place in the config. ``known`` collects the
    class paths met so far by their place, for an overlay that gives only ``init_args``.
    """
    options = _options(parser)
    for key, value in content.items():
        option, where = f"{group}{key}".removesuffix("+"), f"{shown}{key}"
        inside = [name for name in options if name.startswith(f"{option}.")]
        if inside and isinstance(value, dict):
            yield from _misspelt(parser, value, f"{option}.", f"{where}.", known)
        elif option not in options and not inside:
            siblings = {name.removeprefix(group).split(".")[0] for name in options if name.startswith(group)}
            yield f"`{where}` is no option{did_you_mean(str(key), siblings) or _elsewhere(str(key), options)}"
        else:
            yield from _in_value(value, where, known)


def _in_value(value: Any, where: str, known: dict[str, str]) -> Iterator[str]:
    if isinstance(value, list):
        for n, item in enumerate(value):
            yield from _in_value(item, f"{where}[{n}]", known)
    elif isinstance(value, dict) and ("class_path" in value or "init_args" in value):
        path = value.get("class_path", known.get(where))
        if not isinstance(path, str):
            return
        known[where] = path
        found = _imported(path) if "." in path else None
        if isinstance(found, str):
            yield f"`{where}.class_path`: {found}"
        elif found is not None and isinstance(value.get("init_args"), dict):
            yield from _misspelt(_parameters(found), value["init_args"], "", f"{where}.init_args.", known)


def _imported(path: str) -> type | str:
    """The class, or why there is none."""
    module, _, name = path.rpartition(".")
    try:
        home = import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        parent, _, last = missing.rpartition(".")
        around = import_module(parent).__path__ if parent else None
        hint = did_you_mean(last, {found.name for found in pkgutil.iter_modules(around)})
        return f"there is no module `{missing}`{hint}"
    if not hasattr(home, name):
        return f"`{module}` has no `{name}`{did_you_mean(name, dir(home))}"
    found: type = getattr(home, name)
    return found


def _parameters(kind: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=False)
    return parser


def _options(parser: ArgumentParser) -> set[str]:
    names = {action.dest for action in parser._actions}
    return {name for name in names if name != "help" and not name.endswith(".help")}


def _elsewhere(key: str, options: set[str]) -> str:
    """An option of that name in another group."""
    same = sorted(name for name in options if name.rpartition(".")[2] == key)
    return f"; did you mean `{same[0]}`?" if same else ""


_STRUCTURE = re.compile(r"Parser key |Does not validate against|Subtypes: |Errors:|Problem with given class_path ")


def _cause(parser: ArgumentParser, complaint: str) -> str:
    """The innermost reason in jsonargparse's tree of reasons, in one line."""
    unrecognized = re.search(r"[Uu]nrecognized arguments: --([^\s=]+)", complaint)
    if unrecognized:
        name = unrecognized[1]
        options = _options(parser)
        return f"`--{name}` is no option{did_you_mean(name, options) or _elsewhere(name.rpartition('.')[2], options)}"
    keys: list[str] = []
    reason, rest = complaint, ""
    kind: type | str | None = None
    for line in complaint.splitlines():
        keys += re.findall(r'Parser key "(?:fit\.)?([^"]+)"', line)
        given = re.search(r"class_path '([^']+)'", line)
        kind = _imported(given[1]) if given and "." in given[1] else kind
        rest = re.sub(r'^[\s-]*(Parser key "[^"]+": ?)?', "", line)
        if rest and not _STRUCTURE.match(rest):
            reason = rest
            break
    unknown = re.search(r"Option '([^']+)' is not accepted", reason)
    if unknown:
        hint = did_you_mean(unknown[1], _options(_parameters(kind))) if isinstance(kind, type) else ""
        return f"`{'.'.join([*keys, unknown[1]])}` is no option{hint}"
    missing = re.search(r"arguments are required: (.+)", reason)
    if missing:
        names = [".".join([*keys, name.removeprefix("fit.")]) for name in missing[1].split(", ")]
        return ", ".join(f"`{name}`" for name in names) + ": missing, and required"
    return f"`{'.'.join(keys)}`: {_plain(reason, complaint)}" if keys else _plain(reason, complaint)


def _plain(reason: str, complaint: str) -> str:
    """``expected int or None, got 'many'``."""
    expected = re.match(r"Expected an? (.+?)(?:\. Got value: (.*))?$", reason)
    if not expected or expected[1].startswith("dot import path"):
        return re.sub(
            r"^Expected a dot import path string: (.*)", r"there is no class `\1`; give its full path", reason
        )
    types = [expected[1], *(["None"] if "Expected a <class 'NoneType'>" in complaint and not expected[2] else [])]
    got = expected[2] or next(iter(re.findall(r"Given value: (.*)", complaint)), "")
    choices = re.findall(r"'([^']+)'", expected[1]) if "Literal[" in expected[1] else []
    wanted = " or ".join(re.sub(r"<class '([^']+)'>", r"\1", kind) for kind in types)
    wanted = f"one of {', '.join(choices)}" if choices else wanted
    return f"expected {wanted}, got `{got}`{did_you_mean(got, choices)}"
