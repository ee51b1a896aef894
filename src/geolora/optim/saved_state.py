"""States that are loaded: refused where they are of another model or method, and kept in their dtypes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from geolora.errors import StateError

Shapes = dict[str, tuple[int, ...]]


class Expected(NamedTuple):
    """What a state must be of.

    Attributes:
        who: name of the optimizer. method: name of its row in the table of methods.
        keys: what every param group of pairs has, by the optimizer itself (schedulers add keys of their own).
        settings: names of the optimizer's own settings, which tell the methods apart. others: those of all methods.
        same_names: whether layers must have the same names, and not only the same shapes.
        shapes_of: (group, saved group) -> shapes of the tensors that a bucket which has a state must have.
        holder: which parameter of a bucket holds them. newer: those that states of earlier versions lack.
    """

    who: str
    method: str
    keys: set[str]
    settings: set[str]
    others: set[str]
    same_names: bool
    shapes_of: Callable[[dict[str, Any], dict[str, Any]], Shapes]
    holder: int
    newer: tuple[str, ...]


def refuse_other_state(
    groups: list[dict[str, Any]], state_dict: dict[str, Any], wanted: Expected
) -> None:
    """Raise `StateError` for a saved state that is not of these groups, or not whole."""
    start = f"{wanted.who}.load_state_dict:"
    if not {"state", "param_groups"} <= set(state_dict):
        raise StateError(
            f"{start} the state must have `state` and `param_groups`; got "
            f"{sorted(map(str, state_dict))[:4]}. Give what optimizer.state_dict() returned."
        )
    saved_groups = state_dict["param_groups"]
    good = isinstance(saved_groups, list) and isinstance(state_dict["state"], dict)
    if not good or not all(isinstance(g, dict) and "params" in g for g in saved_groups):
        raise StateError(
            f"{start} the state must be a dict, and every param group a dict with `params`. Give what "
            "optimizer.state_dict() returned."
        )
    mine, other = (
        [
            (group.get("layers") if wanted.same_names else None, len(group["params"] or ()))
            for group in side
        ]
        for side in (groups, saved_groups)
    )
    if mine != other:
        raise StateError(
            f"{start} the state must be of the same layers; got "
            f"{sum(len(g.get('layers') or []) for g in saved_groups)} pairs, expected "
            f"{sum(len(g.get('layers') or []) for g in groups)}, or in another order. "
            "Load it into the model it was saved with."
        )
    for group, saved in zip(groups, saved_groups, strict=True):
        if group["kind"] == "rest":
            _refuse_missing(
                start, saved, {"lr", "betas", "eps", "weight_decay"}, "the other parameters"
            )
            continue
        _refuse_other_method(start, group, saved, wanted)
        first = state_dict["state"].get(saved["params"][wanted.holder])
        if first:
            shapes = wanted.shapes_of(group, saved)
            due = {k: v for k, v in shapes.items() if k in first or k not in wanted.newer}
            _refuse_other_shapes(start, group["layers"][0], first, due)


def _refuse_other_method(
    start: str, group: dict[str, Any], saved: dict[str, Any], wanted: Expected
) -> None:
    foreign = (set(saved) - set(group)) & wanted.others or wanted.settings - set(saved)
    if foreign or saved.get("kind", group["kind"]) != group["kind"]:
        raise StateError(
            f"{start} the state must be of `{wanted.method}`; got that of another optimizer. Go on with the "
            "method it was saved by, or start anew."
        )
    _refuse_missing(start, saved, wanted.keys, group["layers"][0])


def _refuse_missing(start: str, saved: dict[str, Any], keys: set[str], whose: str) -> None:
    if missing := sorted(keys - set(saved)):
        raise StateError(
            f"{start} the state must be whole; `{missing[0]}` of {whose} is missing. Take an earlier "
            "checkpoint."
        )


def _refuse_other_shapes(start: str, layer: str, first: dict[str, Any], shapes: Shapes) -> None:
    for key, shape in shapes.items():
        if key not in first:
            raise StateError(
                f"{start} the state must be whole; `{key}` of "
                f"{layer} is missing. Take an earlier checkpoint."
            )
        if not isinstance(first[key], Tensor):
            raise StateError(
                f"{start} `{key}` of {layer} must be a tensor; got "
                f"{type(first[key]).__name__}. Take an earlier checkpoint."
            )
        if tuple(first[key].shape) != shape:
            raise StateError(
                f"{start} `{key}` must be {shape} for {layer}; "
                f"got {tuple(first[key].shape)}. Use the rank it was saved with."
            )
        if not bool(first[key].isfinite().all()):
            raise StateError(
                f"{start} `{key}` of {layer} must be finite; it holds NaN or "
                "infinities. Take an earlier checkpoint."
            )


def load_keeping_dtypes(
    optimizer: torch.optim.Optimizer,
    load: Callable[[dict[str, Any]], None],
    state_dict: dict[str, Any],
) -> None:
    """Load a state by torch's rule, which casts to the dtype of the parameter; then undo the cast.

    Tensors are copies, on the parameter's device but for AdamW's `step`, which stays where it was.
    """
    saved = [
        state_dict["state"].get(key) for g in state_dict["param_groups"] for key in g["params"]
    ]
    load(state_dict)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, values in zip(params, saved, strict=True):
        for key, value in (values or {}).items():
            if isinstance(value, Tensor):
                device = value.device if key == "step" else p.device
                optimizer.state[p][key] = value.to(device, copy=True)
