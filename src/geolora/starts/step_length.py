"""How far a start steps along -G: to the norm that is given or, without one, to the best of a few halvings."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from geolora.errors import GradientError, SettingError
from geolora.pairs.find import Pair
from geolora.starts.gradient_pass import Loss, mean_loss

NORM, HALVINGS = 0.05, 8
"""The most a start takes by itself (the published runs have 0.0442), and how often it is halved at most."""


class StepLength(NamedTuple):
    """How far a start went: ||W||_2, and the losses before and after it where it was searched for."""

    norm: float
    losses: tuple[float, float] | tuple[()]


def check_norm(function: str, norm: float | None, batches: Iterable[Any] | None) -> None:
    """Refuse a norm that is not a positive number, and a search without batches."""
    if norm is not None and not (norm > 0 and math.isfinite(norm)):
        raise SettingError(f"{function}: `norm` must be above 0; got {norm}.")
    if norm is None and batches is None:
        raise SettingError(f"{function}: `batches` must be given, or a `norm` with a `state`.")


@torch.no_grad()
def write_start(
    model: nn.Module,
    pairs: list[Pair],
    batches: Iterable[Any] | None,
    loss_fn: Loss | None,
    norm: float | None,
    write_at: Callable[[float], None],
) -> StepLength:
    """Write a start with the norm that is given or, without one, with the best of a search; a failure is undone.

    Args:
        batches, loss_fn: what the search takes the loss of.
        norm: ||W||_2 of every layer, None to search.
        write_at: writes the start of a norm into the pairs.

    Raises:
        GradientError: no norm with a finite loss.
    """
    kept = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in pairs]
    try:
        if norm is not None:
            write_at(norm)
            return StepLength(norm, ())
        return _search(model, () if batches is None else batches, loss_fn, write_at)
    except BaseException:
        for pair, (A, B) in zip(pairs, kept, strict=True):
            pair.set_factors(A, B)
        raise


def _search(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: Loss | None,
    write_at: Callable[[float], None],
) -> StepLength:
    """Halve the norm from NORM while the loss keeps falling and until it is below the loss before; write the best."""
    drawn: list[Any] = []

    def once() -> Iterable[Any]:  # what the loader raises is then raised on all processes
        for batch in batches:
            drawn.append(batch)
            yield batch

    before = mean_loss(model, once(), loss_fn)
    losses: dict[float, float] = {}

    def loss_at(norm: float) -> float:
        write_at(norm)
        loss = mean_loss(model, drawn, loss_fn)
        losses[norm] = loss if math.isfinite(loss) else math.inf
        return losses[norm]

    norm, last = NORM, loss_at(NORM)
    for _ in range(HALVINGS):
        norm, previous = norm / 2, last
        last = loss_at(norm)
        if previous < before and not last < previous:
            break
    best = min(losses, key=lambda norm: losses[norm])
    if not math.isfinite(before + losses[best]):
        raise GradientError(
            f"the loss of `batches` must be finite; it is {before} before the start and {losses[best]} after "
            "the shortest step. Look at the loss function, or at the model."
        )
    write_at(best)
    return StepLength(best, (before, losses[best]))
