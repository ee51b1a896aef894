"""Damaged and hostile input, some two thousand cases: one clear line or a result, and nothing written, run or left open.

Each file begins as a good one, of which bytes are changed, cut out or put in, or whose values are replaced.
"""

import csv
import io
import json
import pickle
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import geolora
import pages
from geolora.adapters.card import model_card
from geolora.cli.__main__ import main
from geolora.cli.terminal import say
from geolora.comparing.plan import read_plan
from geolora.errors import DataWarning, GeoloraError, GeoloraWarning
from geolora.settings.other_tools import OURS, meant
from geolora.settings.strict_yaml import as_yaml, read_yaml, settings_of
from geolora.settings.train_config import TrainConfig
from geolora.tasks.chat_tokens import checked_chat
from geolora.tasks.rows import class_names, classes, numbers, read_rows
from geolora.training import run as training
from geolora.training.check import check
from geolora.training.checkpoints import flaw, latest, seal
from models import Net, lora_net

LIMITS = {
    "deadline": timedelta(seconds=20),
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.sampled_from(["cut", "put", "flip"]), st.binary(max_size=6)),
    min_size=1, max_size=4,
)  # fmt: skip


def damaged(content: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    for share, kind, new in edits:
        at = int(share * len(content))
        if kind == "cut":
            content = content[:at] + content[at + max(1, len(new)) ** 2 :]
        elif kind == "put":
            content = content[:at] + new + content[at:]
        else:
            content = content[:at] + new + content[at + len(new) :]
    return content


def one_line(call: Callable[[], Any]) -> None:
    """The call gives a result, or an error of ours of one line."""
    try:
        call()
    except GeoloraError as error:
        text = str(error)
        assert text
        assert len(text.splitlines()) == 1, text
        assert text.isprintable()
        assert len(text) < 1500


class Trap:
    """What a pickle would call when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (TRAP,))


TRAP = Path(tempfile.gettempdir()) / "geolora-trap"


@pytest.fixture(autouse=True)
def _nothing_is_run() -> Any:
    TRAP.unlink(missing_ok=True)
    yield
    assert not TRAP.exists()


# ---- configs ------------------------------------------------------------------------------------

GOOD = as_yaml(TrainConfig(model="m", train="t.jsonl", eval="e.jsonl", lr=1e-3)).encode()
PLAN = b"""output: out
common: {model: m, max_steps: 20}
tasks:
  one: {train: t.jsonl, eval: e.jsonl}
methods:
  lora: {rank: 8, lr: [1e-3, 1e-2]}
  ours: {method: geolora, rank: 6}
seeds: [0, 1]
"""


def read_config(path: Path) -> None:
    check(TrainConfig(**settings_of(read_yaml(path), TrainConfig, path.name)))


@settings(max_examples=500, **LIMITS)
@given(EDITS)
def test_configs(tmp_path: Path, edits: list) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(damaged(GOOD, edits))
    one_line(lambda: read_config(path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.yaml"]


@settings(max_examples=300, **LIMITS)
@given(st.sampled_from(list(TrainConfig.__dataclass_fields__)), VALUES)
def test_values_of_settings(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"model": "m", "train": "t", "eval": "e", key: value}))
    one_line(lambda: read_config(path))


@settings(max_examples=400, **LIMITS)
@given(EDITS)
def test_plans(tmp_path: Path, edits: list) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(damaged(PLAN, edits))
    one_line(lambda: read_plan(path))


# ---- data ---------------------------------------------------------------------------------------

ROWS = {
    "text-classification": {"text": "a good film", "label": "good"},
    "text-regression": {"text": "a good film", "label": 0.5},
    "token-classification": {"text": ["a", "film"], "label": ["O", "B-ART"]},
    "image-classification": {"image": "picture.png", "label": "good"},
    "causal-lm": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}  # fmt: skip


def load_rows(path: Path, task: str) -> None:
    training.load(TrainConfig(model="m", task=task, train=str(path), eval=str(path)))


@settings(max_examples=500, **LIMITS)
@given(st.sampled_from([*ROWS]), st.sampled_from(["jsonl", "csv"]), EDITS)
def test_data_files(tmp_path: Path, task: str, kind: str, edits: list) -> None:
    rows = [ROWS[task], {**ROWS[task], "label": ROWS[task].get("label", "")}]
    content = "\n".join(json.dumps(row) for row in rows)
    if kind == "csv":
        content = "text,label,image\n" + "\n".join("a film,good,picture.png" for _ in range(3))
    path = tmp_path / f"rows.{kind}"
    path.write_bytes(damaged(content.encode(), edits))
    one_line(lambda: load_rows(path, task))


@settings(max_examples=300, **LIMITS)
@given(
    st.sampled_from([*ROWS]),
    st.dictionaries(st.sampled_from(["text", "label", "image", "messages", "prompt"]), VALUES),
)
def test_values_of_rows(tmp_path: Path, task: str, changed: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS[task]) + "\n" + json.dumps({**ROWS[task], **changed}))
    one_line(lambda: load_rows(path, task))


MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "weight", "name", "reasoning_content"]),
        st.sampled_from(["user", "assistant", "tool", "system", "", " ", "a film"]) | VALUES,
    )
    | VALUES,
    max_size=3,
)


@settings(max_examples=400, **LIMITS)
@given(MESSAGES, VALUES)
def test_chats(messages: list, tools: Any) -> None:
    """What is taken is whole: as many messages, no key lost that says something, and an answer among them."""

    def take() -> None:
        chat = checked_chat({"messages": messages, "tools": tools}, "row 1")
        assert chat.get("tools") == (tools or None)
        for one, kept in zip(messages, chat["messages"], strict=True):
            said = {key: value for key, value in one.items() if value not in (None, [], {})}
            assert {**kept, **said} == kept
            assert kept["role"] != "assistant" or len(kept) > 2 or kept["content"].strip()
        json.dumps(chat)

    one_line(take)


LABELS = (
    st.sampled_from(["a", "b", "0", "1", "0.0", "1.0", "nan", "inf", "", "1e400", "-0"]) | VALUES
)


@settings(max_examples=400, **LIMITS)
@given(st.lists(LABELS, min_size=1, max_size=5), st.lists(LABELS, max_size=3))
def test_labels(train: list, held_out: list) -> None:
    """What is taken as classes is a name per row, and no two kinds of things are one class."""

    def take() -> None:
        sides = [classes(side, "label", "rows") for side in (train, held_out)]
        names = class_names(*sides, "label")
        assert {*sides[1]} <= {*names} == {*sides[0]}
        assert all(isinstance(value, str | int | float) for value in (*train, *held_out))

    one_line(take)
    one_line(lambda: numbers([*train, *held_out], "score", "rows"))


@settings(max_examples=400, **LIMITS)
@given(st.lists(st.tuples(st.text(max_size=6), st.text(max_size=3)), min_size=1), EDITS)
def test_csv_rows(tmp_path: Path, rows: list, edits: list) -> None:
    """Whole, it gives what was written; damaged, rows as wide as the header, or a line."""
    kept = [
        (text, label)
        for text, label in rows
        if not {"\0", "\r"} & {*text, *label} and text != "text"
    ]
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows([("text", "label"), *kept])
    path = tmp_path / "rows.csv"
    try:
        whole = lines.getvalue().encode()
    except UnicodeEncodeError:
        return

    def take() -> list:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            return read_rows(path, "--train")

    path.write_bytes(whole)
    if kept:
        assert [tuple(row.values()) for row in take()] == kept
    path.write_bytes(damaged(whole, edits))
    one_line(take)


@settings(max_examples=200, **LIMITS)
@given(st.text(max_size=12) | st.sampled_from([*OURS]))
def test_unknown_flags(word: str) -> None:
    assert len(meant(f"--{word}", ["--model", "--lr", "--rank"], "flag").splitlines()) <= 1


@settings(max_examples=150, **LIMITS)
@given(EDITS)
def test_arrays(tmp_path: Path, edits: list) -> None:
    path = tmp_path / "pictures.npz"
    np.savez(path, x=np.zeros((4, 5, 5), np.uint8), y=np.arange(4) % 2)
    path.write_bytes(damaged(path.read_bytes(), edits))
    one_line(lambda: load_rows(path, "image-classification"))


def test_arrays_that_are_pickles_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "pictures.npz"
    np.savez(path, x=np.array([Trap()], dtype=object), y=np.zeros(1))
    one_line(lambda: load_rows(path, "image-classification"))
    path.write_bytes(pickle.dumps(Trap()))
    one_line(lambda: load_rows(path, "image-classification"))


@settings(max_examples=100, **LIMITS)
@given(EDITS)
def test_parquet(tmp_path: Path, edits: list) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the data extra is not installed")
    import pyarrow

    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([ROWS["text-classification"]] * 3), path)
    path.write_bytes(damaged(path.read_bytes(), edits))
    one_line(lambda: read_rows(path, "--train"))


# ---- names that are not ours --------------------------------------------------------------------

EVIL = st.text(max_size=20) | st.sampled_from(
    [
        "\x1b[31m", "a\nlicense: mit", "---", "x: y", "<script>", "`|", "../../x", "null", "gpt2", "org/name", "C:\\x",
        "\ud800", "\u202e", " #", "'", '"', "{}", "&a", "*a", "!!x", "%TAG", "con", "a" * 300, "/tmp", ".", "",
    ]
)  # fmt: skip


@settings(max_examples=250, **LIMITS)
@given(EVIL | VALUES, st.lists(EVIL, max_size=3), st.lists(EVIL, max_size=2))
def test_cards(base: Any, layers: list[str], others: list[str]) -> None:
    """Read back, the head has our keys and no others, and a layer is a row."""
    card = model_card(base, "in a form", dict.fromkeys(layers, 3), 7, 8, others)
    assert card.isascii() or card.encode()
    start, head, body = card.split("---\n", 2)
    known = yaml.safe_load(head)
    published = {"base_model": base} if "base_model" in known else {}
    assert (start, known) == (
        "",
        {**published, "library_name": "peft", "tags": ["lora", "geolora"]},
    )
    assert not published or "/tmp" not in base
    lines = body.splitlines()
    assert lines[1].startswith("# LoRA adapter for ")
    assert [line for line in lines if line.startswith("#")] == [lines[1]]
    table = lines[lines.index("|---|---|") + 1 :]
    assert len(table) == len(set(layers))
    assert all(re.fullmatch(r"\| `[^`|<>]*` \| 3 \|", row) for row in table)
    assert not {"<", ">"} & {*body}


@settings(max_examples=200, **LIMITS)
@given(EVIL, EVIL)
def test_names_of_a_comparison(tmp_path: Path, task: str, method: str) -> None:
    """A run lies in its own folder of its task's folder, wherever that is."""
    path = tmp_path / "plan.yaml"
    path.write_text(
        json.dumps({"output": "out", "tasks": {task: {}}, "methods": {method: {"method": "lora"}}})
    )

    def take() -> None:
        (cell,) = read_plan(path).cells
        place = PurePosixPath(cell.name)
        assert place.parts == (task, method, "lr-default", "seed-0")
        assert PureWindowsPath(cell.name).parts == place.parts
        assert cell.name.isprintable()
        (tmp_path / "runs" / cell.name).mkdir(parents=True, exist_ok=True)

    one_line(take)


@settings(max_examples=200, **LIMITS)
@given(st.lists(EVIL | VALUES, max_size=4))
def test_lines_of_a_terminal(values: list) -> None:
    file = io.StringIO()
    say(*values, to=file)
    lines = file.getvalue().split("\n")[:-1]
    assert len(lines) == max(1, len(values))
    assert all(line.isprintable() for line in lines)


# ---- adapters and checkpoints -------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "adapter"
    model = lora_net()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.fill_(0.1)
    geolora.export(model, folder)
    return folder


@pytest.mark.filterwarnings("ignore::geolora.errors.GeoloraWarning")  # of keys peft does not know
@settings(max_examples=200, **LIMITS)
@given(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]), EDITS)
def test_adapters(adapter: Path, name: str, edits: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "adapter"
        shutil.copytree(adapter, copy)
        (copy / name).write_bytes(damaged((copy / name).read_bytes(), edits))
        before = sorted(path.name for path in copy.rglob("*"))
        one_line(lambda: geolora.inspect(copy))
        assert sorted(path.name for path in copy.rglob("*")) == before


PATTERNS = st.lists(
    st.sampled_from(["first", "second", "down", ".", "(", ")", "*", "+", "|", "[a-z]", "^", "$", "\\w", "{2}", "?", "!"]),
    max_size=6,
).map("".join)  # fmt: skip
SETTINGS_OF_PEFT = st.sampled_from(
    ["rank_pattern", "alpha_pattern", "target_modules", "modules_to_save", "layers_pattern", "r", "lora_alpha",
     "layer_replication", "base_model_name_or_path", "init_lora_weights", "bias", "task_type", "use_rslora"]
)  # fmt: skip


@settings(max_examples=150, **LIMITS)
@given(
    st.dictionaries(
        SETTINGS_OF_PEFT | EVIL,
        VALUES | EVIL | PATTERNS | st.dictionaries(PATTERNS, st.integers(1, 9)),
        max_size=3,
    )
)
def test_configs_of_adapters(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    """Whatever is in adapter_config.json: a result or a line, in seconds, and every warning a line."""
    monkeypatch.setattr("geolora.adapters.patterns.LIMIT", 2.0)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "adapter"
        shutil.copytree(adapter, copy)
        config = {**json.loads((copy / "adapter_config.json").read_text()), **changed}
        (copy / "adapter_config.json").write_text(json.dumps(config))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one_line(lambda: geolora.inspect(copy) and geolora.verify(copy, Net().double()))
        ours = [w.message for w in caught if isinstance(w.message, GeoloraWarning)]
        assert all(str(message).isprintable() for message in ours)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a comparison, with their JSON files."""
    folder = tmp_path_factory.mktemp("written")
    for name, make in (("run", pages.run), ("comparison", pages.comparison)):
        (folder / name).mkdir()
        make(folder / name)
    return folder


def places(value: Any, here: tuple = ()) -> list[tuple]:
    """Where something stands in a JSON value."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [here, *(place for key, one in inner for place in places(one, (*here, key)))]


@settings(max_examples=120, **LIMITS)
@given(
    st.sampled_from(["run/report", "run/history", "run/run", "comparison/comparison"]),
    st.floats(0, 1),
    VALUES | EVIL | st.sampled_from([10**400, -(10**30), 1e308, float("nan")]),
)
def test_pages_of_odd_numbers_and_names(
    written: Path, monkeypatch: pytest.MonkeyPatch, name: str, share: float, new: Any
) -> None:
    """`plot` without figures: it ends with a page or a line."""
    monkeypatch.setattr("geolora.report.figures.find_spec", lambda _: None)
    file = written / f"{name}.json"
    whole = file.read_text()
    value = json.loads(whole)
    every = places(value)[1:]
    *outer, last = every[int(share * (len(every) - 1))]
    inner = value
    for key in outer:
        inner = inner[key]
    inner[last] = new
    out, err = io.StringIO(), io.StringIO()
    try:
        file.write_text(json.dumps(value))
        with redirect_stdout(out), redirect_stderr(err):
            code = main(["plot", str(file.parent)])
    finally:
        file.write_text(whole)
    assert code in (0, 2)
    assert len(err.getvalue().splitlines()) == (1 if code else 0), err.getvalue()
    assert all(
        line.isprintable() for line in (*out.getvalue().splitlines(), err.getvalue().strip())
    )


@settings(max_examples=150, **LIMITS)
@given(st.sampled_from(["geolora.json", "optimizer.pt"]), EDITS)
def test_checkpoints(name: str, edits: list) -> None:
    """One that differs in a byte is never taken for whole."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint-3"
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").write_bytes(bytes(range(200)))
        seal(checkpoint, "run")
        whole = (checkpoint / name).read_bytes()
        changed = damaged(whole, edits)
        (checkpoint / name).write_bytes(changed)
        if name == "optimizer.pt" and changed != whole:
            assert flaw(checkpoint, "run")
            with pytest.warns(geolora.errors.CheckpointWarning):
                assert latest(Path(folder), "run") is None
        else:
            assert flaw(checkpoint, "run") is None or changed != whole
