"""YAML files of settings, read strictly: duplicate keys, unknown keys and wrong types are errors."""

import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from geolora.errors import SettingError, first_line, listed, shown
from geolora.settings.other_tools import meant

FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
"""1e-3, which YAML 1.1 would read as a word."""
LONGEST, MOST_VALUES = 2**20, 100_000
"""Characters of a file, and its values where every alias is written out."""
KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    type(None): "left out",
}
"""What a setting must be, in words."""


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping a YAML file holds, with plain values only.

    Raises:
        SettingError: missing, not YAML, not a mapping, a key given twice, or an object tag.
    """
    import yaml
    from yaml.composer import ComposerError

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            """The mapping as it is written, before anything is merged into it."""
            node = super().compose_mapping_node(anchor)
            seen: set[str] = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ComposerError(None, None, "a key is no plain word", key.start_mark)
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise SettingError(
                        f"{path}: `{shown(key.value)[1:-1]}` is given twice (line {line}). Remove one."
                    )
                seen.add(key.value)
            return node

        def get_single_node(self) -> Any:
            """The file as it is written, unless aliases make it endless."""
            node = super().get_single_node()
            if node is not None and _size(node, {}) > MOST_VALUES:
                raise SettingError(
                    f"{path} must hold at most {MOST_VALUES:,} values; with its aliases it holds more."
                )
            return node

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+0123456789."))
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
    except (OSError, ValueError) as error:
        raise SettingError(f"{path} cannot be read: {first_line(error)}.") from error
    if len(text) > LONGEST:
        raise SettingError(f"{path} must have at most {LONGEST:,} characters, as settings have.")
    try:
        value = yaml.load(text, Loader)
    except SettingError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f" in line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise SettingError(f"{path} is not YAML{at}: {problem}.") from error
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise SettingError(
            f"{path} has half of a character, {half}. Write the whole one."
        ) from error
    except (
        ValueError,
        RecursionError,
        TypeError,
    ) as error:  # an anchor inside of itself, a date as a key
        raise SettingError(f"{path} holds no plain settings: {first_line(error)}.") from error
    return mapping(value, str(path))


def _size(node: Any, known: dict[int, int]) -> int:
    """Values of a node, with all that its aliases stand for.

    Args:
        known: sizes of nodes that were counted; 0 while one is, which may lie inside of itself.
    """
    if id(node) not in known:
        known[id(node)] = 0
        inner = [] if isinstance(node.value, str) else node.value
        parts = (
            part for entry in inner for part in (entry if isinstance(entry, tuple) else [entry])
        )
        known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]


def as_yaml(config: Any) -> str:
    """A dataclass of settings as YAML that `settings_of` reads to the same, each with its help as a comment."""
    lines = [
        f"# {spec.metadata['help']}\n{spec.name}: {_scalar(getattr(config, spec.name))}\n"
        for spec in fields(config)
    ]
    return "\n".join(lines)


def _scalar(value: Any) -> str:
    """A word, number, bool or None in YAML; words in quotes, with what does not print escaped."""
    if not isinstance(value, str):
        return json.dumps(value)
    text = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text) + '"'


def mapping(value: Any, where: str) -> dict[str, Any]:
    """The value, if it is a mapping from words.

    Raises:
        SettingError: it is anything else.
    """
    if not isinstance(value, dict):
        raise SettingError(
            f"{where} must be a mapping of settings (`key: value`); got {called(value)}."
        )
    return {str(key): inner for key, inner in value.items()}


def refuse_unknown_keys(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Raise `SettingError` for a key that is not known, with the nearest one."""
    known = list(known)
    for key in given:
        if key not in known:
            raise SettingError(
                f"{where}: unknown key `{shown(key)[1:-1]}`."
                f"{meant(key, known, 'setting') or f' Known: {listed(known)}.'}"
            )


def settings_of(given: Mapping[str, Any], config: type, where: str) -> dict[str, Any]:
    """Settings for the fields of a dataclass; `a-b` and `a_b` are the same key.

    Raises:
        SettingError: an unknown key, a key in both spellings, or a value of another type.
    """
    hints = typing.get_type_hints(config)
    result: dict[str, Any] = {}
    for key, value in given.items():
        name = key.replace("-", "_")
        if name in result:
            raise SettingError(f"{where}: `{key}` is given twice. Remove one.")
        refuse_unknown_keys({name: None}, [spec.name for spec in fields(config)], where)
        auto = name == "lr" and value == "auto"
        result[name] = None if auto else of_type(value, hints[name], f"{where}: `{key}`")
    return result


def of_type(value: Any, hint: Any, where: str) -> Any:
    """The value as int, float, str, bool or None, if its type fits the hint.

    Raises:
        SettingError: it does not; whole numbers are accepted as float, and nothing else is converted.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if type(value) is kind:
            return value
    wanted = " or ".join(KINDS[kind] for kind in kinds)
    raise SettingError(f"{where} must be {wanted}; got {called(value)}.")


def called(value: Any) -> str:
    """A value of a settings file and its kind, for a message."""
    if value is None or isinstance(value, bool | int | float):
        return "nothing" if value is None else shown(value).lower()
    kind = {str: "the word", list: "the list", dict: "the mapping"}.get(type(value), "the value")
    return f"{kind} {shown(value)}"
