"""Buckets: pairs of equal shape as one param group, stacked for batched kernels.

A group holds what must survive a checkpoint as plain numbers: `layers` (names), `scales`, `ranks`
(as last judged), `steps` (taken so far) and the settings. Pairs are found by position,
[A1, B1, A2, B2, …].
"""

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from geolora.errors import StateError
from geolora.pairs.find import Pair
from geolora.pairs.sharded import gathered, local_shard

REFERENCE_WIDTH = 1024.0
"""Width of a model at which an adaptive step of a square layer has spectral norm lr."""


def phase_of(group: dict[str, Any]) -> str:
    """ "grow", "judge" or "hold": what the coming step does with the rank."""
    at, settle, every = group["steps"], group["settle_after"], group["prune_every"]
    if (
        settle is not None and at >= settle
    ):  # due until it is done: a step with lr = 0 judges nothing
        return "hold" if group["settled"] else "judge"
    if every is None:
        return "hold" if settle is None else "grow"
    at, growing = at % every, every // 6
    return "grow" if at < growing else "judge" if at == growing else "hold"


def by_shape(pairs: list[Pair]) -> list[list[Pair]]:
    """Pairs of equal shape, dtype and device together, in the order they are found."""
    buckets: dict[Any, list[Pair]] = defaultdict(list)
    for pair in pairs:
        shape = (pair.d_out, pair.d_in, pair.r, pair.experts)
        key = (*shape, pair.A.dtype, pair.B.dtype, pair.A.device)
        buckets[key].append(pair)
    return list(buckets.values())


