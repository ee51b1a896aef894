"""geolora verify: check with stock peft that a saved adapter computes what was trained."""

import argparse

from geolora.cli.terminal import say

EXAMPLES = """examples:
  geolora verify out/adapter
  geolora verify out/adapter --base ./my-model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", help="folder written by geolora export or train")
    parser.add_argument("--base", help="base model folder or name; the adapter's own if not given")


def run(arguments: argparse.Namespace) -> None:
    """Print the worst layer; exit code 2 where one is wrong."""
    from geolora.adapters.verify import read_loss, verify

    errors = verify(arguments.adapter, arguments.base)
    worst = max(errors, key=lambda name: errors[name])
    say(f"{len(errors)} layers are right; largest relative error {errors[worst]:.1e} in {worst}")
    if lost := read_loss(arguments.adapter):
        say(f"export left out {lost:.1%} of what was trained (relative error of the update)")
