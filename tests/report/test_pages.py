"""report.html: whole, safe, the same each time, and right in a browser."""

import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

import pages
from geolora.report import inline
from geolora.report import pages as written
from geolora.report.clean import without_folders
from geolora.report.comparison import table
from geolora.report.shape import wrong_comparison, wrong_history, wrong_run
from pages import NASTY, Page

needs_figures = pytest.mark.skipif(not written.can_draw(), reason="matplotlib is not installed")
TITLES = (
    "Score against parameters",
    "Robustness to the learning rate",
    "Training loss",
)


@needs_figures
def test_a_comparison_on_one_page(tmp_path: Path) -> None:
    summary = pages.comparison(tmp_path)
    page = Page(written.write_comparison(tmp_path))
    wanted = [f"{title}, {task}" for title in TITLES for task in (NASTY, "lm")]
    wanted += [f"ranks, {task}: {m}" for task in (NASTY, "lm") for m in (NASTY, "small", "large")]
    wanted += [f"budget and learning rate {i}, {t}: geolora" for i, t in ((1, NASTY), (2, "lm"))]
    assert sorted(page.figures) == sorted(wanted)
    for row in summary["rows"]:
        assert f"{row['value']:.4f} ± {row['spread']:.4f}" in page.text
        if "difference" in row:
            gap = row["difference"]
            shown = f"{gap['mean']:+.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}]"
            assert shown in page.text
    assert "10 % of the training rows" in page.text
    assert "perplexity (lower is better)" in page.text
    assert "2.6" in page.text
    assert "bert" in page.text
    assert "someone" not in page.source, "no folder of the machine"
    assert "/data" not in page.source


@needs_figures
def test_names_are_text_and_nothing_is_loaded(tmp_path: Path) -> None:
    pages.comparison(tmp_path)
    pages.run(tmp_path)
    for write in (written.write_comparison, written.write_run):
        page = Page(write(tmp_path))
        assert NASTY in page.text
        assert not {"script", "iframe", "object", "embed"} & set(page.names)
        sources = [source for source in page.sources if not source.startswith("data:")]
        assert set(sources) <= {f"#{name}" for name in page.ids}
        assert "http:" not in page.source
        assert "https:" not in page.source
        assert len(set(page.ids)) == len(page.ids), "every figure has its own ids"
        named = set(re.findall(r"url\(#([^)]+)\)", page.source))
        assert named <= set(page.ids)


@needs_figures
@pytest.mark.filterwarnings("ignore:Glyph 7")
def test_characters_that_no_page_may_hold_are_left_out(tmp_path: Path) -> None:
    summary = pages.comparison(tmp_path, {"one": "accuracy"})
    summary["failures"][0]["text"] = "lost \x00\x1b[31m\ud800 here"
    summary["versions"]["to\x07rch"] = ["2\x7f.6"]
    text = json.dumps(summary).replace('"small"', '"sm\\u0007all"')
    (tmp_path / "comparison.json").write_text(text)
    page = Page(written.write_comparison(tmp_path))
    assert "lost [31m here" in page.text
    assert "torch2.6" in page.text
    assert "ranks, one: small" in page.figures
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", page.source)


def test_the_page_and_the_terminal_say_the_same_of_a_row(tmp_path: Path) -> None:
    summary = pages.comparison(tmp_path, {"one": "accuracy", "two": "accuracy"})
    source = written.write_comparison(tmp_path).read_text(encoding="utf-8")
    rows = re.findall(r"<tr>(.*<td.*)</tr>", source.partition("</table>")[0])
    lines = table(summary).splitlines()[1 : len(rows) + 1]
    assert len(rows) == len(summary["rows"]) + len(summary["means"])
    assert summary["means"]
    for row, line in zip(rows, lines, strict=True):
        method, lr, score, _, *rest = re.findall(r"<td[^>]*>(.*?)</td>", row)
        shown = [unescape(method), lr, *score.split(" ± "), *rest]
        assert line.split(maxsplit=1)[1].split() == " ".join(shown).split()


@needs_figures
def test_a_field_that_diverged_is_marked(tmp_path: Path) -> None:
    summary = pages.comparison(tmp_path, {"one": "accuracy"})
    (found,) = summary["budgets"]
    assert (found["budgets"], found["lrs"]) == ([1000, 2000], [1e-3, 1e-2, 1e-1])
    page = Page(written.write_comparison(tmp_path))
    start = page.source.index('aria-label="budget and learning rate 1')
    figure = page.source[start : page.source.index("</figure>", start)]
    words = re.findall(r"<text[^>]*>([^<]+)</text>", figure)
    assert words.count("diverged") == 2, "all of one field, a part of another"
    assert words.count("1 of 2") == 1
    assert figure.count("url(#h") == 2, "hatched"
    assert {"1,000", "2,000", "0.001", "0.01", "0.1"} <= set(words)
    assert "Runs that diverged" in page.text
    assert f"diverged: {NASTY}" in page.text


@needs_figures
def test_the_same_json_gives_the_same_bytes(tmp_path: Path) -> None:
    pages.comparison(tmp_path)
    first = written.write_comparison(tmp_path).read_bytes()
    code = f"from geolora.report.pages import write_comparison; write_comparison({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert (tmp_path / "report.html").read_bytes() == first


