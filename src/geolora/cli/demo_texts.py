"""A data set every Python carries: the docstrings of its standard library, labelled by theme.

The demo must run without a network, and invented sentences would show nothing. Here are some
thousand paragraphs of real English whose subject is known from the module they stand in; themes
overlap enough (files and storage, say) that the words alone do not settle every row.

A fresh interpreter, which runs this file as a script, reads them: torch, transformers and pytest
put functions of their own into `inspect`, `logging` and `sys`, which must not change the rows.
"""

import functools
import importlib
import inspect
import json
import pkgutil
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from types import GetSetDescriptorType, ModuleType
from typing import Any

# Only modules that Python 3.10 to 3.14 have on Linux and macOS. A package stands for its public
# submodules as well, and `builtins` is listed class by class, for its classes differ in theme.
THEMES: dict[str, tuple[str, ...]] = {
    theme: tuple(names.split())
    for theme, names in {
        "concurrency": """asyncio concurrent.futures contextvars multiprocessing queue sched
            selectors signal subprocess threading""",
        "files": """filecmp fileinput fnmatch genericpath glob io linecache os pathlib
            posixpath shutil stat tempfile""",
        "language": """abc ast code codeop compileall dis gc importlib inspect modulefinder
            pkgutil py_compile pyclbr pydoc runpy site symtable sys sysconfig tokenize typing""",
        "markup": """base64 binascii email html mailbox mimetypes plistlib quopri xml""",
        "networking": """ftplib http imaplib ipaddress netrc poplib select smtplib socket
            socketserver ssl urllib webbrowser wsgiref xmlrpc""",
        "numbers": """builtins.complex builtins.float builtins.int calendar cmath colorsys
            datetime decimal fractions math numbers random secrets statistics time zoneinfo""",
        "storage": """bz2 configparser copyreg csv dbm gzip json lzma marshal pickle
            pickletools shelve sqlite3 tarfile zipapp zipfile zipimport zlib""",
        "structures": """array bisect builtins.dict builtins.frozenset builtins.list
            builtins.memoryview builtins.range builtins.set builtins.slice builtins.tuple
            collections contextlib copy dataclasses enum functools graphlib heapq itertools
            operator struct types weakref""",
        "testing": """bdb cProfile faulthandler logging profile pstats timeit trace traceback
            tracemalloc unittest warnings""",
        "text": """argparse builtins.bytes builtins.str cmd codecs difflib gettext locale
            optparse pprint re reprlib shlex string stringprep textwrap unicodedata""",
    }.items()
}

Rows = list[dict[str, str]]
_MIN_PER_CLASS = 10
_MIN_WORDS, _MAX_WORDS = 5, 60
_KEY_WORDS = 12  # texts that open with the same words are near duplicates, and count as one
_DESCRIPTORS = (classmethod, property, staticmethod, GetSetDescriptorType)
_CODE = re.compile(r"(?:^|\s)(?:>>>|-+>|=>)\s")
_PLAIN = re.compile(r"\W{0,3}[A-Za-z][\w'/.-]*\W{0,3}")
_RULER = re.compile(r"([^\w\s])\1{2,}")  # the line under a heading

# `foo(x, y[, z]) -> int`, a line of its own or with prose after it, as in C docstrings.
_SIGNATURE = re.compile(
    r"\s*(?:.* = <instance>\.)?[\w.]+\([^()]*(?:\([^()]*\)[^()]*)*\)"
    r"(?:[ \t]*$|[ \t]*-+>[^\n]*?(?:[.,:;][ ]|[ ]--?[ ]|$)|[ \t]*(?:--?|:)[ ])",
    re.MULTILINE,
)


def docstring_themes(per_class: int = 250, seed: int = 0) -> tuple[Rows, Rows]:
    """Return (train, eval) rows `{"text": ..., "label": theme}`, about 80 to 20 in each theme.

    Every theme has the same number of rows: `per_class`, or what the smallest theme holds where
    that is less. The rows depend on the seed and the Python that runs this, and on nothing else.
    """
    if per_class < _MIN_PER_CLASS:
        from geolora.errors import SettingError

        message = f"`per_class` must be at least {_MIN_PER_CLASS}; got {per_class}."
        raise SettingError("docstring_themes: " + message)
    themes = _texts_by_theme()
    size = min(per_class, _smallest(themes))
    rng = random.Random(seed)
    train: Rows = []
    held_out: Rows = []
    for theme, texts in themes.items():
        rows = [{"text": text, "label": theme} for text in rng.sample(texts, size)]
        cut = round(0.8 * size)
        train += rows[:cut]
        held_out += rows[cut:]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def _smallest(themes: dict[str, list[str]]) -> int:
    """Return the smallest theme's size; refuse a Python whose docstrings were stripped."""
    theme, texts = min(themes.items(), key=lambda item: len(item[1]))
    if len(texts) < _MIN_PER_CLASS:
        from geolora.errors import DataError

        message = f"docstring_themes: this Python has only {len(texts)} docstrings on `{theme}`."
        raise DataError(message)
    return len(texts)


