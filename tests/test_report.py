"""Reports are drawn from files alone."""

import json
from pathlib import Path

import pytest

from geolora.report import figures

RANKS = {
    "bert.encoder.layer.0.attention.self.query": 3,
    "bert.encoder.layer.10.attention.self.query": 5,
    "bert.encoder.layer.2.output.dense": 1,
    "bert.pooler.dense": 4,
}


def test_layers_are_laid_out_by_depth_and_kind() -> None:
    kinds, depths, table = figures.rank_table(RANKS)
    assert kinds == ["attention.self.query", "output.dense", "bert.pooler.dense"]
    assert depths == ["0", "2", "10", "-"]
    assert table == [[3, None, 5, None], [None, 1, None, None], [None, None, None, 4]]


def test_the_map_is_drawn_from_report_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = {
        "ranks": RANKS, "method": "geolora", "metric": "accuracy", "value": 0.5,
        "adapter_parameters": 123,
    }  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    assert figures.rank_map(tmp_path) is None, "without matplotlib none is drawn"
    monkeypatch.undo()
    pytest.importorskip("matplotlib", reason="the plots extra is not installed")
    path = figures.rank_map(tmp_path)
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
