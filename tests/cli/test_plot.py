"""geolora plot: finished folders are drawn again; what is none is one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import pages
from geolora.cli import compare
from geolora.cli.__main__ import main
from geolora.report import figures
from geolora.report import pages as written

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plot(capsys: pytest.CaptureFixture) -> Call:
    def call(*folders: Path) -> tuple[int, str, str]:
        code = main(["plot", *map(str, folders)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A comparison and a run."""
    found = tmp_path / "comparison", tmp_path / "run"
    for folder, make in zip(found, (pages.comparison, pages.run), strict=True):
        folder.mkdir()
        make(folder)
    return found


def test_a_comparison_and_a_run_are_drawn_again(plot: Call, folders: tuple[Path, Path]) -> None:
    pytest.importorskip("matplotlib", reason="the plots extra is not installed")
    comparison, run = folders
    code, out, err = plot(comparison, run)
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first == (
        f"written: {comparison}/report.html, score_against_parameters.png, learning_rates.png, "
        "loss_curves.png, rank_maps.png, budgets.png"
    )
    assert second == f"written: {run}/report.html, ranks.png"
    assert all((comparison / name).is_file() for name in first.split(", ")[1:])
    before = [(folder / "report.html").read_bytes() for folder in folders]
    assert plot(comparison, run)[0] == 0
    assert [(folder / "report.html").read_bytes() for folder in folders] == before
    assert not list(comparison.glob("*.partial"))


def test_without_matplotlib(
    plot: Call, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    code, out, _ = plot(*folders)
    assert code == 0
    assert out.splitlines()[-1].endswith("Run: pip install 'matplotlib>=3.9'")
    for folder in folders:
        assert not list(folder.glob("*.png"))
        assert "<table" in (folder / written.NAME).read_text()


@pytest.mark.parametrize(
    "name, content, message",
    [
        (None, "", "has neither report.json nor comparison.json. Give the output folder of"),
        ("run.json", "{}", "holds a run that is not finished. Start it again to go on."),
        ("comparison.json", "{}", "holds a comparison that is not finished. Start it again"),
        ("comparison.json", '{"rows": [', "comparison.json is not JSON, or cannot be read."),
        ("comparison.json", "[1]", "comparison.json is damaged, or of another program: it is of"),
        ("report.json", "\xff", "report.json is not JSON, or cannot be read."),
        ("report.json", '{"a": 1}', "report.json is damaged, or of another program: `method` is"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_drawn_is_one_line(
    plot: Call,
    tmp_path: Path,
    folders: tuple[Path, Path],
    name: str | None,
    content: str,
    message: str,
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    if name:
        (folder / name).write_text(content, encoding="latin-1")
    code, out, err = plot(folders[0], folder)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"geolora: plot: {folder}")
    assert message in err
    assert not list(tmp_path.rglob("report.html")), "all are checked before any is drawn"


@pytest.mark.parametrize(
    "file, keys, value, message",
    [
        ("report", ["train_loss"], 10**400, "`train_loss` is too large"),
        ("report", ["peak_memory_bytes"], -(10**400), "`peak_memory_bytes` is too large"),
        ("report", ["ranks", "x" * 1001], 3, "a name in `ranks` has more than 1,000 characters"),
        ("report", ["ranks"], {"\ud800.1.a": 1, "b\x1b[2J": 2}, None),
        ("report", ["method"], "$x^$ \ud800", None),
        ("report", ["value"], float("nan"), None),
        ("report", ["more"], json.loads("[" * 21 + "]" * 21), "is not JSON, or cannot be read"),
        ("history", [0, "loss"], 10**400, "`[0].loss` is too large"),
        ("run", ["text"], ["x", None, [1], 10**400], None),
        ("comparison", ["rows", 0, "value"], 10**400, "`rows[0].value` is too large"),
        ("comparison", ["rows", 0, "task"], "\ud800$_$", None),
        ("comparison", ["settings", 0, "values"], {"lr": ["x", {"y": 10**400}]}, None),
    ],
)  # fmt: skip
def test_what_is_odd_is_drawn_or_is_one_line(
    plot: Call,
    folders: tuple[Path, Path],
    file: str,
    keys: list,
    value: object,
    message: str | None,
) -> None:
    folder = folders[file != "comparison"]
    inner = whole = json.loads((folder / f"{file}.json").read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / f"{file}.json").write_text(json.dumps(whole))
    code, out, err = plot(folder)
    if message is None:
        assert (code, err) == (0, "")
        assert (folder / "report.html").is_file()
    else:
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.splitlines()) == 1


def test_a_comparison_without_means_has_a_table(folders: tuple[Path, Path]) -> None:
    from geolora.report.comparison import table

    summary = json.loads((folders[0] / "comparison.json").read_text())
    whole = table(summary)
    del summary["means"]
    assert table(summary).splitlines()[:3] == whole.splitlines()[:3]


def test_what_a_run_lacks_or_has_damaged(plot: Call, folders: tuple[Path, Path]) -> None:
    run = folders[1]
    for name in ("history.json", "run.json"):
        whole = (run / name).read_text()
        (run / name).write_text("7")
        code, _, err = plot(run)
        assert code == 2
        assert f"{name} is damaged" in err
        (run / name).unlink()
        assert plot(run)[0] == 0
        (run / name).write_text(whole)


def test_a_folder_that_is_missing_or_a_file(plot: Call, tmp_path: Path) -> None:
    assert "nothing does not exist." in plot(tmp_path / "nothing")[2]
    (tmp_path / "file").write_text("")
    assert "file is a file." in plot(tmp_path / "file")[2]


def test_compare_ends_with_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from geolora.comparing import run as comparison

    output = tmp_path / "out"
    plan = "output: {output}\ntasks: {{t: {{}}}}\nmethods: {{lora: {{}}}}\n"
    (tmp_path / "plan.yaml").write_text(plan.format(output=output))

    def run_all(_: object, __: object, then: Callable) -> dict:
        output.mkdir()
        summary = pages.comparison(output)
        then(output, summary)
        return summary

    monkeypatch.setattr(comparison, "run_all", run_all)
    assert main(["compare", str(tmp_path / "plan.yaml")]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"written: {output}/comparison.json, table.txt, report.html")
    assert (output / "report.html").is_file()
    assert compare.EXAMPLES.count("report.html") == 1
    summary = json.loads((output / "comparison.json").read_text())
    assert f"{summary['rows'][0]['value']:.4f}" in (output / "report.html").read_text()
