"""JSON files: read with plain errors, written whole; none that is nested too deeply ends in a traceback."""

import gzip
import json
import os
import re
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

import pages
from geolora import errors
from geolora.cli.__main__ import main
from geolora.errors import first_line, install, nearest, shown
from geolora.files.reading import parse_json, read_json
from geolora.files.writing import write_json
from geolora.training.checkpoints import SEAL, flaw

WRITTEN = Path(__file__).parents[1] / "fixtures" / "written_by_0.1.0"
DEEP = "[" * 100_000
TRAIN = [
    "train", "--model", "base", "--train", "train.jsonl", "--eval", "dev.jsonl", "--output", "out",
]  # fmt: skip
PLAN = """
output: grid
common: {model: base, max-steps: 1}
tasks:
  reviews: {train: train.jsonl, eval: dev.jsonl}
methods:
  lora: {rank: 2, lr: 0.001}
seeds: [0]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What 0.1.0 wrote, a comparison and a plan: the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shutil.copytree(WRITTEN, tmp_path, dirs_exist_ok=True)
    (tmp_path / "comparison").mkdir()
    pages.comparison(tmp_path / "comparison")
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "grid" / "runs" / "reviews" / "lora" / "lr-0.001").mkdir(parents=True)
    (tmp_path / "grid" / "comparison.json").write_text("{}")
    return tmp_path


DEEPLY_NESTED = {
    "rows": ("train.jsonl", TRAIN, "`--train`: train.jsonl cannot be read: line 1 is not JSON"),
    "zipped rows": (
        "dev.jsonl.gz",
        [*TRAIN, "--eval", "dev.jsonl.gz"],
        "`--eval`: dev.jsonl.gz cannot be read: line 1 is not JSON",
    ),
    "a base model": ("base/config.json", TRAIN, "`--model`: base cannot be loaded: "),
    "a stopped run": ("out/run.json", TRAIN, "`--output`: out exists."),
    "settings": ("config.yaml", ["train", "--config", "config.yaml"], "config.yaml is not YAML"),
    "an adapter": (
        "uniform/adapter_config.json",
        ["inspect", "uniform"],
        "adapter_config.json must hold JSON: maximum recursion depth exceeded",
    ),
    "an adapter's base": (
        "base/config.json",
        ["verify", "uniform", "--base", "base"],
        "base model `base` cannot be loaded: ",
    ),
    "an adapter's shards": (
        "base/model.safetensors.index.json",
        ["verify", "uniform", "--base", "base"],
        "model.safetensors.index.json must hold JSON: maximum recursion depth exceeded",
    ),
    "a report": ("finished/report.json", ["plot", "finished"], "report.json is not JSON"),
    "a history": ("finished/history.json", ["plot", "finished"], "history.json is not JSON"),
    "a run's settings": ("finished/run.json", ["plot", "finished"], "run.json is not JSON"),
    "a comparison": (
        "comparison/comparison.json",
        ["plot", "comparison"],
        "comparison.json is not JSON",
    ),
    "a cell of a grid": (
        "grid/runs/reviews/lora/lr-0.001/seed-0.json",
        ["compare", "plan.yaml"],
        "seed-0.json is not the file of a run. Remove it.",
    ),
}


@pytest.mark.parametrize("what", DEEPLY_NESTED)
def test_a_file_that_is_nested_too_deeply_is_one_line(
    what: str, folder: Path, capsys: pytest.CaptureFixture
) -> None:
    name, command, message = DEEPLY_NESTED[what]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(DEEP.encode()) if name.endswith(".gz") else DEEP.encode())
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("geolora: ")
    assert message in err


def test_a_seal_that_is_nested_too_deeply_is_a_flaw(tmp_path: Path) -> None:
    (tmp_path / SEAL).write_text(DEEP)
    assert flaw(tmp_path, "run") == f"has an unreadable {SEAL}"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1 2]", DEEP.encode()])
def test_what_is_not_json_is_a_value_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="."):
        read_json(path)
    if content.isascii():
        with pytest.raises(ValueError, match="."):
            parse_json(content.decode())


@pytest.mark.parametrize("path", ["gone", "."])
def test_what_cannot_be_read_is_an_os_error(path: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="."):
        read_json(tmp_path / path)


def test_what_is_written_is_read_and_replaces_the_whole_file_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "some.json"
    value = {"ä": [1, 2.5, None, True], "b": {}}
    write_json(path, value)
    assert read_json(path) == json.loads(path.read_text()) == value
    write_json(path, value, indent=None)
    assert len(path.read_text().splitlines()) == 1

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, [])
    assert read_json(path) == value


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError(""), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (OSError("first.\nsecond"), "first"),
        (OSError("errors:\n  the\tfirst\nsecond"), "errors: the first"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_a_hint_names_packages_that_an_index_has() -> None:
    """Not `geolora[…]`: geolora may be a clone."""
    from importlib import metadata

    for extra in metadata.metadata("geolora").get_all("Provides-Extra") or ():
        assert re.fullmatch(r"pip install( '?[\w-]+[=>]=[\d.]+'?)+", install(extra)), extra
    for path in Path(errors.__file__).parent.rglob("*.*"):
        if path.suffix in (".py", ".html"):
            text = path.read_text(encoding="utf-8")
            assert "geolora[" not in text, path
            for extra in re.findall(r"install\([\"'](\w+)", text):
                assert install(extra) != "pip install ", (path, extra)


def test_values_and_names_in_messages() -> None:
    assert shown("a\nb") == r"'a\nb'"
    assert len(shown("x" * 1000)) < 80
    assert nearest("trian", ["train", "plot"]) == " Did you mean `train`?"
    assert nearest("xyz", ["train", "plot"]) == ""


def test_an_error_without_a_message_is_still_one_line(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library may raise with nothing to say."""

    def silent(*_: object, **__: object) -> None:
        raise ValueError

    monkeypatch.setattr("transformers.AutoModelForSequenceClassification.from_pretrained", silent)
    assert main(TRAIN) == 2
    assert capsys.readouterr().err == "geolora: `--model`: base cannot be loaded: ValueError.\n"
    monkeypatch.setattr("geolora.tasks.rows._read_jsonl", silent)
    assert main(TRAIN) == 2
    message = "geolora: `--train`: train.jsonl cannot be read: ValueError.\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "settings, error, told",
    [
        ({"quant_method": "gptq", "bits": 4}, None, "Loading a GPTQ quantized model requires "),
        ({"quant_method": "torchao"}, None, "'quant_type'."),
        ("int8", None, "'str' object has no attribute "),
        (
            {"quant_method": "torchao"},
            RuntimeError("issues in conversion"),
            "issues in conversion. It is quantised: save it as the class of the task, with its head.",
        ),
    ],
)
def test_a_quantised_base_that_cannot_be_loaded_is_one_line(
    folder: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    settings: object,
    error: Exception | None,
    told: str,
) -> None:
    config = json.loads((folder / "base" / "config.json").read_text())
    (folder / "base" / "config.json").write_text(
        json.dumps(config | {"quantization_config": settings})
    )
    if error is not None:
        auto = "transformers.AutoModelForSequenceClassification.from_pretrained"
        monkeypatch.setattr(auto, Mock(side_effect=error))
    assert main(TRAIN) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"geolora: `--model`: base cannot be loaded: {told}")
    assert len(err.splitlines()) == 1
