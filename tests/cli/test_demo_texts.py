import json
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from geolora.cli import demo_texts as docstrings
from geolora.cli.demo_texts import THEMES, docstring_themes
from geolora.errors import DataError, SettingError

# The patched method stands for what libraries do to the standard library when imported.
OTHER_PROCESS = """
import json, logging
logging.Logger.warn_once = lambda: None
logging.Logger.warn_once.__doc__ = "Warn with the same message only once."
from geolora.cli.demo_texts import docstring_themes
print(json.dumps(docstring_themes(seed=3)))
"""


@pytest.fixture(scope="module")
def rows():
    return docstring_themes()


def normal(text):
    return " ".join(re.findall(r"\w+", text.casefold()))


def test_the_same_seed_gives_the_same_rows_and_another_seed_others(rows):
    assert docstring_themes() == rows
    assert docstring_themes(seed=1) != rows


def test_a_process_of_another_hash_seed_with_other_imports_gives_the_same_rows_in_silence():
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-OO", "-W", "error", "-c", OTHER_PROCESS],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert tuple(json.loads(done.stdout)) == docstring_themes(seed=3)


def test_every_theme_has_as_many_rows(rows):
    train, held_out = (Counter(row["label"] for row in part) for part in rows)
    assert set(train) == set(held_out) == set(THEMES)
    assert len(set(train.values())) == len(set(held_out.values())) == 1
    total = train["files"] + held_out["files"]
    assert 200 <= total <= 250
    assert train["files"] == round(0.8 * total)


@pytest.mark.parametrize("per_class", [10, 33, 200])
def test_per_class_is_the_size_of_every_theme(per_class):
    train, held_out = docstring_themes(per_class)
    counts = Counter(row["label"] for row in train + held_out)
    assert set(counts.values()) == {per_class}
    assert len(train) == round(0.8 * per_class) * len(THEMES)


def test_per_class_above_the_smallest_theme_takes_all_of_that_theme():
    train, held_out = docstring_themes(100_000)
    counts = Counter(row["label"] for row in train + held_out)
    smallest = min(map(len, docstrings._texts_by_theme().values()))
    assert set(counts.values()) == {smallest}


def test_no_text_occurs_twice_on_either_side_or_in_two_themes():
    train, held_out = docstring_themes(100_000)
    texts = [normal(row["text"]) for row in train + held_out]
    assert len(set(texts)) == len(texts)
    openings = [" ".join(text.split()[:12]) for text in texts]
    assert len(set(openings)) == len(openings)


def test_a_text_of_two_themes_is_dropped_from_both(monkeypatch):
    monkeypatch.setattr(docstrings, "THEMES", {"a": ("heapq", "textwrap"), "b": ("heapq", "glob")})
    themes = docstrings._collect()
    assert not any("heap" in text for texts in themes.values() for text in texts)
    assert all(themes.values())


def test_rows_hold_one_line_of_prose(rows):
    for row in rows[0] + rows[1]:
        assert set(row) == {"text", "label"}
        assert 5 <= len(row["text"].split(" ")) <= 60
        assert row["text"] == " ".join(row["text"].split())
        assert ">>>" not in row["text"]
        assert " -> " not in row["text"]


@pytest.mark.parametrize(
    ("doc", "text"),
    [
        (
            "f(x, y) -> z\n\nReturn the larger of both numbers.",
            "Return the larger of both numbers.",
        ),
        ("f(x[, y]) -> int\nf(*x) -> int\n\nCount all that there is.", "Count all that there is."),
        ("D.pop(k[,d]) -> v, remove the key and return it.", "remove the key and return it."),
        ("L.add(x) -> None -- put it at the end", "put it at the end"),
        ("Head of the text\n================\n\n    x = 1\n\nmore", ""),
        (
            "First line of text,\n    and the second.\n\n>>> f(1)\n2",
            "First line of text, and the second.",
        ),
        ("Too short, this.", ""),
        ("word " * 100, " ".join(["word"] * 60)),
    ],
)
def test_clean(doc, text):
    assert docstrings._clean(doc) == text


def test_themes_are_sorted_and_name_modules_of_the_standard_library_once():
    names = [name for modules in THEMES.values() for name in modules]
    assert list(THEMES) == sorted(THEMES)
    assert all(list(modules) == sorted(modules) for modules in THEMES.values())
    assert len(set(names)) == len(names)
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names


def test_missing_modules_are_passed_over(monkeypatch):
    for name in ("bz2", "curses", "lzma", "readline", "sqlite3", "ssl"):
        monkeypatch.setitem(sys.modules, name, None)
    themes = docstrings._collect()
    assert set(themes) == set(THEMES)
    assert min(map(len, themes.values())) >= 200


@pytest.mark.parametrize("per_class", [9, 3, 0, -1])
def test_too_few_rows_per_class_are_refused(per_class):
    expected = f"docstring_themes: `per_class` must be at least 10; got {per_class}."
    with pytest.raises(SettingError, match=f"^{re.escape(expected)}$"):
        docstring_themes(per_class)


def test_a_python_without_docstrings_is_refused(monkeypatch):
    monkeypatch.setattr(docstrings, "_texts_by_theme", lambda: {"files": ["a"], "text": []})
    with pytest.raises(DataError, match="only 0 docstrings on `text`"):
        docstring_themes()
