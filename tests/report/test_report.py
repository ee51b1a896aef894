"""Reports are drawn from files and plain rows alone."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from geolora.report import figures, panels, text

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


def rows_of(layers: list[str], rank: int = 6) -> list[dict]:
    """Rows as `geolora.inspect` gives them; the last layer has no direction."""
    sigma = [2.0**-i for i in range(rank)]
    row = {
        "d_out": 8,
        "d_in": 4,
        "rank": rank,
        "sigma": sigma,
        "settled_rank": 2,
        "share_dropped": 0.2,
    }
    none = {"rank": 0, "sigma": [], "settled_rank": 0, "share_dropped": 0.0}
    return [{"layer": name, **row} for name in layers[:-1]] + [{"layer": layers[-1], **row, **none}]


def test_a_grid_of_holes_is_a_list() -> None:
    """Else twenty thousand layers of as many kinds and depths would be four hundred million cells."""
    ranks = {f"a{i}.{i}.b{i}": i for i in range(20_000)}
    lines = text.rank_map(ranks, "rank now").splitlines()
    assert len(lines) == len(ranks) + 2
    assert lines[-1].split() == ["a19999.19999.b19999", "19999"]


def test_a_rank_map_as_text() -> None:
    lines = text.rank_map(RANKS, "rank now").splitlines()
    assert lines == [
        "rank now",
        "                        0  2 10  -",
        "  attention.self.query  3     5",
        "  output.dense             1",
        "  bert.pooler.dense              4",
    ]


def test_a_deep_model_goes_on_below() -> None:
    ranks = {f"layers.{i}.{kind}": i for i in range(100) for kind in ("up", "down")}
    _, *lines = text.rank_map(ranks, "rank now").splitlines()
    assert max(map(len, lines)) <= text.WIDEST
    shown = [
        int(word) for line in lines if line.strip().startswith("up") for word in line.split()[1:]
    ]
    assert shown == list(range(100))


def test_a_small_spectrum_steps_down_by_factors_of_two() -> None:
    assert text.spectrum([8.0, 7.9, 4.0, 2.0, 1e-9], 5) == "██▇▆▁"
    assert text.spectrum([8.0, 4.0, 2.0], 1) == "█|▇▆"
    assert text.spectrum([1.0] * 40, 40) == "█" * text.MOST + "…"
    assert text.spectrum([1.0] * 40, 35) == "█" * text.MOST + "…", "the cut is beyond"
    assert text.spectrum([], 0) == "-"


def test_a_row_per_layer() -> None:
    rows = rows_of(["layers.0.up", "layers.1.up"])
    head, first, second, legend = text.layer_rows(rows, "needed").splitlines()
    assert head.split() == [
        "layer",
        "shape",
        "rank",
        "needed",
        "dropped",
        "leading",
        "singular",
        "values",
        "spectrum",
    ]
    assert first.split() == [
        "layers.0.up",
        "8",
        "x",
        "4",
        "6",
        "2",
        "0.200",
        "1",
        "0.5",
        "0.25",
        "0.125",
        "█▇|▆▅▄▃",
    ]
    assert second.split() == ["layers.1.up", "8", "x", "4", "0", "0", "0.000", "-", "-"]
    assert "|" in legend
    plain = text.layer_rows(rows, "needed", spectra=False)
    assert plain.isascii()
    assert len(plain.splitlines()) == 3


LLAMA = [f"model.layers.{d}.{kind}" for d in range(32) for kind in "abcdefg"]
BERT = [f"encoder.layer.{d}.attention.output.{kind}" for d in range(6) for kind in "abcdef"]
BART = [f"model.{s}.layers.{d}.fc" for s in ("encoder", "decoder") for d in range(2)]


@pytest.mark.parametrize("layers", [LLAMA, BERT, BART, ["pooler"], ["layer.0.query", "pooler"]])
def test_figures_of_an_adapter_hold_every_layer_without_overlap(
    layers: list[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="the plots extra is not installed")
    rows = rows_of(layers)
    judged = "rank needed at tail 0.25 and budget 1,337,920"
    paths = figures.adapter_figures(rows, tmp_path, judged)
    assert [path.name for path in paths] == list(figures.NAMES)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)

    change, spectra = figures._rank_change(rows, judged), figures._spectra(rows, judged)
    for figure in (change, spectra):
        figure.draw_without_rendering()
        outside = figure.get_tightbbox()
        assert outside.x0 >= 0, "nothing is cut off"
        assert outside.x1 <= figure.get_size_inches()[0]
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                boxes = [t.get_window_extent() for t in axis.get_ticklabels() if t.get_text()]
                assert not any(a.overlaps(b) for a, b in pairwise(boxes))
    now, needed = change.axes[:2]
    assert [t.get_text() for t in now.texts].count("6") == len(layers) - 1
    assert [t.get_text() for t in needed.texts].count("2") == len(layers) - 1
    titles = [a.title.get_window_extent() for a in (now, needed)]
    assert not titles[0].overlaps(titles[1])
    dots = [line for axes in spectra.axes for line in axes.lines if line.get_marker() == "o"]
    assert len(dots) == len(layers) - 1, "a layer without a direction has no line"
    assert {(line.get_xdata()[0], line.get_ydata()[0]) for line in dots} <= {(2, 0.5)}


def test_many_methods_have_different_colours() -> None:
    for count in (3, 10, 14, 20):
        summary = {"rows": [{"method": f"m{i}"} for i in range(count)]}
        assert len(set(panels.colors(summary).values())) == count
