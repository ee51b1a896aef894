"""geolora inspect: ranks and singular values of a saved LoRA adapter, geolora's or not."""

import argparse
import json
import math

EXAMPLES = """examples:
  geolora inspect out/adapter
  geolora inspect some-lora --tail 0.2
  geolora inspect out/adapter --json > ranks.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="PEFT adapter folder; the base model is not needed")
    parser.add_argument("--tail", type=float, default=0.25, help="tail to judge by (0.25)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(arguments: argparse.Namespace) -> None:
    """Print a row per layer."""
    from geolora.saved import as_rows, inspect

    rows = inspect(arguments.adapter, arguments.tail)
    if arguments.json:
        print(json.dumps(as_rows(rows), indent=2))
        return
    wide = max(len("layer"), *(len(row.layer) for row in rows))
    judged = f"rank at tail {arguments.tail:g}"
    print(f"{'layer':{wide}}  {'shape':>12}  rank  {judged}  {'tail':>6}  leading singular values")
    for row in rows:
        leading = " ".join(f"{value:.3g}" for value in row.sigma[:4]) or "-"
        shape = f"{row.d_out} x {row.d_in}"
        print(
            f"{row.layer:{wide}}  {shape:>12}  {row.rank:4d}  {row.tail_rank:{len(judged)}d}  "
            f"{row.share_of_tail:6.3f}  {leading}"
        )
    used = sum(row.rank * (row.d_out + row.d_in) for row in rows)
    needed = sum(row.tail_rank * (row.d_out + row.d_in) for row in rows)
    size = math.hypot(*(value for row in rows for value in row.sigma))
    print(
        f"{len(rows)} layers, {used:,} parameters in use, {needed:,} needed at tail "
        f"{arguments.tail:g}; ||W|| = {size:.4g}"
    )
