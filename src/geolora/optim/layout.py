"""Shapes, dtypes and devices of what an optimizer trains: what was changed between its steps is refused, by name.

torch lets a program put another tensor into a parameter through `.data`, which tells nobody.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from geolora.errors import StateError
from geolora.optim.buckets import pairs_of

REST = "a parameter outside the pairs"


class Layout:
    """What the parameters of an optimizer were like in its last step. Nothing of it is saved."""

    def __init__(self) -> None:
        self._seen: dict[int, list[Any]] = {}
        self._shapes: dict[str, list[tuple[int, ...]]] = {}

    def remember_shapes(self, groups: Iterable[dict[str, Any]]) -> None:
        """Remember the shapes of pairs by the names of their layers, where they are not known yet."""
        for group in groups:
            for name, pair in zip(group["layers"], pairs_of(group["params"]), strict=True):
                self._shapes.setdefault(name, [tuple(p.shape) for p in pair])

    def check(
        self,
        who: str,
        groups: Iterable[dict[str, Any]],
        states: Mapping[Tensor, dict[str, Any]],
    ) -> None:
        """Refuse parameters with which no step could be taken; costs next to nothing while all are as before.

        A model may be moved or cast as a whole before the first step, and cast where its state still fits.

        Raises:
            StateError: a factor has another shape than it had, a pair is unlike the others of its bucket, or
                a gradient or a state does not fit any more.
        """
        for index, group in enumerate(groups):
            now = [(p.shape, p.dtype, p.device) for p in group["params"]]
            if self._seen.get(index) == now:
                continue
            if group["kind"] == "rest":
                names = [REST] * len(now)
            else:
                names = [f"{side} of `{layer}`" for layer in group["layers"] for side in "AB"]
                self._check_pairs(who, group, names)
            for name, p in zip(names, group["params"], strict=True):
                state = states.get(p, {}) if index in self._seen else {}
                _check_what_goes_with(who, name, p, state)
            self._seen[index] = now

    def _check_pairs(self, who: str, group: dict[str, Any], names: list[str]) -> None:
        """Every pair has the shapes it had, and the dtypes and the device of the first of its bucket."""
        self.remember_shapes([group])
        shapes = [shape for layer in group["layers"] for shape in self._shapes[layer]]
        first = group["params"][:2] * len(group["layers"])
        for name, p, shape, like in zip(names, group["params"], shapes, first, strict=True):
            if tuple(p.shape) != shape:
                raise _changed(who, name, f"had the shape {shape}, now {tuple(p.shape)}")
            if (p.dtype, p.device) != (like.dtype, like.device):
                theirs = f"{like.dtype} on {like.device} as those of its shape are"
                raise _changed(who, name, f"was {theirs}, now {p.dtype} on {p.device}")


def _check_what_goes_with(who: str, name: str, p: Tensor, state: dict[str, Any]) -> None:
    """The gradient of a parameter has its shape and device; its state its device, and is float32 or wider as it is."""
    grad = p.grad
    if grad is not None and (grad.shape, grad.device) != (p.shape, p.device):
        raise _changed(who, name, f"has a gradient {tuple(grad.shape)} on {grad.device}")
    dtype = torch.promote_types(p.dtype, torch.float32)
    for value in state.values():
        if not isinstance(value, Tensor) or not value.dim():
            continue
        if (value.dtype, value.device) != (dtype, p.device):
            what = f"{value.dtype} on {value.device}"
            raise _changed(who, name, f"has a state {what}, and is {p.dtype} on {p.device}")
        if name == REST and value.shape != p.shape:
            raise _changed(who, name, f"had the shape {tuple(value.shape)}, now {tuple(p.shape)}")


def _changed(who: str, name: str, how: str) -> StateError:
    return StateError(
        f"{who}.step: shape, dtype and device of what is trained must stay as they were; {name} {how}. "
        "Change the model before the optimizer is built."
    )
