"""A comparison and a run as their JSON files have them, and what a page holds."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from geolora.comparing.plan import Cell
from geolora.comparing.summary import summarise
from geolora.settings.train_config import TrainConfig
from geolora.tasks.metrics import score

NASTY = """<script>alert("1")</script> & 'x' $a$"""
WITHOUT_END = {"meta", "link", "img", "br"}
BUDGETS = {"small": 1000, "large": 2000}
VERSIONS = {"geolora": "0.1.0", "torch": "2.6"}


def results(tasks: dict[str, str]) -> list[tuple[Cell, dict[str, Any]]]:
    """Runs of {task: metric}: NASTY at its default step size, and two budgets at three; at the largest
    step size the large budget diverges, and the small one at seed 1."""
    runs = []
    for task, metric in tasks.items():
        for method, lrs in (
            (NASTY, [None]),
            ("small", [1e-3, 1e-2, 1e-1]),
            ("large", [1e-3, 1e-1]),
        ):
            for lr in lrs:
                for seed in (0, 1):
                    config = TrainConfig(
                        model="/home/someone/models/bert", train="rows.jsonl", eval="/data/x/dev.csv",
                        method="lora" if method == NASTY else "geolora", budget=BUDGETS.get(method),
                        task="causal-lm" if metric == "perplexity" else "text-classification",
                        lr=lr, seed=seed,
                    )  # fmt: skip
                    cell = Cell(task, method, lr, seed, config)
                    if lr == 1e-1 and (method == "large" or seed == 1):
                        runs.append((cell, {"failure": f"diverged: {NASTY}"}))
                        continue
                    hits = [1] * (6 - seed) + [0] * (2 + seed)
                    report = {
                        "metric": metric, "value": score(metric, hits, [1] * len(hits)),
                        "train_loss": 0.2, "seconds_per_step": 0.1, "peak_memory_bytes": 10_000_000,
                        "adapter_parameters": BUDGETS.get(method, 1500), "exported_parameters": 3000,
                        "ranks": {f"layer.{i}.query": i for i in range(4)}, "versions": VERSIONS,
                    }  # fmt: skip
                    history = [{"step": i, "loss": 1 / i} for i in range(1, 9)]
                    runs.append(
                        (
                            cell,
                            {
                                "failure": None, "settings": {"method": config.method}, "report": report,
                                "choice": 0.5, "history": history, "predictions": hits,
                                "targets": [1] * len(hits),
                            },
                        )
                    )  # fmt: skip
    return runs


def comparison(folder: Path, tasks: dict[str, str] | None = None) -> dict[str, Any]:
    """Write comparison.json of such runs; returns what it holds."""
    tasks = tasks or {NASTY: "accuracy", "lm": "perplexity"}
    summary = summarise(results(tasks), NASTY, 0.1)
    (folder / "comparison.json").write_text(json.dumps(summary))
    return json.loads(json.dumps(summary))


def run(folder: Path, metric: str = "accuracy") -> None:
    """Write report.json, history.json and run.json of a run."""
    report = {
        "method": "geolora", "task": "text-classification", "metric": metric, "value": 0.75,
        "train_loss": 0.2, "steps": 80, "seconds": 9.5, "seconds_per_step": 0.1,
        "trainable_parameters": 900, "adapter_parameters": 700, "exported_parameters": 800,
        "ranks": {"layer.0.query": 2, "layer.1.query": 0}, "peak_memory_bytes": 10_000_000, "seed": 3,
        "versions": VERSIONS, "command": f"geolora train --model /home/someone/bert --text {NASTY}",
    }  # fmt: skip
    settings = {
        "model": "/home/someone/bert",
        "text": NASTY,
        "lr": None,
        "tail": 0.25,
        "data": "f0",
    }
    history = [{"step": step, "loss": 1 / step} for step in range(1, 9)]
    for name, value in (("report", report), ("history", history), ("run", settings)):
        (folder / f"{name}.json").write_text(json.dumps(value))


class Page(HTMLParser):
    """A page that was read: elements must close in order.

    Attributes:
        titles, texts: what the reader sees, by part. figures: labels of the figures.
        sources: whatever attribute may load something.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.figures: list[str] = []
        self.sources: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {key: value or "" for key, value in attrs}
        assert len(given) == len(attrs), "an attribute stands twice"
        self.names.append(tag)
        self.sources += [given[key] for key in ("src", "href", "xlink:href") if key in given]
        self.ids += [given["id"]] if "id" in given else []
        if self.open[-1:] == ["figure"]:
            self.figures.append(given.get("aria-label") or given["alt"])
        assert not [key for key in given if key.startswith("on")], "no scripts"
        if tag not in WITHOUT_END:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data
