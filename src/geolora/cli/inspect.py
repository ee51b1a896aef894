"""geolora inspect: ranks and singular values of a saved LoRA adapter, geolora's or not."""

import argparse
import json
import math
import sys
from pathlib import Path

from geolora.cli.terminal import say

EXAMPLES = """examples:
  geolora inspect out/adapter
  geolora inspect some-lora --tail 0.2 --figures figures
  geolora inspect some-lora --tail 0 --budget 200000
  geolora inspect out/adapter --json > ranks.json

What is needed is what `geolora.prune` with the same tail and budget leaves.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="PEFT adapter folder; the base model is not needed")
    parser.add_argument(
        "--tail", type=float, default=0.25, help="part of its norm a layer may lose (0.25)"
    )
    parser.add_argument("--budget", type=int, help="adapter parameters to keep at most, in all")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--figures", help="folder for ranks.png and spectra.png")
    parser.add_argument("--overwrite", action="store_true", help="replace figures that exist")


def run(arguments: argparse.Namespace) -> None:
    """Print a rank map and a row per layer; draw them where asked."""
    from geolora.adapters.inspect import as_rows, inspect
    from geolora.files.folders import alone
    from geolora.files.output_folder import naming_disk_errors
    from geolora.report import figures, text

    if arguments.figures is not None:
        _check_figures(Path(arguments.figures), arguments.overwrite)
    rows = as_rows(inspect(arguments.adapter, arguments.tail, arguments.budget))
    limit = f"tail {arguments.tail:g}"
    if arguments.budget is not None:
        limit += f" and budget {arguments.budget:,}"
    paths = []
    if arguments.figures is not None:
        folder = Path(arguments.figures)
        with naming_disk_errors(folder, "`--figures`"):
            folder.mkdir(parents=True, exist_ok=True)
            with alone(folder):
                _check_figures(folder, arguments.overwrite)  # another process may have drawn some
                paths = figures.adapter_figures(rows, folder, f"rank needed at {limit}")
    if arguments.json:
        say(*json.dumps(rows, indent=2).splitlines())
        return
    now = text.rank_map({row["layer"]: row["rank"] for row in rows}, "rank now")
    needed = {row["layer"]: row["settled_rank"] for row in rows}
    then = text.rank_map(needed, f"rank needed at {limit}")
    layers = text.layer_rows(rows, "needed", _can_show(text.BLOCKS))
    say(*"\n\n".join((now, then, layers)).split("\n"))
    cost = {row["layer"]: row["d_out"] + row["d_in"] for row in rows}
    say(
        f"{len(rows)} layer{'s' * (len(rows) > 1)}, {sum(row['rank'] * cost[row['layer']] for row in rows):,} parameters "
        f"in use, {sum(rank * cost[layer] for layer, rank in needed.items()):,} needed at {limit}; "
        f"||W|| = {math.hypot(*(value for row in rows for value in row['sigma'])):.4g}"
    )
    if paths:
        say(f"drawn: {', '.join(map(str, paths))}")


def _check_figures(folder: Path, overwrite: bool) -> None:
    """Refuse figures that cannot or must not be drawn, before anything is read."""
    from geolora.errors import OutputError, SettingError, install
    from geolora.files.output_folder import demand_writable
    from geolora.files.reading import exists, is_folder
    from geolora.report import figures

    if not figures.can_draw():
        raise SettingError(f"`--figures` needs matplotlib. Run: {install('plots')}.")
    if exists(folder) and not is_folder(folder):
        raise OutputError(f"`--figures` must be a folder; {folder} is a file. Choose another.")
    demand_writable(folder, "`--figures`")
    there = [folder / name for name in figures.NAMES if (folder / name).exists()]
    if there and not overwrite:
        raise OutputError(
            f"`--figures`: {there[0]} exists. Choose another folder, or add --overwrite."
        )


def _can_show(characters: str) -> bool:
    """Whether standard output takes these characters."""
    try:
        characters.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
