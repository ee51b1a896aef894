"""The one way to the terminal: lines that no name out of a file can break, colour or forge."""

import sys
from contextlib import nullcontext
from typing import TextIO

from geolora.errors import escaped


def say(*lines: object, to: TextIO | None = None) -> None:
    """Print each on a line of its own, at once; what does not print, or the terminal cannot show, is shown escaped.

    Args:
        to: standard output where it is not given.
    """
    stream: TextIO = to or sys.stdout
    encoding = stream.encoding or "utf-8"
    text = "\n".join(escaped(str(line)) for line in lines)
    bars = sys.modules.get("tqdm.auto")  # a bar that is being drawn makes room
    with bars.tqdm.external_write_mode(file=stream) if bars else nullcontext():
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