def new_groups(pairs: list[Pair], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The param groups of all buckets, before their first step."""
    sizes = [math.log(pair.d_in * pair.d_out) / 2 for pair in pairs]
    width = math.exp(sum(sizes) / len(sizes))
    return [_new_group(bucket, width, settings) for bucket in by_shape(pairs)]


def _new_group(pairs: list[Pair], width: float, settings: dict[str, Any]) -> dict[str, Any]:
    """The param group of a bucket.

    `unit` is what lr is multiplied by for an adaptive step: 1 for square layers of width 1024,
    proportional to sqrt(max(d_out, d_in)) within a model and to 1 / sqrt(width) between models;
    the width of a model is the geometric mean of sqrt(d_out d_in) over its pairs.
    """
    first = pairs[0]
    rank = settings["start_rank"] or first.r
    return {
        "kind": "geometric",
        "params": [p for pair in pairs for p in (pair.A, pair.B)],
        "layers": [pair.name for pair in pairs],
        "scales": [pair.scale for pair in pairs],
        "ranks": [rank] * len(pairs),
        "cost": first.d_in + first.d_out,
        "unit": math.sqrt(REFERENCE_WIDTH * max(first.d_in, first.d_out)) / width,
        "steps": 0,
        "skipped": 0,
        "settled": False,
        **settings,
    }


def by_gain(settings: dict[str, Any]) -> bool:
    """Whether the budget is shared out by what directions gain, and not by sigma."""
    return settings["moments"] == "adaptive" and settings["budget"] is not None


def master_shapes(group: dict[str, Any], settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Masters U (n, d_out, r), sigma (n, r), V (n, d_in, r), momentum K, L like U, V, and gain (n, r)."""
    A, B = group["params"][:2]
    n, r, d_out, d_in = len(group["layers"]), A.shape[0], B.shape[0], A[0].numel()
    shapes = {"U": (n, d_out, r), "sigma": (n, r), "V": (n, d_in, r)}
    if settings["moments"] != "none":
        shapes |= {"K": (n, d_out, r), "L": (n, d_in, r)}
    if by_gain(settings):
        shapes["gain"] = (n, r)
    return shapes


def make_masters(state: dict[Tensor, dict[str, Any]], group: dict[str, Any]) -> None:
    """Zero masters and momentum, in float32 or the wider dtype of A, as the state of the first A.

    The other parameters get the row of the stacks they stand for: torch.distributed.checkpoint
    demands a state of every parameter.
    """
    A, *others = group["params"]
    dtype = torch.promote_types(A.dtype, torch.float32)
    for place, p in enumerate(others, 1):
        state[p]["row"] = place // 2
    for key, (n, *rest) in master_shapes(group, group).items():
        # like A: a direction is a row in memory
        state[A][key] = torch.zeros((n, *rest[::-1]), dtype=dtype, device=A.device).movedim(-1, 1)


def refuse_other_state(groups: list[dict[str, Any]], state_dict: dict[str, Any]) -> None:
    """Raise `StateError` for a saved state that is not of these groups, or not whole."""
    if not {"state", "param_groups"} <= set(state_dict):
        raise StateError(
            "GeoLoRA.load_state_dict: the state must have `state` and `param_groups`; got "
            f"{sorted(map(str, state_dict))[:4]}. Give what optimizer.state_dict() returned."
        )
    theirs = state_dict["param_groups"]
    mine, other = (
        [(group.get("layers"), len(group["params"])) for group in side] for side in (groups, theirs)
    )
    if mine != other:
        raise StateError(
            "GeoLoRA.load_state_dict: the state must be of the same layers; got "
            f"{sum(len(names or []) for names, _ in other)} pairs, expected "
            f"{sum(len(names or []) for names, _ in mine)}, or in another order. "
            "Load it into the model it was saved with."
        )
    for group, saved in zip(groups, theirs, strict=True):
        first = state_dict["state"].get(saved["params"][0])
        if group["kind"] != "geometric" or not first:
            continue
        if missing := sorted(set(group) - set(saved)):
            raise StateError(
                f"GeoLoRA.load_state_dict: the state must be whole; `{missing[0]}` of "
                f"{group['layers'][0]} is missing. Take an earlier checkpoint."
            )
        for key, shape in master_shapes(group, saved).items():
            if key not in first:
                raise StateError(
                    f"GeoLoRA.load_state_dict: the state must be whole; `{key}` of "
                    f"{group['layers'][0]} is missing. Take an earlier checkpoint."
                )
            if tuple(first[key].shape) != shape:
                raise StateError(
                    f"GeoLoRA.load_state_dict: `{key}` must be {shape} for {group['layers'][0]}; "
                    f"got {tuple(first[key].shape)}. Use the rank it was saved with."
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


def stacked_gradients(params: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of all A (n, r, d_in) and all B (n, d_out, r); zero where there is none."""

    def stack(side: list[Tensor]) -> Tensor:
        grads = [gathered(torch.zeros_like(p) if p.grad is None else p.grad) for p in side]
        return torch.stack([g if g.dim() == 2 else g.flatten(1) for g in grads]).to(dtype)

    return stack(params[::2]), stack(params[1::2])


def not_finite(groups: Iterable[dict[str, Any]]) -> list[str]:
    """Names of the layers of some buckets of which a gradient holds NaN or infinities."""
    return [
        name
        for group in groups
        for name, pair in zip(group["layers"], pairs_of(group["params"]), strict=True)
        if any(p.grad is not None and not gathered(p.grad).isfinite().all() for p in pair)
    ]


def pairs_of(params: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    """(A, B) of every pair of a group."""
    return zip(params[::2], params[1::2], strict=True)


def new_probes(U: Tensor, V: Tensor, layers: list[str], step: int) -> tuple[Tensor, Tensor]:
    """A random unit vector w (n, d_in, 1), orthogonal to V, and the slot (n, 1, r) it goes to.

    That is the first idle slot of every layer; V + w * slot is the new V.

    Where U^T G = 0 and G V = 0 the tangent step is blind although G may not be zero (with lr = 1 on
    a quadratic loss a rank-1 start stays at rank 1 for ever); a probe sees G w. The numbers depend
    on the layer's name and the step alone, so every process draws the same.
    """
    idle = ~((U != 0).any(-2) | (V != 0).any(-2))  # (n, r)
    first = idle & (idle.cumsum(-1) == 1)
    draws = []
    for name in layers:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name}:{step}".encode()))
        draws.append(torch.randn(V.shape[-2], generator=generator, dtype=torch.float64))
    omega = torch.stack(draws).to(V).unsqueeze(-1)  # (n, d_in, 1)
    omega = omega / torch.linalg.vector_norm(omega, dim=-2, keepdim=True)
    for _ in range(2):
        omega = omega - V @ (V.mT @ omega)
    length = torch.linalg.vector_norm(omega, dim=-2, keepdim=True)
    room = length > 1e-3  # V may span everything
    omega = torch.where(room, omega / length.clamp(min=1e-3), 0.0)
    omega = omega - V @ (V.mT @ omega)
    return omega, first.unsqueeze(-2)


def scales_of(group: dict[str, Any], like: Tensor) -> Tensor:
    """LoRA's s of every pair (n,)."""
    return torch.tensor(group["scales"], dtype=like.dtype, device=like.device)


def fingerprints(params: list[Tensor]) -> list[tuple[int, int]]:
    """What changes when a parameter is written or swapped by somebody else."""
    return [(p._version, local_shard(p).data_ptr()) for p in params]