@needs_figures
def test_a_large_figure_is_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.run(tmp_path)
    monkeypatch.setattr(inline, "LARGEST", 1000)
    page = Page(written.write_run(tmp_path))
    pictures = [source for source in page.sources if source != "data:,"]
    assert len(pictures) == len(page.figures) == 2
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in pictures)


def test_a_run_on_one_page(tmp_path: Path) -> None:
    pages.run(tmp_path, "perplexity")
    page = Page(written.write_run(tmp_path, lower_is_better=True))
    assert "<title>geolora on text-classification: perplexity 0.7500</title>" in page.source
    for part in (
        "perplexity (lower is better)",
        "0.7500",
        "700",
        "800",
        "0 to 2 in 2 layers",
        "10 MB",
    ):
        assert part in page.text
    assert "geolora train --model bert" in page.text
    assert "someone" not in page.source
    assert "f0" not in page.text
    if written.can_draw():
        assert page.figures == ["training loss over the steps", "rank of every layer by depth"]


def test_without_matplotlib_there_is_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "can_draw", lambda: False)
    summary = pages.comparison(tmp_path)
    pages.run(tmp_path)
    for write in (written.write_comparison, written.write_run):
        page = Page(write(tmp_path))
        assert page.figures == []
        assert "Run pip install 'matplotlib>=3.9', then" in page.text
    written.write_comparison(tmp_path)
    assert f"{summary['rows'][0]['value']:.4f}" in Page(tmp_path / "report.html").text


@needs_figures
def test_a_comparison_of_an_older_version_is_drawn(tmp_path: Path) -> None:
    summary = pages.comparison(tmp_path, {"one": "accuracy"})
    for key in (
        "choose_on",
        "seeds",
        "lower_is_better",
        "budgets",
        "failures",
        "settings",
        "versions",
    ):
        del summary[key]
    assert wrong_comparison(summary) is None
    (tmp_path / "comparison.json").write_text(json.dumps(summary))
    assert len(Page(written.write_comparison(tmp_path)).figures) == 3 + 3


@needs_figures
def test_a_comparison_in_which_all_diverged(tmp_path: Path) -> None:
    found = [(cell, {"failure": "diverged"}) for cell, _ in pages.results({"one": "accuracy"})]
    summary = pages.summarise(found, NASTY, 0.1)
    (tmp_path / "comparison.json").write_text(json.dumps(summary))
    assert wrong_comparison(summary) is None
    page = Page(written.write_comparison(tmp_path))
    assert page.text.count("2 of 2 diverged") == 3


def test_paths_become_names() -> None:
    for given, left in (
        ("--model /home/me/bert --out=/tmp/a/b/", "--model bert --out=b/"),
        (r"C:\Users\me\rows.csv", "rows.csv"),
        ("~/rows.csv", "rows.csv"),
        ("glue/sst2/dev.csv ./a/b ../a owner/name", "glue/sst2/dev.csv ./a/b ../a owner/name"),
        ("https://host/a/b", "https://host/a/b"),
        ("<b>x</b> 3 / 4", "<b>x</b> 3 / 4"),
    ):
        assert without_folders(given) == left


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("rows", [], "`rows` is empty"),
        ("rows", [{}], "`rows[0].task` is missing"),
        ("against", 3, "`against` is of another type"),
        ("metrics", {"one": 3}, "`metrics.one` is of another type"),
        ("seeds", [True], "`seeds[0]` is of another type"),
        ("means", [{"method": "a"}], "`means[0].value` is missing"),
        ("maps", [{"task": "a", "method": "b", "ranks": {}}], "`maps[0].ranks` is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path: Path, key: str, value: object, message: str) -> None:
    summary = pages.comparison(tmp_path)
    assert wrong_comparison(summary) is None
    assert wrong_comparison({**summary, key: value}) == message
    assert wrong_comparison([]) == "it is of another type"


def test_what_is_wrong_with_a_run_is_named(tmp_path: Path) -> None:
    pages.run(tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    assert wrong_run(report) is None
    assert wrong_run({**report, "ranks": {}}) == "`ranks` is empty"
    assert wrong_run({**report, "value": "high"}) == "`value` is of another type"
    assert wrong_history([{"step": 1}]) == "`[0].loss` is missing"


@needs_figures
@pytest.mark.guard
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here")
@pytest.mark.parametrize("kind", ["comparison", "run"])
def test_in_a_browser(tmp_path: Path, kind: str) -> None:
    getattr(pages, kind)(tmp_path)
    path = getattr(written, f"write_{kind}")(tmp_path)
    chromium = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'browser'}", "--enable-logging=stderr", "--dump-dom",
    ]  # fmt: skip
    # the title as the browser has it: a script of the test's own copies it into the page
    probe = "<script>document.body.dataset.title = document.title</script></body>"
    copy = tmp_path / "probed.html"
    copy.write_text(path.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    done = subprocess.run(
        [*chromium, copy.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    title = {
        "comparison": "3 methods on 2 tasks, compared by geolora",
        "run": "geolora on text-classification: accuracy 0.7500",
    }[kind]
    assert f'data-title="{title}"' in done.stdout
    assert done.stdout.count("<figure>") == len(Page(path).figures)
    assert done.stdout.count("<script>") == 1, "names stay text"
    assert "CONSOLE" not in done.stderr
