"""States that are loaded: refused where they are of another model or method, and kept in their dtypes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geolora.errors import StateError

Shapes = dict[str, tuple[int, ...]]


def refuse_other_state(
    who: str,
    groups: list[dict[str, Any]],
    state_dict: dict[str, Any],
    shapes_of: Callable[[dict[str, Any], dict[str, Any]], Shapes],
    holder: int = 0,
) -> None:
    """Raise `StateError` for a saved state that is not of these groups, or not whole.

    Args:
        who: name of the optimizer. groups: its param groups.
        shapes_of: (group, saved group) -> shapes of the tensors that a bucket which has a state must have.
        holder: which parameter of a bucket holds them.
    """
    if not {"state", "param_groups"} <= set(state_dict):
        raise StateError(
            f"{who}.load_state_dict: the state must have `state` and `param_groups`; got "
            f"{sorted(map(str, state_dict))[:4]}. Give what optimizer.state_dict() returned."
        )
    saved_groups = state_dict["param_groups"]
    mine, other = (
        [(group.get("layers"), len(group["params"])) for group in side]
        for side in (groups, saved_groups)
    )
    if mine != other:
        raise StateError(
            f"{who}.load_state_dict: the state must be of the same layers; got "
            f"{sum(len(names or []) for names, _ in other)} pairs, expected "
            f"{sum(len(names or []) for names, _ in mine)}, or in another order. "
            "Load it into the model it was saved with."
        )
    for group, saved in zip(groups, saved_groups, strict=True):
        if group["kind"] != "rest":
            _refuse_other_method(who, group, saved)
            first = state_dict["state"].get(saved["params"][holder])
            if first:
                _refuse_other_shapes(who, group, saved, first, shapes_of)


def _refuse_other_method(who: str, group: dict[str, Any], saved: dict[str, Any]) -> None:
    missing = sorted(set(group) - set(saved) - {"method"})
    # groups of version 0.1.0 do not name their method: those of another one have other keys
    unnamed = "method" not in saved
    same_keys = not missing and not set(saved) - set(group)
    if saved.get("method", group["method"]) != group["method"] or (
        unnamed and (saved["kind"] != group["kind"] or not same_keys)
    ):
        of = "another optimizer" if unnamed else f"`{saved['method']}`"
        raise StateError(
            f"{who}.load_state_dict: the state must be of `{group['method']}`; got that of {of}. Go on "
            "with the method it was saved by, or start anew."
        )
    if missing:
        raise StateError(
            f"{who}.load_state_dict: the state must be whole; `{missing[0]}` of "
            f"{group['layers'][0]} is missing. Take an earlier checkpoint."
        )


def _refuse_other_shapes(
    who: str,
    group: dict[str, Any],
    saved: dict[str, Any],
    first: dict[str, Any],
    shapes_of: Callable[[dict[str, Any], dict[str, Any]], Shapes],
) -> None:
    for key, shape in shapes_of(group, saved).items():
        if key not in first:
            raise StateError(
                f"{who}.load_state_dict: the state must be whole; `{key}` of "
                f"{group['layers'][0]} is missing. Take an earlier checkpoint."
            )
        if tuple(first[key].shape) != shape:
            raise StateError(
                f"{who}.load_state_dict: `{key}` must be {shape} for {group['layers'][0]}; "
                f"got {tuple(first[key].shape)}. Use the rank it was saved with."
            )
        if not bool(first[key].isfinite().all()):
            raise StateError(
                f"{who}.load_state_dict: `{key}` of {group['layers'][0]} must be finite; it holds NaN or "
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
