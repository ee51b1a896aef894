"""Every exception and warning geolora raises on purpose.

    GeoloraError(Exception)
    ├── PairingError(ValueError)              a LoRA pair that cannot be trained on the manifold, or none at all
    ├── SettingError(ValueError)              an argument or flag out of its range, or misspelt
    │   └── BudgetError                       a parameter budget below one direction per layer
    ├── DataError(ValueError)                 a file, column or label that is missing or unusable
    ├── ModelError(ValueError)                a model folder or name that cannot be loaded
    ├── OutputError(OSError)                  an output folder that exists, or cannot be written
    ├── StateError(ValueError)                a state that does not fit: an optimizer's, a start's
    ├── SetupError(RuntimeError)              closures, ZeRO partitions, sharded factors
    ├── GradientError(ArithmeticError)
    │   ├── NonFiniteGradientError            too many steps in a row without a finite gradient
    │   └── DivergedError                     a training whose loss or weights are no longer finite
    └── AdapterError(RuntimeError)
        └── VerificationError                 a saved adapter that does not compute what it should

    GeoloraWarning(UserWarning)
    ├── SkippedStepWarning                    a step skipped for a non-finite gradient
    ├── UnpairedParametersWarning             LoRA layers left to AdamW
    ├── DataWarning                           rows of a file that are left out
    └── CheckpointWarning                     a checkpoint not used, or saved because the run is to stop

On the command line each error is one line on stderr and exit code 2. At the end: what messages are built with.
"""

import difflib
import itertools
import re
import shlex
from collections.abc import Iterable
from importlib import metadata


class GeoloraError(Exception):
    """Base of every error geolora raises on purpose."""

    def __str__(self) -> str:
        """The message on one line, whatever was put into it: control characters are shown escaped."""
        return escaped(super().__str__())


class PairingError(GeoloraError, ValueError):
    """A LoRA pair that cannot be trained on the manifold, or no pair at all."""


class SettingError(GeoloraError, ValueError):
    """An argument or flag out of its range, or misspelt."""


class BudgetError(SettingError):
    """A parameter budget below one direction per layer."""


class DataError(GeoloraError, ValueError):
    """A file, column or label that is missing or unusable."""


class ModelError(GeoloraError, ValueError):
    """A model folder or name that cannot be loaded."""


class OutputError(GeoloraError, OSError):
    """An output folder that exists already, or cannot be written."""


class StateError(GeoloraError, ValueError):
    """A state, of an optimizer or of a start, that belongs to another model or method, or to factors as they were."""


class SetupError(GeoloraError, RuntimeError):
    """A closure, a ZeRO partition or a sharded factor: a setup the step cannot work in."""


class GradientError(GeoloraError, ArithmeticError):
    """Gradients the step cannot use."""


class NonFiniteGradientError(GradientError):
    """Too many steps in a row were skipped for non-finite gradients."""


class DivergedError(GradientError):
    """The loss or the trained weights are no longer finite."""


class AdapterError(GeoloraError, RuntimeError):
    """An adapter that cannot be written, read or represented."""


class VerificationError(AdapterError):
    """A saved adapter does not compute what was trained."""


class GeoloraWarning(UserWarning):
    """Base of every warning geolora gives."""

    def __str__(self) -> str:
        """The message on one line, as an error's."""
        return escaped(super().__str__())


class SkippedStepWarning(GeoloraWarning):
    """A step was skipped because a gradient was not finite."""


class UnpairedParametersWarning(GeoloraWarning):
    """LoRA layers that the geometric step does not treat and AdamW trains instead."""


class DataWarning(GeoloraWarning):
    """Rows of a file that cannot be used and are left out."""


class CheckpointWarning(GeoloraWarning):
    """A checkpoint was refused, or one is saved because the run was asked to stop."""


LONGEST_REASON = 400
"""Characters of what another library says."""


def escaped(text: str, also: str = "") -> str:
    """Text on one line that moves no cursor and colours nothing: what does not print is shown as `\\x1b` or `\\n`.

    Args:
        also: characters that are shown so too.
    """
    return "".join(
        ascii(c)[1:-1] if not c.isprintable() else f"\\x{ord(c):02x}" if c in also else c
        for c in text
    )


def at_most_three(names: list[str]) -> str:
    """Join names for a message: three at most, then a count of the rest."""
    text = ", ".join(names[:3])
    return text if len(names) <= 3 else f"{text} and {len(names) - 3} more"


def nearest(word: str, known: Iterable[str]) -> str:
    """ " Did you mean `x`?" for the known word that differs in a letter or two, or nothing."""
    short = [name for name in itertools.islice(known, 10_000) if len(name) <= 100]
    close = difflib.get_close_matches(word.lstrip("-"), {n.lstrip("-"): n for n in short}, 1, 0.75)
    full = next((name for name in short if close and name.lstrip("-") == close[0]), None)
    return f" Did you mean `{full}`?" if full and len(word) <= 100 else ""


def listed(names: Iterable[object]) -> str:
    """Names out of a file for a message: ten at most, each short, then a count of the rest."""
    every = [str(name) for name in names]
    text = ", ".join(shown(name)[1:-1] for name in every[:10])
    return f"{text} and {len(every) - 10:,} more" if len(every) > 10 else text or "none"


def install(extra: str) -> str:
    """The command that installs what an extra of geolora needs, from wherever geolora itself was installed."""
    needed = [line.partition(";") for line in metadata.requires("geolora") or ()]
    of_extra = re.compile(rf"\bextra == ['\"]{extra}['\"]")
    words = [shlex.quote(name.strip()) for name, _, when in needed if of_extra.search(when)]
    return f"pip install {' '.join(words)}"


def shown(value: object) -> str:
    """A value out of a file for a message: on one line, and short."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more than 4300 digits
        text = type(value).__name__
    return text if len(text) <= 80 else f"{text[:60]}…{text[-15:]}"


def first_line(error: BaseException) -> str:
    """What an exception of another library says, on one line that has an end, without a full stop; else its class."""
    lines = str(error).strip().splitlines()
    text = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    text = re.sub(r"\s+", " ", text).rstrip(".") or type(error).__name__
    return text if len(text) <= LONGEST_REASON else f"{text[: LONGEST_REASON - 1]}…"
