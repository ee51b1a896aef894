"""Patterns of an adapter's config, which peft matches against names of layers: few, short, and tried where they are odd.

A regular expression of twenty characters can take longer than a life to fail, and Python cannot be told to give up. So a
pattern that is no plain name is tried in a process of its own, against the names it is for, before it is used here.
"""

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from geolora.errors import AdapterError, shown

LIMIT = 5.0
"""Seconds in which all odd patterns must have been matched against all names."""
FEW = 512
"""Patterns that Python keeps compiled; of more, peft compiles each again for every layer."""
MANY = 100_000
"""Names that a list may have: more than any model has layers."""
MOST_LAYERS = 1_000
"""Layers that `layer_replication` may make of those of the base."""
LONGEST, LONGEST_ALONE = 1_000, 100_000
"""Characters of a pattern among others, and of one that is the whole setting."""
PLAIN = re.compile(r"\^?(?:[\w-]|\\\W|\.)*")
"""Patterns that fail after one look at every place of a name: words, characters escaped by a backslash, and dots."""
LISTS = ("target_modules", "exclude_modules", "layers_to_transform", "trainable_token_indices")
"""Settings whose lists peft compares as they are."""

TRIAL = """
import json, re, sys, warnings
warnings.simplefilter("ignore")
patterns, names = json.load(sys.stdin)
for number, (pattern, how) in enumerate(patterns):
    print(number, flush=True)
    match = getattr(re.compile(pattern), how)
    for name in names:
        match(name)
"""


class _Pattern(NamedTuple):
    """A pattern, the setting it is of, and the expression that peft makes of it."""

    key: str
    text: str
    expression: str
    how: str = "match"


class Table:
    """`rank_pattern` or `alpha_pattern`: what peft looks up for a layer, without trying every pattern for each.

    Args:
        file: the config, for messages. key: the setting. table: what it holds. names: of all layers.

    Raises:
        AdapterError: more patterns than layers, one that is too long, no expression or takes too long.
    """

    def __init__(self, file: Path, key: str, table: dict[str, Any], names: Collection[str]) -> None:
        _demand_few(file, key, table, len(names))
        self.table, self.values = table, list(table.values())
        self.named: dict[tuple[str, str], int] = {}
        self.others: list[tuple[int, re.Pattern[str]]] = []
        expressions = []
        for place, text in enumerate(table):
            if name := _literal(text):
                self.named.setdefault(name, place)
            else:
                expressions.append(_Pattern(key, text, _at_the_end(text)))
                self.others.append((place, _compiled(file, expressions[-1])))
        if len(expressions) <= FEW:
            expressions = [pattern for pattern in expressions if not PLAIN.fullmatch(pattern.text)]
        _try(file, expressions, names)

    def of(self, name: str, default: Any) -> Any:
        """The value of the first pattern that fits a layer, else of the key that is its name, else `default`."""
        tails = [name, *(name[i + 1 :] for i, c in enumerate(name) if c == ".")]
        ways = [("^", name), *(("", tail) for tail in tails)]
        last = len(self.values)
        first = min(self.named.get(way, last) for way in ways)
        for place, other in self.others:
            if place < first and other.match(name):
                first = place
        return self.values[first] if first < last else self.table.get(name, default)


