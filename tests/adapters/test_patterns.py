"""Patterns of a config: looked up as peft does, and tried before it does."""

import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from geolora.adapters import patterns
from geolora.adapters.patterns import Table, demand_quick
from geolora.errors import AdapterError

NAMES = ["a", "b", "a.b", "b.a", "a.a.b", "ab", "a1.b-c", "aXb", "^a", "a b.c"]
PIECES = [
    "a",
    "b",
    "1",
    "-c",
    " c",
    ".",
    r"\.",
    "X",
    "^",
    r"\^",
    "$",
    "|",
    "(",
    ")",
    "*",
    "?",
    "[ab]",
    r"\w",
]


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(PIECES), max_size=4).map("".join), max_size=5)
    | st.lists(st.sampled_from(NAMES).map(lambda name: f"^{re.escape(name)}"), max_size=5)
)
def test_a_layer_gets_the_value_that_peft_gives_it(texts: list[str]) -> None:
    values = {text: place for place, text in enumerate(texts)}
    try:
        table = Table(Path("c"), "rank_pattern", values, NAMES)
    except AdapterError:
        with pytest.raises(re.error):
            [re.compile(rf"(.*\.)?({text})$") for text in texts]
        return
    for name in NAMES:
        assert table.of(name, None) == values.get(get_pattern_key(list(values), name)), name


def test_what_export_writes_is_looked_up_at_once() -> None:
    names = [f"model.layers.{i}.mlp.experts.{j}.up-proj" for i in range(100) for j in range(200)]
    values = {f"^{re.escape(name)}": place for place, name in enumerate(names)}
    begun = time.perf_counter()
    table = Table(Path("c"), "rank_pattern", values, names)
    assert [table.of(name, None) for name in names] == list(range(len(names)))
    assert not table.others
    assert time.perf_counter() - begun < 5, "as many as all layers of a large mixture of experts"


@pytest.mark.parametrize(
    "pattern", ["(([a.])+)+!", "(a|aa)+b!", "(a|aa)" * 40 + "!", "(.*)" * 12 + "!"]
)
def test_a_pattern_that_takes_for_ever_is_given_up(
    pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "LIMIT", 0.3)
    name = "a" * 80
    with pytest.raises(AdapterError, match=r"takes more than 0.3 s to match: '.{10}"):
        Table(Path("c"), "rank_pattern", {"a": 1, "b.c": 1, pattern: 1}, [name])
    with pytest.raises(AdapterError, match=r"c: `target_modules` has a pattern that takes more"):
        demand_quick(Path("c"), {"exclude_modules": ".*z", "target_modules": pattern}, [name], 1)


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r".*\.(q|k|v|o)_proj", "exclude_modules": r"(?i).*lm_head"},
        {"target_modules": r"^(?=.*\.layers\.)(?!.*visual).*\.(down|up|gate)_proj$"},
        {"modules_to_save": ["classifier", "score"], "layers_pattern": ["layers", "h"]},
        {"target_modules": "all-linear", "layers_to_transform": [0, 1], "modules_to_save": "abc"},
        {"target_modules": 3, "modules_to_save": 3, "layers_pattern": 3, "exclude_modules": [[], {}]},
    ],
)  # fmt: skip
def test_what_people_write_is_let_through(config: dict) -> None:
    names = [f"model.language_model.layers.{i}.self_attn.q_proj" for i in range(5000)]
    before = str(config)
    demand_quick(Path("c"), config, names, 10)
    assert str(config) == before
