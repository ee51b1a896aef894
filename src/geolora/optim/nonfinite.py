"""A step with a gradient that is not finite is skipped as a whole, and said; too many in a row raise."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geolora.errors import NonFiniteGradientError, SkippedStepWarning, at_most_three

SKIPS_ALLOWED = 20


def total(grad: Tensor) -> Tensor:
    """The sum of a gradient, finite only where all its terms are; much cheaper than asking each of them."""
    return grad.sum(dtype=torch.promote_types(grad.dtype, torch.float32))


def to_be_skipped(
    who: str, counter: dict[str, Any], totals: list[Tensor], culprits: Callable[[], list[str]]
) -> bool:
    """Whether a step is to be skipped, with one warning that names the layers.

    Args:
        who: name of the optimizer. counter: its first param group, which counts in `skipped`.
        totals: `total` of everything that a step reads. culprits: names of what is not finite; none where
            sums overflow.

    Raises:
        NonFiniteGradientError: `SKIPS_ALLOWED` steps in a row.
    """
    if not totals or bool(torch.stack([t.to(totals[0]) for t in totals]).isfinite().all()):
        counter["skipped"] = 0 if totals else counter["skipped"]
        return False
    names = culprits()
    what = "not finite in" if names else "too large to add up in"
    names = names or ["all layers together"]
    counter["skipped"] += 1
    if counter["skipped"] >= SKIPS_ALLOWED:
        raise NonFiniteGradientError(
            f"{who}.step: gradients must be finite; {counter['skipped']} steps in a row were "
            f"not; now {what} {at_most_three(names)}. Lower `lr`, or look at the loss."
        )
    warnings.warn(
        f"{who}.step: skipped, gradients {what} {at_most_three(names)}. Nothing was updated.",
        SkippedStepWarning,
        stacklevel=4,
    )
    return True