def demand_quick(file: Path, config: dict[str, Any], names: Collection[str], layers: int) -> None:
    """Refuse a config whose patterns peft could not match in seconds, before it is given to peft.

    Args:
        file: the config, for messages. names: of all modules and parameters of the base model.
        layers: how many of them have a pair in the file.

    Raises:
        AdapterError: which setting, and which pattern.
    """
    patterns: list[_Pattern] = []
    for key in ("rank_pattern", "alpha_pattern"):
        table = config.get(key) or {}
        _demand_few(file, key, table, layers)
        patterns += [_Pattern(key, text, _at_the_end(text)) for text in table]
    for key, before, after in (
        ("modules_to_save", r"(^|.*\.)", r"($|\..*)"),
        ("layers_pattern", r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\."),
    ):
        value = config.get(key) or ()
        if isinstance(value, str) and key == "layers_pattern":
            value = [value]
        several = isinstance(value, str | list | dict)  # of a word peft takes every letter
        texts = [text for text in value if isinstance(text, str)] if several else []
        _demand_few(file, key, texts, 0)
        patterns += [_Pattern(key, text, f"{before}{text}{after}") for text in texts]
    for key in LISTS:
        value = config.get(key)
        if isinstance(value, str):
            _demand_short(file, key, value, LONGEST_ALONE)
            patterns.append(_Pattern(key, value, value, "fullmatch"))
        elif (count := _size(value)) > MANY:
            raise AdapterError(
                f"{file}: `{key}` must have at most {MANY:,} entries; got {count:,}."
            )
    ranges = config.get("layer_replication")
    if ranges and not _are_few(ranges):
        raise AdapterError(
            f"{file}: `layer_replication` must be ranges of layers, {MOST_LAYERS:,} in all at most; got {shown(ranges)}."
        )
    odd = [pattern for pattern in patterns if not PLAIN.fullmatch(pattern.text)]
    for pattern in odd:
        _compiled(file, pattern)
    _try(file, odd, names)


def _at_the_end(text: str) -> str:
    """What peft makes of a key of `rank_pattern` or `alpha_pattern`."""
    return rf"(.*\.)?({text})$"


def _size(value: Any) -> int:
    """Entries of a list, or of all lists in an object."""
    lists = value.values() if isinstance(value, dict) else [value]
    return sum(len(entries) for entries in lists if isinstance(entries, list))


def _are_few(ranges: Any) -> bool:
    """Whether these are pairs of numbers, the ends of not too many layers."""
    try:
        return sum(len(range(start, end)) for start, end in ranges) <= MOST_LAYERS
    except (TypeError, ValueError, OverflowError):
        return False


def _demand_few(file: Path, key: str, texts: Collection[str], layers: int) -> None:
    most = max(FEW, layers)
    if len(texts) > most:
        raise AdapterError(
            f"{file}: `{key}` must have at most {most:,} patterns ({FEW}, or one for each layer); got {len(texts):,}."
        )
    for text in texts:
        _demand_short(file, key, text, LONGEST)


def _demand_short(file: Path, key: str, text: str, most: int) -> None:
    if len(text) > most:
        raise AdapterError(
            f"{file}: a pattern of `{key}` must have at most {most:,} characters; got {len(text):,}: {shown(text)}."
        )


def _literal(text: str) -> tuple[str, str] | None:
    """("^" or "", the name) of a pattern that fits one name, or all that end in it; None for any other."""
    start = "^" if text.startswith("^") else ""
    parts = re.findall(r"\\\W|[\w-]|.", text.removeprefix("^"), re.DOTALL)
    if not PLAIN.fullmatch(text) or "." in parts:
        return None
    return start, "".join(part[-1] for part in parts)


def _compiled(file: Path, pattern: _Pattern) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what may mean something else in a later Python
            return re.compile(pattern.expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise AdapterError(
            f"{file}: `{pattern.key}` must be names or regular expressions; got {shown(pattern.text)}."
        ) from error


def _try(file: Path, patterns: list[_Pattern], names: Iterable[str]) -> None:
    """Match patterns against names in a process of its own, for `LIMIT` seconds at most."""
    if not patterns:
        return
    given = json.dumps([[(p.expression, p.how) for p in patterns], list(names)])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", TRIAL],
            input=given.encode(),
            capture_output=True,
            timeout=LIMIT,
        )
        tried, failed = done.stdout, done.returncode != 0
    except subprocess.TimeoutExpired as stopped:
        tried, failed = stopped.stdout or b"", True
    if failed:
        pattern = patterns[int(tried.split()[-1]) if tried.split() else 0]
        raise AdapterError(
            f"{file}: `{pattern.key}` has a pattern that takes more than {LIMIT:g} s to match: {shown(pattern.text)}. "
            "Write the names of the layers instead."
        )
