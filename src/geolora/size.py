"""How far a start goes along -G: a norm that is given, or the one with the lowest loss."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from geolora.errors import SettingError
from geolora.gradient_pass import Loss, mean_loss
from geolora.pairs import Pair

FIRST_NORM, FACTORS = 0.05, 8
"""Where the search begins, and how many factors of two it goes up or down at most."""


class Sized(NamedTuple):
    """||W||_2 of a start that is written, and the losses before and after it where it was searched for."""

    norm: float
    losses: tuple[float, float] | tuple[()]


def check_norm(function: str, norm: float | None, batches: Iterable[Any] | None) -> None:
    """Refuse a norm that is none, and a search without batches."""
    if norm is not None and not (norm > 0 and math.isfinite(norm)):
        raise SettingError(f"{function}: `norm` must be above 0; got {norm}.")
    if norm is None and batches is None:
        raise SettingError(f"{function}: `batches` must be given, or a `norm` with a `state`.")


@torch.no_grad()
def sized(
    model: nn.Module,
    pairs: list[Pair],
    batches: Iterable[Any] | None,
    loss_fn: Loss | None,
    norm: float | None,
    write: Callable[[float], None],
) -> Sized:
    """Write the start with the norm that is given or, without one, that is found best; a failure is undone."""
    kept = [(pair.A.detach().clone(), pair.B.detach().clone()) for pair in pairs]
    try:
        if norm is not None:
            write(norm)
            return Sized(norm, ())
        return _searched(model, list(batches or ()), loss_fn, write)
    except BaseException:
        for pair, (A, B) in zip(pairs, kept, strict=True):
            pair.A.copy_(A)
            pair.B.copy_(B)
        raise


def _searched(
    model: nn.Module, batches: list[Any], loss_fn: Loss | None, write: Callable[[float], None]
) -> Sized:
    """Go from FIRST_NORM by factors of two for as long as the loss falls, and write the lowest."""

    def loss_at(norm: float) -> float:
        write(norm)
        return mean_loss(model, batches, loss_fn)

    before = mean_loss(model, batches, loss_fn)
    norm, lowest = FIRST_NORM, loss_at(FIRST_NORM)
    for _ in range(FACTORS):
        if not (loss := loss_at(2 * norm)) < lowest:
            break
        norm, lowest = 2 * norm, loss
    if norm == FIRST_NORM:
        for _ in range(FACTORS):
            loss = loss_at(norm / 2)
            if math.isfinite(lowest) and not loss < lowest:
                break
            norm, lowest = norm / 2, loss
    write(norm)
    return Sized(norm, (before, lowest))
