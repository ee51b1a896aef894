"""geolora plot: redraw the figures and report.html of finished runs and comparisons."""

import argparse
from pathlib import Path
from typing import Any

from geolora.cli.terminal import say
from geolora.errors import DataError, install
from geolora.files.folders import alone
from geolora.files.reading import exists, is_folder

EXAMPLES = """examples:
  geolora plot out
  geolora plot comparison other-comparison

Reads report.json, history.json and run.json of `geolora train`, or comparison.json of
`geolora compare`; nothing is trained or computed again.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="output folder of `geolora train` or `geolora compare`",
    )


def run(arguments: argparse.Namespace) -> None:
    """Check every folder, then draw them."""
    from geolora.files.output_folder import naming_disk_errors
    from geolora.report.figures import can_draw

    reports = [(Path(folder), _read(Path(folder))) for folder in arguments.folders]
    for folder, report in reports:
        with naming_disk_errors(folder, "plot"), alone(folder):
            drawn = draw_comparison(folder) if report is None else draw_run(folder, report)
        say(f"written: {', '.join([f'{folder}/report.html', *(path.name for path in drawn)])}")
    if not can_draw():
        say(f"without figures: they need matplotlib. Run: {install('plots')}")


def draw_run(folder: Path, report: dict[str, Any]) -> list[Path]:
    """Draw the figures and the page of a run; returns the figures."""
    from geolora.report.figures import rank_map
    from geolora.report.pages import write_run
    from geolora.tasks.metrics import LOWER_IS_BETTER

    lower = report["metric"] in LOWER_IS_BETTER
    figure = rank_map(folder, lower)
    write_run(folder, lower)
    return [figure] if figure else []


def draw_comparison(folder: Path) -> list[Path]:
    """Draw the figures and the page of a comparison; returns the figures."""
    from geolora.report.comparison import figures
    from geolora.report.pages import write_comparison

    drawn = figures(folder)
    write_comparison(folder)
    return drawn


def _read(folder: Path) -> dict[str, Any] | None:
    """The checked report of a run, or None where the folder holds a comparison.

    Raises:
        DataError: the folder is neither, or is missing, unfinished or damaged.
    """
    from geolora.report.shape import wrong_comparison, wrong_history, wrong_run, wrong_search

    if not is_folder(folder):
        what = "is a file" if exists(folder) else "does not exist"
        raise DataError(f"plot: {folder} {what}. Give the output folder of a run or a comparison.")
    if (folder / "comparison.json").exists():
        summary = _json(folder / "comparison.json")
        if summary == {}:
            raise DataError(
                f"plot: {folder} holds a comparison that is not finished. Start it again to go on."
            )
        _refuse(folder / "comparison.json", wrong_comparison(summary))
        return None
    if not (folder / "report.json").exists():
        if (folder / "run.json").exists():
            raise DataError(
                f"plot: {folder} holds a run that is not finished. Start it again to go on."
            )
        raise DataError(
            f"plot: {folder} has neither report.json nor comparison.json. Give the output folder of "
            "`geolora train` or `geolora compare`."
        )
    report = _json(folder / "report.json")
    _refuse(folder / "report.json", wrong_run(report))
    for name, fault in (("history.json", wrong_history), ("step_size.json", wrong_search)):
        if (folder / name).exists():
            _refuse(folder / name, fault(_json(folder / name)))
    if (folder / "run.json").exists():
        settings = _json(folder / "run.json")
        wrong = None if isinstance(settings, dict) else "it is not a mapping of settings"
        _refuse(folder / "run.json", wrong)
    return report


def _json(path: Path) -> Any:
    from geolora.report.clean import read_clean

    try:
        return read_clean(path)
    except (OSError, ValueError) as error:
        raise DataError(f"plot: {path} is not JSON, or cannot be read.") from error


def _refuse(path: Path, wrong: str | None) -> None:
    if wrong:
        raise DataError(f"plot: {path} is damaged, or of another program: {wrong}.")
