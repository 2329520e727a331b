"""Readable messages for errors in configs and options: what is wrong, where, and a suggestion.

Some are parsed from the text of jsonargparse's messages, so pyproject.toml bounds its versions. Messages of versions
before 4.51, which other packages still require, can't be parsed: they are shown as they are.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes with jsonargparse
from jsonargparse import ArgumentParser

from lightning_memsink.cli.recipes import did_you_mean


def explain(parser: ArgumentParser, words: list[str], message: str) -> list[str]:
    """One line for each error in the configs and options of a command line.

    Args:
        parser: the parser that refused it.
        words: the command line.
        message: of the parser's error.
    """
    lines = []
    class_paths: dict[str, str] = {}
    for file in _configs(words):
        try:
            with open(file, encoding="utf-8") as stream:
                content = yaml.safe_load(stream)
        except yaml.YAMLError as error:
            lines.append(f"{file}: no valid YAML {' '.join(str(error).split())}")
            continue
        if isinstance(content, dict):
            lines += [f"{file}: {line}" for line in _key_errors(parser, content, "", "", class_paths)]
        else:
            lines.append(
                f"{file}: a config maps options to values, like `trainer: {{max_epochs: 1}}`; this one does not"
            )
    return lines or [_innermost_error(parser, message)]


def _configs(words: list[str]) -> Iterator[str]:
    """The config files that a command line names."""
    for before, word in zip(["", *words], words, strict=False):
        if before in ("-c", "--config"):
            yield word
        elif word.startswith(("-c=", "--config=")):
            yield word.partition("=")[2]


def _key_errors(
    parser: ArgumentParser, content: dict[str, Any], group: str, path: str, class_paths: dict[str, str]
) -> Iterator[str]:
    """A message for each key that is no option and each class path that can't be imported, at any depth.

    Args:
        parser: of the options.
        content: part of a config.
        group: prefix of its options in ``parser``.
        path: prefix of its keys in the config.
        class_paths: class paths found so far, by key; an overlay may give ``init_args`` alone. New ones are added.
    """
    options = _options(parser)
    for key, value in content.items():
        option, place = f"{group}{key}".removesuffix("+"), f"{path}{key}"
        inside = [name for name in options if name.startswith(f"{option}.")]
        if inside and isinstance(value, dict):
            yield from _key_errors(parser, value, f"{option}.", f"{place}.", class_paths)
        elif option not in options and not inside:
            siblings = {name.removeprefix(group).split(".")[0] for name in options if name.startswith(group)}
            hint = did_you_mean(str(key), siblings) or _same_name_elsewhere(str(key), options)
            yield f"`{place}` is no option{hint}"
        else:
            yield from _class_errors(value, place, class_paths)


def _class_errors(value: Any, place: str, class_paths: dict[str, str]) -> Iterator[str]:
    """A message for each class path that can't be imported, and each of its ``init_args`` that is no option."""
    if isinstance(value, list):
        for n, item in enumerate(value):
            yield from _class_errors(item, f"{place}[{n}]", class_paths)
    elif isinstance(value, dict) and ("class_path" in value or "init_args" in value):
        path = value.get("class_path", class_paths.get(place))
        if not isinstance(path, str):
            return
        class_paths[place] = path
        kind = _imported(path) if "." in path else None
        if isinstance(kind, str):
            yield f"`{place}.class_path`: {kind}"
        elif kind is not None and isinstance(value.get("init_args"), dict):
            yield from _key_errors(_parameters(kind), value["init_args"], "", f"{place}.init_args.", class_paths)


def _imported(path: str) -> type | str:
    """The class at ``path``, or the reason why there is none."""
    module, _, name = path.rpartition(".")
    try:
        defining = import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        parent, _, last = missing.rpartition(".")
        folders = import_module(parent).__path__ if parent else None
        hint = did_you_mean(last, {each.name for each in pkgutil.iter_modules(folders)})
        return f"there is no module `{missing}`{hint}"
    if not hasattr(defining, name):
        return f"`{module}` has no `{name}`{did_you_mean(name, dir(defining))}"
    kind: type = getattr(defining, name)
    return kind


def _parameters(kind: type) -> ArgumentParser:
    """A parser of the constructor arguments of a class."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, fail_untyped=False)
    return parser


def _options(parser: ArgumentParser) -> set[str]:
    """The names of a parser's options, with their groups."""
    names = {action.dest for action in parser._actions}
    return {name for name in names if name != "help" and not name.endswith(".help")}


def _same_name_elsewhere(key: str, options: set[str]) -> str:
    """A hint at an option of the same name in another group; empty if there is none."""
    same = sorted(name for name in options if name.rpartition(".")[2] == key)
    return f"; did you mean `{same[0]}`?" if same else ""


_STRUCTURE = re.compile(r"Parser key |Does not validate against|Subtypes: |Errors:|Problem with given class_path ")


def _innermost_error(parser: ArgumentParser, message: str) -> str:
    """The innermost error in jsonargparse's nested message, in one line."""
    unrecognized = re.search(r"[Uu]nrecognized arguments: --([^\s=]+)", message)
    if unrecognized:
        name = unrecognized[1]
        options = _options(parser)
        hint = did_you_mean(name, options) or _same_name_elsewhere(name.rpartition(".")[2], options)
        return f"`--{name}` is no option{hint}"
    keys: list[str] = []
    reason, rest = message, ""
    kind: type | str | None = None
    for line in message.splitlines():
        keys += re.findall(r'Parser key "(?:fit\.)?([^"]+)"', line)
        class_path = re.search(r"class_path '([^']+)'", line)
        kind = _imported(class_path[1]) if class_path and "." in class_path[1] else kind
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
    return f"`{'.'.join(keys)}`: {_expectation(reason, message)}" if keys else _expectation(reason, message)


def _expectation(reason: str, message: str) -> str:
    """A type error in the form ``expected int or None, got 'many'``; another reason as it is."""
    expected = re.match(r"Expected an? (.+?)(?:\. Got value: (.*))?$", reason)
    if not expected or expected[1].startswith("dot import path"):
        return re.sub(
            r"^Expected a dot import path string: (.*)", r"there is no class `\1`; give its full path", reason
        )
    types = [expected[1], *(["None"] if "Expected a <class 'NoneType'>" in message and not expected[2] else [])]
    got = expected[2] or next(iter(re.findall(r"Given value: (.*)", message)), "")
    choices = re.findall(r"'([^']+)'", expected[1]) if "Literal[" in expected[1] else []
    wanted = " or ".join(re.sub(r"<class '([^']+)'>", r"\1", kind) for kind in types)
    wanted = f"one of {', '.join(choices)}" if choices else wanted
    return f"expected {wanted}, got `{got}`{did_you_mean(got, choices)}"
