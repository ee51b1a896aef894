"""YAML read strictly: numbers as people write them, and one line for everything that is wrong."""

import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geolora.errors import SettingError
from geolora.settings.strict_yaml import as_yaml, read_yaml, settings_of
from geolora.settings.train_config import TrainConfig


def file_of(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def test_numbers_are_numbers(tmp_path: Path) -> None:
    found = read_yaml(file_of(tmp_path, "a: 1e-3\nb: [3e-4, .5, 2, -1.5E2]\nc: v1e\nd: no\n"))
    assert found == {"a": 1e-3, "b": [3e-4, 0.5, 2, -150.0], "c": "v1e", "d": False}


def test_an_anchor_that_merges_and_is_merged(tmp_path: Path) -> None:
    text = "a: &x {b: 1, c: 2}\nd: {in: &y {<<: *x, c: 3}}\ne: {<<: *y, f: 4}\n"
    assert read_yaml(file_of(tmp_path, text))["e"] == {"b": 1, "c": 3, "f": 4}


BOMB = "".join(f"k{i}: &k{i} [{', '.join(9 * [f'*k{i - 1}' if i else 'x'])}]\n" for i in range(9))
"""387 million words in a few lines."""
DOUBLED = "k0: &k0 {a: 1}\n" + "".join(
    f"k{i}: &k{i} {{<<: [*k{i - 1}, *k{i - 1}]}}\n" for i in range(1, 40)
)
CHAINED = "k0: &k0 {a0: 1}\n" + "".join(
    f"k{i}: &k{i} {{<<: *k{i - 1}, a{i}: 1}}\n" for i in range(1, 400)
)


@pytest.mark.parametrize("text", [BOMB, DOUBLED, CHAINED], ids=["lists", "merges", "chain"])
def test_aliases_that_stand_for_millions_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match="must hold at most 100,000 values; with its aliases it holds more"
    ):
        read_yaml(file_of(tmp_path, text))


def test_a_file_of_settings_is_no_book(tmp_path: Path) -> None:
    with pytest.raises(
        SettingError, match="must have at most 1,048,576 characters, as settings have"
    ):
        read_yaml(file_of(tmp_path, "a: " + "x" * 2**20))


def test_anchors_and_merging(tmp_path: Path) -> None:
    found = read_yaml(file_of(tmp_path, "a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\n"))
    assert found["d"] == {"b": 1, "c": 3}


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: 1\nb: 2\na: 3", "`a` is given twice (line 3)"),
        ("a: {b: 1, b: 2}", "`b` is given twice (line 1)"),
        ("- a", "must be a mapping of settings.*got the list \\['a'\\]"),
        ("", "must be a mapping of settings.*got nothing"),
        ("a: [1", "is not YAML in line 1"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML in line 1: could not determine"),
        ("? [1, 2]\n: 3", "is not YAML in line 1: a key is no plain word"),
        ("a: 2024-02-30", "is not YAML"),
        ("a: " + "[" * 100_000, "is not YAML"),
        ('a: "\\ud83d film"', "has half of a character, .ud83d. Write"),
        ("a: &x [*x]", "holds no plain settings"),
        ("x" * 100 + ": 1\n" + "x" * 100 + ": 1", "….* is given twice"),
    ],
)
def test_what_is_no_settings_file(tmp_path: Path, text: str, message: str) -> None:
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(SettingError, match=pattern):
        read_yaml(file_of(tmp_path, text))


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(b"\xef\xbb\xbfmodel: m\n")
    assert read_yaml(tmp_path / "run.yaml") == {"model": "m"}


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_settings_take_both_spellings() -> None:
    found = settings_of({"batch-size": 8, "lr": 1, "budget": None}, TrainConfig, "here")
    assert found == {"batch_size": 8, "lr": 1.0, "budget": None}
    assert isinstance(found["lr"], float)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"bugdet": 1}, "here: unknown key `bugdet`. Did you mean `budget`?"),
        ({"rank": "8"}, "here: `rank` must be a whole number; got the word '8'."),
        ({"rank": True}, "here: `rank` must be a whole number; got true."),
        ({"rank": 8.0}, "here: `rank` must be a whole number; got 8.0."),
        ({"rank": [8]}, "here: `rank` must be a whole number; got the list [8]."),
        ({"lr": "fast"}, "here: `lr` must be a number or left out; got the word 'fast'."),
        ({"max_steps": {"a": 1}}, "must be a whole number or left out; got the mapping {'a': 1}."),
        ({"model": None}, "here: `model` must be a word; got nothing."),
        ({"overwrite": "yes"}, "here: `overwrite` must be true or false; got the word 'yes'."),
        ({"learning_rate": 1}, "here: unknown key `learning_rate`. Did you mean `lr`?"),
        ({"lora_alpha": 1}, "here: unknown key `lora_alpha`. There is no such setting yet."),
        ({"x" * 9999: 1}, "unknown key `xxxxx.*Known: model, train, eval, "),
        ({"max-steps": 1, "max_steps": 2}, "here: `max_steps` is given twice"),
    ],
)
def test_settings_of_another_kind(given: dict, message: str) -> None:
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    with pytest.raises(SettingError, match=pattern) as caught:
        settings_of(given, TrainConfig, "here")
    assert len(str(caught.value)) < 400


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=30)


@settings(max_examples=300, deadline=None)
@given(
    WORDS,
    WORDS,
    st.none() | st.floats(0, 1e9, allow_nan=False),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_what_is_written_is_read_as_the_same_settings(
    train: str, text: str, lr: float | None, seed: int, packing: bool
) -> None:
    config = TrainConfig(model="m", train=train, text=text, lr=lr, seed=seed, packing=packing)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(as_yaml(config), encoding="utf-8")
        assert TrainConfig(**settings_of(read_yaml(path), TrainConfig, "run.yaml")) == config
