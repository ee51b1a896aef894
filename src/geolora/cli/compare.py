"""geolora compare: methods over a grid of step sizes, seeds and tasks, fairly, in one table."""

import argparse
from pathlib import Path
from typing import Any

from geolora.cli.plot import draw_comparison
from geolora.cli.terminal import say

EXAMPLES = """examples:
  geolora compare comparison.yaml

comparison.yaml:
  output: comparison                # runs/, comparison.json, table.txt, figures and report.html
  common: {model: ./my-model, max_steps: 200, max_length: 64}
  tasks:
    reviews: {train: train.jsonl, eval: dev.jsonl, text: sentence}
  methods:
    lora: {rank: 8, lr: [3e-4, 1e-3, 3e-3, 1e-2]}
    geolora: {rank: 16, budget: 337920}
  seeds: [0, 1, 2]
  choose_on: 0.1                    # share of the training rows that choose lr
  against: lora

Settings are the flags of `geolora train`. Every run is one file; stopped, the same command goes on.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="YAML file, as below")


def run(arguments: argparse.Namespace) -> None:
    """Run what is missing, and print the table."""
    from geolora.comparing.plan import read_plan
    from geolora.comparing.run import run_all
    from geolora.files.writing import write_text
    from geolora.report.comparison import table

    def write(folder: Path, summary: dict[str, Any]) -> None:
        write_text(folder / "table.txt", table(summary) + "\n")
        drawn.extend(draw_comparison(folder))

    plan, drawn = read_plan(arguments.config), []
    summary = run_all(plan, say, write)
    say("", *table(summary).split("\n"), "")
    say(
        f"written: {plan.output}/comparison.json, table.txt, report.html"
        + "".join(f", {path.name}" for path in drawn)
    )