@functools.cache
def _texts_by_theme() -> dict[str, list[str]]:
    """Collect in an interpreter that no environment variable, `site` or other import changes."""
    command = [sys.executable, "-I", "-S", "-W", "ignore", __file__]
    themes: dict[str, list[str]] = json.loads(subprocess.check_output(command))
    return themes


def _collect() -> dict[str, list[str]]:
    """Return the sorted texts of each theme, without those that a second theme has too."""
    by_theme = {theme: _by_key(names) for theme, names in sorted(THEMES.items())}
    holders = Counter(key for texts in by_theme.values() for key in texts)
    return {
        theme: sorted(text for key, text in texts.items() if holders[key] == 1)
        for theme, texts in by_theme.items()
    }


def _by_key(names: tuple[str, ...]) -> dict[str, str]:
    """Return one text per key; sorted first, so that import order cannot choose which."""
    docs = {doc for name in names for doc in _docs(name) if isinstance(doc, str)}
    texts = sorted(filter(None, map(_clean, docs)), reverse=True)
    return {_key(text): text for text in texts}


def _docs(name: str) -> Iterator[Any]:
    """Yield the docstrings of one entry of `THEMES`: of a class of `builtins`, or of a module."""
    home, _, cls = name.partition(".")
    if home == "builtins":
        yield from _class_docs(getattr(importlib.import_module(home), cls))
        return
    for module in _modules(name):
        yield module.__doc__
        for member, value in vars(module).items():
            own = not member.startswith("_") and _defined_in(module.__name__, value)
            if own and inspect.isclass(value):
                yield from _class_docs(value)
            elif own and inspect.isroutine(value):
                yield value.__doc__


def _class_docs(cls: type) -> Iterator[Any]:
    """Yield the docstrings of a class and of the public members that it defines itself."""
    yield vars(cls).get("__doc__")
    for member, value in vars(cls).items():
        documented = inspect.isroutine(value) or isinstance(value, _DESCRIPTORS)
        if documented and not member.startswith("_"):
            yield value.__doc__


def _modules(name: str) -> Iterator[ModuleType]:
    """Import a module and its public submodules, passing over those this Python lacks."""
    try:
        module = importlib.import_module(name)
    except ImportError:  # built without the C library behind it, or of another platform
        return
    yield module
    for info in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if not info.name.startswith("_") and info.name != "test":
            yield from _modules(f"{name}.{info.name}")


def _defined_in(module: str, value: Any) -> bool:
    """Tell a module's own members, written in Python or C, from those it imported."""
    home = getattr(value, "__module__", None) or ""
    twin = "posix" if module == "os" else "_" + module.rpartition(".")[2]
    return f"{home}.".startswith((f"{module}.", f"{twin}."))


def _clean(doc: str) -> str:
    """Return the first paragraphs of prose as one line, or nothing where they say too little."""
    doc = inspect.cleandoc(doc)
    while match := _SIGNATURE.match(doc):
        doc = doc[match.end() :]
    words: list[str] = []
    for paragraph in re.split(r"\n\s*\n", doc):
        more = [word for word in paragraph.split() if not _RULER.fullmatch(word)]
        plain = sum(bool(_PLAIN.fullmatch(word)) for word in more)
        prose = plain > 0.7 * len(more) and not _CODE.search(paragraph)
        if prose and (not words or len(words) + len(more) <= _MAX_WORDS):
            words += more[:_MAX_WORDS]
        elif words:
            break
    return " ".join(words) if len(words) >= _MIN_WORDS else ""


def _key(text: str) -> str:
    """Return what near duplicates share: the opening words, without case or punctuation."""
    return " ".join(re.findall(r"\w+", text.casefold())[:_KEY_WORDS])


if __name__ == "__main__":
    json.dump(_collect(), sys.stdout)
