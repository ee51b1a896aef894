"""`geolora demo | train | compare | plot | inspect | export | verify`: wiring and the one-line errors."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

from geolora.cli import compare, demo, export, inspect, plot, train, verify
from geolora.cli.terminal import say
from geolora.errors import GeoloraError, escaped, nearest
from geolora.settings.other_tools import meant

COMMANDS = {
    "demo": demo,
    "train": train,
    "compare": compare,
    "plot": plot,
    "inspect": inspect,
    "export": export,
    "verify": verify,
}
WRONG_KIND = re.compile(
    r"argument (\S+): invalid (int|float|number_or_auto) value: (.*)", re.DOTALL
)
WITHOUT_VALUE = re.compile(r"argument (\S+): expected one argument")
"""What argparse says of a flag's value."""
KINDS = {"int": "a whole number", "float": "a number", "number_or_auto": "a number or auto"}


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line that name the nearest valid word."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong on one line, exit code 2."""
        if found := WRONG_KIND.fullmatch(message):
            flag, kind, value = found.groups()
            value = value if len(value) <= 80 else f"{value[:60]}…{value[-15:]}"
            message = f"`{flag}` must be {KINDS[kind]}; got {value}"
        elif found := WITHOUT_VALUE.fullmatch(message):
            message = f"`{found[1]}` must have a value after it"
        message = message if message.endswith("?") else f"{message.rstrip('.')}."
        self.exit(2, f"geolora: {escaped(message)} See {self.prog} --help.\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all sub-commands."""
    parser = Parser(
        prog="geolora",
        description="Fine-tune Hugging Face models on the manifold of low-rank matrices.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--version", action="version", version=f"geolora {metadata.version('geolora')}"
    )
    _offer_completion(parser)
    commands = parser.add_subparsers(
        dest="name", metavar="COMMAND", required=True, parser_class=Parser
    )
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0].partition(": ")[2]
        sub = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:],
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run, parser=sub)
    return parser


def _offer_completion(parser: argparse.ArgumentParser) -> None:
    """--print-completion bash, zsh or tcsh: a script for the shell, by the package shtab where it is installed."""
    try:
        import shtab
    except ImportError:
        return
    shtab.add_argument_to(parser, help="print a script that completes geolora's words in a shell")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 for an error of the user's, 130 for Ctrl-C."""
    warnings.showwarning = _one_line_warning
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if arguments and not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        parser.error(f"unknown command `{arguments[0]}`.{nearest(arguments[0], COMMANDS)}")
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [flag for action in parsed.parser._actions for flag in action.option_strings]
        word = unknown[0].partition("=")[0]
        parsed.parser.error(f"unknown argument `{word}`.{meant(word, known, 'flag')}")
    try:
        parsed.run(parsed)
    except GeoloraError as error:
        _say(error)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":  # of several processes one says it
            _say(str(stop) or "stopped.")
        return 130
    return 0


def _one_line_warning(message: object, category: type, *_: object, **__: object) -> None:
    if category.__module__.startswith("geolora"):
        _say(message)


def _say(message: object) -> None:
    """A line on stderr; messages that name geolora themselves, for users of the library, name it once."""
    say(f"geolora: {str(message).removeprefix('geolora: ')}", to=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
